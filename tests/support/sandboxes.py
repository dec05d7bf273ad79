"""`cowfs run` as root and as an ordinary user in a user namespace, for the tests that try what it isolates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import namespace
from .command import environment, user_python
from .users import UID, command_as

APPLETS = (
    "cat", "chroot", "dd", "echo", "grep", "head", "hostname", "id", "kill", "ls", "mkdir", "mknod", "mount", "ps", "pwd", "readlink", "sh", "sleep", "stat",
    "stty", "touch", "true", "umount", "wc",
)  # fmt: skip


class Runner:
    """`cowfs run` of one user over a store of his, with a snapshot "box" that holds busybox."""

    def __init__(self, who: str, python: str, store: Path) -> None:
        self.who, self.python, self.store = who, python, store
        self.environment = environment() | {"COWFS_ROOT": str(store), "HOME": str(store.parent)}

    def command(self, *arguments: object) -> list[str]:
        words = [self.python, "-m", "cowfs", *map(str, arguments)]
        return words if self.who == "root" else command_as(words)

    def cowfs(self, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {
            "capture_output": True, "text": True, "timeout": 60, "env": self.environment, "cwd": "/",
            "stdin": subprocess.DEVNULL, **more,
        }  # fmt: skip
        done: subprocess.CompletedProcess[str] = subprocess.run(self.command(*arguments), **options)
        return done

    def inside(self, script: str, *options: object) -> str:
        """The output of a shell in a fresh snapshot, errors included."""
        done = self.cowfs("run", "box", "--rm", *options, "--", "/bin/sh", "-c", script)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr


def tree(place: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True, check=False).returncode == 0:
        pytest.skip("no static busybox (busybox-static)")
    for name in ("bin", "dev", "proc", "tmp", "etc"):
        (place / name).mkdir(parents=True)
    shutil.copy(busybox, place / "bin/busybox")
    for applet in APPLETS:
        (place / "bin" / applet).symlink_to("busybox")
    (place / "etc/inside").write_text("inside\n")


@pytest.fixture(scope="module", params=["root", "user"])
def runner(request: pytest.FixtureRequest, public_directory: Path) -> Iterator[Runner]:
    """A runner of each kind of user, whose store has the snapshot box."""
    if namespace.why_not:
        pytest.skip(namespace.why_not)
    python = sys.executable
    if request.param == "user":
        request.getfixturevalue("ordinary_user")
        found = user_python()
        if found is None:
            pytest.skip("no Python that an ordinary user can start with cowfs in it")
        python = found
    base = public_directory / f"isolation-{request.param}"
    tree(base / "tree")
    with tarfile.open(base / "box.tar", "w") as tar:
        tar.add(base / "tree", ".", filter=_owned)
    if request.param == "user":
        for where, dirs, files in os.walk(base):
            for name in (".", *dirs, *files):
                os.chown(os.path.join(where, name), UID, UID, follow_symlinks=False)
    made = Runner(request.param, python, base / "store")
    owners = () if request.param == "root" else ("--owners", "xattr")
    done = made.cowfs("import", base / "box.tar", "box", "--as", "rootfs", *owners)
    assert done.returncode == 0, done.stderr
    if request.param == "user":  # asked of the kernel, not of cowfs, whose faults would look like an absence
        user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--"]
        asked = subprocess.run([*user, "unshare", "-Urm", "true"], capture_output=True, text=True, check=False, cwd="/")
        if asked.returncode:
            pytest.skip(f"no user namespaces here: {asked.stderr.strip()}")
    done = made.cowfs("run", "box", "--rm", "--", "/bin/true")
    assert done.returncode == 0, done.stderr
    yield made
    subprocess.run(["rm", "-rf", base], check=False)


def _owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    return info


def running_with(word: str) -> list[int]:
    """Processes that have a word among their arguments."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if word.encode() in words:
                found.append(int(name))
    return sorted(found)
