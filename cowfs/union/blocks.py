"""The part of a file that is on the disk, in units of 4 KiB.

A file that was only ever written from its start without a gap is *dense*: its count is its size. Any other has a
:class:`Blocks`, an exact list of ranges. st_blocks is not used where a host adds to it: xfs preallocates, ext4 counts
extent blocks.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right

from cowfs.sys import files

UNIT = 4096  # bytes
_PAGE = os.sysconf("SC_PAGESIZE")
_TMPFS_END = 1 << 51  # units: 2^63 bytes


def units(size: int) -> int:
    """The number of units for ``size`` bytes."""
    return (size + UNIT - 1) // UNIT


class Blocks:
    """The allocated units of one sparse file: disjoint, sorted [start, end) ranges.

    ``credit`` is space that is known to be allocated but not where (tmpfs after fallocate, before Linux 6.5).
    ``reserved``: room behind the end was asked for, and is counted.
    """

    __slots__ = ("credit", "ends", "reserved", "starts", "total")

    def __init__(self, ranges: list[tuple[int, int]] | None = None) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.total = 0
        self.credit = 0
        self.reserved = False
        for start, end in ranges or ():
            self.add(start, end)

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that are not allocated."""
        found = []
        index = bisect_right(self.ends, start)
        while start < end and index < len(self.starts):
            if self.starts[index] > start:
                if self.starts[index] >= end:
                    break
                found.append((start, self.starts[index]))
            start = self.ends[index]
            index += 1
        if start < end:
            found.append((start, end))
        return found

    def add(self, start: int, end: int) -> int:
        """Allocate [start, end). Returns the number of new units."""
        if start >= end:
            return 0
        new = sum(b - a for a, b in self.missing(start, end))
        first, last = bisect_left(self.ends, start), bisect_right(self.starts, end)
        if first < last:
            start = min(start, self.starts[first])
            end = max(end, self.ends[last - 1])
        self.starts[first:last] = [start]
        self.ends[first:last] = [end]
        self.total += new
        return new

    def remove(self, start: int, end: int) -> int:
        """Free [start, end). Returns the number of units freed."""
        if start >= end:
            return 0
        first, last = bisect_right(self.ends, start), bisect_left(self.starts, end)
        if first >= last:
            return 0
        pieces = []
        if self.starts[first] < start:
            pieces.append((self.starts[first], start))
        if self.ends[last - 1] > end:
            pieces.append((end, self.ends[last - 1]))
        before = sum(self.ends[i] - self.starts[i] for i in range(first, last))
        freed = before - sum(b - a for a, b in pieces)
        self.starts[first:last] = [a for a, _ in pieces]
        self.ends[first:last] = [b for _, b in pieces]
        self.total -= freed
        return freed


def blocks_of(fd: int, size: int, prealloc: bool, fs: str) -> int | Blocks:
    """Count a file: an int when it is dense, else its ranges."""
    ranges = [(start // UNIT, units(end)) for start, end in files.data_ranges(fd, size)]
    whole = units(size)
    if fs == "tmpfs":
        total = os.fstat(fd).st_blocks // 8
        if ranges == [(0, whole)] and total <= whole:
            return whole
        blocks = Blocks(ranges)
        if total > blocks.total:
            _find_reserved(fd, blocks, total)
        return blocks if size or blocks.total or blocks.credit else 0
    if fs == "xfs" and (found := files.extents(fd, sync=True)) is not None:
        # SEEK_DATA takes room that is only reserved for copies of shared blocks (cowextsize) for data, and FIEMAP knows of these
        # copies only once they are written
        blocks = Blocks(
            [(start // UNIT, units(end) if prealloc else min(units(end), whole)) for start, end, _ in found]
        )
        blocks.reserved = prealloc
        return whole if not prealloc and blocks.total == whole else blocks
    if not prealloc and (ranges == [(0, whole)] or whole == 0):
        return whole
    blocks = Blocks(ranges)
    blocks.reserved = prealloc
    for start, end, flags in files.extents(fd) or ():
        if flags & files.FIEMAP_EXTENT_UNWRITTEN:
            blocks.add(start // UNIT, units(end) if prealloc else min(units(end), whole))
    return blocks


def _find_reserved(fd: int, blocks: Blocks, total: int) -> None:
    """Find the units of a file on tmpfs that were reserved and not written; SEEK_DATA does not show those."""
    pending = blocks.missing(0, _TMPFS_END)
    while pending and blocks.total < total:
        start, end = pending.pop()
        there = files.cached_pages(fd, start * UNIT, end * UNIT)
        if there is None:
            break
        there //= UNIT // _PAGE or 1
        if there >= end - start:
            blocks.add(start, end)
        elif there:
            middle = (start + end) // 2
            pending += [(start, middle), (middle, end)]
    blocks.credit = max(0, total - blocks.total)


def total_of(space: int | Blocks | None) -> int:
    """The units in a node's ``space``."""
    if space is None:
        return 0
    return space if isinstance(space, int) else space.total + space.credit


def measure_file(dirfd: int, name: bytes, st: os.stat_result, prealloc: bool, fs: str) -> int:
    """The units of a regular file of a directory."""
    if st.st_size == 0 and not st.st_blocks:
        return 0
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name, flags, dir_fd=dirfd)
    except PermissionError:
        return units(min(st.st_size, st.st_blocks * 512))
    try:
        return total_of(blocks_of(fd, st.st_size, prealloc, fs))
    finally:
        os.close(fd)
