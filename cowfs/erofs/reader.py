"""Reads an image back: the same records that :mod:`~cowfs.erofs.writer` was given. For ``check``, and for tests.

Every field of the image is checked before use: a damaged image is :class:`~cowfs.errors.Corrupt`, never a read
outside of it or a loop.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator

from cowfs._typed import NamedTuple
from cowfs.erofs import layout
from cowfs.erofs.layout import BLOCK, DIRENT, INODE, SLOT, XATTR_ENTRY, XATTR_HEADER
from cowfs.erofs.tree import Chunk, Device, Inode, Map
from cowfs.errors import Corrupt

__all__ = ["Image"]


class _Raw(NamedTuple):
    """The fixed part of an inode, and the offset of the data behind it."""

    data: int
    xattrs: int
    mode: int
    size: int
    union: int
    uid: int
    gid: int
    mtime_ns: int
    nlink: int
    end: int


class Image:
    """An image, as a :class:`~cowfs.erofs.tree.Source` whose keys are inode numbers.

    Args:
        fd: the file; it stays the caller's.

    Attributes:
        inodes: the number that its superblock has.
        devices: the files that its maps refer to.
        end: the image's length in bytes; the file may be longer.
        uuid: 16 bytes.

    Raises:
        Corrupt: it is no image of the kind that cowfs writes, or it is damaged.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size
        block = self._read(layout.SUPER_OFFSET, BLOCK - layout.SUPER_OFFSET)
        (magic, checksum, _, bits, _, root, self.inodes, _, _, blocks, meta, self._xattrs, self.uuid, _, incompat,
         _, devices, table, *_) = layout.SUPER.unpack_from(block)  # fmt: skip
        if magic != layout.MAGIC or bits != layout.BLOCK_BITS or meta or blocks * BLOCK > self._size:
            raise Corrupt("this is no EROFS image that cowfs wrote")
        if incompat & ~(layout.INCOMPAT_CHUNKS | layout.INCOMPAT_DEVICES):
            raise Corrupt(f"the EROFS image has features that cowfs does not write: {incompat:#x}")
        if layout.checksum(block[:4] + bytes(4) + block[8:]) != checksum:
            raise Corrupt("the superblock of the EROFS image is damaged: its checksum is another")
        self._root = root
        self.end = blocks * BLOCK
        slots = self._read(table * layout.DEVICE.size, devices * layout.DEVICE.size)
        self.devices = [Device(count, tag.rstrip(b"\0")) for tag, count, _ in layout.DEVICE.iter_unpack(slots)]

    def _read(self, at: int, size: int) -> bytes:
        whole = at >= 0 and at + size <= self._size  # asked first: room for a damaged size is more than there is
        data = os.pread(self._fd, size, at) if whole else b""
        if len(data) != size:
            raise Corrupt(f"the EROFS image has {self._size} bytes, bytes {at} to {at + size} are asked for")
        return data

    def root(self) -> tuple[Inode, int]:
        """(the root, its number)."""
        return self.inode(self._root), self._root

    def names(self, key: int) -> Iterator[bytes]:
        """The names in the directory with the number ``key``, sorted. Raises Corrupt."""
        return (name for name, _ in self._dirents(key))

    def entries(self, key: int) -> Iterator[tuple[bytes, Inode, int | None]]:
        """(name, object, its number if it is a directory) of each entry of the directory ``key``. Raises Corrupt."""
        for name, nid in self._dirents(key):
            inode = self.inode(nid)
            yield name, inode, nid if stat.S_ISDIR(inode.mode) else None

    def inode(self, nid: int) -> Inode:
        """The object with the number ``nid``. Raises Corrupt."""
        raw = self._raw(nid)
        kind = stat.S_IFMT(raw.mode)
        target, data, rdev, size = b"", None, (0, 0), 0
        if kind == stat.S_IFREG:
            size = raw.size
            data = self._map(raw)
        elif kind == stat.S_IFLNK:
            target = self._data(raw)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = layout.decode_rdev(raw.union)
        return Inode(
            mode=raw.mode,
            uid=raw.uid,
            gid=raw.gid,
            size=size,
            mtime_ns=raw.mtime_ns,
            nlink=raw.nlink,
            rdev=rdev,
            target=target,
            xattrs=tuple(self._attributes(nid * SLOT + INODE.size, raw.xattrs)),
            link=nid if raw.nlink > 1 and kind != stat.S_IFDIR else None,
            data=data,
        )

    def _raw(self, nid: int) -> _Raw:
        at = nid * SLOT
        form, icount, mode, _, size, union, _, uid, gid, seconds, nanoseconds, nlink = INODE.unpack(
            self._read(at, INODE.size)
        )
        if not form & layout.EXTENDED or form >> 1 not in (layout.PLAIN, layout.INLINE, layout.CHUNKED):
            raise Corrupt(f"inode {nid} of the EROFS image has the form {form:#x}")
        xattrs = XATTR_HEADER.size + 4 * (icount - 1) if icount else 0
        return _Raw(
            form >> 1, xattrs, mode, size, union, uid, gid, seconds * 1_000_000_000 + nanoseconds, nlink,
            at + INODE.size + xattrs,
        )  # fmt: skip

    def _data(self, raw: _Raw) -> bytes:
        """The bytes of a directory or a link."""
        tail = raw.size % BLOCK if raw.data == layout.INLINE else 0
        if raw.size > self._size or raw.data == layout.CHUNKED:
            raise Corrupt(f"the EROFS image has a directory or link of {raw.size} bytes")
        blocks = self._read(raw.union * BLOCK, raw.size - tail) if raw.size > tail else b""
        return blocks + (self._read(raw.end, tail) if tail else b"")

    def _map(self, raw: _Raw) -> Map | None:
        if raw.data != layout.CHUNKED:
            if raw.size:
                raise Corrupt("the EROFS image has a file whose data is in it")
            return None
        bits = raw.union & layout.CHUNK_BITS_MASK
        count = -(-raw.size // (BLOCK << bits))
        if not raw.union & layout.CHUNK_INDEXES:
            if any(at != layout.NOWHERE for (at,) in struct.iter_unpack("<I", self._read(raw.end, 4 * count))):
                raise Corrupt("the EROFS image has a file whose data is in it")
            return None
        found = layout.CHUNK.iter_unpack(self._read(layout.align(raw.end, layout.CHUNK.size), 8 * count))
        return Map(bits, tuple([self._chunk(device, at, BLOCK << bits) for _, device, at in found]))

    def _chunk(self, device: int, at: int, size: int) -> Chunk:
        if at == layout.NOWHERE:
            return None
        if device:
            if device > len(self.devices):
                raise Corrupt(f"the EROFS image has {len(self.devices)} devices, a file is on device {device}")
            return device, at
        return self._read(at * BLOCK, size)

    def _attributes(self, at: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        if not size:
            return
        body = self._read(at, size)
        _, count = XATTR_HEADER.unpack_from(body)
        first = XATTR_HEADER.size + 4 * count
        if first > size:
            raise Corrupt(f"the EROFS image has {count} shared xattrs in {size} bytes")
        for (id,) in struct.iter_unpack("<I", body[XATTR_HEADER.size : first]):
            where = self._xattrs * BLOCK + 4 * id
            length, _, value = XATTR_ENTRY.unpack(self._read(where, XATTR_ENTRY.size))
            yield self._entry(self._read(where, XATTR_ENTRY.size + length + value), 0)[0]
        while first < size:
            pair, first = self._entry(body, first)
            yield pair

    def _entry(self, body: bytes, at: int) -> tuple[tuple[bytes, bytes], int]:
        """(an xattr, where the next one is)."""
        try:
            length, index, size = XATTR_ENTRY.unpack_from(body, at)
            at += XATTR_ENTRY.size
            if at + length + size > len(body):
                raise Corrupt("an xattr of the EROFS image ends outside of its object")
            name = layout.join_name(index, body[at : at + length])
        except (struct.error, KeyError):
            raise Corrupt("an xattr of the EROFS image is damaged") from None
        at += length
        return (name, body[at : at + size]), layout.align(at + size, 4)

    def _dirents(self, nid: int) -> Iterator[tuple[bytes, int]]:
        raw = self._raw(nid)
        if not stat.S_ISDIR(raw.mode):
            raise Corrupt(f"inode {nid} of the EROFS image is no directory")
        data = self._data(raw)
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            _, first, _ = DIRENT.unpack_from(block) if len(block) >= DIRENT.size else (0, 0, 0)
            if not first or first % DIRENT.size or first > len(block):
                raise Corrupt(f"directory {nid} of the EROFS image is damaged")
            heads = list(DIRENT.iter_unpack(block[:first]))
            ends = [offset for _, offset, _ in heads[1:]] + [len(block)]
            for (child, offset, _), end in zip(heads, ends, strict=True):
                name = block[offset:end].rstrip(b"\0")
                if not first <= offset < end or not name:
                    raise Corrupt(f"directory {nid} of the EROFS image is damaged")
                if name not in (b".", b".."):
                    yield name, child
