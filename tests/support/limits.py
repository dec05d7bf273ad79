"""A second opinion on what an upper layer holds, by the words of docs/semantics.md ("Limits").

Written against the words, not against ``cowfs.union.quota``: 4 KiB units of file data, 4 KiB a
directory (not the root) and a large xattr (over 1,024 bytes), whiteouts free, and directories free
that were copied up only to hold one.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

UNIT = 4096
LARGE_XATTR = 1024


def units(length: int) -> int:
    return -(-length // UNIT)


def stored_units(path: str, allocated: bool) -> int:
    """Units of a file that hold data; with ``allocated``, what the host says it gave (tmpfs: exact)."""
    status = os.lstat(path)
    if allocated:
        return units(status.st_blocks * 512)
    total, at = 0, 0
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        while at < status.st_size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            at = os.lseek(fd, start, os.SEEK_HOLE)
            total += units(at) - start // UNIT
    finally:
        os.close(fd)
    return total


def measure(upper: str | os.PathLike[str], *, form: str = "trusted", allocated: bool = False) -> tuple[int, int]:
    """(bytes, inodes) of an upper layer, read from the disk."""
    top = [os.getxattr(upper, name) for name in os.listxattr(upper)]
    blocks, inodes = sum(units(len(value)) for value in top if len(value) > LARGE_XATTR), 0
    seen: set[int] = set()
    pending = [os.fspath(upper)]
    while pending:
        for entry in os.scandir(pending.pop()):
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                continue
            if not stat.S_ISDIR(status.st_mode):
                if status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
            names = os.listxattr(entry.path, follow_symlinks=False)
            sizes = [len(os.getxattr(entry.path, name, follow_symlinks=False)) for name in names]
            blocks += sum(units(size) for size in sizes if size > LARGE_XATTR)
            if stat.S_ISDIR(status.st_mode):
                pending.append(entry.path)
                if any(name.endswith("cowfs.exempt") for name in names):
                    continue
                blocks += 1
            elif stat.S_ISREG(status.st_mode) and f"{form}.overlay.metacopy" not in names:
                blocks += stored_units(entry.path, allocated)
            inodes += 1
    return blocks * UNIT, inodes


def disk_usage(upper: Path) -> int:
    """What ``du`` counts for files (tmpfs gives directories nothing), each inode once, in bytes."""
    seen: set[int] = set()
    total = 0
    for at, _, files in os.walk(upper):
        for name in files:
            status = os.lstat(os.path.join(at, name))
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * 512
    return total
