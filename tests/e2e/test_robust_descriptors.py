"""Descriptors: whatever programs in a mount do, its server stays within its limit, and everybody is served."""

from __future__ import annotations

import json
import mmap
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import bounded, command, posix

from cowfs.mounting import protocol

pytestmark = pytest.mark.usefixtures("can_mount")

LIMITS = {256: 700, 1024: 1_500, 20_000: 1_500}
"""Descriptors of the server -> files that the test uses."""


@pytest.fixture(params=["overlay", "row"])
def options(request: pytest.FixtureRequest) -> list[str]:
    return ["row=4096"] if request.param == "row" else []


@pytest.fixture(params=LIMITS)
def most(request: pytest.FixtureRequest) -> int:
    """The server's RLIMIT_NOFILE."""
    limit: int = request.param
    return limit


@pytest.fixture
def start(space: Path, most: int, options: list[str]) -> Iterator[Callable[..., bounded.Bounded]]:
    """Mounts a lower layer with some files; at the end everything must still work."""
    lower = space / "lower"
    (lower / "d").mkdir(parents=True)
    for number in range(LIMITS[most]):
        (lower / f"{number}").write_bytes(b"y" * 5000)
    for name in ("read", "mode", "moved"):
        (lower / name).write_bytes(name.encode())
    with bounded.mounted([lower], space, *options, limits=[f"--nofile={most}:{most}"]) as mount:
        yield lambda: mount
        _everything_works(mount)
    assert "Traceback" not in (space / "server.log").read_text()


def _everything_works(mount: bounded.Bounded) -> None:
    at = mount.path
    (at / "new").write_bytes(b"new")
    (at / "new").unlink()
    (at / "new-dir").mkdir()
    (at / "new-dir").rmdir()
    assert (at / "read").read_bytes() == b"read"
    os.chmod(at / "mode", 0o600)
    os.rename(at / "moved", at / "d/moved")
    assert os.listdir(at / "d") == ["moved"]
    os.rename(at / "d/moved", at / "moved")
    done = command.run_module("cowfs", "usage", at)
    assert done.returncode == 0, done.stderr


def test_files_that_are_synced_after_they_were_closed(start: Callable[[], bounded.Bounded], most: int) -> None:
    mount = start()
    for number in range(LIMITS[most]):
        (mount.path / f"n{number}").write_bytes(b"x" * 100)
    highest = 0
    for number in range(LIMITS[most]):
        fd = os.open(mount.path / f"n{number}", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        highest = max(highest, mount.descriptors()) if number % 20 == 0 else highest
    assert highest < most * 9 // 10


def test_files_of_a_lower_layer_that_are_appended_to(start: Callable[[], bounded.Bounded], most: int) -> None:
    mount, highest = start(), 0
    with ExitStack() as held:  # or the kernel forgets them, and the server closes them
        for number in range(LIMITS[most]):
            held.callback(os.close, os.open(mount.path / f"{number}", os.O_PATH))
            with open(mount.path / f"{number}", "ab") as file:
                file.write(b"+")
            highest = max(highest, mount.descriptors()) if number % 20 == 0 else highest
        assert highest < most * 9 // 10
        assert (mount.path / "6").read_bytes() == b"y" * 5000 + b"+"


def test_files_that_are_mapped_and_closed(start: Callable[[], bounded.Bounded], most: int) -> None:
    mount = start()
    with ExitStack() as held:
        for number in range(300):
            fd = os.open(mount.path / f"{number}", os.O_RDWR)
            stored = held.enter_context(mmap.mmap(fd, 0))
            os.close(fd)
            stored[0:5] = b"store"
        assert mount.descriptors() < most * 9 // 10
    for number in range(300):
        assert (mount.path / f"{number}").read_bytes()[:6] == b"storey"


@pytest.mark.parametrize("how", ["unlinked", "unlinked lower", "replaced", "never named"])
def test_files_without_a_name_that_programs_hold(start: Callable[[], bounded.Bounded], most: int, how: str) -> None:
    """They keep their data, their attributes and a link count of 0, and give all back when they are closed."""
    mount = start()
    at, fds = mount.path, []
    before = mount.descriptors()
    for number in range(400):
        path = at / (f"{number}" if how == "unlinked lower" else f"n{number}")
        if how == "never named":
            fds.append(os.open(at, os.O_TMPFILE | os.O_RDWR, 0o600))
        else:
            fds.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.pwrite(fds[-1], b"%05d" % number, 0)
        if how == "replaced":
            (at / "victor").write_bytes(b"victor")
            os.rename(at / "victor", path)
            assert path.read_bytes() == b"victor"
        elif how != "never named":
            os.unlink(path)
    assert mount.descriptors() < most * 9 // 10
    _everything_works(mount)
    for number, fd in enumerate(fds):
        os.fchmod(fd, 0o640)
        os.fsync(fd)
        assert os.pread(fd, 5, 0) == b"%05d" % number
        status = os.fstat(fd)
        assert (status.st_nlink, stat.S_IMODE(status.st_mode)) == (0, 0o640)
    if how == "never named":
        posix.link_fd(fds[-1], at / "named")
        assert os.stat(at / "named").st_nlink == 1
    for fd in fds:
        os.close(fd)
    if how == "never named":
        assert (at / "named").read_bytes() == b"00399"
    (at / "after").write_bytes(b"")
    work = mount.path.parent / "work/work"
    bounded.eventually(lambda: not [name for name in os.listdir(work) if name != "#1"][5:])
    bounded.eventually(lambda: mount.descriptors() < before + most // 2)


def test_directories_without_a_name_that_programs_hold(start: Callable[[], bounded.Bounded], most: int) -> None:
    """A change of what was removed, or replaced by a rename, never reaches what has its name now."""
    mount = start()
    at, fds = mount.path, []
    for number in range(120):
        path = at / f"n{number}"
        path.mkdir(0o755)
        fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        if number % 2:
            os.rmdir(path)
            path.mkdir(0o755)
        else:
            (at / "victor").mkdir(0o755)
            os.rename(at / "victor", path)
    assert mount.descriptors() < most * 9 // 10
    for number, fd in enumerate(fds):
        os.fchmod(fd, 0o700)
        os.utime(fd, (1, 1))
        status = os.fstat(fd)
        assert (stat.S_IMODE(status.st_mode), int(status.st_mtime)) == (0o700, 1)
        assert stat.S_IMODE(os.stat(at / f"n{number}").st_mode) == 0o755
        os.close(fd)


@pytest.mark.parametrize("most", [256], indirect=True)
def test_clients_of_the_control_socket_that_say_nothing(start: Callable[[], bounded.Bounded], most: int) -> None:
    """They take neither the descriptors of the others nor their answers."""
    mount = start()
    path = _socket_of(mount)
    with ExitStack() as held:
        for number in range(100):
            client = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.connect(path)
            if number % 3 == 0:
                client.sendall(b'{"verb": ')
        assert mount.descriptors() < most * 9 // 10
        assert command.run_module("cowfs", "usage", mount.path, timeout=120).returncode == 0


@pytest.mark.parametrize("most", [256], indirect=True)
def test_clients_of_the_control_socket_that_ask_again(start: Callable[[], bounded.Bounded], most: int) -> None:
    """One connection has many questions, in pieces of any size; nothing is closed that nobody else needs."""
    mount = start()
    with ExitStack() as held:
        clients = [held.enter_context(protocol.connect(_socket_of(mount))) for _ in range(30)]
        for _ in range(3):
            for client in clients:
                client.sendall(b'{"verb": "us')
            clients.pop().close()
            for client in clients:
                client.sendall(b'age"}\n')
                assert "ok" in protocol.decode(protocol.read_line(client))
        for client in clients:
            client.sendall(b"nonsense\n")
            assert "error" in protocol.decode(protocol.read_line(client))


def _socket_of(mount: bounded.Bounded) -> str:
    done = command.run_module("cowfs", "mounts", "--json")
    return next(str(entry["socket"]) for entry in json.loads(done.stdout) if entry["mountpoint"] == str(mount.path))


READERS = """
import os, sys
fds = [os.open(sys.argv[1] + "/%d" % n, os.O_RDONLY) for n in range(int(sys.argv[2]))]
assert all(os.pread(fd, 3, 4000) == b"yyy" for fd in fds)
print(len(fds))
"""


@pytest.mark.parametrize("most", [256], indirect=True)
def test_ten_thousand_files_that_are_open(start: Callable[[], bounded.Bounded], most: int) -> None:
    """Open files of programs cost the server nothing."""
    mount = start()
    (mount.path / "many").mkdir()
    for number in range(10_000):
        (mount.path / f"many/{number}").write_bytes(b"y" * 4003 if number % 50 == 0 else b"")
        if number % 50:
            os.truncate(mount.path / f"many/{number}", 4003)
    reader = READERS.replace('b"yyy"', "(b'yyy' if fd % 50 == fds[0] % 50 else bytes(3))")
    done = subprocess.run(
        ["prlimit", "--nofile=15000:15000", sys.executable, "-c", reader, str(mount.path / "many"), "10000"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "10000\n", done.stderr
    assert mount.descriptors() < most * 9 // 10
