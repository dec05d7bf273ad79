"""Nodes: one object for each file or directory that somebody looked at.

A node is found by its ``id``. While nobody holds it (``nlookup`` 0) it is dropped, and its entry in
the parent's ``children`` turns back into a small integer that says which layer has it: a
*code*. So memory follows what is in use, and a listing costs one integer an entry.

    code = position << 4 | type

``position`` counts the parent's sources from the bottom (so that copying a directory up, which
adds a source on top, changes no code) and ``type`` is the DT_* of readdir(3).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

from cowfs.union.filedata import PLAIN, FileData

if TYPE_CHECKING:
    from cowfs.union.layers import Source

DT_FIFO, DT_CHR, DT_DIR, DT_BLK, DT_REG, DT_LNK, DT_SOCK = 1, 2, 4, 6, 8, 10, 12


class Node:
    """A file of any type but directory.

    Attributes:
        id: never reused together with ``generation``.
        parent, name: one of its names; ``parent`` is ``None`` once the last name is gone.
        where: the layer directory that holds ``name``; ``None`` for an orphan (use ``fd``).
        type: DT_* of readdir(3).
        attr: the packed attributes, or ``None`` when they must be read again.
        nlookup: how often the front end handed the id out.
        bare: 1 when it is known to have no capability (the kernel asks at each first write and chown),
            2 when it has no xattr at all, 0 when nothing is known.
        fd: an open descriptor of the data, or -1.
        wfd: whether ``fd`` may be written.
        data: where the data is (:mod:`cowfs.union.filedata`); :data:`~cowfs.union.filedata.PLAIN` for all but regular files.
        space: data units of 4 KiB: int when dense, :class:`~cowfs.union.quota.Blocks` when not,
            ``None`` when not counted yet.
    """

    __slots__ = (
        "attr",
        "bare",
        "data",
        "fd",
        "generation",
        "id",
        "name",
        "nlookup",
        "parent",
        "space",
        "type",
        "wfd",
        "where",
    )

    def __init__(self, id: int, type: int, name: bytes, where: Source | None) -> None:
        self.id = id
        self.type = type
        self.name = name
        self.where = where
        self.parent: Dir | None = None
        self.attr: bytes | None = None
        self.bare = 0
        self.generation = 0
        self.nlookup = 0
        self.fd = -1
        self.wfd = False
        self.data: FileData = PLAIN
        self.space: Any = None

    def __repr__(self) -> str:
        return f"<{self.__class__.__name__} {self.id} {self.name!r}>"


class Dir(Node):
    """A directory.

    Attributes:
        sources: the layer directories merged here, topmost first.
        children: name -> node or code; ``None`` until first read.
        live: how many children are nodes that name this directory as their parent.
        order: names sorted by cookie while a listing is under way.
        lowpath: its path in the merged lower tree, when a rename made it differ.
        record: its record in a tree index, when the lower tree comes from one.
    """

    __slots__ = ("children", "live", "lowpath", "order", "record", "sources")

    def __init__(self, id: int, name: bytes, sources: list[Source]) -> None:
        super().__init__(id, DT_DIR, name, sources[0] if sources else None)
        self.sources = sources
        self.children: dict[bytes, Node | int] | None = None
        self.live = 0
        self.order: list[bytes] | None = None
        self.lowpath: bytes | None = None
        self.record: Any = None


def type_of(mode: int) -> int:
    """DT_* of a mode: the file type bits, shifted (as the kernel defines both)."""
    return stat.S_IFMT(mode) >> 12
