"""Nodes: one object for each file or directory that was looked up.

A node is found by its ``id``. Once its ``nlookup`` is 0 it is dropped, and its entry in
the parent's ``children`` turns back into a small integer with its layer: a
*code*. So memory follows what is in use, and a listing costs one integer an entry.

    code = position << 4 | type

``position`` counts the parent's sources from the bottom (so that copying a directory up, which
adds a source on top, changes no code) and ``type`` is the DT_* of readdir(3).

A node's ``data`` (:class:`FileData`) locates the data of a regular file; no caller tests its class. A kind of one
descriptor is read and written through that (``pieced`` is false); a pieced kind answers ``pread`` and ``pwrite`` itself.
Only data of the upper layer is written: a file of any other kind is copied up, or redirected, before.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cowfs.union.layers import Layer, Source

DT_FIFO, DT_CHR, DT_DIR, DT_BLK, DT_REG, DT_LNK, DT_SOCK = 1, 2, 4, 6, 8, 10, 12


def _unsupported() -> OSError:
    return OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class FileData(ABC):
    """The data of one file.

    Attributes:
        pieced: no single descriptor has the data; :meth:`pread` reads it.
        stays: the node keeps it for as long as it is in use, whatever is found under its name meanwhile.
    """

    __slots__ = ()

    pieced = False
    stays = False

    @property
    @abstractmethod
    def home(self) -> Layer | None:
        """The layer of the file that has the data; ``None`` for the layer of the node itself."""

    @property
    @abstractmethod
    def path(self) -> bytes | None:
        """The path in the merged lower tree for a metacopy's ``redirect``; ``None`` for other data."""

    @abstractmethod
    def place(self) -> tuple[Source, bytes] | None:
        """The file that has the data: its directory in a layer, its name; ``None`` if the node has them."""

    @abstractmethod
    def shown(self, st: os.stat_result) -> tuple[int, int]:
        """(size in bytes, blocks of 512) to show, given the node's own lstat."""

    @property
    def writable(self) -> bool:
        """Whether it is pieced data of the upper layer, which :meth:`pwrite` changes where it is."""
        return False

    # -- the life of a node -----------------------------------------------------------------------

    def bind(self, node: Node) -> None:  # noqa: B027 - most kinds have nothing to do here
        """The node whose data this is."""

    def close(self) -> None:  # noqa: B027 - most kinds have nothing to do here
        """Release descriptors when the node goes, or gets other data."""

    def rebase(self) -> None:  # noqa: B027 - most kinds have nothing to do here
        """Handle the replacement of the layers beneath, which have the same data."""

    def in_layers(self, layers: set[Layer]) -> bool:
        """Whether any of the data is in one of some layers."""
        return self.home in layers

    def found_at(self) -> object:
        """Equal for two of one kind that are found at the same place."""
        there = self.place()
        return None if there is None else (there[0].layer, there[0].path(), there[1])

    # -- pieced data ------------------------------------------------------------------------------

    def own_fd(self) -> int:
        """The descriptor of the file in the upper layer (do not close it). Pieced data only."""
        raise _unsupported()

    def pread(self, offset: int, buffer: memoryview, flags: int = 0) -> int:
        """Read into ``buffer``; fewer bytes only at the end. Pieced data only.

        Raises:
            OSError: EIO; EAGAIN with ``flags`` RWF_NOWAIT if the read would wait for the disk.
        """
        raise _unsupported()

    def reader(self, offset: int, length: int) -> Callable[[memoryview], int] | None:
        """A read to run once in any thread, without concurrent writes; ``None``: by descriptor."""
        return None

    def stream(self, offset: int, length: int) -> Callable[[memoryview], int] | None:
        """:meth:`reader` for a read in sequence."""
        return None

    def lseek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE. Pieced data only. Raises ENXIO past the end."""
        raise _unsupported()

    def pwrite(self, offset: int, data: memoryview | bytes) -> int:
        """Write; short where the limit or the host's space ends. Writable data only. Raises ENOSPC, EFBIG."""
        raise _unsupported()

    def truncate(self, size: int) -> None:
        """Set the size. Writable data only."""
        raise _unsupported()

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). Writable data only."""
        raise _unsupported()

    def sync_job(self) -> Callable[[bool], None] | None:
        """The work of fsync(2), to run once in any thread (True: fdatasync(2) will do); ``None``: by descriptor."""
        return None


class Plain(FileData):
    """Data in the inode itself. The only instance is :data:`PLAIN`."""

    __slots__ = ()

    @property
    def home(self) -> None:
        return None

    @property
    def path(self) -> None:
        return None

    def place(self) -> None:
        return None

    def shown(self, st: os.stat_result) -> tuple[int, int]:
        return st.st_size, st.st_blocks


PLAIN: FileData = Plain()


class Node:
    """A file of any type but directory.

    Attributes:
        id: never reused together with ``generation``.
        parent, name: one of its names; ``parent`` is ``None`` once the last name is gone.
        where: the layer directory that holds ``name``; ``None`` for an orphan (use ``fd``).
        type: DT_* of readdir(3).
        attr: the packed attributes, or ``None`` when they must be read again.
        nlookup: the number of times that the front end handed out the id.
        bare: 1 when it is known to have no capability (the kernel asks at each first write and chown),
            2 when it has no xattr at all, 0 when nothing is known.
        fd: an open descriptor of the data, or -1.
        wfd: whether ``fd`` may be written.
        data: the place of the data (:class:`FileData`); :data:`PLAIN` for all but regular files.
        space: data units of 4 KiB: int when dense, :class:`~cowfs.union.blocks.Blocks` when not,
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
        live: the number of children that are nodes with this directory as their parent.
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


def at(node: Node) -> tuple[int, bytes]:
    """(directory descriptor, name) of an inode; the name is empty when the descriptor is it."""
    if isinstance(node, Dir):
        return node.sources[0].open(), b""
    if node.where is None or (node.wfd and node.fd >= 0 and node.data is PLAIN):
        return node.fd, b""
    return node.where.open(), node.name
