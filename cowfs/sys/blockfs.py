"""A mounted file system as a whole, by ioctl(2): frozen, trimmed, grown (linux/fs.h, fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import struct

from cowfs.sys import mounts

__all__ = ["freeze", "grow_ext4", "grow_xfs", "is_alive", "thaw", "trim", "unwritten"]

_FREEZE, _THAW = 0xC0045877, 0xC0045878  # _IOWR('X', 119, int), _IOWR('X', 120, int)
_TRIM = 0xC0185879  # _IOWR('X', 121, struct fstrim_range)
_EXT4_RESIZE = 0x40086610  # _IOW('f', 16, __u64): blocks
_XFS_GROW = 0x4010586E  # _IOW('X', 110, struct xfs_growfs_data): blocks, percentage of inodes
_RANGE = struct.Struct("=3Q")


def freeze(root: int) -> None:
    """Have all that was written on the disk, and hold every change until :func:`thaw`.

    Args:
        root: a descriptor of a directory of the file system.

    Raises:
        OSError: EBUSY: it is frozen already; EPERM; EOPNOTSUPP.
    """
    fcntl.ioctl(root, _FREEZE, 0)


def thaw(root: int) -> bool:
    """Let changes go on. Returns whether it was frozen."""
    try:
        fcntl.ioctl(root, _THAW, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def trim(root: int) -> int:
    """Discard all free blocks. Returns bytes. Raises OSError: EOPNOTSUPP where the device discards nothing."""
    told = fcntl.ioctl(root, _TRIM, _RANGE.pack(0, (1 << 64) - 1, 0))
    return int(_RANGE.unpack(told)[1])


def grow_ext4(root: int, blocks: int) -> None:
    """Make an ext4 larger while it is mounted.

    Args:
        blocks: of its block size.

    Raises:
        OSError: EPERM: the kernel asks for CAP_SYS_RESOURCE; EINVAL: the device is smaller than that.
    """
    fcntl.ioctl(root, _EXT4_RESIZE, struct.pack("=Q", blocks))


def grow_xfs(root: int, blocks: int) -> None:
    """Make an XFS larger while it is mounted.

    Args:
        blocks: of its block size.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN; EINVAL: the device is smaller than that.
    """
    fcntl.ioctl(root, _XFS_GROW, struct.pack("=QII", blocks, 25, 0))


def unwritten(device: str) -> int:
    """Bytes that are in memory and not yet on a block device; 0 also where this kernel does not tell (no debugfs).

    Source: mm/backing-dev.c, ``bdi/MAJOR:MINOR/stats``.
    """
    there = os.stat(device).st_rdev
    try:
        root = mounts.detached_mount(b"debugfs", [])
    except OSError:
        return 0
    try:
        fd = os.open(f"bdi/{os.major(there)}:{os.minor(there)}/stats", os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        with open(fd, "rb") as file:
            told = file.read()
    except OSError:
        return 0
    finally:
        os.close(root)
    return 1024 * sum(int(kib) for kib in re.findall(rb"^Bdi(?:Writeback|Reclaimable): +([0-9]+) kB$", told, re.M))


def is_alive(device: str) -> bool:
    """Whether a block device answers: one block is read, past the page cache."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, 4096) as buffer:
            return os.preadv(fd, [buffer], 0) == 4096
    except OSError:
        return False
    finally:
        os.close(fd)
