"""Debian's podman and buildah over a mount program, as root and as an ordinary user with a name and ranges of ids.

Everything is below one directory of the test's own; the user is in a copy of /etc that is bound over the real one in the private mount namespace.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cowfs.sys.mounts import mountinfo

from . import namespace, users

UID = 46_432
ROOT = Path(__file__).resolve().parents[2]
APPLETS = (
    "sh", "true", "false", "ls", "cat", "echo", "find", "touch", "mkdir", "rm", "rmdir", "df", "dd", "sleep", "stat", "mv", "ln", "chmod",
    "chown", "id", "grep", "sort", "head", "tar", "cp", "md5sum", "kill", "wc", "mount",
)  # fmt: skip

CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
netns = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
hooks_dir = ["{hooks}"]
"""


def why_not() -> str:
    """Why podman cannot run here, or ""."""
    for program in ("podman", "buildah", "runc", "fuse-overlayfs", "busybox", "newuidmap"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not any(mount.target == b"/" for mount in mountinfo()):
        return "in a chroot: containers/storage must make / private, and the kernel makes no user namespace there"
    return ""


def root_tar() -> bytes:
    """A root file system of a static busybox, with links, modes and owners of several kinds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))

        for name in ("bin", "etc", "tmp", "srv", "srv/deep", "srv/deep/er", "home", "proc", "sys", "dev", "run"):
            add(name, tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
        add("bin/busybox", data=Path(shutil.which("busybox") or "").read_bytes(), mode=0o755)
        for name in APPLETS:
            add(f"bin/{name}", tarfile.SYMTYPE, linkname="busybox")
        add("etc/passwd", data=b"root:x:0:0::/:/bin/sh\nsome:x:1000:1000::/home:/bin/sh\n")
        add("etc/group", data=b"root:x:0:\nsome:x:1000:\n")
        add("srv/one", data=b"one\n" * 1000, uid=1000, gid=1000)
        add("srv/two", tarfile.LNKTYPE, linkname="srv/one")
        add("srv/deep/er/file", data=b"deep\n", mode=0o640)
        add("srv/set", data=b"#!", mode=0o4755)
        add("srv/link", tarfile.SYMTYPE, linkname="deep/er")
    return out.getvalue()


@dataclass
class Host:
    """Places and the user of one engine's tests.

    Attributes:
        prefix: words before a command, which make it this user's.
    """

    base: Path
    uid: int
    prefix: list[str]
    environment: dict[str, str]
    services: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def directory(self, name: str, mode: int = 0o755) -> Path:
        """A directory of this user."""
        path = self.base / name
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        os.chown(path, self.uid, self.uid)
        return path

    def run(self, *command: object, code: int | None = 0, **more: object) -> subprocess.CompletedProcess[str]:
        """Run a command as this user; its exit status must be ``code``, if that is given."""
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [*self.prefix, *map(str, command)],
            **{"env": self.environment, "cwd": "/", "capture_output": True, "text": True, "timeout": 300, "errors": "replace", **more},  # type: ignore[call-overload]
        )  # fmt: skip
        assert code is None or done.returncode == code, (
            f"{' '.join(map(str, command))}: {done.returncode}\n{done.stderr[-2000:]}\n{done.stdout[-500:]}"
        )
        return done

    def python(self) -> list[str]:
        return [self.environment["COWFS_TEST_PYTHON"]]

    def serve(self) -> subprocess.Popen[bytes]:
        """Start this user's mount service, and wait until it listens."""
        directory = "/run/cowfs" if self.uid == 0 else f"{self.environment['XDG_RUNTIME_DIR']}/cowfs"
        path = f"{directory}/mounts.socket"
        service = subprocess.Popen(
            [*self.prefix, *self.python(), "-m", "cowfs", "serve", "--mounts"], env=self.environment, cwd="/"
        )
        self.services.append(service)
        end = time.monotonic() + 60
        while not _greets(path):
            assert service.poll() is None, "the mount service ended"
            assert time.monotonic() < end, "the mount service does not start"
            time.sleep(0.02)
        return service

    def end_services(self) -> None:
        for service in self.services:
            service.send_signal(signal.SIGKILL)
            service.wait()
        self.services.clear()

    def program(self) -> Path:
        """The command as `cowfs podman install` makes it: a script that hands over, with a log of what was done without a service."""
        path = self.base / f"home-{self.uid}/cowfs-overlayfs"
        self.run(*self.python(), "-m", "cowfs", "podman", "install", "--only", "program", "--program", path)
        return path

    def hook(self) -> None:
        """The hook of limits, where this user's containers.conf looks."""
        home = self.environment["HOME"]
        words = ["podman", "install", "--only", "hook", "--program", self.program(), "--hooks-dir", f"{home}/hooks"]
        self.run(*self.python(), "-m", "cowfs", *words)


def make_host(base: Path, uid: int) -> Host:
    """A place for root (0) or for the ordinary user; call once a session and user."""
    python, environment = (
        users.interpreter() if uid else (sys.executable, {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    )
    host = Host(base, uid, users.command_as([], uid, uid) if uid else [], {})
    home = host.directory(f"home-{uid}")
    runtime = host.directory(f"home-{uid}/run", 0o700)
    hooks = host.directory(f"home-{uid}/hooks")
    (home / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    configuration = home / "containers.conf"
    configuration.write_text(CONFIGURATION.format(hooks=hooks))
    host.environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(runtime),
        "TMPDIR": str(home),
        "CONTAINERS_CONF": str(configuration),
        "PYTHONPATH": environment["PYTHONPATH"],
        "COWFS_TEST_PYTHON": python,
    }
    return host


def add_user(base: Path) -> None:
    """Give the user a name and ranges of ids, in this mount namespace only.

    A copy of the whole of /etc is bound: a file bound over one that somebody replaces meanwhile would be gone.
    """
    etc = base / "etc"
    subprocess.run(["cp", "-a", "/etc", str(etc)], check=True)
    for name, line in {
        "passwd": f"cowfs-podman:x:{UID}:{UID}::{base}/home-{UID}:/bin/sh\n",
        "group": f"cowfs-podman:x:{UID}:\n",
        "subuid": "cowfs-podman:300000:65536\n",
        "subgid": "cowfs-podman:300000:65536\n",
    }.items():
        with (etc / name).open("a") as file:
            file.write(line)
    namespace.bind(str(etc), "/etc")


def _greets(path: str) -> bool:
    """Whether a mount service answers at a socket; one that was killed leaves its socket behind."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        try:
            sock.connect(path)
        except OSError:
            return False
    return True


class Engine:
    """podman and buildah with a storage of their own over one mount program."""

    def __init__(self, host: Host, name: str, program: str | Path, *options: str) -> None:
        self.host, self.name = host, name
        self.store = host.directory(f"store-{name}-{host.uid}")
        self.running = tempfile.mkdtemp(prefix="cp-", dir="/tmp")  # podman takes 50 characters
        os.chown(self.running, host.uid, host.uid)
        self.options = [
            "--root", f"{self.store}/root", "--runroot", self.running, "--storage-driver", "overlay",
            "--storage-opt", f"overlay.mount_program={program}", *(word for option in options for word in ("--storage-opt", option)),
        ]  # fmt: skip

    def __call__(self, *arguments: object, code: int | None = 0, **more: object) -> str:
        """One podman command; what it printed."""
        done = self.host.run("podman", *self.options, *arguments, code=code, **more)
        return done.stdout if code == 0 else f"{done.returncode}: {done.stdout}"

    def buildah(self, *arguments: object, code: int = 0) -> str:
        return self.host.run("buildah", *self.options, *arguments, code=code).stdout

    def unshare(self, *command: object) -> str:
        """A command where the user is root: as root, just the command."""
        if self.host.uid == 0:
            return self.host.run(*command).stdout
        return self("unshare", *command)

    def close(self) -> None:
        """Remove everything, and what podman keeps running for a user."""
        self("rm", "--all", "--force", "--time", "0", code=None)
        self("umount", "--all", code=None)
        if self.host.uid:
            self("system", "migrate", code=None)
        subprocess.run(["rm", "-rf", "--one-file-system", self.running], check=False)


def children(pid: int) -> list[int]:
    """Servers of mounts whose parent a process is."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"cowfs server")]


def skip_unless_possible() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
