"""The limit: what the upper layer holds, counted by us and not by the host.

Measure (docs/semantics.md, Limits): file data in units of 4 KiB, wherever it was written or
allocated; 4 KiB for each directory but the root; a large xattr rounded up to 4 KiB. Whiteouts,
and directories that were copied up only to hold one (marked ``exempt``), are free. st_blocks is not used for
that, because hosts add to it: xfs preallocates, ext4 counts extent blocks.

A file that was only ever written from its start without a gap is *dense*: its count is its size. Any
other has a :class:`Blocks`, an exact list of ranges. :func:`measure` computes the same from
the disk, and is what a mount starts with, also after a kill.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from cowfs.format import whiteout
from cowfs.format.whiteout import Form
from cowfs.model import Limit, Usage
from cowfs.sys import files, xattr
from cowfs.union.layers import Layer, Source
from cowfs.union.node import Node

if TYPE_CHECKING:
    from cowfs.union.view import View

UNIT = 4096
LARGE_XATTR = 1024  # bytes; what is larger does not fit beside the inode on common hosts


class Awaited(OSError):
    """Ask again once everything that is already forgotten was heard of: inodes without a name still hold space.

    Only raised for a front end that set ``view.patient``; nothing was changed. A kernel sends what it forgets behind
    requests that wait, so a client that unlinked a file can want its space, or look for it with statfs(2), before the
    view has it back. ENOSPC for whoever does not ask again.
    """

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


def units(size: int) -> int:
    """How many units hold ``size`` bytes."""
    return (size + UNIT - 1) // UNIT


def xattr_units(value: bytes | memoryview) -> int:
    """What a value of an xattr counts."""
    return units(len(value)) if len(value) > LARGE_XATTR else 0


def large_xattrs(fd: int, name: bytes) -> int:
    """Units of all xattrs of one inode (``name`` empty: the descriptor itself)."""
    return sum(xattr_units(xattr.try_get(fd, name, attribute) or b"") for attribute in xattr.listx(fd, name))


class Blocks:
    """The allocated units of one sparse file: disjoint, sorted [start, end) ranges.

    ``credit`` is space that is known to be allocated but not where (tmpfs after fallocate).
    """

    __slots__ = ("credit", "ends", "starts", "total")

    def __init__(self, ranges: list[tuple[int, int]] | None = None) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.total = 0
        self.credit = 0
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
        """Allocate [start, end). Returns how many units are new."""
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
        """Free [start, end). Returns how many units that gives back."""
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
        blocks.credit = max(0, total - blocks.total)
        return blocks if size or blocks.credit else 0
    if not prealloc and (ranges == [(0, whole)] or whole == 0):
        return whole
    blocks = Blocks(ranges)
    for start, end, flags in files.extents(fd) or ():
        if flags & files.FIEMAP_EXTENT_UNWRITTEN:
            blocks.add(start // UNIT, units(end) if prealloc else min(units(end), whole))
    return blocks


def total_of(space: int | Blocks | None) -> int:
    """The units in a node's ``space``."""
    if space is None:
        return 0
    return space if isinstance(space, int) else space.total + space.credit


class Space:
    """Keeps the count of one view and refuses what would pass the limit.

    Owner: the view's thread.
    """

    __slots__ = ("_fs", "_inodes", "_leaving", "_nameless", "_units", "limit", "view")

    def __init__(self, view: View) -> None:
        self._start(view)
        assert view.upper is not None
        now = measure(view.upper, view.form)
        self._units, self._inodes = now.bytes // UNIT, now.inodes
        for node in view.nodes.values():
            if node.where is None and node.fd >= 0:  # unlinked but open: not found by a scan
                self._units += total_of(self.count(node))
                self._inodes += 1
                self._nameless.add(node)

    def _start(self, view: View) -> None:
        assert view.upper is not None
        self.view = view
        self.limit = Limit()
        self._fs = files.fs_name(view.upper.root.fd)
        self._leaving: dict[Node, int] = {}  # units of large xattrs of inodes without a name
        self._nameless: set[Node] = set()  # inodes that lost their last name, as far as they are still in use
        self._units = self._inodes = 0

    def usage(self) -> Usage:
        """What is held now."""
        self._settle()
        return Usage(bytes=self._units * UNIT, inodes=self._inodes)

    def left(self) -> int:
        """Units that may still be allocated."""
        limit = self.limit.bytes
        return (1 << 62) if limit is None else max(0, limit // UNIT - self._units)

    def need(self, blocks: int, inodes: int = 0) -> None:
        """Raise ENOSPC unless so much more fits. Counts nothing."""
        if blocks > 0 and blocks > self.left():
            raise self._full()
        most = self.limit.inodes
        if inodes and most is not None and self._inodes + inodes > most:
            raise self._full()

    def _settle(self) -> None:
        """Raise Awaited while what was removed may still be counted."""
        if self._may_return():
            raise Awaited

    def _full(self) -> OSError:
        """What to raise when something does not fit."""
        return Awaited() if self._may_return() else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _may_return(self) -> bool:
        """Whether space may come back without anybody's doing, and the front end has a way to wait for that."""
        if not self.view.patient:
            return False
        self._nameless = {node for node in self._nameless if node.where is None}  # an unlink may have failed
        return bool(self._nameless)

    def add(self, blocks: int, inodes: int = 0) -> None:
        """Count what was done."""
        self._units += blocks
        self._inodes += inodes

    def leaving(self, node: Node) -> None:
        """The last name of an upper inode is about to go: count it while it can still be read."""
        from cowfs.union import attributes as union_attributes

        self.count(node)
        self._nameless.add(node)
        if node.bare < 2 and (cost := large_xattrs(*union_attributes.at(node))):
            self._leaving[node] = cost

    def xattr_changed(self, node: Node, cost: int) -> None:
        """A large xattr of a node grew by ``cost`` units."""
        self.add(cost)
        if cost and node.parent is None and node.type != 4:
            self._leaving[node] = self._leaving.get(node, 0) + cost

    def directory_gone(self, source: Source) -> tuple[int, int]:
        """(units, inodes) that removing an upper directory will change, for :meth:`add`."""
        fd = source.open()
        exempt = xattr.try_get(fd, b"", self.view.form.exempt) is not None
        own = 0 if exempt else 1
        return -(own + large_xattrs(fd, b"")), -own

    def statfs(self, host: os.statvfs_result) -> os.statvfs_result:
        """statvfs with the limit as the size; available also bounded by what the host has."""
        self._settle()
        fields = list(host[:10])
        host_free = host.f_bavail * host.f_frsize // UNIT
        if self.limit.bytes is not None:
            total = self.limit.bytes // UNIT
            free = max(0, total - self._units)
            fields[0] = fields[1] = UNIT
            fields[2:5] = [total, free, min(free, host_free)]
        if self.limit.inodes is not None:
            free = max(0, self.limit.inodes - self._inodes)
            fields[5:8] = [self.limit.inodes, free, min(free, host.f_favail) if host.f_files else free]
        return os.statvfs_result(fields)

    # -- one file -----------------------------------------------------------------------------

    def count(self, node: Node) -> int | Blocks:
        """A node's units, counted from the disk the first time."""
        if node.space is None:
            own = getattr(node.data, "writable", False)  # a redirect file of the upper layer
            if (node.data is not None and not own) or node.type != 8:
                return 0
            fd = node.data.own_fd() if own else self.view.data_fd(node, False)
            st = os.fstat(fd)
            prealloc = xattr.try_get(fd, b"", self.view.form.prealloc) is not None
            node.space = blocks_of(fd, st.st_size, prealloc, self._fs)
        return node.space  # type: ignore[no-any-return]

    def _ranges(self, node: Node) -> Blocks:
        space = self.count(node)
        if isinstance(space, int):
            space = node.space = Blocks([(0, space)])
        return space

    def grow(self, node: Node, offset: int, length: int) -> int:
        """How many of ``length`` bytes may be written at ``offset``; counts their units.

        Raises:
            OSError: ENOSPC when not even one byte fits.
        """
        space = self.count(node)
        first, last = offset // UNIT, units(offset + length)
        if isinstance(space, int):
            if first <= space:
                new = last - space
                if new <= 0:
                    return length
                left = self.left()
                if new > left:
                    last = space + left
                    length = last * UNIT - offset
                    if length <= 0 or self._may_return():
                        raise self._full()
                    new = left
                node.space = space + new
                self._units += new
                return length
            space = self._ranges(node)
        left = self.left() + space.credit
        for start, end in space.missing(first, last):
            if end - start > left:
                last = start + left
                length = last * UNIT - offset
                if length <= 0 or self._may_return():
                    raise self._full()
                break
            left -= end - start
        self._count_new(space, first, last)
        return length

    def _count_new(self, space: Blocks, first: int, last: int) -> None:
        new = space.add(first, last)
        paid = min(space.credit, new)
        space.credit -= paid
        self._units += new - paid

    def allocate(self, node: Node, offset: int, length: int) -> None:
        """Count an fallocate of [offset, offset+length). Raises ENOSPC when it does not fit."""
        space = self._ranges(node)
        first, last = offset // UNIT, units(offset + length)
        new = sum(end - start for start, end in space.missing(first, last))
        if new - space.credit > self.left():
            raise self._full()
        self._count_new(space, first, last)

    def punch(self, node: Node, offset: int, length: int, size: int) -> None:
        """Count a hole: whole units inside it are free again."""
        first, end = units(offset), offset + length
        space = self._ranges(node)
        if space.credit or (end >= size and space.ends[-1:] > [size // UNIT]):
            self.recount(node)  # of the unit with the file's end, and of room reserved past it, hosts think differently
            return
        last = max(units(end), first) if end >= size else end // UNIT
        self._units -= space.remove(first, last)

    def cut(self, node: Node, size: int, before: int) -> None:
        """Count a truncation from ``before`` to ``size``; a longer file has a hole, which is free."""
        space = self.count(node)
        whole = units(size)
        if size > before and isinstance(space, Blocks) and (space.credit or space.ends[-1:] > [units(before)]):
            self.recount(node)  # room was reserved past the end: most hosts keep it
            return
        if isinstance(space, int):
            if whole < space:
                self._units += whole - space
                node.space = whole
            elif whole > space:
                self._ranges(node)
        else:
            self._units -= space.remove(whole, 1 << 62) + space.credit
            space.credit = 0

    def recount(self, node: Node) -> None:
        """Count a file again from the disk, after the host refused a part."""
        before = total_of(node.space)
        node.space = None
        self._units += total_of(self.count(node)) - before

    def release(self, node: Node) -> None:
        """An inode of the upper layer is gone for good."""
        if node.type == 4:
            return
        self._nameless.discard(node)
        self._units -= total_of(node.space) + self._leaving.pop(node, 0)
        self._inodes -= 1


def ledger(view: View) -> Space:
    """A count that starts with nothing and has no limit: what is done with it shows by itself."""
    made = object.__new__(Space)
    made._start(view)
    return made


def measure(layer: Layer, form: Form) -> Usage:
    """Count a layer from the disk: the same measure, by a walk that follows no link.

    Raises:
        OSError: a directory cannot be read.
    """
    fs = files.fs_name(layer.root.fd)
    blocks, inodes = large_xattrs(layer.root.open(), b""), 0
    seen: set[int] = set()
    pending = [layer.root]
    opened = []  # a child opens its parent again when need be, so they are closed together
    while pending:
        source = pending.pop()
        if source is not layer.root:
            opened.append(source)
        fd = source.open()
        with os.scandir(b"/proc/self/fd/%d" % fd) as found:
            names = [entry.name for entry in found]
        for name in names:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if whiteout.is_whiteout(st):
                continue
            if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
                if st.st_ino in seen:
                    continue
                seen.add(st.st_ino)
            attributes = xattr.listx(fd, name)
            if form.whiteout in attributes:
                continue
            for attribute in attributes:
                blocks += xattr_units(xattr.try_get(fd, name, attribute) or b"")
            if stat.S_ISDIR(st.st_mode):
                pending.append(source.child(name))
                if form.exempt in attributes:
                    continue
                blocks += 1
            elif stat.S_ISREG(st.st_mode) and form.metacopy not in attributes:
                blocks += _measure_file(fd, name, st, form.prealloc in attributes, fs)
            inodes += 1
        source.descriptors.trim()
    for source in opened:
        source.close()
    return Usage(bytes=blocks * UNIT, inodes=inodes)


def _measure_file(dirfd: int, name: bytes, st: os.stat_result, prealloc: bool, fs: str) -> int:
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
