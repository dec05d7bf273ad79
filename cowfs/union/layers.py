"""Where things really are: layers, and their directories.

A :class:`Source` is one directory of one layer. Sources form a tree for each layer, apart from
the merged tree: renaming a directory of the upper layer moves its Source, and the Sources of
read-only layers never move. Every access to a file is *one name relative to a Source's
descriptor*, so no path is ever resolved twice and no symbolic link is ever followed.

Descriptors: a Source opens its O_PATH descriptor when first used. Nothing is closed in the
middle of an operation, since an operation may hold several; :meth:`Descriptors.trim` runs
between operations and closes the oldest above the budget.
"""

from __future__ import annotations

import os
import resource
from collections import deque

#: beside a layer's root: the maps of its redirect files (cowfs.row.map)
MAP_DIR = b"../map"
#: How a directory on the way is opened: to be gone through, never to be read.
WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Descriptors:
    """A first-in, first-out budget of directory descriptors.

    Owner: the view's thread.
    """

    __slots__ = ("budget", "opened")

    def __init__(self, budget: int | None = None) -> None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.budget = budget or max(16, min(4096, soft // 4))
        self.opened: deque[Source] = deque()

    def trim(self) -> None:
        """Close the oldest descriptors above the budget. Only between operations."""
        opened = self.opened
        while len(opened) > self.budget:
            opened.popleft().close()


class Layer:
    """One layer: a directory on a host file system.

    Attributes:
        index: its place, 0 at the bottom.
        dev: st_dev of its root.
    """

    __slots__ = ("dev", "index", "path", "root", "xwhiteouts")

    def __init__(self, path: bytes, index: int, descriptors: Descriptors) -> None:
        self.path = path
        self.index = index
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.dev = os.fstat(fd).st_dev
        self.root = Source(self, None, b"", descriptors)
        self.root.fd = fd
        self.xwhiteouts = False

    def close(self) -> None:
        """Close the root's descriptor."""
        self.root.close()


class Source:
    """One directory of one layer.

    Attributes:
        fd: its O_PATH descriptor, or -1 while closed; use :meth:`open`.
        whiteouts: names deleted here (kept for the upper layer only).
        shadow: names here that would show something of a lower layer if removed (upper only).
        impure: whether entries here may carry ``origin`` (upper only).
        marked: whether it is known that the directory says so.
        default_acl: whether new entries inherit an ACL; ``None`` while unknown.
    """

    __slots__ = (
        "default_acl",
        "descriptors",
        "fd",
        "impure",
        "layer",
        "marked",
        "name",
        "parent",
        "shadow",
        "whiteouts",
    )

    def __init__(self, layer: Layer, parent: Source | None, name: bytes, descriptors: Descriptors) -> None:
        self.layer = layer
        self.parent = parent
        self.name = name
        self.fd = -1
        self.descriptors = descriptors
        self.whiteouts: set[bytes] | None = None
        self.shadow: set[bytes] | None = None
        self.impure = False
        self.marked = False
        self.default_acl: bool | None = None

    def open(self) -> int:
        """The descriptor, opened when need be. Raises OSError when the directory is gone."""
        fd = self.fd
        if fd < 0:
            parent = self.parent
            assert parent is not None
            fd = os.open(self.name, WALK, dir_fd=parent.fd if parent.fd >= 0 else parent.open())
            self.fd = fd
            self.descriptors.opened.append(self)
        return fd

    def adopt(self, fd: int) -> None:
        """Take over a descriptor that somebody opened for this directory."""
        self.fd = fd
        self.descriptors.opened.append(self)

    def close(self) -> None:
        """Close the descriptor; the next use opens it again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def child(self, name: bytes) -> Source:
        """A Source for a sub-directory; nothing is opened."""
        return Source(self.layer, self, name, self.descriptors)

    def path(self) -> bytes:
        """The path inside the layer, without a leading slash."""
        parts = []
        here: Source | None = self
        while here is not None and here.parent is not None:
            parts.append(here.name)
            here = here.parent
        return b"/".join(reversed(parts))


def lstat(source: Source, name: bytes) -> os.stat_result | None:
    """lstat of a name in a Source; ``None`` when there is none."""
    try:
        return os.stat(name, dir_fd=source.fd if source.fd >= 0 else source.open(), follow_symlinks=False)
    except FileNotFoundError:
        return None
