"""The limit: the use of the upper layer, counted by cowfs and not by the host; a change that would pass the limit is
refused beforehand.

The measure is that of :mod:`cowfs.union.measure`. Here it is kept: :class:`Space` starts with one walk and then follows
every change, so that a query costs nothing. Rule for each change: first :meth:`Space.need`, with its largest possible
use; then the change; then the count of its real use, read from the disk if the host decides about it.
"""

from __future__ import annotations

import os

from cowfs._typed import TYPE_CHECKING, Protocol
from cowfs.model import Usage
from cowfs.sys import files, xattr
from cowfs.union.blocks import UNIT, Blocks, blocks_of, total_of, units
from cowfs.union.bound import Awaited, Bound
from cowfs.union.layers import Source
from cowfs.union.measure import (
    NOTHING,
    Room,
    Sizes,
    Tally,
    inode_xattrs,
    link_units,
    measure,
    names_cost,
    sizes,
    walk,
    xattr_room,
)
from cowfs.union.node import DT_DIR, DT_LNK, DT_REG, PLAIN, Dir, Node, at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cowfs.format.whiteout import Form
    from cowfs.union.filedata import Redirects
    from cowfs.union.layers import Layer
    from cowfs.union.meta import Meta

__all__ = ["UNIT", "Awaited", "Blocks", "Space", "ledger", "measure", "total_of", "units"]

_PUNCH = files.FALLOC_FL_PUNCH_HOLE | files.FALLOC_FL_KEEP_SIZE
_END = 1 << 50  # units: behind the end of any file
_ORIGIN = 29  # bytes of the mark that a copy gets (cowfs.union.inodes.make_origin)


class Counted(Protocol):
    """The interface of the counted view."""

    form: Form
    nodes: dict[int, Node]
    rows: Redirects | None
    patient: bool
    limit_reached: Callable[[], None] | None

    @property
    def space(self) -> Space | None: ...

    @property
    def upper(self) -> Layer | None: ...

    def is_nameless(self, node: Node) -> bool: ...

    def size(self, node: Node) -> int: ...

    def data_fd(self, node: Node, write: bool) -> int: ...


class Space(Bound):
    """The count of one view, which refuses changes that would pass the limit.

    Owner: the view's thread.
    """

    __slots__ = ("_later", "_leaving", "_nameless", "view", "written")

    def __init__(self, view: Counted, *, empty: bool = False) -> None:
        """Count the upper layer; ``empty``: start with nothing."""
        assert view.upper is not None
        super().__init__(files.fs_name(view.upper.root.fd), view.form)
        self.view = view
        self._later: list[Space] = []  # ledgers of objects that do not count yet
        self._leaving: dict[Node, Room] = {}  # the xattrs of inodes without a name
        self._nameless: set[Node] = set()  # inodes that lost their last name, as far as they are still in use
        self.written: set[bytes] = set()  # maps that may have become longer, from another thread, too
        if empty:
            return
        self._take(walk(view.upper, view.form))
        for node in view.nodes.values():
            if view.is_nameless(node):  # not found by a scan
                self.units += total_of(self.count(node))
                self.inodes += 1
                self._nameless.add(node)
        self._sum()

    def _take(self, tally: Tally) -> None:
        self.units, self.inodes, self.small, self.names = tally.units, tally.inodes, tally.small, tally.names
        self.grown, self.growth, self.mapped = tally.grown, tally.growth, tally.mapped
        self.hidden, self.exempt = tally.hidden, tally.exempt

    def usage(self) -> Usage:
        """Use of the upper layer now."""
        self._settle()
        self.look_at_maps()
        return Usage(bytes=(self._base + self.total()) * UNIT, inodes=self._base_inodes + self.inodes)

    def freeze(self) -> None:
        """Freeze the count of the upper layer, which goes on to count; a new one starts empty."""
        self.look_at_maps()
        nameless = [node for node in self.view.nodes.values() if self.view.is_nameless(node)]
        xattrs = [self._leaving[node] for node in nameless if node in self._leaving]
        kept = sum(total_of(node.space) for node in nameless) + sum(room.large for room in xattrs)
        small = sum(room.small for room in xattrs)
        self.take(Room(-kept, -small))
        self.inodes -= len(nameless)
        self.offset(self.total(), self.inodes)
        self.clear()
        self.units, self.small, self.inodes = kept, small, len(nameless)
        self.written.clear()
        self._sum()

    def later(self, other: Space) -> None:
        """Keep a ledger, to be counted when :meth:`take_later` is called."""
        self._later.append(other)

    def take_later(self) -> None:
        """Count the ledgers of :meth:`later`."""
        for other in self._later:
            other.look_at_maps()
            self.take(Room(other.units, other.small))
            self.inodes += other.inodes
            self.names += other.names
            self.growth += other.growth
            self.hidden += other.hidden
            self.exempt += other.exempt
            self.mapped.update(other.mapped)
            self.written |= other.written
        self._later.clear()
        self._sum()

    def _settle(self) -> None:
        """Raise Awaited while removed objects may still count."""
        if self._may_return():
            raise Awaited

    def _full(self) -> OSError:
        found = super()._full()
        if not isinstance(found, Awaited) and self.view.limit_reached is not None:
            self.view.limit_reached()
        return found

    def _may_return(self) -> bool:
        """Whether space may come back without a request, and the front end can wait for it."""
        if not self.view.patient:
            return False
        self._nameless = {node for node in self._nameless if node.parent is None}  # an unlink may have failed
        return bool(self._nameless)

    def add(self, blocks: int, inodes: int = 0) -> None:
        """Count a ledger."""
        self.units += blocks
        if inodes:
            self.inodes += inodes
            self._sum()

    # -- names ----------------------------------------------------------------------------------

    def named(self, up: Source, name: bytes, blocks: int = 0, inodes: int = 0) -> None:
        """Count a new name in a directory of the upper layer, and its object."""
        self.units += blocks
        self.inodes += inodes
        host = self.host
        if host.name:
            self.names += self.name_cost(name)
        elif not host.grows:
            return
        self._looked(up)

    def copied(self, up: Source, name: bytes, room: Room) -> None:
        """Count a directory that was copied up only for whiteouts; its xattrs take ``room``."""
        self.exempt += 1 + sum(room)
        self.named(up, name)

    def unnamed(self, up: Source, name: bytes) -> None:
        """Count the removal of a name."""
        self.names -= self.name_cost(name)
        self._looked(up)

    def _looked(self, up: Source) -> None:
        host = self.host
        if host.grows:
            self.grew(os.fstat(up.fd if up.fd >= 0 else up.open()))
        elif not host.name:
            return
        self._excess = self.beyond()

    def hid(self, up: Source, name: bytes, *, instead: bool = False) -> None:
        """Count a whiteout; ``instead``: in place of an object of the upper layer."""
        self.hide(name)
        if instead:
            self.names -= self.name_cost(name)
        self._looked(up)
        self._sum()

    def unhid(self, names: Iterable[bytes]) -> None:
        """Count the removal of whiteouts."""
        self.hidden -= names_cost(self, names)
        self._sum()

    def moved(
        self, source: Source, name: bytes, destination: Source, to_name: bytes, *, leaves: bool, over: bool
    ) -> None:
        """Count a rename.

        Args:
            leaves: whether it leaves a whiteout.
            over: whether it replaced an object of the upper layer (not a whiteout).
        """
        self.names -= self.name_cost(name)
        if not over:
            self.names += self.name_cost(to_name)
        if leaves:
            self.hide(name)
        self._looked(source)
        self._looked(destination)
        self._sum()

    # -- inodes and their xattrs ------------------------------------------------------------------

    def copy_cost(self, meta: Meta) -> Room:
        """Room for all of a copy but its data: xattrs with its mark, a link's target."""
        found = {name: len(value) for name, value in meta.xattrs.items()}
        found[self.form.origin] = _ORIGIN
        link = link_units(meta.size) if meta.mode & 0o170000 == 0o120000 else 0
        return xattr_room(found, self.form).with_units(link)

    def xattrs(self, fd: int, name: bytes | None) -> Room:
        """The present room of an inode's xattrs."""
        return inode_xattrs(fd, name, self.form)

    def inherited(self, up: Source, *, directory: bool) -> Room:
        """The largest room of the ACLs that a new object gets from its directory."""
        length = len(xattr.try_get(up.open(), b"", b"system.posix_acl_default") or b"")
        found = {b"system.posix_acl_access": length}
        if directory:
            found[b"system.posix_acl_default"] = length
        return xattr_room(found, self.form)

    def set_xattr(
        self,
        fd: int,
        name: bytes | None,
        attribute: bytes,
        value: bytes,
        flags: int = 0,
        *,
        node: Node | None = None,
        found: Sizes | None = None,
    ) -> None:
        """Set an xattr that counts. Raises ENOSPC.

        Args:
            node: its node, if that may have lost its last name.
            found: the present xattrs, if known.
        """
        found = sizes(fd, name) if found is None else found
        before = xattr_room(found, self.form)
        if found is not None:
            self.need(0, room=xattr_room({**found, attribute: len(value)}, self.form).over(before))
        xattr.setx(fd, name, attribute, value, flags)
        self.xattrs_changed(node, self.xattrs(fd, name).over(before))
        if node is not None and node.type == DT_DIR:
            self.grew_by_xattrs(fd, b"")

    def grew_by_xattrs(self, dirfd: int, name: bytes) -> None:
        """Count the blocks of a directory again after a change of its xattrs: some hosts count both together."""
        if self.host.grows and not self.host.sized:
            self.grew(os.stat(name, dir_fd=dirfd, follow_symlinks=False) if name else os.fstat(dirfd))
            self._sum()

    def xattrs_changed(self, node: Node | None, more: Room) -> None:
        """Count additional room of a node's xattrs."""
        if not any(more):
            return
        self.take(more)
        self._sum()
        if node is not None and node.parent is None and node.type != DT_DIR:
            before = self._leaving.get(node, NOTHING)
            self._leaving[node] = Room(before.large + more.large, before.small + more.small)

    def leaving(self, node: Node) -> None:
        """Count an upper inode before it loses its last name, while it can still be read."""

        self.count(node)
        self._nameless.add(node)
        if node.bare < 2 and any(room := self.xattrs(*at(node))):
            self._leaving[node] = room

    def counts_now(self, node: Dir) -> None:
        """Begin to count a directory that was copied up only for whiteouts, since it changes. Raises ENOSPC."""
        fd = node.sources[0].open()
        if xattr.try_get(fd, b"", self.form.exempt) is None:
            return
        room = self.xattrs(fd, b"").with_units(1)
        self.need(0, 1, room=room)
        xattr.remove(fd, b"", self.form.exempt)
        self.exempt -= sum(room)
        self.take(room)
        self.add(0, 1)

    def directory_gone(self, source: Source) -> tuple[Room, int, int, int, int]:
        """The change of the count by removing an upper directory that holds at most whiteouts, for :meth:`apply`."""
        fd = source.open()
        room = self.xattrs(fd, b"").with_units(1)
        hidden = names_cost(self, source.whiteouts or ())
        ino = os.fstat(fd).st_ino
        if xattr.try_get(fd, b"", self.form.exempt) is not None:
            return NOTHING, 0, sum(room), hidden, ino
        return room, 1, 0, hidden, ino

    def apply(self, gone: tuple[Room, int, int, int, int]) -> None:
        """Count the removal of an upper directory."""
        room, inodes, exempt, hidden, ino = gone
        self.take(NOTHING.over(room))
        self.inodes -= inodes
        self.exempt -= exempt
        self.hidden -= hidden
        self.forget_growth(ino)
        self._sum()

    # -- maps of redirect files -------------------------------------------------------------------

    def map_written(self, name: bytes, size: int) -> None:
        """Count a map of ``size`` bytes, which may become a little longer when it is synced."""
        self.written.add(name)
        if self.mapped.get(name) != units(size):
            self.map(name, size)
            self._look_at_map_dir()
            self._sum()

    def map_room(self, name: bytes, size: int) -> Room:
        """The additional room of a map of ``size`` bytes."""
        return Room(0, max(0, units(size) - self.mapped.get(name, 0)))

    def map_gone(self, name: bytes) -> None:
        """Count the removal of a map."""
        self.written.discard(name)
        self.map(name, 0)
        self._sum()

    def _look_at_map_dir(self) -> None:
        rows = self.view.rows
        if self.host.grows and rows is not None and self.view.upper is not None:
            self.grew(os.fstat(rows.map_dir(self.view.upper)))

    def look_at_maps(self) -> None:
        """Count maps again that another thread made longer by syncing them."""
        rows = self.view.rows
        if not self.written or rows is None or self.view.upper is None:
            return
        there = rows.map_dir(self.view.upper)
        for name in list(self.written):
            try:
                self.map(name, os.stat(name, dir_fd=there, follow_symlinks=False).st_size)
            except FileNotFoundError:
                self.map_gone(name)
        self._sum()

    def statfs(self, host: os.statvfs_result) -> os.statvfs_result:
        """statvfs with the limit as the size; the available space also bounded by the host's."""
        self._settle()
        self.look_at_maps()
        fields = list(host[:10])
        host_free = host.f_bavail * host.f_frsize // UNIT
        if self.limit.bytes is not None:
            total = self.limit.bytes // UNIT
            free = max(0, total - self._base - self.total())
            fields[0] = fields[1] = UNIT
            fields[2:5] = [total, free, min(free, host_free)]
        if self.limit.inodes is not None:
            free = max(0, self.limit.inodes - self._base_inodes - self.inodes)
            fields[5:8] = [self.limit.inodes, free, min(free, host.f_favail) if host.f_files else free]
        return os.statvfs_result(fields)

    # -- one file -----------------------------------------------------------------------------

    def count(self, node: Node) -> int | Blocks:
        """A node's units, counted from the disk the first time."""
        if node.space is None:
            if node.type == DT_LNK:
                node.space = link_units(self.view.size(node))
                return node.space  # type: ignore[no-any-return]
            own = node.data.writable
            if (node.data is not PLAIN and not own) or node.type != DT_REG:
                return 0
            fd = node.data.own_fd() if own else self.view.data_fd(node, False)
            st = os.fstat(fd)
            prealloc = xattr.try_get(fd, b"", self.view.form.prealloc) is not None
            node.space = blocks_of(fd, st.st_size, prealloc, self.fs)
        return node.space  # type: ignore[no-any-return]

    def ranges_of(self, node: Node) -> Blocks:
        """The blocks that a file holds, counted when they are first asked for."""
        space = self.count(node)
        if isinstance(space, int):
            space = node.space = Blocks([(0, space)])
        return space

    def grow(self, node: Node, offset: int, length: int) -> int:
        """The number of ``length`` bytes that may be written at ``offset``; counts their units.

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
                self.units += new
                return length
            space = self.ranges_of(node)
        left = self.left() + space.credit
        for start, end in space.missing(first, last):
            if end - start > left:
                last = start + left
                length = last * UNIT - offset
                if length <= 0 or self._may_return():
                    raise self._full()
                break
            left -= end - start
        self.count_new(space, first, last)
        return length

    def count_new(self, space: Blocks, first: int, last: int) -> None:
        """Count the blocks from ``first`` up to ``last`` that a file does not hold yet; credit is used up first."""
        new = space.add(first, last)
        paid = min(space.credit, new)
        space.credit -= paid
        self.units += new - paid

    def stretch(self, node: Node, fd: int, start: int) -> int:
        """Prepare a write or a new end at ``start``, which may be behind the file's end.

        Returns:
            The present size for :meth:`stretched`, or -1 when there is nothing to be done: no gap, or a host that keeps
            it a hole.

        Raises:
            OSError: ENOSPC: btrfs writes the rest of the last unit, even if that is a hole.
        """
        if self.fs not in ("xfs", "btrfs"):
            return -1
        size = os.fstat(fd).st_size
        if start <= size:
            space = node.space
            return size if space.__class__ is Blocks and space.reserved else -1
        if self.fs == "btrfs" and size % UNIT:
            space = self.ranges_of(node)
            if space.missing(size // UNIT, size // UNIT + 1):
                self.need(1)
                # taken now, so that it exists and counts in any case
                files.fallocate(fd, files.FALLOC_FL_KEEP_SIZE, size // UNIT * UNIT, UNIT)
                self.count_new(space, size // UNIT, size // UNIT + 1)
        return size

    def stretched(self, node: Node, fd: int, size: int, start: int) -> None:
        """After the write: give back the preallocation of xfs behind the end.

        It would become a part of the growing file; and it could not be told from requested room there.
        """
        if self.fs != "xfs":
            return
        space = self.ranges_of(node)
        holes = space.missing(units(size), start // UNIT)
        if space.reserved:
            holes += space.missing(units(os.fstat(fd).st_size), _END)
        for first, end in holes:
            files.fallocate(fd, _PUNCH, first * UNIT, (end - first) * UNIT)

    def can_clone(self) -> bool:
        """Whether copy_file_range(2) shares blocks here, and holes."""
        return self.fs in ("xfs", "btrfs")

    def allocate(self, node: Node, offset: int, length: int) -> None:
        """Count an fallocate of [offset, offset+length). Raises ENOSPC when it does not fit."""
        space = self.ranges_of(node)
        first, last = offset // UNIT, units(offset + length)
        new = sum(end - start for start, end in space.missing(first, last))
        if new - space.credit > self.left():
            raise self._full()
        self.count_new(space, first, last)

    def reserved(self, node: Node, fd: int) -> None:
        """Record that room behind a file's end was requested."""
        self.ranges_of(node).reserved = True
        self.stretched(node, fd, 0, 0)

    def punch(self, node: Node, offset: int, length: int, size: int) -> None:
        """Count a hole: whole units inside it are free again."""
        first, end = units(offset), offset + length
        space = self.ranges_of(node)
        if space.credit or (end >= size and space.ends[-1:] > [size // UNIT]):
            self.recount(node)  # hosts differ about the unit with the file's end, and about room reserved past it
            return
        last = max(units(end), first) if end >= size else end // UNIT
        self.units -= space.remove(first, last)

    def cut(self, node: Node, size: int, before: int) -> None:
        """Count a truncation from ``before`` to ``size``; a longer file has a hole, which is free."""
        space = self.count(node)
        whole = units(size)
        if size > before and isinstance(space, Blocks) and (space.credit or space.ends[-1:] > [units(before)]):
            self.recount(node)  # room was reserved past the end: most hosts keep it
            return
        if isinstance(space, int):
            if whole < space:
                self.units += whole - space
                node.space = whole
            elif whole > space:
                self.ranges_of(node)
        else:
            self.units -= space.remove(whole, 1 << 62) + space.credit
            space.credit = 0

    def recount(self, node: Node) -> None:
        """Count a file again from the disk, after the host refused a part."""
        before = total_of(node.space)
        node.space = None
        self.units += total_of(self.count(node)) - before

    def release(self, node: Node) -> None:
        """Count the final removal of an inode of the upper layer."""
        if node.type == DT_DIR:
            return
        self._nameless.discard(node)
        self.units -= total_of(node.space)
        self.inodes -= 1
        room = self._leaving.pop(node, None)
        if room is not None:
            self.take(NOTHING.over(room))
        if room is not None or self.host.inode:
            self._sum()


def ledger(view: Counted) -> Space:
    """A count that starts with nothing and has no limit, for changes that are counted later (:meth:`Space.later`)."""
    made = Space(view, empty=True)
    if view.space is not None:
        made.grown = view.space.grown  # the growth of a directory is counted once, by either
    return made
