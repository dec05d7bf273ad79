"""A daemon of its own for each test that asks for one."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, busybox_tar, clean_up


@pytest.fixture(scope="session")
def docker_command() -> str:
    """The real docker command."""
    pytest.importorskip("h11", reason="the extra cowfs[daemon] is not installed")
    path = shutil.which("docker")
    if path is None:
        pytest.skip("no docker command here (Debian: docker.io; CI has it)")
    return path


_numbers = itertools.count()


@pytest.fixture
def short(scratch: Path, can_mount: None) -> Path:
    """A directory whose name leaves room for the addresses of sockets below it."""
    return scratch / f"r{next(_numbers)}"


@pytest.fixture
def make_daemon(scratch: Path, can_mount: None) -> Iterator[Callable[..., Daemon]]:
    """A function that makes a daemon; it is ended after the test, and a traceback in its log fails the test."""
    pytest.importorskip("h11", reason="the extra cowfs[daemon] is not installed")
    made: list[Daemon] = []

    def make(*arguments: str, **options: Any) -> Daemon:
        base = scratch / f"d{next(_numbers)}"  # short: the address of a unix socket has 107 bytes
        made.append(Daemon(base, *arguments, **options))
        return made[-1]

    yield make
    for each in made:
        clean_up(each)
        shutil.rmtree(each.base / "store", ignore_errors=True)
    for each in made:
        assert "Traceback" not in each.log, each.log


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], docker_command: str) -> Daemon:
    """A running daemon, in debug mode, with a unix door."""
    return make_daemon("-D").start()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, busybox: bytes) -> Iterator[Daemon]:
    """One daemon for all tests of a module, with the image ``bb``, on a host that can run containers."""
    pytest.importorskip("h11", reason="the extra cowfs[daemon] is not installed")
    for name in ("docker", "runc"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here (CI has it)")
    if os.geteuid():
        pytest.skip("containers need root here")
    made = Daemon(tmp_path_factory.mktemp("s") / "d", "-D").start()
    try:
        made.docker("import", "-c", 'CMD ["sh"]', "-c", "ENV FROM=image", "-", "bb", input=busybox)
        yield made
    finally:
        clean_up(made)
    assert "Traceback" not in made.log, made.log


@pytest.fixture(scope="session")
def busybox() -> bytes:
    """A root file system's tar."""
    return busybox_tar()


@pytest.fixture
def engine(daemon: Daemon, busybox: bytes) -> Daemon:
    """A daemon with the image ``bb``, on a host that can run containers."""
    if shutil.which("runc") is None and shutil.which("crun") is None:
        pytest.skip("no OCI runtime here (Debian: runc)")
    if os.geteuid():
        pytest.skip("containers need root here")
    daemon.docker("import", "-c", 'CMD ["sh"]', "-c", "ENV FROM=image", "-", "bb", input=busybox)
    return daemon
