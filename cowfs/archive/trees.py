"""Trees to read from: a merged view, or a directory, by path.

Strategy. Export and apply need little of a tree and not fast: attributes, names, contents. Paths
are resolved from the deepest directory known, so a walk in order costs one look-up a name.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import Any

from cowfs.archive.compress import CHUNK
from cowfs.archive.options import LowerStat
from cowfs.sys import xattr
from cowfs.sys.files import open_beneath

__all__ = ["DirTree", "ViewTree"]

# struct fuse_attr: ino size blocks, three times, their nanoseconds, mode nlink uid gid rdev blksize flags
_ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
_ABSENT = (FileNotFoundError, NotADirectoryError)


def _rdev(packed: int) -> int:
    """The kernel's 32-bit device encoding (include/linux/kdev_t.h) as os.makedev gives it."""
    return os.makedev((packed & 0xFFF00) >> 8, (packed & 0xFF) | ((packed >> 12) & 0xFFF00))


class ViewTree:
    """A :class:`cowfs.union.View` (or what looks like one) by path. For one thread, the view's owner."""

    def __init__(self, view: Any) -> None:
        self._view = view
        self._dirs: dict[bytes, Any] = {b"": view.root}

    def _node(self, path: bytes) -> Any:
        found = self._dirs.get(path)
        if found is not None:
            return found
        parent, _, name = path.rpartition(b"/")
        above = self._node(parent)
        node = self._view.lookup(above, name)
        if stat.S_ISDIR(_ATTR.unpack(self._view.attr(node))[9]):
            if len(self._dirs) > 4096:
                self._dirs = {b"": self._view.root}
            self._dirs[path] = node
        return node

    def stat(self, path: bytes) -> LowerStat | None:
        try:
            node = self._node(path)
        except _ABSENT:
            return None
        ino, size, _, _, mtime, _, _, mtimensec, _, mode, nlink, uid, gid, rdev, _, _ = _ATTR.unpack(
            self._view.attr(node)
        )
        return LowerStat(
            mode=mode, uid=uid, gid=gid, size=size, mtime=mtime * 1_000_000_000 + mtimensec, rdev=_rdev(rdev),
            nlink=nlink, ident=ino,
        )  # fmt: skip

    def names(self, path: bytes) -> list[bytes]:
        return [entry[0] for entry in self._view.listing(self._node(path), 0) if entry[0] not in (b".", b"..")]

    def readlink(self, path: bytes) -> bytes:
        target: bytes = self._view.readlink(self._node(path))
        return target

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        node = self._node(path)
        return {name: self._view.getxattr(node, name) for name in self._view.listxattr(node)}

    def read(self, path: bytes) -> Iterator[bytes]:
        node = self._node(path)
        offset = 0
        while True:
            buffer = bytearray(CHUNK)
            count = self._view.pread(node, offset, memoryview(buffer))
            if not count:
                return
            yield bytes(buffer[:count])
            offset += count


class DirTree:
    """A plain directory by path; nothing is followed, nothing outside is reached.

    Args:
        fd: an open directory, stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def stat(self, path: bytes) -> LowerStat | None:
        try:
            handle = open_beneath(self._fd, path, os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if isinstance(error, _ABSENT) or error.errno == 40:
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

    def read(self, path: bytes) -> Iterator[bytes]:
        fd = open_beneath(self._fd, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while data := os.read(fd, CHUNK):
                yield data
        finally:
            os.close(fd)
