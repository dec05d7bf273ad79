"""A plain directory as a tree to read from, by path; nothing is followed, nothing outside is reached."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from cowfs.archive.decode import CHUNK
from cowfs.archive.options import LowerStat
from cowfs.sys import xattr
from cowfs.sys.files import data_ranges, open_beneath

__all__ = ["DirTree"]

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class DirTree:
    """A :class:`~cowfs.archive.options.Tree` of an open directory.

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
