"""Trees to read from: a merged view, or a directory, by path.

Strategy. Export and apply need little of a tree and not fast: attributes, names, contents. Paths
are resolved from the deepest directory known, so a walk in order costs one look-up a name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from cowfs.archive.compress import CHUNK
from cowfs.archive.options import LowerStat
from cowfs.sys import xattr
from cowfs.sys.files import open_beneath
from cowfs.union import content, metadata
from cowfs.union.attr import unpack
from cowfs.union.node import Dir, Node
from cowfs.union.view import View

__all__ = ["DirTree", "ViewTree"]

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class ViewTree:
    """A :class:`cowfs.union.View` by path. For one thread, the view's owner."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._dirs: dict[bytes, Dir] = {b"": view.root}

    def _node(self, path: bytes) -> Node:
        found = self._dirs.get(path)
        if found is not None:
            return found
        parent, _, name = path.rpartition(b"/")
        node = self._view.lookup(self._dir(parent), name)
        if isinstance(node, Dir):
            if len(self._dirs) > 4096:
                self._dirs = {b"": self._view.root}
            self._dirs[path] = node
        return node

    def _dir(self, path: bytes) -> Dir:
        node = self._node(path)
        if not isinstance(node, Dir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def stat(self, path: bytes) -> LowerStat | None:
        try:
            node = self._node(path)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
        attr = unpack(self._view.attr(node))
        return LowerStat(
            mode=attr.mode, uid=attr.uid, gid=attr.gid, size=attr.size, mtime=attr.mtime_ns, rdev=attr.rdev,
            nlink=attr.nlink, ident=attr.ino,
        )  # fmt: skip

    def names(self, path: bytes) -> list[bytes]:
        return [name for name, _ in self._view.listing(self._dir(path)) if name not in (b".", b"..")]

    def readlink(self, path: bytes) -> bytes:
        return content.readlink(self._view, self._node(path))

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        node = self._node(path)
        return {name: metadata.getxattr(self._view, node, name) for name in metadata.listxattr(self._view, node)}

    def read(self, path: bytes) -> Iterator[bytes]:
        node = self._node(path)
        offset = 0
        while True:
            buffer = bytearray(CHUNK)
            count = content.pread(self._view, node, offset, memoryview(buffer))
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

    def read(self, path: bytes) -> Iterator[bytes]:
        fd = open_beneath(self._fd, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while data := os.read(fd, CHUNK):
                yield data
        finally:
            os.close(fd)
