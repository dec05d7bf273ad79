"""A program that an ordinary user has written never runs with another's rights: looked at by running it, not by its mode.

The kernel decides from the mode that it has cached, and a full stat(2) would refresh that: so nothing is stat'ed between the
write and execve(2). Every way to change data is done on ext4 (or what the host has) too, and the mount must agree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.users import UID, command_as

import cowfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="set-id programs of root, and mounts: needs root")

FRONTS = {
    "kernel": {},
    "limit": {"size": "1G"},
    "row": {"row": 4096},
    "passthrough": {"io": "passthrough"},
    "fusepy": {"frontend": "fusepy"},
}

WAYS = """
import ctypes, mmap, os, sys
way, program, path = sys.argv[1:]
data = open(program, "rb").read()
libc = ctypes.CDLL(None, use_errno=True)
def whole(fd, put):
    at = 0
    while at < len(data):
        at += put(fd, data[at:], at)
def fallocate(fd, mode, offset, length):
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        sys.exit(77 if ctypes.get_errno() == 95 else 1)
flags = os.O_RDWR
if way == "direct":
    flags |= os.O_DIRECT
if way == "opened before":  # a descriptor from before the file had the bits
    fd = int(os.environ["HELD"])
elif way == "truncated at open":
    fd = os.open(path, flags | os.O_TRUNC)
else:
    fd = os.open(path, flags)
if way in ("write", "truncated at open", "opened before"):
    whole(fd, lambda fd, part, at: os.write(fd, part))
elif way == "pwrite":
    whole(fd, lambda fd, part, at: os.pwrite(fd, part, at))
elif way == "direct":
    room = mmap.mmap(-1, (len(data) + 4095) // 4096 * 4096)
    room[: len(data)] = data
    os.pwrite(fd, room, 0)
elif way == "truncate":
    os.ftruncate(fd, 0)
    os.setxattr  # nothing else is needed: the file is empty, and not executed
elif way == "sendfile":
    source = os.open(program, os.O_RDONLY)
    at = 0
    while at < len(data):
        at += os.sendfile(fd, source, at, len(data) - at)
elif way == "splice":
    source, (r, w) = os.open(program, os.O_RDONLY), os.pipe()
    at = 0
    while at < len(data):
        n = os.splice(source, w, 65536)
        while n:
            done = os.splice(r, fd, n)
            n -= done
            at += done
elif way == "copy_file_range":
    source = os.open(program, os.O_RDONLY)
    at = 0
    while at < len(data):
        at += os.copy_file_range(source, fd, len(data) - at, at, at)
elif way == "allocate":
    fallocate(fd, 0, 1 << 20, 4096)
elif way == "punch":
    fallocate(fd, 3, 1 << 20, 4096)
elif way == "zero":
    fallocate(fd, 0x10, 1 << 20, 4096)
elif way == "map":
    room = mmap.mmap(fd, 4096)
    room[0:4] = data[:4]
    room.flush()
"""

#: the file holds a program already, and only something behind it is changed
BEHIND = {"allocate", "punch", "zero", "map"}


def program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None
    return os.path.realpath(found)


@pytest.fixture(scope="module")
def layer(scratch: Path) -> Path:
    """Files of root that anybody may write, with set-id bits: /bin/true, or /bin/id and a megabyte of padding."""
    lower = scratch / f"setid-{os.urandom(4).hex()}" / "lower"
    lower.mkdir(parents=True)
    return lower


def fill(place: Path) -> None:
    shutil.copy(program("id"), place / "source")
    for bits in (0o4757, 0o2757, 0o6757):
        for kind in ("other", "own"):
            path = place / f"{bits:o}-{kind}"
            shutil.copy(program("true" if kind == "other" else "id"), path)
            if kind == "own":
                os.truncate(path, 2 << 20)
            os.chmod(path, bits)


@pytest.fixture(params=FRONTS)
def mounted(request: pytest.FixtureRequest, space: Path, can_mount: None) -> Iterator[Path]:
    """A mount with those files in its lower layer."""
    if request.param == "fusepy":
        pytest.importorskip("fuse", exc_type=OSError)  # type: ignore[arg-type]
    lower, mnt = space / "lower", space / "mnt"
    lower.mkdir()
    mnt.mkdir()
    fill(lower)
    with cowfs.mount([lower], mnt, upper=space / "upper", **FRONTS[request.param]):  # type: ignore[arg-type]
        yield mnt


@pytest.fixture
def plain(space: Path) -> Path:
    """The same files on the host."""
    place = space / "plain"
    place.mkdir()
    fill(place)
    return place


def ids_of(path: Path) -> str:
    """(effective user, effective group) that the program sees when an ordinary user runs it."""
    answers = []
    for word in ("-u", "-g"):
        done = subprocess.run(command_as([str(path), word]), capture_output=True, text=True, check=False)
        answers.append(done.stdout.strip() or f"exit {done.returncode}")
    return " ".join(answers)


def change(way: str, path: Path, uid: int = UID) -> int:
    """Change a file in one way, as a user; the exit code."""
    command = [sys.executable if os.access(sys.executable, os.X_OK) else "/usr/bin/python3", "-c", WAYS, way]
    command = ["/usr/bin/python3", *command[1:], str(path.parent / "source"), str(path)]
    if way != "opened before":
        return subprocess.run(command_as(command, uid), check=False).returncode
    mode = path.stat().st_mode & 0o7777
    os.chmod(path, 0o757)
    fd = os.open(path, os.O_RDWR)
    os.set_inheritable(fd, True)
    os.chmod(path, mode)
    try:
        environ = {**os.environ, "HELD": str(fd)}
        return subprocess.run(command_as(command, uid), check=False, pass_fds=[fd], env=environ).returncode
    finally:
        os.close(fd)


@pytest.mark.parametrize("bits", ["4757", "2757", "6757"])
@pytest.mark.parametrize(
    "way",
    [
        "write", "pwrite", "direct", "truncated at open", "opened before", "sendfile", "splice", "copy_file_range",
        "allocate", "punch", "zero", "map",
    ],
)  # fmt: skip
def test_what_a_user_wrote_runs_with_his_rights(mounted: Path, plain: Path, way: str, bits: str) -> None:
    """As on the host, in the kernel's own eyes."""
    if way == "splice" and sys.version_info < (3, 10):
        pytest.skip("Python has no splice")
    name = f"{bits}-{'own' if way in BEHIND else 'other'}"
    before = ids_of(mounted / name)  # the kernel has the mode now
    assert before == ids_of(plain / name)
    here, there = change(way, mounted / name), change(way, plain / name)
    if here == 77 or there == 77:
        pytest.skip("a file system without that mode of fallocate")
    assert (here, there) == (0, 0)
    assert ids_of(mounted / name) == ids_of(plain / name)
    if way not in BEHIND:
        assert ids_of(mounted / name) == f"{UID} {UID}"


@pytest.mark.parametrize("way", ["write", "pwrite", "truncated at open", "copy_file_range", "allocate", "punch"])
def test_what_root_wrote_keeps_its_bits(mounted: Path, plain: Path, way: str) -> None:
    """Root has CAP_FSETID: also where the file has capabilities, which go with any write."""
    kind = "own" if way in BEHIND else "other"
    for place in (mounted, plain):
        path = place / f"6757-{kind}"
        if shutil.which("setcap"):
            subprocess.run(["setcap", "cap_net_raw+ep", path], check=True)
        ids_of(path)
        if change(way, path, 0) == 77:
            pytest.skip("a file system without that mode of fallocate")
    assert ids_of(mounted / f"6757-{kind}") == ids_of(plain / f"6757-{kind}")
    assert os.stat(mounted / f"6757-{kind}").st_mode == os.stat(plain / f"6757-{kind}").st_mode
    assert os.listxattr(mounted / f"6757-{kind}") == os.listxattr(plain / f"6757-{kind}")


@pytest.mark.skipif(shutil.which("setcap") is None, reason="needs setcap (libcap2-bin)")
@pytest.mark.parametrize("way", ["write", "copy_file_range", "punch", "allocate"])
def test_capabilities_go_when_a_user_writes(mounted: Path, plain: Path, way: str) -> None:
    """A program with capabilities that somebody overwrites has none when it runs."""
    kind = "own" if way in BEHIND else "other"
    seen = []
    for place in (mounted, plain):
        path = place / f"4757-{kind}"
        subprocess.run(["setcap", "cap_net_raw+ep", path], check=True)
        ids_of(path)
        if change(way, path) == 77:
            pytest.skip("a file system without that mode of fallocate")
        seen.append((os.listxattr(path), ids_of(path)))
    assert seen[0] == seen[1]


def test_many_writers_and_runners_at_once(mounted: Path) -> None:
    """While some write and set the bits again and again, no run after a finished write has root's rights."""
    path = mounted / "4757-other"
    for _ in range(40):
        os.chmod(path, 0o4757)
        assert os.stat(path).st_mode & 0o4000
        assert change("write", path) == 0
        assert ids_of(path).split()[0] == str(UID)
