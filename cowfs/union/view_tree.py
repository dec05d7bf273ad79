"""A merged view as a tree to read from, by path.

Strategy. Export and apply need little of a tree and not fast: attributes, names, contents. Paths
are resolved from the deepest directory known, so a walk in order costs one look-up a name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from cowfs.union import attributes, content
from cowfs.union.attr import unpack
from cowfs.union.node import Dir, Node
from cowfs.union.tree import CHUNK, LowerStat
from cowfs.union.view import View

__all__ = ["ViewTree"]

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
        return {name: attributes.getxattr(self._view, node, name) for name in attributes.listxattr(self._view, node)}

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        node = self._node(path)
        for start, end in content.data_ranges(self._view, node):
            while start < end:
                buffer = bytearray(min(CHUNK, end - start))
                count = content.pread(self._view, node, start, memoryview(buffer))
                if not count:
                    break
                yield start, bytes(buffer[:count])
                start += count

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
