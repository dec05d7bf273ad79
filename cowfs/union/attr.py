"""An inode's attributes, packed.

A node keeps one record of 88 bytes, a tenth of the size of a stat result.
The layout is that of the kernel's ``struct fuse_attr`` (include/uapi/linux/fuse.h), so a front end may pass it on
without unpacking; other code uses it as a struct with named offsets.
"""

from __future__ import annotations

import os
import struct

from cowfs._typed import NamedTuple

#: ino size blocks atime mtime ctime | atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags
ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
assert ATTR.size == 88

NS = 1_000_000_000
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MODE, _NLINK, _SIZE, _BLOCKS = 60, 64, 8, 16


class Attr(NamedTuple):
    """The unpacked form, with whole nanosecond times."""

    ino: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int


def encode_dev(rdev: int) -> int:
    """The kernel's 32-bit device number (new_encode_dev)."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_dev(dev: int) -> int:
    """The inverse of :func:`encode_dev`, as :func:`os.makedev` gives it."""
    return os.makedev((dev & 0xFFF00) >> 8, (dev & 0xFF) | ((dev >> 12) & 0xFFF00))


def pack(st: os.stat_result, ino: int, mode: int, uid: int, gid: int) -> bytes:
    """Pack a stat result under another inode number, mode and owner."""
    atime, mtime, ctime = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    rdev = st.st_rdev
    return ATTR.pack(
        ino, st.st_size, st.st_blocks,
        atime // NS, mtime // NS, ctime // NS,
        atime % NS, mtime % NS, ctime % NS,
        mode, st.st_nlink, uid, gid, encode_dev(rdev) if rdev else 0, 4096, 0,
    )  # fmt: skip


def unpack(attr: bytes) -> Attr:
    """The named form of a packed record."""
    (ino, size, blocks, atime, mtime, ctime, an, mn, cn, mode, nlink, uid, gid, rdev, _, _) = ATTR.unpack(attr)
    return Attr(
        ino, size, blocks, atime * NS + an, mtime * NS + mn, ctime * NS + cn,
        mode, nlink, uid, gid, decode_dev(rdev) if rdev else 0,
    )  # fmt: skip


def mode_of(attr: bytes) -> int:
    """st_mode of a packed record."""
    return int(_U32.unpack_from(attr, _MODE)[0])


def nlink_of(attr: bytes) -> int:
    """st_nlink of a packed record."""
    return int(_U32.unpack_from(attr, _NLINK)[0])


def size_of(attr: bytes) -> int:
    """st_size of a packed record."""
    return int(_U64.unpack_from(attr, _SIZE)[0])


def with_nlink(attr: bytes, nlink: int) -> bytes:
    """A copy with another link count."""
    return attr[:_NLINK] + _U32.pack(nlink) + attr[_NLINK + 4 :]


def with_size(attr: bytes, size: int, blocks: int) -> bytes:
    """A copy with another size and block count (512-byte units)."""
    return attr[:_SIZE] + _U64.pack(size) + _U64.pack(blocks) + attr[_BLOCKS + 8 :]
