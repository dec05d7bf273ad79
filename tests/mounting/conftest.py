"""A mount service of each test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import mounts, namespace
from support.command import environment
from support.layers import Layer
from support.standby import CLIENT, HANDOVER, Service


@pytest.fixture
def run_directory(can_mount: None) -> Iterator[Path]:
    """A /run/cowfs of this test's own."""
    path = Path("/run/cowfs")
    namespace.mount("tmpfs", str(path), "tmpfs", 0, "mode=700")
    yield path
    mounts.umount_busy(str(path), 5.0)


@pytest.fixture(autouse=True)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Choose the client of :func:`command`."""
    CLIENT[:] = [sys.executable, "-I", "-S", "-E", str(HANDOVER)]
    if getattr(request, "param", "python") == "c":
        if shutil.which("cc") is None:
            pytest.skip("no C compiler (cc)")
        made = tmp_path_factory.getbasetemp() / "handover"
        if not made.exists():
            words = [
                sys.executable,
                "-m",
                "cowfs",
                "podman",
                "install",
                "--only",
                "program",
                "--kind",
                "c",
                "--program",
                str(made),
            ]
            subprocess.run(words, env=environment(), check=True, stdout=subprocess.DEVNULL)
        CLIENT[:] = [str(made)]


@pytest.fixture
def service(run_directory: Path) -> Iterator[Service]:
    service = Service()
    yield service
    service.end()


@pytest.fixture
def tree(space: Path, run_directory: Path) -> Iterator[Path]:
    Layer(space / "base").file("who", b"base")
    for name in ("up", "work", "mnt"):
        (space / name).mkdir()
    yield space
    while os.path.ismount(space / "mnt"):
        mounts.umount_busy(str(space / "mnt"), 0.0)
