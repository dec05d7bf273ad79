"""A second opinion on what an upper layer holds, by the words of docs/mounts.md ("Limits").

Written against the words, not against ``cowfs.union.measure``: 4 KiB units of file data, 4 KiB a directory (not the root),
a large xattr (over 1,024 bytes), a link's target of 60 bytes and more; small things beyond 32 KiB; whiteouts and
directories copied up for them beyond 32 KiB and one unit for each that is counted.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

UNIT = 4096
LARGE_XATTR = 1024
INLINE = 92
FREE = 32 << 10

#: of each host: bytes for an inode, for a name, for a letter of it; whether a directory's st_size or st_blocks says its names
NAMES = {"tmpfs": (0, 0, 0, ""), "btrfs": (256, 256, 4, ""), "xfs": (512, 0, 0, "blocks"), "ext4": (0, 0, 0, "size")}
MARKS = ("opaque", "metacopy", "impure", "whiteout", "cowfs.exempt", "cowfs.prealloc")


def units(length: int) -> int:
    return -(-length // UNIT)


def host_of(path: str) -> str:
    """The name of the file system of a path, from mountinfo: the longest mount point above it."""
    path, best, name = os.path.realpath(path), "", "ext4"
    with open("/proc/self/mountinfo", encoding="ascii") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            point = before.split()[4]
            if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
                best, name = point, after.split()[0]
    return name if name in NAMES else "ext4"


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


def xattrs(path: str, form: str) -> tuple[int, int, list[str]]:
    """(units of large ones, units of the small ones together, names)"""
    large = beside = small = 0
    names = os.listxattr(path, follow_symlinks=False)
    own = f"{form}.overlay."
    for name in names:
        size = len(os.getxattr(path, name, follow_symlinks=False))
        if size > LARGE_XATTR:
            large += units(size)
            beside += 256
        elif name != "security.capability" and name not in [own + mark for mark in MARKS]:
            tail = "" if name.startswith("system.posix_acl_") else name.partition(".")[2]
            small += 16 + units_of(4, len(tail)) + units_of(4, size)
    if small > INLINE:
        beside += 2 * small
    return large, units(beside), names


def units_of(unit: int, length: int) -> int:
    return -(-length // unit) * unit


def grown(path: str, says: str) -> int:
    status = os.stat(path)
    return max(0, {"": 0, "size": units(status.st_size), "blocks": status.st_blocks // 8}[says] - 1)


def measure(upper: str | os.PathLike[str], *, form: str = "trusted", allocated: bool = False) -> tuple[int, int]:
    """(bytes, inodes) of an upper layer, read from the disk."""
    top = os.fspath(upper)
    inode, name_cost, letter, says = NAMES[host_of(top)]
    large, few, marks = xattrs(top, form)
    counted, small, inodes, exempt, hidden = large, few + grown(top, says), 0, 0, 0
    names = 0  # bytes
    if f"{form}.overlay.cowfs.row" in marks:
        small += sum(units(entry.stat().st_size) for entry in os.scandir(os.path.join(top, "../map")))
        small += grown(os.path.join(top, "../map"), says)
    seen: set[int] = set()
    pending = [top]
    while pending:
        for entry in os.scandir(pending.pop()):
            status = entry.stat(follow_symlinks=False)
            cost = name_cost + letter * len(os.fsencode(entry.name))
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                hidden += cost or 24 + len(os.fsencode(entry.name))
                continue
            names += cost
            is_dir = stat.S_ISDIR(status.st_mode)
            if not is_dir:
                if status.st_ino in seen:
                    continue
                seen.add(status.st_ino)
            large, few, marks = xattrs(entry.path, form)
            if is_dir:
                pending.append(entry.path)
                small += grown(entry.path, says)
                if f"{form}.overlay.cowfs.exempt" in marks:
                    exempt += 1 + large + few
                    continue
                counted += 1
            elif stat.S_ISREG(status.st_mode) and f"{form}.overlay.metacopy" not in marks:
                counted += stored_units(entry.path, allocated)
            elif stat.S_ISLNK(status.st_mode) and status.st_size >= 60:
                counted += units(status.st_size + 1)
            counted += large
            small += few
            inodes += 1
    together = small * UNIT + names + inode * inodes - (hidden if says else 0)
    counted += max(0, units(together - FREE))
    return max(counted, exempt + units(hidden) - FREE // UNIT) * UNIT, inodes


def disk_usage(upper: Path) -> int:
    """The use of files as in ``du`` (directories of tmpfs use nothing), each inode once, in bytes."""
    seen: set[int] = set()
    total = 0
    for at, _, files in os.walk(upper):
        for name in files:
            status = os.lstat(os.path.join(at, name))
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * 512
    return total
