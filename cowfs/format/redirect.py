"""The *reference* of a redirect file: the xattr that names the file's base (docs/row.md).

Layout, little endian: ``<BBHQQQ`` version, log2 of the block size, flags, map id, base_end, st_blocks of the base; then the
base's path in the merged tree of the layers beneath, without leading slash.
"""

from __future__ import annotations

import errno
import os
import struct

from cowfs._record import record, replace
from cowfs.format.whiteout import Form
from cowfs.sys import xattr

__all__ = ["MAX_BLOCK", "MIN_BLOCK", "ROOT_MARK", "VERSION", "Ref", "bad", "check_block", "is_marked"]

VERSION = 1
MIN_BLOCK, MAX_BLOCK = 4096, 1 << 20
#: value of the reference's xattr on a layer's root: redirect files may be in here
ROOT_MARK = b"\x01root"

_REF = struct.Struct("<BBHQQQ")
assert _REF.size == 28
_HAS_MAP = 1  # flag


def bad(what: str, name: bytes) -> OSError:
    """The error for a damaged record."""
    return OSError(errno.EIO, f"bad redirect file: {what}", name)


def is_marked(root_fd: int, form: Form) -> bool:
    """Whether a layer, by its root's descriptor, may hold redirect files."""
    return xattr.try_get(root_fd, b"", form.row) is not None


def check_block(size: int) -> int:
    """The base-2 logarithm of a block size. Raises ValueError unless it is a power of two, 4 KiB to 1 MiB."""
    if size & (size - 1) or not MIN_BLOCK <= size <= MAX_BLOCK:
        raise ValueError(f"the block size is a power of two from 4096 to 1048576, not {size}")
    return size.bit_length() - 1


@record(frozen=True, slots=True)
class Ref:
    """The base of a redirect file, and its map.

    Attributes:
        map_id: names the map; 64 random bits.
        shift: log2 of the block size.
        base_end: from this byte on the base does not show.
        base_blocks: st_blocks of the base when the reference was made, 512-byte units.
        path: the base in the merged tree of the layers beneath.
        has_map: whether the map was made; without one no block is present.
    """

    map_id: int
    shift: int
    base_end: int
    base_blocks: int
    path: bytes
    has_map: bool = False

    @classmethod
    def make(cls, block: int, base_end: int, base_blocks: int, path: bytes, *, has_map: bool) -> Ref:
        """A reference with a fresh map id."""
        return cls(int.from_bytes(os.urandom(8)), check_block(block), base_end, base_blocks, path, has_map)

    def pack(self) -> bytes:
        """The xattr's value."""
        flags = _HAS_MAP if self.has_map else 0
        return _REF.pack(VERSION, self.shift, flags, self.map_id, self.base_end, self.base_blocks) + self.path

    @classmethod
    def unpack(cls, value: bytes, name: bytes = b"") -> Ref:
        """The inverse of :meth:`pack`.

        Raises:
            OSError: EIO for anything that :meth:`pack` does not make, a path that leads out included.
        """
        if len(value) <= _REF.size:
            raise bad("reference is cut short", name)
        version, shift, flags, map_id, base_end, blocks = _REF.unpack_from(value)
        path = value[_REF.size :]
        if version != VERSION:
            raise bad(f"reference of version {version}", name)
        if not MIN_BLOCK <= 1 << shift <= MAX_BLOCK or flags & ~_HAS_MAP or base_end >= 1 << 62 or blocks >= 1 << 62:
            raise bad("reference is damaged", name)
        if any(part in (b"", b".", b"..") for part in path.split(b"/")) or b"\0" in path:
            raise bad("reference names no path", name)
        return cls(map_id, shift, base_end, blocks, path, bool(flags & _HAS_MAP))

    def ending(self, base_end: int) -> Ref:
        """The same reference with less of the base."""
        return replace(self, base_end=base_end)

    def mapped(self) -> Ref:
        """The same reference with a map."""
        return replace(self, has_map=True)

    @property
    def map_name(self) -> bytes:
        """The map's file name."""
        return b"%016x" % self.map_id
