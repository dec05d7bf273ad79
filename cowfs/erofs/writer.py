"""Writes an image, in one pass over a tree, from the root down.

Strategy. An entry of a directory holds the number, and so the place, of the object that it names, and ``..`` that of the
parent; so places are assigned before anything is written. When a directory is visited, it has its place already; its entries
get theirs one after another, non-directories are written as they come, and directories wait on a stack with the size of their
own entries, for which only their names are needed. Then the directory itself is written.

Inodes are packed into runs of 64 KiB, so that what is looked at together lies together; blocks of directories and long
targets come between the runs. An xattr that comes a second time goes into the shared area, which is written last.

Memory: the names of one directory, the directories that wait, the numbers of hard-linked files, and a bounded table of xattrs.
The same tree gives the same bytes.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence

from cowfs._typed import Any, NamedTuple
from cowfs.erofs import layout
from cowfs.erofs.layout import BLOCK, DIRENT, INODE, SLOT, XATTR_ENTRY, XATTR_HEADER, align
from cowfs.erofs.tree import Chunk, Device, Inode, Map, Source
from cowfs.errors import Unsupported

__all__ = ["Written", "write_image"]

RUN = 16 * BLOCK
_SHARED_MAX = 1 << 14  # xattrs in the shared area
_ONCE_MAX = 1 << 16  # xattrs remembered that were seen once
_LAST_BLOCK = 0xFFFFFFFE
_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


class Written(NamedTuple):
    """The result of :func:`write_image`: the number of ``inodes``, and the ``size`` of the file in bytes."""

    inodes: int
    size: int


class _Shape(NamedTuple):
    """A directory's blocks: how many names each has, and the bytes used of the last one."""

    counts: tuple[int, ...]
    last: int

    @property
    def size(self) -> int:
        return (len(self.counts) - 1) * BLOCK + self.last


class _Waiting(NamedTuple):
    """A directory that has its place, but is not written yet."""

    inode: Inode
    key: Any
    nid: int
    parent: int
    shape: _Shape
    xattrs: bytes
    inline: bool


def write_image(source: Source, fd: int, *, devices: Sequence[Device] = (), uuid: bytes = bytes(16)) -> Written:
    """Write the image of a tree into an empty file.

    Args:
        source: the tree.
        fd: the file, open for reading and writing.
        devices: the files that maps refer to, device 1 first.
        uuid: 16 bytes that identify the image.

    Raises:
        Unsupported: the format cannot hold the tree: an xattr's name or size, a link target, a name, or the whole.
        OSError: of writing.
    """
    return _Writer(source, fd, devices).write(uuid)


class _Writer:
    """One image being written.

    Attributes:
        end: bytes given to runs and blocks so far: the next of either begins there.
        run: the run that inodes go to, from ``run_at``; ``free`` is its first free byte.
    """

    def __init__(self, source: Source, fd: int, devices: Sequence[Device]) -> None:
        self.source = source
        self.fd = fd
        self.devices = devices
        self.end = 0
        self.run = bytearray()
        self.run_at = 0
        self.free = 0
        self.inodes = 0
        self.links: dict[Hashable, int] = {}
        self.once: set[tuple[bytes, bytes]] = set()
        self.shared: dict[tuple[bytes, bytes], int] = {}
        self.shared_area = bytearray()
        self.has_chunks = False
        self.waiting: list[_Waiting] = []

    def write(self, uuid: bytes) -> Written:
        root, key = self.source.root()
        self._new_run(RUN)
        self.free = layout.SUPER_OFFSET + layout.SUPER.size
        nid = self._wait(root, key, None, inline=False)
        table = align(self.free, layout.DEVICE.size)
        if self.devices:
            self._device_table(table)
        while self.waiting:
            self._directory(self.waiting.pop())
        self._flush()
        xattr_block = self.end // BLOCK
        if self.shared_area:
            self._put_blocks(self._blocks(len(self.shared_area)), bytes(self.shared_area))
        if self.end // BLOCK > _LAST_BLOCK:
            raise Unsupported("an EROFS image ends at 16 TiB", remedy="mount this snapshot with FUSE")
        os.ftruncate(self.fd, self.end)
        self._superblock(nid, xattr_block, table, uuid)
        return Written(self.inodes, self.end)

    # -- places -----------------------------------------------------------------------------------

    def _new_run(self, size: int) -> None:
        self._flush()
        self.run_at, self.end = self.end, self.end + align(size, RUN)
        self.run = bytearray(self.end - self.run_at)
        self.free = self.run_at

    def _flush(self) -> None:
        if self.run:
            os.pwrite(self.fd, self.run, self.run_at)
            self.run = bytearray()

    def _place(self, head: int, tail: int) -> int:
        """A place for an inode: ``head`` bytes, then ``tail`` that must not cross the end of a block."""
        at = align(self.free, SLOT)
        if at % BLOCK + INODE.size > BLOCK:
            at = align(at, BLOCK)
        if tail and (at + head) % BLOCK + tail > BLOCK:
            at = align(at, BLOCK)  # a tail is inline only where it fits behind its head in one block
        if at + head + tail > self.run_at + len(self.run):
            self._new_run(head + tail)
            at = self.run_at
        self.free = at + head + tail
        return at

    def _put(self, at: int, data: bytes) -> None:
        """Bytes of the metadata, into the run in memory or, behind it, into the file."""
        if self.run_at <= at and at + len(data) <= self.run_at + len(self.run):
            self.run[at - self.run_at : at - self.run_at + len(data)] = data
        else:
            os.pwrite(self.fd, data, at)

    def _blocks(self, size: int) -> int:
        """The address, in blocks, of as many fresh ones as hold ``size`` bytes."""
        at = self.end
        self.end += align(size, BLOCK)
        return at // BLOCK

    def _put_blocks(self, block: int, data: bytes) -> None:
        os.pwrite(self.fd, data + bytes(-len(data) % BLOCK), block * BLOCK)

    # -- directories ------------------------------------------------------------------------------

    def _wait(self, inode: Inode, key: Any, parent: int | None, *, inline: bool = True) -> int:
        """Assign a place to a directory, queue it, and return its number."""
        shape = _shape(self.source.names(key))
        xattrs = self._xattrs(inode)
        head = INODE.size + len(xattrs)
        inline = inline and head + shape.last <= BLOCK
        nid = self._place(head, shape.last if inline else 0) // SLOT
        self.inodes += 1
        self.waiting.append(_Waiting(inode, key, nid, nid if parent is None else parent, shape, xattrs, inline))
        return nid

    def _directory(self, it: _Waiting) -> None:
        names, nids, types = [b".", b".."], array("Q", (it.nid, it.parent)), bytearray((2, 2))
        for name, inode, key in self.source.entries(it.key):
            if stat.S_ISDIR(inode.mode):
                nid = self._wait(inode, key, it.nid)
            else:
                nid = self._leaf(inode)
            names.append(name)
            nids.append(nid)
            types.append(_FILE_TYPES[stat.S_IFMT(inode.mode)])
        order = _with_dots(names)
        full = len(it.shape.counts) - (1 if it.inline else 0)
        block = self._blocks(full * BLOCK) if full else 0
        data_layout = layout.INLINE if it.inline else layout.PLAIN
        head = self._inode(it.nid * SLOT, it.inode, it.shape.size, data_layout, block, it.xattrs)
        start = 0
        for number, count in enumerate(it.shape.counts):
            data = _block(order[start : start + count], names, nids, types)
            start += count
            if number < full:
                self._put_blocks(block + number, data)
            else:
                head += data
        self._put(it.nid * SLOT, head)

    # -- everything else --------------------------------------------------------------------------

    def _leaf(self, inode: Inode) -> int:
        """Write an object that is no directory, unless it was written by another name, and return its number."""
        if inode.link is not None:
            known = self.links.get(inode.link)
            if known is not None:
                return known
        xattrs = self._xattrs(inode)
        kind = stat.S_IFMT(inode.mode)
        if kind == stat.S_IFREG and inode.size:
            at = self._file(inode, xattrs)
        elif kind == stat.S_IFLNK:
            at = self._symlink(inode, xattrs)
        else:
            at = self._place(INODE.size + len(xattrs), 0)
            device = layout.encode_rdev(*inode.rdev) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
            self._put(at, self._inode(at, inode, 0, layout.PLAIN, device, xattrs))
        self.inodes += 1
        nid = at // SLOT
        if inode.link is not None:
            self.links[inode.link] = nid
        return nid

    def _file(self, inode: Inode, xattrs: bytes) -> int:
        self.has_chunks = True
        data = inode.data or Map(max(0, (inode.size - 1).bit_length() - layout.BLOCK_BITS), (None,))
        if data.bits > layout.CHUNK_BITS_MASK:
            raise Unsupported(f"a file of {inode.size} bytes", remedy="mount this snapshot with FUSE")
        if len(data.chunks) != align(inode.size, BLOCK << data.bits) >> layout.BLOCK_BITS + data.bits:
            raise ValueError(f"{len(data.chunks)} chunks of {BLOCK << data.bits} bytes for a file of {inode.size}")
        head = INODE.size + len(xattrs)
        indexes = inode.data is not None
        if indexes:
            chunks = b"".join([layout.CHUNK.pack(0, *self._chunk(it, BLOCK << data.bits)) for it in data.chunks])
            padding = -head % layout.CHUNK.size
        else:
            chunks, padding = struct.pack("<I", layout.NOWHERE), 0
        at = self._place(head + padding + len(chunks), 0)
        form = data.bits | (layout.CHUNK_INDEXES if indexes else 0)
        self._put(at, self._inode(at, inode, inode.size, layout.CHUNKED, form, xattrs) + bytes(padding) + chunks)
        return at

    def _chunk(self, it: Chunk, size: int) -> tuple[int, int]:
        """(device, block) of a chunk; bytes are put into the image itself, which is device 0."""
        if it is None:
            return 0, layout.NOWHERE
        if isinstance(it, tuple):
            return it
        block = self._blocks(size)
        self._put_blocks(block, it.ljust(size, b"\0"))
        return 0, block

    def _symlink(self, inode: Inode, xattrs: bytes) -> int:
        size = len(inode.target)
        if not 0 < size < BLOCK:
            raise Unsupported(f"a symbolic link with a target of {size} bytes", remedy="mount this snapshot with FUSE")
        head = INODE.size + len(xattrs)
        if head + size <= BLOCK:
            at = self._place(head, size)
            self._put(at, self._inode(at, inode, size, layout.INLINE, 0, xattrs) + inode.target)
            return at
        at = self._place(head, 0)
        block = self._blocks(size)
        self._put_blocks(block, inode.target)
        self._put(at, self._inode(at, inode, size, layout.PLAIN, block, xattrs))
        return at

    def _inode(self, at: int, inode: Inode, size: int, data: int, union: int, xattrs: bytes) -> bytes:
        seconds, nanoseconds = divmod(inode.mtime_ns, 1_000_000_000)
        icount = (len(xattrs) - XATTR_HEADER.size) // 4 + 1 if xattrs else 0
        form = layout.EXTENDED | data << 1
        return (
            INODE.pack(
                form, icount, inode.mode, 0, size, union, at // SLOT & 0xFFFFFFFF, inode.uid, inode.gid, seconds,
                nanoseconds, inode.nlink,
            )
            + xattrs
        )  # fmt: skip

    # -- xattrs -----------------------------------------------------------------------------------

    def _xattrs(self, inode: Inode) -> bytes:
        """The header, the ids of shared ones, and the others, as they follow an inode; empty where there are none."""
        if not inode.xattrs:
            return b""
        ids: list[int] = []
        own = bytearray()
        for pair in inode.xattrs:
            id = self._share(pair)
            if id is not None and len(ids) < 255:
                ids.append(id)
            else:
                own += _entry(*pair)
        body = XATTR_HEADER.pack(0, len(ids)) + struct.pack(f"<{len(ids)}I", *ids) + own
        if (len(body) - XATTR_HEADER.size) // 4 + 1 > 0xFFFF:
            raise Unsupported("an object has more than 256 KiB of xattrs", remedy="mount this snapshot with FUSE")
        return bytes(body)

    def _share(self, pair: tuple[bytes, bytes]) -> int | None:
        """The id of an xattr in the shared area, where it goes when it comes the second time."""
        id = self.shared.get(pair)
        if id is not None:
            return id
        if pair not in self.once:
            if len(self.once) < _ONCE_MAX:
                self.once.add(pair)
            return None
        if len(self.shared) >= _SHARED_MAX:
            return None
        id = self.shared[pair] = len(self.shared_area) // 4
        self.shared_area += _entry(*pair)
        self.once.discard(pair)
        return id

    # -- the head of the file ---------------------------------------------------------------------

    def _device_table(self, at: int) -> None:
        table = b"".join(layout.DEVICE.pack(device.tag, device.blocks, 0) for device in self.devices)
        if len(self.devices) > 0xFFFF:
            raise Unsupported(f"{len(self.devices)} devices in one image", remedy="mount this snapshot with FUSE")
        if at + len(table) > self.run_at + len(self.run):
            self.end += align(len(table), RUN)
            self.run += bytes(self.end - self.run_at - len(self.run))
        self._put(at, table)
        self.free = at + len(table)

    def _superblock(self, root: int, xattr_block: int, table: int, uuid: bytes) -> None:
        incompat = (layout.INCOMPAT_CHUNKS if self.has_chunks else 0) | (layout.INCOMPAT_DEVICES if self.devices else 0)
        block = bytearray(os.pread(self.fd, BLOCK - layout.SUPER_OFFSET, layout.SUPER_OFFSET))
        layout.SUPER.pack_into(
            block, 0, layout.MAGIC, 0, layout.COMPAT_CHECKSUM | layout.COMPAT_MTIME, layout.BLOCK_BITS, 0, root,
            self.inodes, 0, 0, self.end // BLOCK, 0, xattr_block, uuid, b"", incompat, 0, len(self.devices),
            table // layout.DEVICE.size if self.devices else 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        struct.pack_into("<I", block, 4, layout.checksum(bytes(block)))
        os.pwrite(self.fd, block, layout.SUPER_OFFSET)


def _entry(name: bytes, value: bytes) -> bytes:
    split = layout.split_name(name)
    if split is None or len(split[1]) > 255 or len(value) > layout.XATTR_VALUE_MAX:
        raise Unsupported(
            f"the xattr {name[:64]!r} with {len(value)} bytes cannot be in an EROFS image",
            remedy="mount this snapshot with FUSE",
        )
    index, rest = split
    data = XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
    return data + bytes(-len(data) % 4)


def _shape(names: Iterable[bytes]) -> _Shape:
    """How a directory's names, ``.`` and ``..`` among them, are cut into blocks."""
    counts: list[int] = []
    count = used = 0
    dots = [b"..", b"."]
    for name in names:
        while dots and dots[-1] < name:
            count, used = _add(counts, count, used, dots.pop())
        if not 0 < len(name) <= layout.NAME_MAX:
            raise Unsupported(f"a name of {len(name)} bytes", remedy="mount this snapshot with FUSE")
        count, used = _add(counts, count, used, name)
    while dots:
        count, used = _add(counts, count, used, dots.pop())
    return _Shape((*counts, count), used)


def _add(counts: list[int], count: int, used: int, name: bytes) -> tuple[int, int]:
    cost = DIRENT.size + len(name)
    if used + cost > BLOCK:
        counts.append(count)
        return 1, cost
    return count + 1, used + cost


def _with_dots(names: list[bytes]) -> list[int]:
    """Positions in ``names`` in the order of the names; the first two are ``.`` and ``..``, the others sorted."""
    order = list(range(2, len(names)))
    for dot in (1, 0):
        order.insert(bisect_left(order, names[dot], key=names.__getitem__), dot)
    return order


def _block(order: list[int], names: list[bytes], nids: array[int], types: bytearray) -> bytes:
    """One block of a directory: its entries, then their names."""
    offset = DIRENT.size * len(order)
    head = bytearray()
    for at in order:
        head += DIRENT.pack(nids[at], offset, types[at])
        offset += len(names[at])
    return bytes(head) + b"".join([names[at] for at in order])
