"""The exact requests of each small operation. Times vary from run to run; these counts do not.

The tables are the promise of the front end: nothing is asked for warm reads, listings and stats, and nothing is
ever opened or released. (They hold while the kernel keeps what it knows: see ``pytest_runtest_call`` in conftest.) A
row is (what is done, in a mount whose file was used before or not, requests).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Step = Callable[[Any], object]


def read_all(name: str) -> Step:
    """open, fstat, read to the end, close: what cat does."""

    def step(mnt: Any) -> None:
        fd = os.open(mnt / name, os.O_RDONLY)
        os.fstat(fd)
        while os.read(fd, 65536):
            pass
        os.close(fd)

    return step


def write_new(name: str, data: bytes) -> Step:
    def step(mnt: Any) -> None:
        fd = os.open(mnt / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, data)
        os.close(fd)

    return step


def write_small(name: str, times: int) -> Step:
    def step(mnt: Any) -> None:
        fd = os.open(mnt / name, os.O_WRONLY)
        for _ in range(times):
            os.write(fd, b"x" * 512)
        os.close(fd)

    return step


def missing(mnt: Any) -> None:
    with pytest.raises(FileNotFoundError):
        os.stat(mnt / "missing")


WARM = ("file",)  # prepared by reading and listing everything three times

#: what -> (step, requests the first time, requests when everything was looked at before)
READING: dict[str, tuple[Step, dict[str, int], dict[str, int]]] = {
    "stat": (lambda mnt: os.stat(mnt / "file"), {"LOOKUP": 1}, {}),
    "stat of a name that is not there": (missing, {"LOOKUP": 1}, {}),
    "stat three directories deep": (lambda mnt: os.stat(mnt / "a/b/c/deep"), {"LOOKUP": 4}, {}),
    "listdir": (lambda mnt: os.listdir(mnt.path), {"READDIRPLUS": 2}, {}),
    "readlink": (lambda mnt: os.readlink(mnt / "link"), {"LOOKUP": 1, "READLINK": 1}, {}),
    "stat through a link": (lambda mnt: os.stat(mnt / "link"), {"LOOKUP": 2, "READLINK": 1}, {}),
    "open, fstat, read, close": (read_all("file"), {"LOOKUP": 1, "READ": 1}, {}),
    "walk and stat": (
        lambda mnt: [os.lstat(os.path.join(base, name)) for base, dirs, files in os.walk(mnt.path) for name in files],
        {"READDIRPLUS": 12, "READLINK": 1},
        {},
    ),
}

#: what -> (step, requests) on a writable mount where "file", "d" and "d/old" are known and were read.
#: GETXATTR is for security.capability: the kernel asks before the first write to each inode, and before each chown and
#: truncate, whether a capability must go (answered from memory after the first time).
CHANGING: dict[str, tuple[Step, dict[str, int]]] = {
    "create, write 1 KiB, close": (
        write_new("d/new", b"x" * 1024),
        {"LOOKUP": 1, "MKNOD": 1, "GETXATTR": 1, "WRITE": 1},
    ),
    "create, write 3 MiB, close": (
        write_new("d/new", b"x" * (3 << 20)),
        {"LOOKUP": 1, "MKNOD": 1, "GETXATTR": 1, "WRITE": 3},
    ),
    "open, 8 writes of 512 B, close": (write_small("d/old", 8), {"GETXATTR": 1, "WRITE": 8}),
    "mkdir": (lambda mnt: os.mkdir(mnt / "d/sub"), {"LOOKUP": 1, "MKDIR": 1}),
    "symlink": (lambda mnt: os.symlink("t", mnt / "d/l"), {"LOOKUP": 1, "SYMLINK": 1}),
    "link": (lambda mnt: os.link(mnt / "d/old", mnt / "d/two"), {"LOOKUP": 1, "LINK": 1}),
    "mkfifo": (lambda mnt: os.mkfifo(mnt / "d/fifo"), {"LOOKUP": 1, "MKNOD": 1}),
    "rename": (lambda mnt: os.rename(mnt / "d/old", mnt / "d/newname"), {"LOOKUP": 1, "RENAME": 1}),
    "rename over another": (
        lambda mnt: os.rename(mnt / "d/old", mnt / "d/other"),
        {"LOOKUP": 1, "RENAME": 1, "FORGET": 1},
    ),
    "unlink": (lambda mnt: os.unlink(mnt / "d/old"), {"UNLINK": 1, "FORGET": 1}),
    "rmdir": (lambda mnt: os.rmdir(mnt / "d/empty"), {"RMDIR": 1, "FORGET": 1}),
    "chmod": (lambda mnt: os.chmod(mnt / "d/old", 0o600), {"SETATTR": 1}),
    "chown": (lambda mnt: os.chown(mnt / "d/old", 1, 1), {"GETXATTR": 1, "SETATTR": 1}),
    "utime": (lambda mnt: os.utime(mnt / "d/old", (1, 1)), {"SETATTR": 1}),
    "truncate": (lambda mnt: os.truncate(mnt / "d/old", 3), {"GETXATTR": 1, "SETATTR": 1}),
    "open with O_TRUNC": (lambda mnt: os.close(os.open(mnt / "d/old", os.O_WRONLY | os.O_TRUNC)), {"GETXATTR": 1, "SETATTR": 1}),
    "statvfs": (lambda mnt: os.statvfs(mnt.path), {"STATFS": 1}),
    "set an xattr": (lambda mnt: os.setxattr(mnt / "d/old", "user.a", b"1"), {"SETXATTR": 1}),
}  # fmt: skip


def fill(root: Path) -> None:
    """The tree that both tables are about."""
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/deep").write_bytes(b"deep")
    (root / "file").write_bytes(b"content")
    (root / "link").symlink_to("file")
    (root / "d").mkdir()
    (root / "d/empty").mkdir()
    for name in ("old", "other"):
        (root / "d" / name).write_bytes(b"content")


def look_at_everything(mnt: Any) -> None:
    for base, _, files in os.walk(mnt.path):
        for name in files:
            path = os.path.join(base, name)
            if stat.S_ISLNK(os.lstat(path).st_mode):
                os.readlink(path)
            read_all(os.path.relpath(path, mnt.path))(mnt)
            os.stat(path)
    os.stat(mnt.path)
    missing(mnt)


def without_singles(asked: dict[str, int]) -> dict[str, int]:
    """Without what comes once a mount, and without GETATTR, which a test of its own bounds."""
    asked.pop("GETATTR", None)
    for name in ("OPEN", "FLUSH", "CREATE"):
        assert asked.pop(name, 0) <= 1
    return asked


@pytest.mark.parametrize("what", READING)
@pytest.mark.parametrize("readonly", [True, False], ids=["read-only", "writable"])
def test_reading_the_first_time_asks_for_what_is_new(union: Any, layers: Path, what: str, readonly: bool) -> None:
    fill(layers / "lower")
    step, first, _ = READING[what]
    mnt = union(readonly=readonly)
    mnt.mark()
    step(mnt)
    assert without_singles(mnt.asked()) == first


@pytest.mark.parametrize("what", READING)
@pytest.mark.parametrize("readonly", [True, False], ids=["read-only", "writable"])
def test_reading_again_asks_for_nothing(union: Any, layers: Path, what: str, readonly: bool) -> None:
    fill(layers / "lower")
    step, _, again = READING[what]
    mnt = union(readonly=readonly)
    for _ in range(3):
        look_at_everything(mnt)
    mnt.mark()
    step(mnt)
    assert mnt.asked() == again


@pytest.mark.parametrize("what", CHANGING)
def test_a_change_asks_for_itself(union: Any, layers: Path, what: str) -> None:
    fill(layers / "upper")
    step, expected = CHANGING[what]
    mnt = union()
    for _ in range(3):
        look_at_everything(mnt)
    mnt.mark()
    step(mnt)
    assert mnt.eventually(lambda: True)
    if "FORGET" in expected:
        before = dict(mnt._before)
        mnt.eventually(lambda: mnt.session.counters.get("FORGET", 0) > before.get("FORGET", 0))
    assert without_singles(mnt.asked()) == expected


@pytest.mark.parametrize("what", CHANGING)
def test_after_a_change_the_kernel_asks_at_most_twice_for_attributes(union: Any, layers: Path, what: str) -> None:
    """The directory's, and those of what was changed: both are stale in the kernel by its own rules."""
    fill(layers / "upper")
    step, _ = CHANGING[what]
    mnt = union()
    for _ in range(3):
        look_at_everything(mnt)
    mnt.mark()
    step(mnt)
    for _ in range(3):
        os.stat(mnt / "d")
        for name in ("old", "other"):
            if os.path.lexists(mnt / f"d/{name}"):
                os.stat(mnt / f"d/{name}")
    assert mnt.asked().get("GETATTR", 0) <= 3


def test_nothing_is_opened_or_released_however_often(union: Any, layers: Path) -> None:
    fill(layers / "lower")
    mnt = union()
    mnt.mark()
    for _ in range(20):
        look_at_everything(mnt)
        write_small("d/old", 1)(mnt)
    asked = mnt.asked()
    for name in ("OPENDIR", "RELEASE", "RELEASEDIR", "ACCESS"):
        assert name not in asked
    for name in ("OPEN", "FLUSH", "CREATE"):  # once a mount, to learn that there is none
        assert asked.get(name, 0) <= 1


def test_a_shell_s_append_loop_costs_a_write_each(union: Any, layers: Path) -> None:
    fill(layers / "upper")
    mnt = union()
    look_at_everything(mnt)
    mnt.mark()
    for _ in range(50):
        fd = os.open(mnt / "d/old", os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"line\n")
        os.close(fd)
    asked = mnt.asked()
    asked.pop("FLUSH", None)
    assert asked.pop("GETATTR", 0) <= 50  # O_APPEND must know the size
    assert asked == {"GETXATTR": 1, "WRITE": 50}


def test_walking_a_large_directory_looks_up_nothing(union: Any, layers: Path) -> None:
    for index in range(2000):
        (layers / "lower" / f"file-number-{index}").touch()
    mnt = union()
    mnt.mark()
    for name in os.listdir(mnt.path):
        os.stat(mnt / name)
    asked = mnt.asked()
    assert "LOOKUP" not in asked
    assert asked["READDIRPLUS"] <= 15
