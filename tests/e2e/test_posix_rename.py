"""rename and renameat2: what replaces what, directories, flags, hard links, the errno table."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.posix import (
    KINDS,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    error_of,
    fails,
    kind_of,
    make,
    make_all,
    read,
    rename2,
    tree,
    write,
)
from support.users import acting_as

flags_needed = pytest.mark.only("kernel", "overlay", reason="libfuse2's path interface has no rename flags")


def pairs(d: Path) -> None:
    for side in ("from", "to"):
        os.mkdir(d / side)
        make_all(d / side)


@tree(pairs)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_rename_replaces_what_it_may(d: Path, source: str, target: str) -> None:
    """A non-directory replaces a non-directory, an empty directory an empty directory; nothing else."""
    one, two = d / "from" / source, d / "to" / target
    inode = os.lstat(one).st_ino
    type_ = kind_of(one)
    if (source == "dir") == (target == "dir"):
        os.rename(one, two)
        assert kind_of(two) == type_
        assert os.lstat(two).st_ino == inode
        assert source not in os.listdir(d / "from")
        assert os.listdir(d / "to").count(target) == 1
    else:
        fails(errno.ENOTDIR if source == "dir" else errno.EISDIR, os.rename, one, two)
        assert kind_of(one) == type_


@tree(make_all)
@pytest.mark.parametrize("kind", KINDS)
def test_rename_to_a_new_name(d: Path, kind: str) -> None:
    inode = os.lstat(d / kind).st_ino
    os.rename(d / kind, d / "new")
    fails(errno.ENOENT, os.lstat, d / kind)
    assert os.lstat(d / "new").st_ino == inode
    os.rename(d / "new", d / kind)
    assert sorted(os.listdir(d)) == sorted(KINDS)


def deep(d: Path) -> None:
    os.makedirs(d / "a" / "b" / "c")
    write(d / "a" / "f", b"f")
    write(d / "a" / "b" / "g", b"g")
    write(d / "a" / "b" / "c" / "h", b"h")
    os.mkdir(d / "z")


@tree(deep)
def test_a_directory_takes_its_content_along(d: Path) -> None:
    """A rename of a (lower) directory is no EXDEV, and everything below moves."""
    os.rename(d / "a", d / "z" / "moved")
    assert read(d / "z" / "moved" / "b" / "c" / "h") == b"h"
    assert sorted(os.listdir(d / "z" / "moved")) == ["b", "f"]
    assert os.listdir(d) == ["z"]
    write(d / "z" / "moved" / "b" / "new", b"n")
    os.rename(d / "z" / "moved" / "b", d / "b2")
    assert sorted(os.listdir(d / "b2")) == ["c", "g", "new"]
    assert os.listdir(d / "z" / "moved") == ["f"]
    os.mkdir(d / "a")
    assert os.listdir(d / "a") == [], "a directory made where one was moved away is empty"


@tree(deep)
def test_a_chain_of_directory_renames(d: Path) -> None:
    """Renamed inside renamed: each step is found again by path."""
    os.rename(d / "a" / "b", d / "a" / "B")
    os.rename(d / "a", d / "A")
    os.rename(d / "A" / "B" / "c", d / "A" / "C")
    os.rename(d / "A", d / "a")
    assert read(d / "a" / "C" / "h") == b"h"
    assert read(d / "a" / "B" / "g") == b"g"
    assert sorted(os.listdir(d / "a")) == ["B", "C", "f"]
    assert os.listdir(d / "a" / "B") == ["g"]


@tree(deep)
def test_swap_of_two_directories_by_three_renames(d: Path) -> None:
    os.rename(d / "a", d / "t")
    os.rename(d / "z", d / "a")
    os.rename(d / "t", d / "z")
    assert os.listdir(d / "a") == []
    assert sorted(os.listdir(d / "z")) == ["b", "f"]


@tree(deep)
def test_rename_into_itself_is_einval(d: Path) -> None:
    for target in ("a/x", "a/b/x", "a/b/c/x", "a/b/c"):
        fails(errno.EINVAL, os.rename, d / "a", d / target)
    assert error_of(os.rename, d / "a" / "b", d / "a") == "ENOTEMPTY"
    fails(errno.ENOTEMPTY, os.rename, d / "z", d / "a")
    assert read(d / "a" / "b" / "c" / "h") == b"h"


@tree(deep)
def test_rename_onto_itself_changes_nothing(d: Path) -> None:
    os.rename(d / "a", d / "a")
    os.rename(d / "a" / "f", d / "a" / "f")
    assert read(d / "a" / "f") == b"f"


@tree(lambda d: [write(d / "f"), os.link(d / "f", d / "g")])
def test_rename_of_one_name_onto_another_of_the_same_file_does_nothing(d: Path) -> None:
    os.rename(d / "f", d / "g")
    assert sorted(os.listdir(d)) == ["f", "g"]
    assert os.stat(d / "f").st_nlink == 2


@tree(lambda d: [write(d / "f", b"f"), os.link(d / "f", d / "g"), write(d / "t", b"t"), os.link(d / "t", d / "u")])
def test_rename_over_one_of_two_links(d: Path) -> None:
    """The replaced file loses one link, the renamed one none."""
    os.rename(d / "f", d / "t")
    assert (read(d / "t"), read(d / "u"), read(d / "g")) == (b"f", b"t", b"f")
    assert [os.stat(d / n).st_nlink for n in ("t", "g", "u")] == [2, 2, 1]


@pytest.mark.parametrize("bad", [".", ".."])
def test_rename_of_dot_is_an_error(d: Path, bad: str) -> None:
    os.mkdir(d / "x")
    assert error_of(os.rename, f"{d}/x/{bad}", d / "y") in ("EBUSY", "EINVAL")
    assert error_of(os.rename, d / "x", f"{d}/x/{bad}") in ("EBUSY", "EINVAL", "ENOTEMPTY")


@tree(deep)
def test_an_open_file_follows_its_rename(d: Path) -> None:
    fd = os.open(d / "a" / "f", os.O_RDWR)
    os.rename(d / "a", d / "z" / "q")
    os.write(fd, b"F")
    os.close(fd)
    assert read(d / "z" / "q" / "f") == b"F"


@tree(lambda d: [write(d / "f", b"f"), write(d / "t", b"t")])
def test_a_replaced_file_stays_readable_while_open(d: Path) -> None:
    fd = os.open(d / "t", os.O_RDWR)
    os.rename(d / "f", d / "t")
    assert os.pread(fd, 10, 0) == b"t"
    os.pwrite(fd, b"T", 0)
    assert os.pread(fd, 10, 0) == b"T"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    assert read(d / "t") == b"f"


@flags_needed
@tree(pairs)
@pytest.mark.parametrize("target", KINDS)
def test_noreplace_never_replaces(d: Path, target: str) -> None:
    fails(errno.EEXIST, rename2, d / "from" / "file", d / "to" / target, RENAME_NOREPLACE)
    rename2(d / "from" / target, d / "to" / "new", RENAME_NOREPLACE)
    assert kind_of(d / "to" / "new") == kind_of(d / "to" / target)
    fails(errno.ENOENT, rename2, d / "from" / "missing", d / "to" / "other", RENAME_NOREPLACE)


@flags_needed
@tree(pairs)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_exchange_swaps_any_two(d: Path, source: str, target: str) -> None:
    one, two = d / "from" / source, d / "to" / target
    before = os.lstat(one), os.lstat(two)
    rename2(one, two, RENAME_EXCHANGE)
    after = os.lstat(one), os.lstat(two)
    assert (after[0].st_ino, after[1].st_ino) == (before[1].st_ino, before[0].st_ino)
    assert (after[0].st_mode, after[1].st_mode) == (before[1].st_mode, before[0].st_mode)
    assert sorted(os.listdir(d / "from")) == sorted(KINDS)


@flags_needed
@tree(deep)
def test_exchange_of_full_directories(d: Path) -> None:
    write(d / "z" / "only")
    rename2(d / "a", d / "z", RENAME_EXCHANGE)
    assert sorted(os.listdir(d / "z")) == ["b", "f"]
    assert os.listdir(d / "a") == ["only"]
    fails(errno.EINVAL, rename2, d / "z", d / "z" / "b", RENAME_EXCHANGE)
    fails(errno.EINVAL, rename2, d / "z" / "b", d / "z", RENAME_EXCHANGE)


@flags_needed
@tree(deep)
def test_exchange_needs_both(d: Path) -> None:
    fails(errno.ENOENT, rename2, d / "a", d / "missing", RENAME_EXCHANGE)
    fails(errno.EINVAL, rename2, d / "a", d / "z", RENAME_EXCHANGE | RENAME_NOREPLACE)


@flags_needed
def test_whiteout_flag_is_refused_or_leaves_nothing_visible(d: Path) -> None:
    """RENAME_WHITEOUT through a union: EINVAL, or the old name is simply gone."""
    if "plain" in str(d):
        pytest.skip("a plain filesystem makes a visible device")
    write(d / "f")
    result = error_of(rename2, d / "f", d / "g", RENAME_WHITEOUT)
    assert result in ("EINVAL", "EPERM", "")
    assert os.listdir(d) == (["g"] if result == "" else ["f"])


@tree(lambda d: [os.mkdir(d / "s"), os.chmod(d / "s", 0o1777), write(d / "s" / "theirs"), os.mkdir(d / "s" / "dir")])
def test_sticky_directories_protect_others_files(d: Path) -> None:
    """In a 1777 directory only the owner of file or directory renames or removes."""
    with acting_as(4321, 4321):
        fails(errno.EPERM, os.unlink, d / "s" / "theirs")
        fails(errno.EPERM, os.rmdir, d / "s" / "dir")
        fails(errno.EPERM, os.rename, d / "s" / "theirs", d / "s" / "mine")
        write(d / "s" / "own")
        fails(errno.EPERM, os.rename, d / "s" / "own", d / "s" / "theirs")
        os.rename(d / "s" / "own", d / "s" / "own2")
        os.unlink(d / "s" / "own2")
    assert sorted(os.listdir(d / "s")) == ["dir", "theirs"]


@tree(lambda d: [os.mkdir(d / "ro"), write(d / "ro" / "f"), os.mkdir(d / "rw"), os.chmod(d / "rw", 0o777)])
def test_rename_needs_both_directories_writable(d: Path) -> None:
    with acting_as(4321, 4321):
        fails(errno.EACCES, os.rename, d / "ro" / "f", d / "rw" / "f")
        write(d / "rw" / "g")
        fails(errno.EACCES, os.rename, d / "rw" / "g", d / "ro" / "g")


@tree(
    lambda d: [
        os.mkdir(d / "o"),
        os.chown(d / "o", 4321, 4321),
        os.chmod(d / "o", 0o700),
        os.mkdir(d / "o" / "sub"),
        os.mkdir(d / "p"),
        os.chmod(d / "p", 0o777),
    ]
)
def test_a_directory_one_cannot_write_cannot_change_parents(d: Path) -> None:
    """'..' of a moved directory changes, so it must be writable (POSIX); within its parent it may be renamed."""
    with acting_as(4321, 4321):
        fails(errno.EACCES, os.rename, d / "o" / "sub", d / "p" / "sub")
        os.rename(d / "o" / "sub", d / "o" / "sub2")


@tree(deep)
def test_dotdot_follows_a_moved_directory(d: Path) -> None:
    fd = os.open(d / "a" / "b", os.O_RDONLY)
    os.rename(d / "a" / "b", d / "z" / "b")
    parent = os.open("..", os.O_RDONLY, dir_fd=fd)
    assert os.fstat(parent).st_ino == os.stat(d / "z").st_ino
    os.close(parent)
    os.close(fd)


def test_many_renames_of_one_name(d: Path) -> None:
    """Write-new-then-rename, as editors and databases do, a hundred times."""
    for i in range(100):
        write(d / "new", str(i).encode())
        os.rename(d / "new", d / "it")
        assert read(d / "it") == str(i).encode()
    assert os.listdir(d) == ["it"]


@tree(lambda d: [make(k, d / k) for k in ("file", "dir")])
def test_rename_over_a_whiteout(d: Path) -> None:
    os.unlink(d / "file")
    os.rmdir(d / "dir")
    write(d / "x")
    os.mkdir(d / "y")
    os.rename(d / "x", d / "dir")
    os.rename(d / "y", d / "file")
    assert sorted(os.listdir(d)) == ["dir", "file"]
    assert os.listdir(d / "file") == []
