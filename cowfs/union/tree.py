"""Trees to read from, by path: a protocol for whoever copies or packs one, and a plain directory that keeps it.

Rule: no link is followed, and nothing outside of the tree is reached.
"""

from __future__ import annotations

import errno
import os
import stat as stat_module
from collections.abc import Iterator

from cowfs._record import record
from cowfs._typed import Protocol
from cowfs.sys import xattr
from cowfs.sys.files import data_ranges, open_beneath

__all__ = ["CHUNK", "DirTree", "LowerStat", "Tree", "resolve"]

CHUNK = 256 << 10
"""Bytes that are read at once."""

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


@record(frozen=True, slots=True, kw_only=True)
class LowerStat:
    """Attributes of one object in a tree: ``mode`` with its type bits, times in nanoseconds.

    ``ident`` is equal for two names of one file (hard links) where ``nlink`` is more than 1.
    """

    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    rdev: int = 0
    nlink: int = 1
    ident: object = None


class Tree(Protocol):
    """A merged tree to read from, by canonical path (``b""`` is its root); raises OSError.

    :class:`cowfs.union.view_tree.ViewTree` makes one of a :class:`cowfs.union.View`,
    :class:`DirTree` of a directory.
    """

    def stat(self, path: bytes) -> LowerStat | None:
        """Attributes, None where there is nothing."""

    def names(self, path: bytes) -> list[bytes]:
        """The entries of a directory, without ``.`` and ``..``, in any order."""

    def readlink(self, path: bytes) -> bytes: ...

    def xattrs(self, path: bytes) -> dict[bytes, bytes]: ...

    def read(self, path: bytes) -> Iterator[bytes]:
        """A regular file's bytes, in pieces."""

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """A regular file's bytes with the offset of each piece, in order and without its holes."""


MOST_LINKS = 40
"""Links that one path may lead through, as in the kernel (path_resolution(7))."""


def resolve(tree: Tree, path: bytes, *, last: bool = True) -> bytes:
    """The canonical path that a path leads to inside a tree, links followed as if its root were the root directory.

    Args:
        last: whether a link at the end is followed, too.

    Returns:
        A path of which nothing but the last name may be missing.

    Raises:
        OSError: ENOENT, ENOTDIR, ELOOP on the way.
    """
    todo = path.split(b"/")[::-1]
    done: list[bytes] = []
    links = 0
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            del done[-1:]
            continue
        here = b"/".join([*done, part])
        st = tree.stat(here)
        kind = st.mode & 0o170000 if st is not None else 0
        if kind == stat_module.S_IFLNK and (last or any(todo)):
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = tree.readlink(here)
            if target.startswith(b"/"):
                done = []
            todo += target.split(b"/")[::-1]
            continue
        if todo and kind != stat_module.S_IFDIR:
            if kind:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            if any(name not in (b"", b".") for name in todo):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        done.append(part)
    return b"/".join(done)


class DirTree:
    """A :class:`Tree` of an open directory.

    Args:
        fd: an open directory, stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def stat(self, path: bytes) -> LowerStat | None:
        try:
            handle = open_beneath(self._fd, path, os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        try:
            st = os.fstat(handle)
        finally:
            os.close(handle)
        return LowerStat(
            mode=st.st_mode, uid=st.st_uid, gid=st.st_gid, size=st.st_size, mtime=st.st_mtime_ns, rdev=st.st_rdev,
            nlink=st.st_nlink, ident=(st.st_dev, st.st_ino),
        )  # fmt: skip

    def _parent(self, path: bytes) -> tuple[int, bytes]:
        parent, _, name = path.rpartition(b"/")
        return open_beneath(self._fd, parent, os.O_PATH | os.O_DIRECTORY), name

    def names(self, path: bytes) -> list[bytes]:
        fd = open_beneath(self._fd, path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)

    def readlink(self, path: bytes) -> bytes:
        fd, name = self._parent(path)
        try:
            return os.readlink(name, dir_fd=fd)
        finally:
            os.close(fd)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        fd, name = self._parent(path)
        try:
            return xattr.read_all(fd, name)
        finally:
            os.close(fd)

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        fd = open_beneath(self._fd, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            for start, end in data_ranges(fd, os.fstat(fd).st_size):
                while start < end and (piece := os.pread(fd, min(CHUNK, end - start), start)):
                    yield start, piece
                    start += len(piece)
        finally:
            os.close(fd)

    def read(self, path: bytes) -> Iterator[bytes]:
        fd = open_beneath(self._fd, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while data := os.read(fd, CHUNK):
                yield data
        finally:
            os.close(fd)

    def opened(self, path: bytes, mode: str) -> int:
        """A descriptor of a regular file, opened in a mode of ``open`` without ``b`` and ``t``. Raises OSError."""
        how = {
            "r": os.O_RDONLY,
            "w": os.O_CREAT | os.O_TRUNC,
            "a": os.O_CREAT | os.O_APPEND,
            "x": os.O_CREAT | os.O_EXCL,
        }[mode[0]]
        writes = os.O_RDWR if "+" in mode else os.O_RDONLY if mode == "r" else os.O_WRONLY
        made = 0o644 if how & os.O_CREAT else 0
        return open_beneath(self._fd, path, how | writes | os.O_NOFOLLOW | os.O_NONBLOCK, made)
