"""The limit holds for what the host stores, whatever it is stored as (docs/mounts.md, Limits).

For each kind of thing that takes room, one mount makes as many as it is allowed. Then the host's own free blocks say what
it holds: at most the limit, 64 KiB, and as much again as is counted. And a remount counts the same.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import hostfs, layers, limits, mounts

LIMIT = 1 << 20
ALLOWANCE = 64 << 10
MANY = 6_500


def held(directory: Path) -> int:
    """Bytes that the host does not have free, all of them written back."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.sync()
        status = os.fstatvfs(fd)
    finally:
        os.close(fd)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def acl(users: int) -> bytes:
    """A POSIX ACL in the form of its xattr (include/uapi/linux/posix_acl_xattr.h), with so many named users."""
    entries = [
        (1, 7, 0xFFFFFFFF),
        *((2, 7, 1000 + n) for n in range(users)),
        (4, 5, 0xFFFFFFFF),
        (0x10, 7, 0xFFFFFFFF),
        (0x20, 5, 0xFFFFFFFF),
    ]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def small_xattrs(p: Path) -> Iterator[Callable[..., Any]]:
    for number in range(MANY):
        path = p / f"{number}"
        yield lambda path=path: path.touch()
        for size in (60, 200, 900):
            yield lambda path=path, size=size: os.setxattr(path, f"user.{size}", os.urandom(size))


def large_xattrs(p: Path) -> Iterator[Callable[..., Any]]:
    for number in range(MANY):
        path = p / f"{number}"
        yield lambda path=path: path.touch()
        for size in (2100, 3900, 30_000, 65_000):
            yield lambda path=path, size=size: os.setxattr(path, f"user.{size}", os.urandom(size))


def many_xattrs(p: Path) -> Iterator[Callable[..., Any]]:
    for number in range(8):
        path = p / f"{number}"
        yield lambda path=path: path.touch()
        for count in range(1200):
            yield lambda path=path, count=count: os.setxattr(path, f"user.{count:06}" + "k" * 100, os.urandom(300))


def inherited_acls(p: Path) -> Iterator[Callable[..., Any]]:
    for users in (4, 12, 40, 300):
        top = p / f"{users}"
        yield lambda top=top: top.mkdir()
        yield lambda top=top, users=users: os.setxattr(top, "system.posix_acl_default", acl(users))
        for number in range(MANY // 8):
            yield lambda top=top, number=number: (top / f"f{number}").touch()
            yield lambda top=top, number=number: (top / f"d{number}").mkdir()


def symlinks(p: Path) -> Iterator[Callable[..., Any]]:
    for number in range(MANY):
        yield lambda number=number: os.symlink("x" * (30, 59, 60, 200, 1000, 4000)[number % 6], p / f"s{number}")


def hard_links(p: Path) -> Iterator[Callable[..., Any]]:
    yield (p / "one").touch
    for number in range(MANY):
        yield lambda number=number: os.link(p / "one", p / (f"{number:06}" + "n" * 240))


def files(p: Path) -> Iterator[Callable[..., Any]]:
    for number in range(MANY):
        yield lambda number=number: (p / f"{number:06}{'e' * (number % 200)}").touch()


def grown_directories(p: Path) -> Iterator[Callable[..., Any]]:
    """Filled, then emptied: some hosts never take back a directory's blocks."""
    for number in range(60):
        top = p / f"{number}"
        yield lambda top=top: top.mkdir()
        for name in range(400):
            yield lambda top=top, name=name: (top / (f"{name:04}" + "n" * 200)).touch()
        for name in range(400):
            yield lambda top=top, name=name: (top / (f"{name:04}" + "n" * 200)).unlink(missing_ok=True)


def directories(p: Path) -> Iterator[Callable[..., Any]]:
    for number in range(MANY):
        yield lambda number=number: (p / f"{number}").mkdir()


def whiteouts(p: Path) -> Iterator[Callable[..., Any]]:
    for name in sorted(os.listdir(p / "flat")):
        yield (p / "flat" / name).unlink


def parents_for_whiteouts(p: Path) -> Iterator[Callable[..., Any]]:
    for name in sorted(os.listdir(p / "tree")):
        yield (p / "tree" / name / "file").unlink


def moved_files(p: Path) -> Iterator[Callable[..., Any]]:
    (p / "here").mkdir()
    for name in sorted(os.listdir(p / "flat")):
        yield lambda name=name: os.rename(p / "flat" / name, p / "here" / name)


def changed_modes(p: Path) -> Iterator[Callable[..., Any]]:
    for name in sorted(os.listdir(p / "tree")):
        yield lambda name=name: os.chmod(p / "tree" / name / "file", 0o600)


def data(p: Path) -> Iterator[Callable[..., Any]]:
    for number in range(MANY):
        yield lambda number=number: (p / f"{number}").write_bytes(os.urandom(1 + 700 * (number % 9)))


def maps(p: Path) -> Iterator[Callable[..., Any]]:
    """One byte of each file: a block of data, and a map."""
    for name in sorted(os.listdir(p / "big")):
        for place in (0, 9000):
            yield lambda name=name, place=place: _store(p / "big" / name, place)


def _store(path: Path, place: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, b"x", place)
    finally:
        os.close(fd)


KINDS = {
    function.__name__: function
    for function in (
        small_xattrs, large_xattrs, many_xattrs, inherited_acls, symlinks, hard_links, files, grown_directories,
        directories, whiteouts, parents_for_whiteouts, moved_files, changed_modes, data, maps,
    )
}  # fmt: skip


#: so many whiteouts that the allowance for them is used up
BOUNDED = ("whiteouts", "parents_for_whiteouts", "moved_files")


def lower_for(kind: str, base: Path) -> layers.Layer:
    lower = layers.Layer(base / "lower")
    if kind in ("whiteouts", "moved_files"):
        (lower.path / "flat").mkdir()
        for number in range(MANY):
            (lower.path / "flat" / f"{number:06}{'w' * 200}").touch()
    if kind in ("parents_for_whiteouts", "changed_modes"):
        for number in range(1500):
            (lower.path / "tree" / f"{number}").mkdir(parents=True)
            (lower.path / "tree" / f"{number}" / "file").write_bytes(b"x")
    if kind == "maps":
        (lower.path / "big").mkdir()
        for number in range(400):
            (lower.path / "big" / f"{number}").write_bytes(bytes([1 + number % 255]) * 12_288)
    return lower


def as_many_as_allowed(path: Path, kind: str) -> tuple[int, int]:
    """(done, refused)"""
    done = refused = in_a_row = 0
    for step in KINDS[kind](path):
        try:
            step()
            done, in_a_row = done + 1, 0
        except FileNotFoundError:
            continue  # what was refused before
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.E2BIG, errno.EMLINK, errno.ENAMETOOLONG):
                raise
            refused, in_a_row = refused + 1, in_a_row + 1
            if in_a_row > 300:
                break
    return done, refused


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_holds_no_more_than_the_limit_and_the_allowance(fs: hostfs.HostFs, kind: str) -> None:
    base = fs.fresh(kind)
    lower = lower_for(kind, base)
    more: dict[str, Any] = {"size": LIMIT} | ({"row": 4096} if kind == "maps" else {})
    with mounts.mounted("kernel", [lower], base, **more):
        pass
    before = held(base)
    with mounts.mounted("kernel", [lower], base, **more) as m:
        done, refused = as_many_as_allowed(m.path, kind)
        usage = m.handle.usage()
        assert (usage.bytes, usage.inodes) == limits.measure(base / "upper"), "counted otherwise by a second opinion"
    after = held(base)
    assert done
    assert usage.bytes <= LIMIT
    assert after - before <= LIMIT + ALLOWANCE + usage.bytes, (
        f"{fs.name}: {done} done, {refused} refused, the host holds {after - before}, counted {usage.bytes}"
    )
    with mounts.mounted("kernel", [lower], base, **more) as again:
        assert again.handle.usage() == usage
        if kind not in BOUNDED:
            for entry in list(os.scandir(again.path)):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
            assert os.listdir(again.path) == []
    shutil.rmtree(base)


def countless_xattrs(path: Path) -> None:
    """More names than listxattr(2) can list (65,536 bytes), straight on the host."""
    path.touch()
    for number in range(400):
        os.setxattr(path, f"user.{number:06}" + "k" * 200, b"v")
    with pytest.raises(OSError, match="Argument list too long"):
        os.listxattr(path)


@pytest.mark.parametrize("limit", [{}, {"size": LIMIT}], ids=["no limit", "a limit"])
def test_a_mount_lets_no_more_xattrs_in_than_can_be_listed(space: Path, limit: dict[str, Any]) -> None:
    lower = lower_for("", space)
    with mounts.mounted("kernel", [lower], space, **limit) as m:
        for name in ("file", "directory"):
            path = m.path / name
            path.touch() if name == "file" else path.mkdir()
            with pytest.raises(OSError, match="No space left on device"):
                for number in range(3000):
                    os.setxattr(path, f"user.{number:06}" + "k" * 200, b"v")
            assert len(os.listxattr(path)) > 290
            os.setxattr(path, f"user.{0:06}" + "k" * 200, b"another")
            os.rename(path, path.with_suffix(".moved"))
        used = m.handle.usage()
    with mounts.mounted("kernel", [lower], space, **limit) as again:
        assert again.handle.usage() == used
        os.unlink(again.path / "file.moved")
        os.rmdir(again.path / "directory.moved")
        assert (again.handle.usage().bytes, again.handle.usage().inodes) == (0, 0)


@pytest.mark.parametrize("limit", [{}, {"size": LIMIT}], ids=["no limit", "a limit"])
@pytest.mark.parametrize("where", ["upper", "lower"])
def test_an_inode_with_countless_xattrs_stops_neither_a_mount_nor_a_deletion(
    space: Path, limit: dict[str, Any], where: str
) -> None:
    lower = lower_for("", space)
    (space / "upper").mkdir()
    for name in ("file", "replaced", "directory/inside"):
        (space / where / name).parent.mkdir(exist_ok=True)
        countless_xattrs(space / where / name)
    with mounts.mounted("kernel", [lower], space, **limit) as m:
        assert m.handle.usage().bytes >= 0
        (m.path / "new").write_bytes(b"new")
        os.rename(m.path / "new", m.path / "replaced")
        os.unlink(m.path / "file")
        shutil.rmtree(m.path / "directory")
        assert os.listdir(m.path) == ["replaced"]
        used = m.handle.usage()
    with mounts.mounted("kernel", [lower], space, **limit) as again:
        assert os.listdir(again.path) == ["replaced"]
        assert again.handle.usage() == used
