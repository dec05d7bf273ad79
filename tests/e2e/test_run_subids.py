"""`cowfs unshare`: an ordinary user with the ids of /etc/subuid and /etc/subgid, for snapshots whose files have many owners."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import namespace
from support.command import environment, user_python
from support.sandboxes import tree
from support.users import GID, UID, command_as

FIRST = 300_000


@pytest.fixture
def cowfs(public_directory: Path, ordinary_user: object) -> Iterator[tuple[Path, list[str]]]:
    """A directory of the user's, and the words that start cowfs as this user, who has a range of ids."""
    python = user_python()
    if python is None:
        pytest.skip("no Python that an ordinary user can start with cowfs in it")
    if shutil.which("newuidmap") is None or not os.path.exists("/etc/subuid"):
        pytest.skip("needs newuidmap (uidmap) and /etc/subuid")
    base = public_directory / "subids"
    base.mkdir()
    os.chown(base, UID, GID)
    (public_directory / "ranges").write_text(f"{UID}:{FIRST}:65536\n")
    bound = [path for path in ("/etc/subuid", "/etc/subgid") if os.path.exists(path)]
    for path in bound:
        namespace.bind(str(public_directory / "ranges"), path)
    yield base, command_as([python, "-m", "cowfs"])
    for path in bound:
        namespace.umount(path)
    subprocess.run(["rm", "-rf", base], check=False)


def test_files_of_many_owners(cowfs: tuple[Path, list[str]]) -> None:
    """A rootfs keeps its owners, a command gives files to others, and they are other ids of the host; the kernel mounts it."""
    base, words = cowfs
    tree(base / "tree")
    (base / "tree/tmp").chmod(0o1777)
    os.chown(base / "tree/etc/inside", 7, 8)
    archive = base / "tree.tar"
    subprocess.run(["tar", "-C", base / "tree", "-cf", archive, "."], check=True)

    def run(*arguments: object, status: int = 0) -> str:
        done = subprocess.run(
            [*words, *map(str, arguments)],
            env={**environment(), "COWFS_ROOT": str(base / "store"), "HOME": str(base)},
            capture_output=True, text=True, cwd="/", check=False,
        )  # fmt: skip
        assert done.returncode == status, done
        return done.stdout + done.stderr

    inside = ("unshare", *words[words.index("--") + 1 :])
    run(*inside, "import", archive, "box", "--as", "rootfs")
    script = "stat -c %u:%g /etc/inside; echo x > /tmp/a; chown 1000:1001 /tmp/a; grep ' / ' /proc/self/mountinfo | grep -c overlay"
    done = run(
        *inside, "run", "--key", "many", "box", "/bin/busybox", "sh", "-c", f"ln -s busybox /bin/chown; {script}"
    )
    assert done.split()[:2] == ["7:8", "1"]
    (made,) = (base / "store/layers").glob("*/fs/tmp/a")
    assert (made.stat().st_uid, made.stat().st_gid) == (FIRST + 999, FIRST + 1000)
    assert (
        run(
            *inside,
            "run",
            "--rm",
            "-u",
            "1000:1001",
            "--size",
            "1M",
            "box",
            "/bin/sh",
            "-c",
            "touch /tmp/b; stat -c %u:%g /tmp/b",
        )
        == "1000:1001\n"
    )
    run(*inside, "commit", "many", "more")
    assert "/tmp/a" in run("diff", "box", "more")
    run(*inside, "rm", "more")
    assert "1 snapshots" in run(*inside, "check")


def test_no_range_is_one_line(cowfs: tuple[Path, list[str]], public_directory: Path) -> None:
    base, words = cowfs
    env = {**environment(), "HOME": str(base)}
    (public_directory / "ranges").write_text("somebody:1:2\n")
    for verb, status in ((["/bin/true"], 8), (["/nowhere"], 8)):
        done = subprocess.run([*words, "unshare", *verb], env=env, capture_output=True, text=True, cwd="/", check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done
        assert "usermod --add-subuids" in done.stderr
    (public_directory / "ranges").write_text(f"{UID}:{FIRST}:65536\n")
    done = subprocess.run(
        [*words, "unshare", "/nowhere"], env=env, capture_output=True, text=True, cwd="/", check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done
