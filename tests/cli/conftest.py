"""The command as a user runs it: a process of its own, over a small stack of layers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import mounts, namespace
from support.command import Run, run_module
from support.layers import Layer


@pytest.fixture(scope="session")
def our_run_directory(can_mount: None) -> Path:
    """A /run/cowfs of our own, so that only mounts of these tests are listed."""
    path = Path("/run/cowfs")
    path.mkdir(mode=0o700, exist_ok=True)
    namespace.mount("tmpfs", str(path), "tmpfs", 0, "mode=700")
    return path


@pytest.fixture
def run_directory(our_run_directory: Path) -> Path:
    """It holds nothing of a mount service, which a test of another folder may have killed."""
    (our_run_directory / "mounts.socket").unlink(missing_ok=True)
    return our_run_directory


@pytest.fixture
def cowfs(run_directory: Path) -> Run:
    """Run the command; its exit status must be the one in ``code`` (0)."""

    def run(*arguments: object, code: int = 0, **more: object) -> subprocess.CompletedProcess[str]:
        done = run_module("cowfs", *arguments, **more)
        assert done.returncode == code, f"cowfs {' '.join(map(str, arguments))}: {done.returncode}: {done.stderr}"
        return done

    return run


@pytest.fixture
def stack(space: Path) -> Path:
    """A directory of three layers: base below, then 2-python, then 10-app (numbers count as numbers)."""
    directory = space / "layers"
    Layer(directory / "1-base").file("etc/motd", b"hello\n").file("etc/passwd", b"root\n").file("bin/sh", b"#!", 0o755)
    Layer(directory / "2-python").file("usr/bin/python", b"py", 0o755).file("etc/motd", b"python\n")
    Layer(directory / "10-app").file("app/main", b"main\n").whiteout("etc/passwd")
    return directory


@pytest.fixture
def mnt(space: Path) -> Iterator[Path]:
    """A mount point that is cleared at the end, whatever is mounted there."""
    path = space / "mnt"
    path.mkdir()
    yield path
    while os.path.ismount(path) or _dead(path):
        run_module("cowfs", "umount", "--force", path)
        try:
            mounts.umount_busy(str(path), 0.0)
        except OSError:
            break


def _dead(path: Path) -> bool:
    try:
        os.statvfs(path)
    except OSError:
        return True
    return False
