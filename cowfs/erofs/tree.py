"""The records that make up an image; a :class:`Source` gives them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from cowfs._record import record
from cowfs._typed import Any, Protocol

__all__ = ["Chunk", "Device", "Inode", "Map", "Source"]

Chunk = tuple[int, int] | bytes | None
"""(device, block), where device 1 is the first of the image's devices; bytes that the image itself holds; None: a hole."""


@record(frozen=True, slots=True)
class Map:
    """The blocks of a regular file's data.

    Attributes:
        bits: a chunk has ``4096 << bits`` bytes; the last one may be short.
        chunks: of the file, in order; read once.
    """

    bits: int
    chunks: Sequence[Chunk]


@record(frozen=True, slots=True, kw_only=True)
class Inode:
    """One object of a tree.

    Attributes:
        mode: type and permission bits as in ``st_mode``.
        uid, gid: the owner's ids.
        size: of a regular file; the size of other types follows from their content.
        mtime_ns: nanoseconds since 1970, may be negative.
        nlink: the number of its names; of a directory 2 plus its sub-directories.
        rdev: (major, minor) of a device.
        target: of a symbolic link.
        xattrs: full names and values.
        link: equal for all names of one file, and for nothing else; None where there is one name.
        data: of a regular file; None: the whole file is a hole (its data is elsewhere, or it has none).
    """

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    nlink: int = 1
    rdev: tuple[int, int] = (0, 0)
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    link: Hashable | None = None
    data: Map | None = None


@record(frozen=True, slots=True)
class Device:
    """A file that holds data for an image: its size in ``blocks`` of 4,096 bytes, and a ``tag`` of 64 bytes that identifies it."""

    blocks: int
    tag: bytes = b""


class Source(Protocol):
    """A tree. A directory is named by a key of the source's own choice."""

    def root(self) -> tuple[Inode, Any]:
        """(the root, its key)."""

    def entries(self, key: Any) -> Iterator[tuple[bytes, Inode, Any]]:
        """(name, object, its key or None) of each entry, sorted by the bytes of the names; each key is asked twice at most."""

    def names(self, key: Any) -> Iterator[bytes]:
        """The names of the directory ``key``, in the order of :meth:`entries`; they give its size before its entries are needed."""
