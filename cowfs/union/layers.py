"""The real places of objects: layers, and their directories.

A :class:`Source` is one directory of one layer. Sources form a tree for each layer, apart from
the merged tree: renaming a directory of the upper layer moves its Source, and the Sources of
read-only layers never move. Every access to a file is *one name relative to a Source's
descriptor*, so no path is ever resolved twice and no symbolic link is ever followed.

Descriptors: a Source opens its O_PATH descriptor when first used. No descriptor that an operation may hold is closed in
its middle; :meth:`Descriptors.trim` runs between operations and closes the oldest above the budget
(:mod:`cowfs.sys.descriptors`).
"""

from __future__ import annotations

import os
from itertools import islice

#: of a chain of directories that had to be opened, so many stay open at least
_STAY = 16
#: beside a layer's root: the maps of its redirect files (cowfs.row.map)
MAP_DIR = b"../map"
#: The flags for a directory on the way, which is passed through and never read.
WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Descriptors:
    """A first-in, first-out budget of directory descriptors.

    Owner: the view's thread.

    Attributes:
        budget: the number that may stay open between operations.
        most_kept: the number of removed directories held by a descriptor alone.
        opened: open ones that can be opened again.
        kept: removed directories that are still in use; only their descriptor leads to them.
    """

    __slots__ = ("budget", "kept", "most_kept", "opened")

    def __init__(self, budget: int = 256, most_kept: int = 0) -> None:
        self.budget = budget
        self.most_kept = most_kept
        self.opened: dict[Source, None] = {}
        self.kept: set[Source] = set()

    def trim(self) -> None:
        """Close the oldest descriptors above the budget, and some more, so that this is seldom. Only between operations."""
        opened = self.opened
        if len(opened) > self.budget:
            for source in list(islice(opened, len(opened) - self.budget + self.budget // 8)):
                source.close()

    def close_all(self) -> None:
        """Close every descriptor that can be opened again. Only between operations."""
        for source in list(self.opened):
            source.close()

    def keep(self, source: Source) -> None:
        """Keep the descriptor of a directory that is about to lose its name, until :meth:`Source.close`."""
        source.open()
        self.opened.pop(source, None)
        self.kept.add(source)

    @property
    def full(self) -> bool:
        """Whether one more removed directory should keep a name in the work directory."""
        return len(self.kept) >= self.most_kept


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
        return fd if fd >= 0 else self._open()

    def _open(self) -> int:
        """Open the closed directories on the way here, from the top down; only the end of a long way stays open."""
        closed = [self]
        above = self.parent
        assert above is not None
        while above.fd < 0:
            closed.append(above)
            above = above.parent
            assert above is not None
        fd, opened = above.fd, self.descriptors.opened
        stay = max(_STAY, self.descriptors.budget // 4)
        for position in range(len(closed) - 1, -1, -1):
            source = closed[position]
            source.fd = fd = os.open(source.name, WALK, dir_fd=fd)
            opened[source] = None
            if position + stay < len(closed):
                closed[position + stay].close()
        return fd

    def adopt(self, fd: int) -> None:
        """Take over an open descriptor of this directory."""
        self.fd = fd
        self.descriptors.opened[self] = None

    def close(self) -> None:
        """Close the descriptor; the next use opens it again, unless the directory was removed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.descriptors.opened.pop(self, None)
            self.descriptors.kept.discard(self)
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
