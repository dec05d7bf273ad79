"""Listings: complete, stable while changing, positions; statfs; file handles."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from support import mounts, posix
from support.posix import DirStream, error_of, fails, make_all, read, tree, write


def names_of(path: Path) -> list[str]:
    stream = DirStream(path)
    out = []
    while (name := stream.read()) is not None:
        out.append(name)
    stream.close()
    return out


@tree(make_all)
def test_a_listing_has_each_name_once_and_the_dots(d: Path) -> None:
    assert sorted(names_of(d)) == sorted([".", "..", *posix.KINDS])


@tree(make_all)
def test_types_and_inodes_of_a_listing_are_those_of_stat(d: Path) -> None:
    stream = DirStream(d)
    while (found := stream.read_full()) is not None:
        name, inode, type_ = found
        if name in (".", ".."):
            continue
        status = os.lstat(d / name)
        assert inode == status.st_ino
        assert type_ in (0, stat.S_IFMT(status.st_mode) >> 12)
    stream.close()


@tree(lambda d: [write(d / f"f{i}") for i in range(2000)])
def test_two_thousand_names(d: Path) -> None:
    assert sorted(os.listdir(d)) == sorted(f"f{i}" for i in range(2000))
    for i in range(0, 2000, 3):
        os.unlink(d / f"f{i}")
    assert sorted(os.listdir(d)) == sorted(f"f{i}" for i in range(2000) if i % 3)


@tree(lambda d: [write(d / f"f{i}") for i in range(1500)])
def test_removing_while_listing_skips_nothing(d: Path) -> None:
    """rm -r: entries that stay are all seen although others go."""
    stream = DirStream(d)
    seen = []
    while (name := stream.read()) is not None:
        if name not in (".", ".."):
            seen.append(name)
            os.unlink(d / name)
    stream.close()
    assert sorted(seen) == sorted(f"f{i}" for i in range(1500))
    assert os.listdir(d) == []


@tree(lambda d: [write(d / f"f{i}") for i in range(1000)])
def test_creating_while_listing_repeats_nothing(d: Path) -> None:
    stream = DirStream(d)
    seen: list[str] = []
    while (name := stream.read()) is not None:
        seen.append(name)
        if len(seen) < 500:
            write(d / f"new{len(seen)}")
    stream.close()
    old = [name for name in seen if name.startswith("f")]
    assert sorted(old) == sorted(f"f{i}" for i in range(1000))
    assert len(set(seen)) == len(seen)


@tree(lambda d: [write(d / f"f{i}") for i in range(800)])
def test_renaming_while_listing_loses_no_other(d: Path) -> None:
    stream = DirStream(d)
    seen: list[str] = []
    while (name := stream.read()) is not None:
        seen.append(name)
        if len(seen) == 100:
            os.rename(d / "f7", d / "g7")
    stream.close()
    others = {f"f{i}" for i in range(800)} - {"f7"}
    assert others <= set(seen)
    assert len(seen) - len(set(seen)) == 0


@tree(lambda d: [write(d / f"f{i}") for i in range(300)])
def test_telldir_and_seekdir(d: Path) -> None:
    """From each remembered position the same rest follows, also after changes elsewhere."""
    stream = DirStream(d)
    marks, order = [], []
    while True:
        marks.append(stream.tell())
        name = stream.read()
        if name is None:
            break
        order.append(name)
    for index in (0, 1, 2, 150, 299, 301):
        stream.seek(marks[index])
        rest = []
        while (name := stream.read()) is not None:
            rest.append(name)
        assert rest == order[index:]
    os.unlink(d / order[200])
    stream.seek(marks[150])
    rest = []
    while (name := stream.read()) is not None:
        rest.append(name)
    assert [n for n in rest if n != order[200]] == order[150:200] + order[201:]
    stream.close()


@tree(lambda d: write(d / "old"))
def test_rewinddir_shows_what_is_new(d: Path) -> None:
    stream = DirStream(d)
    assert stream.read() is not None
    write(d / "new")
    os.unlink(d / "old")
    stream.rewind()
    seen = []
    while (name := stream.read()) is not None:
        seen.append(name)
    stream.close()
    assert sorted(seen) == [".", "..", "new"]


@tree(lambda d: os.mkdir(d / "gone"))
def test_a_removed_directory_lists_empty(d: Path) -> None:
    stream = DirStream(d / "gone")
    os.rmdir(d / "gone")
    names = []
    while (name := stream.read()) is not None:
        names.append(name)
    assert set(names) <= {".", ".."}
    stream.close()


@tree(lambda d: [os.makedirs(d / "a" / "b"), write(d / "a" / "f")])
def test_dot_entries_name_the_right_inodes(d: Path) -> None:
    stream = DirStream(d / "a" / "b")
    found = {}
    while (entry := stream.read_full()) is not None:
        found[entry[0]] = entry[1]
    stream.close()
    assert found["."] == os.stat(d / "a" / "b").st_ino
    assert os.stat(d / "a" / "b" / "..").st_ino == os.stat(d / "a").st_ino


def test_a_deep_tree(d: Path) -> None:
    """500 directories deep: made, listed and removed by descriptor."""
    fd = os.open(d, os.O_RDONLY)
    first = os.dup(fd)
    for _ in range(500):
        os.mkdir("x", dir_fd=fd)
        deeper = os.open("x", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    import shutil

    shutil.rmtree("x", dir_fd=first)
    os.close(first)
    assert os.listdir(d) == []


@tree(lambda d: write(d / "f"))
def test_statfs_is_sane(d: Path) -> None:
    for path in (d, d / "f"):
        status = os.statvfs(path)
        assert status.f_namemax == 255
        assert status.f_frsize > 0
        assert 0 < status.f_bavail <= status.f_bfree <= status.f_blocks
        assert status.f_ffree <= status.f_files


def test_statfs_follows_what_is_written(d: Path) -> None:
    before = os.statvfs(d)
    write(d / "f", b"x" * (8 << 20))
    fd = os.open(d / "f", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    after = os.statvfs(d)
    lost = before.f_bavail * before.f_frsize - after.f_bavail * after.f_frsize
    assert lost >= 7 << 20
    os.unlink(d / "f")


# -- file handles (NFS export) -------------------------------------------------------------

handles_needed = pytest.mark.only("kernel", reason="libfuse2 cannot be exported; overlayfs needs nfs_export=on")


@handles_needed
@tree(lambda d: [make_all(d), os.makedirs(d / "a" / "b"), write(d / "a" / "b" / "f", b"found")])
@pytest.mark.parametrize("forget", [False, True])
def test_a_handle_finds_its_file_again(d: Path, forget: bool) -> None:
    """Also when the kernel forgot the node, the file was renamed or copied up in between."""
    top = os.open(d, os.O_RDONLY)
    handles = {name: posix.file_handle(d / name) for name in ("file", "dir", "a", "a/b", "a/b/f")}
    numbers = {name: os.lstat(d / name).st_ino for name in handles}
    os.rename(d / "a", d / "moved")
    write(d / "moved" / "b" / "f", b"changed")
    if forget:
        mounts.drop_caches(2)
    for name, handle in handles.items():
        fd = posix.open_handle(top, handle)
        assert os.fstat(fd).st_ino == numbers[name]
        if name == "a/b/f":
            assert os.read(fd, 100) == b"changed"
        os.close(fd)
    os.close(top)


@handles_needed
@tree(lambda d: write(d / "f"))
def test_a_handle_of_a_removed_file_is_stale(d: Path) -> None:
    top = os.open(d, os.O_RDONLY)
    handle = posix.file_handle(d / "f")
    os.unlink(d / "f")
    write(d / "f", b"another")
    mounts.drop_caches(2)
    fails(errno.ESTALE, posix.open_handle, top, handle)
    os.close(top)


# -- forgotten nodes -----------------------------------------------------------------------


@tree(
    lambda d: [os.makedirs(d / "a" / "b"), write(d / "a" / "b" / "f", b"1"), os.link(d / "a" / "b" / "f", d / "twin")]
)
def test_everything_is_found_again_after_the_kernel_forgot(d: Path) -> None:
    fd = os.open(d / "a" / "b" / "f", os.O_RDWR)
    number = os.stat(d / "twin").st_ino
    mounts.drop_caches(2)
    os.write(fd, b"2")
    os.rename(d / "a", d / "c")
    mounts.drop_caches(2)
    assert read(d / "c" / "b" / "f") == b"2"
    assert read(d / "twin") == b"2"
    mounts.drop_caches(2)
    assert os.stat(d / "twin").st_ino == os.stat(d / "c" / "b" / "f").st_ino == number
    assert os.stat(d / "twin").st_nlink == 2
    os.unlink(d / "twin")
    os.unlink(d / "c" / "b" / "f")
    mounts.drop_caches(2)
    assert os.pread(fd, 1, 0) == b"2"
    os.close(fd)


def test_unknown_ioctls_are_enotty(d: Path) -> None:
    import fcntl

    write(d / "f")
    fd = os.open(d / "f", os.O_RDWR)
    assert error_of(fcntl.ioctl, fd, 0x12345678, 0) in ("ENOTTY", "EOPNOTSUPP", "ENOSYS")
    os.close(fd)
