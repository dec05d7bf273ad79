"""The structures of an EROFS image, and the arithmetic that the kernel does on them. No I/O.

Rules, from Linux ``fs/erofs/erofs_fs.h`` (on-disk format):

* A block has 4,096 bytes here. Block addresses are 32-bit: an image, and each of its devices, ends below 16 TiB.
* An inode is at ``32 * nid`` (the metadata area begins at block 0): 64 bytes in the extended form, then its xattrs, then,
  by its data layout, the tail of its data or its chunk map.
* Data that is *inline* does not cross the end of a block. The root's nid has 16 bits: it is within the first 2 MiB.
* A chunk map is an array of 4-byte block addresses, or of 8-byte indexes (device, block); all ones is a hole.

Integers are little-endian.
"""

from __future__ import annotations

import struct

from cowfs._typed import Final

BLOCK_BITS: Final = 12
BLOCK: Final = 1 << BLOCK_BITS
SLOT: Final = 32  # an inode number counts these
SUPER_OFFSET: Final = 1024
MAGIC: Final = 0xE0F5E1E2
NAME_MAX: Final = 255

#: magic, checksum, compat, block bits, ext slots, root nid, inodes, time s, time ns, blocks, meta block, xattr block,
#: uuid, volume name, incompat, compression, devices, device slot offset, dirblkbits, prefixes, prefix start,
#: packed nid, xattr filter, reserved
SUPER: Final = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
#: format, xattr icount, mode, reserved, size, union, ino, uid, gid, mtime s, mtime ns, nlink, reserved
INODE: Final = struct.Struct("<HHHHQIIIIqII16x")
XATTR_HEADER: Final = struct.Struct("<IB7x")  # name filter, shared count
XATTR_ENTRY: Final = struct.Struct("<BBH")  # name length, name index, value size
DIRENT: Final = struct.Struct("<QHBx")  # nid, name offset, file type
CHUNK: Final = struct.Struct("<HHI")  # advise, device, block
DEVICE: Final = struct.Struct("<64sII56x")  # tag, blocks, mapped block
NOWHERE: Final = 0xFFFFFFFF  # a chunk that is a hole

COMPAT_CHECKSUM: Final = 1
COMPAT_MTIME: Final = 2
INCOMPAT_CHUNKS: Final = 4
INCOMPAT_DEVICES: Final = 8

PLAIN, INLINE, CHUNKED = 0, 2, 4  # data layouts
EXTENDED: Final = 1  # bit 0 of the format: the inode has 64 bytes
CHUNK_BITS_MASK: Final = 0x1F
CHUNK_INDEXES: Final = 0x20

#: (index, prefix) of xattr names, longest prefix first; an xattr with none of them cannot be in an image
PREFIXES: Final = (
    (3, b"system.posix_acl_default"),
    (2, b"system.posix_acl_access"),
    (6, b"security."),
    (4, b"trusted."),
    (1, b"user."),
)
XATTR_VALUE_MAX: Final = 0xFFFF

assert SUPER.size == 128
assert INODE.size == 64
assert (XATTR_HEADER.size, XATTR_ENTRY.size, DIRENT.size, CHUNK.size, DEVICE.size) == (12, 4, 12, 8, 128)


def align(value: int, unit: int) -> int:
    """The next multiple of a power of two."""
    return (value + unit - 1) & -unit


def split_name(name: bytes) -> tuple[int, bytes] | None:
    """(index of the prefix, the rest) of an xattr's name; None where the format has no prefix for it."""
    for index, prefix in PREFIXES:
        if name.startswith(prefix) and (not prefix.endswith(b".")) == (len(name) == len(prefix)):
            return index, name[len(prefix) :]
    return None


def join_name(index: int, rest: bytes) -> bytes:
    """The name that :func:`split_name` took apart. Raises KeyError for an index that is not one."""
    return dict(PREFIXES)[index] + rest


def encode_rdev(major: int, minor: int) -> int:
    """A device number in the form of an inode: the kernel's ``new_encode_dev``."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_rdev(value: int) -> tuple[int, int]:
    """(major, minor) of :func:`encode_rdev`."""
    return (value & 0xFFF00) >> 8, (value & 0xFF) | ((value >> 12) & 0xFFF00)


def _table() -> tuple[int, ...]:
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        rows.append(byte)
    return tuple(rows)


_CRC = _table()


def checksum(block: bytes) -> int:
    """The superblock's: crc32c over it and the rest of its block, its own field zero, without the final inversion."""
    crc = 0xFFFFFFFF
    for byte in block:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc
