"""Which operation moves mtime and ctime of what; explicit times; stability of inode numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.posix import KINDS, fallocate, make, make_all, mode_of, rename2, tick, touched, tree, write


def scene(d: Path) -> None:
    make_all(d)
    write(d / "file", b"some data")
    os.mkdir(d / "other")
    write(d / "other" / "in")
    os.setxattr(d / "file", "user.there", b"1")


def with_fd(path: Path, flags: int, use: Callable[[int], Any]) -> None:
    fd = os.open(path, flags)
    try:
        use(fd)
    finally:
        os.close(fd)


BOTH, CHANGE, NOTHING = {"mtime", "ctime"}, {"ctime"}, set[str]()

NOT_BY_PATHS = {
    "chown-to-nobody": "libfuse2 does not call chown when neither owner nor group changes",
    "write-below": "libfuse2's hard links need attributes that are never cached: the ctime that copy-up gives shows",
}


def marked(table: dict[str, Any]) -> list[Any]:
    """The table's keys, those that libfuse2's path interface cannot do marked with the reason."""
    only = pytest.mark.only
    return [
        pytest.param(key, marks=only("kernel", "overlay", reason=NOT_BY_PATHS[key])) if key in NOT_BY_PATHS else key
        for key in table
    ]


ON_A_FILE: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "chmod": (lambda f: os.chmod(f, 0o600), CHANGE),
    "chown": (lambda f: os.chown(f, 1, 1), CHANGE),
    "link": (lambda f: os.link(f, f.with_name("l")), CHANGE),
    "rename": (lambda f: [os.rename(f, f.with_name("r")), os.rename(f.with_name("r"), f)], CHANGE),
    "setxattr": (lambda f: os.setxattr(f, "user.x", b"1"), CHANGE),
    "removexattr": (lambda f: os.removexattr(f, "user.there"), CHANGE),
    "write": (lambda f: with_fd(f, os.O_WRONLY, lambda fd: os.write(fd, b"x")), BOTH),
    "append": (lambda f: with_fd(f, os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"x")), BOTH),
    "truncate": (lambda f: os.truncate(f, 3), BOTH),
    "truncate-to-the-same-size": (lambda f: os.truncate(f, 9), BOTH),
    "ftruncate": (lambda f: with_fd(f, os.O_WRONLY, lambda fd: os.ftruncate(fd, 100)), BOTH),
    "open-trunc": (lambda f: with_fd(f, os.O_WRONLY | os.O_TRUNC, lambda fd: None), BOTH),
    "fallocate": (lambda f: with_fd(f, os.O_WRONLY, lambda fd: fallocate(fd, 0, 0, 5000)), BOTH),
    "utime-now": (lambda f: os.utime(f), BOTH),
    "read": (lambda f: f.read_bytes(), NOTHING),
    "stat": (lambda f: os.stat(f), NOTHING),
    "open-for-writing": (lambda f: with_fd(f, os.O_RDWR, lambda fd: None), NOTHING),
    "write-of-nothing": (lambda f: with_fd(f, os.O_WRONLY, lambda fd: os.write(fd, b"")), NOTHING),
    "chown-to-nobody": (lambda f: os.chown(f, -1, -1), CHANGE),
    "failed-link": (lambda f: pytest.raises(FileExistsError, os.link, f, f.with_name("fifo")), NOTHING),
}


@tree(scene)
@pytest.mark.parametrize("what", marked(ON_A_FILE))
def test_times_of_a_file(d: Path, what: str) -> None:
    change, expected = ON_A_FILE[what]
    assert touched(d / "file", lambda: change(d / "file")) == expected


ON_A_DIRECTORY: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    **{f"create-{kind}": ((lambda kind: lambda d: make(kind, d / "new"))(kind), BOTH) for kind in KINDS},
    "link": (lambda d: os.link(d / "file", d / "l"), BOTH),
    "unlink": (lambda d: os.unlink(d / "file"), BOTH),
    "rmdir": (lambda d: os.rmdir(d / "dir"), BOTH),
    "rename-within": (lambda d: os.rename(d / "file", d / "r"), BOTH),
    "rename-out": (lambda d: os.rename(d / "file", d / "other" / "r"), BOTH),
    "rename-in": (lambda d: os.rename(d / "other" / "in", d / "r"), BOTH),
    "rename-over": (lambda d: os.rename(d / "fifo", d / "file"), BOTH),
    "chmod": (lambda d: os.chmod(d, 0o700), CHANGE),
    "setxattr": (lambda d: os.setxattr(d, "user.x", b"1"), CHANGE),
    "write-below": (lambda d: write(d / "file", b"changed"), NOTHING),
    "chmod-below": (lambda d: os.chmod(d / "file", 0o600), NOTHING),
    "list": (lambda d: os.listdir(d), NOTHING),
    "failed-mkdir": (lambda d: pytest.raises(FileExistsError, os.mkdir, d / "file"), NOTHING),
    "failed-unlink": (lambda d: pytest.raises(FileNotFoundError, os.unlink, d / "missing"), NOTHING),
}


@tree(lambda d: [os.mkdir(d / "top"), scene(d / "top")])
@pytest.mark.parametrize("what", marked(ON_A_DIRECTORY))
def test_times_of_a_directory(d: Path, what: str) -> None:
    change, expected = ON_A_DIRECTORY[what]
    assert touched(d / "top", lambda: change(d / "top")) == expected


@tree(scene)
def test_rename_moves_both_directories_times(d: Path) -> None:
    assert touched(d / "other", lambda: os.rename(d / "file", d / "other" / "file")) == BOTH
    assert touched(d, lambda: os.rename(d / "other" / "file", d / "file")) == BOTH


@tree(scene)
def test_unlinking_one_of_two_names_moves_ctime(d: Path) -> None:
    os.link(d / "file", d / "twin")
    assert touched(d / "file", lambda: os.unlink(d / "twin")) == CHANGE
    write(d / "over")
    os.link(d / "file", d / "twin")
    assert touched(d / "file", lambda: os.rename(d / "over", d / "twin")) == CHANGE


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", [0, 1, 1_234_567_890_123_456_789, 2**31 * 10**9, 4_000_000_000_999_999_999])
def test_explicit_times_are_kept_to_the_nanosecond(d: Path, kind: str, when: int) -> None:
    os.utime(d / kind, ns=(when + 1, when), follow_symlinks=False)
    status = os.lstat(d / kind)
    assert (status.st_mtime_ns, status.st_atime_ns) == (when, when + 1)


@tree(lambda d: write(d / "f"))
def test_times_before_1970(d: Path) -> None:
    os.utime(d / "f", ns=(-1_500_000_000, -86_400 * 10**9 - 5))
    status = os.stat(d / "f")
    assert (status.st_atime_ns, status.st_mtime_ns) == (-1_500_000_000, -86_400 * 10**9 - 5)


@tree(lambda d: [write(d / "f"), os.utime(d / "f", ns=(111, 222))])
def test_chmod_and_chown_keep_mtime_across_a_copy_up(d: Path) -> None:
    os.chmod(d / "f", 0o611)
    os.chown(d / "f", 5, 5)
    os.link(d / "f", d / "g")
    os.rename(d / "f", d / "h")
    assert os.stat(d / "h").st_mtime_ns == 222


@tree(
    lambda d: [
        os.makedirs(d / "a" / "b"),
        write(d / "a" / "b" / "f"),
        os.utime(d / "a" / "b", ns=(1, 2)),
        os.utime(d / "a", ns=(3, 4)),
    ]
)
def test_a_write_below_keeps_the_times_of_copied_up_parents(d: Path) -> None:
    write(d / "a" / "b" / "f", b"new")
    assert os.stat(d / "a" / "b").st_mtime_ns == 2
    assert os.stat(d / "a").st_mtime_ns == 4


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
def test_inode_numbers_survive_copy_up(d: Path, kind: str) -> None:
    """The number, device and listing's d_ino are one before and after the first change."""
    before = os.lstat(d / kind)
    with os.scandir(d) as listing:
        listed = {entry.name: entry.inode() for entry in listing}
    os.chown(d / kind, 9, 9, follow_symlinks=False)
    if kind == "file":
        write(d / kind, b"grown")
    after = os.lstat(d / kind)
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)
    assert listed[kind] == after.st_ino
    assert (after.st_uid, after.st_gid) == (9, 9)


@tree(lambda d: write(d / "f", b"abc"))
def test_a_descriptor_and_a_path_show_one_file_after_copy_up(d: Path) -> None:
    """A reader that opened before the first write sees the new data and attributes."""
    fd = os.open(d / "f", os.O_RDONLY)
    assert os.read(fd, 3) == b"abc"
    write(d / "f", b"new content")
    os.chmod(d / "f", 0o640)
    assert os.pread(fd, 100, 0) == b"new content"
    status = os.fstat(fd)
    assert status.st_size == 11
    assert status.st_mode == os.stat(d / "f").st_mode
    assert mode_of(d / "f") == 0o640
    os.close(fd)


@tree(scene)
@pytest.mark.only("kernel", "overlay", reason="libfuse2's path interface has no rename flags")
def test_exchange_moves_ctime_of_both(d: Path) -> None:
    tick()
    assert (
        touched(d / "fifo", lambda: [rename2(d / "file", d / "fifo", 2), rename2(d / "file", d / "fifo", 2)]) == CHANGE
    )


def test_new_objects_are_stamped_now(d: Path) -> None:
    import time

    before = time.time_ns() - 50_000_000
    for kind in KINDS:
        make(kind, d / kind)
        status = os.lstat(d / kind)
        for stamp in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns):
            assert before <= stamp <= time.time_ns() + 50_000_000
