"""Use of the host by an upper layer: one measure, kept while a view is mounted and found again by one walk.

Rules (docs/mounts.md, Limits, in the words of users):

1. *Data*: units of 4 KiB, wherever a file was written or allocated (:mod:`cowfs.union.blocks`).
2. *Objects*: one unit for a directory but the root; the units of a symbolic link's target of 60 bytes or more, and of
   each xattr of more than 1,024 bytes.
3. *Small things*: the other xattrs of an inode, ACLs among them, once they do not fit into it; the maps of redirect
   files; blocks of directories beyond their first, which some hosts never give back; on hosts that keep names
   in a tree of their own (btrfs) the names themselves; the inode if the host makes inodes on demand. The first
   32 KiB of all that are free.
4. *Whiteouts* and the directories that were copied up only to hold one (marked ``exempt``): free up to 32 KiB and one
   unit for each that rules 1 to 3 count. Further units count, too.

So a host never holds more than the limit, 64 KiB, and one unit for each that counts. Everything is counted from what
one walk can read again, so that the count is the same before and after a remount.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable

from cowfs._typed import NamedTuple
from cowfs.format import whiteout
from cowfs.format.whiteout import WH_PREFIX, Form
from cowfs.model import Usage
from cowfs.sys import files, xattr
from cowfs.union.blocks import UNIT, measure_file, units
from cowfs.union.layers import MAP_DIR, Layer

FREE_SMALL = 8  # units
FREE_WHITEOUTS = 8  # units
GROWTH = 4  # units by which one more name may make a directory grow: a split and new levels of its tree

_LARGE = 1024  # bytes: a value that common hosts put into blocks of its own
_HEADER = 256  # bytes: what a host adds to such a value
_INLINE = 92  # bytes: what ext4 holds in an inode of 256 bytes, the least of the common hosts
_ENTRY = 16  # bytes: what ext4 adds to a small value
_SHORT_LINK = 60  # bytes: a target that fits into any host's inode
_ACL = b"system.posix_acl_"
#: they come and go by themselves, and are small
_PASSING = frozenset(
    {b"security.capability", b"security.fuseoverlayfs.override_stat", b"user.containers.override_stat"}
)

Sizes = dict[bytes, int]


class Room(NamedTuple):
    """Room for an object, in units.

    Attributes:
        large: by rules 1 and 2.
        small: by rule 3.
    """

    large: int = 0
    small: int = 0

    def over(self, before: Room) -> Room:
        """The difference from ``before``."""
        return Room(self.large - before.large, self.small - before.small)

    def with_units(self, count: int) -> Room:
        """So many units more by rules 1 and 2."""
        return Room(self.large + count, self.small)


NOTHING = Room()
_COUNTLESS = Room(64)  # an inode with more names of xattrs than can be listed (65,536 bytes)


class Host(NamedTuple):
    """The costs of names and inodes on a kind of file system.

    Attributes:
        inode: bytes for each.
        name, letter: bytes for each name, and for each of its letters.
        grows: whether st_blocks of a directory shows the use of its names.
        sized: whether its st_size does, which does not count xattrs.
        certain: up to so many units a file whose st_blocks is its size has no hole: ext4 also counts a block for more
            than four extents, and xfs its preallocation behind the end.
    """

    inode: int = 0
    name: int = 0
    letter: int = 0
    grows: bool = True
    sized: bool = False
    certain: int = 5


HOSTS = {
    "btrfs": Host(
        inode=256, name=256, letter=4, grows=False, certain=1 << 60
    ),  # items of a tree, each name three times
    "ext4": Host(sized=True),
    "tmpfs": Host(grows=False, certain=1 << 60),  # bounds names and inodes by itself (nr_inodes)
    "xfs": Host(inode=512, certain=1),
}


def host_of(fs: str) -> Host:
    """The costs of a file system by its name."""
    return HOSTS.get(fs, Host())


# -- xattrs -------------------------------------------------------------------------------------


def sizes(fd: int, name: bytes | None) -> Sizes | None:
    """The length of each xattr of an inode, as :mod:`cowfs.sys.xattr` names it; ``None`` when there are too many to list."""
    try:
        found = xattr.listx(fd, name)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        return None
    return {attribute: len(xattr.try_get(fd, name, attribute) or b"") for attribute in found}


def xattr_room(found: Sizes | None, form: Form) -> Room:
    """Room that the xattrs of one inode count for."""
    if found is None:
        return _COUNTLESS
    if not found:
        return NOTHING
    small = beside = total = 0
    free = form.constant
    for name, length in found.items():
        if length > _LARGE:
            total += units(length)
            beside += _HEADER
        elif name not in free and name not in _PASSING:
            kept = 0 if name.startswith(_ACL) else len(name) - name.find(b".") - 1
            small += _ENTRY + (kept + 3 & ~3) + (length + 3 & ~3)
    if small > _INLINE:
        beside += 2 * small  # twice: a host's leaf is half full after a split
    return Room(total, units(beside))


def inode_xattrs(fd: int, name: bytes | None, form: Form) -> Room:
    """Room that the xattrs of an inode count for, read from the disk (``name`` empty or ``None``: the descriptor itself)."""
    return xattr_room(sizes(fd, name), form)


def link_units(length: int) -> int:
    """Units that a symbolic link's target counts for."""
    return units(length + 1) if length >= _SHORT_LINK else 0


class Sums(NamedTuple):
    """The use of a tree, in parts that are added and taken off; for hosts whose directories do not grow (:class:`Host`).

    Attributes:
        units, small, names, inodes: as those of :class:`Tally`.
    """

    units: int
    small: int
    names: int
    inodes: int

    def changed(self, less: Sums, more: Sums) -> Sums:
        """These parts without ``less`` and with ``more``."""
        return Sums(*(max(0, own - old + new) for own, old, new in zip(self, less, more, strict=True)))


# -- the sum ------------------------------------------------------------------------------------


class Tally:
    """The sums of one layer.

    Attributes:
        units: the units of rules 1 and 2.
        inodes: files, directories and the rest; not those of rule 4.
        small: the units of rule 3: xattrs and maps.
        names: bytes of names, if directories do not show them.
        grown: inode of a directory -> units beyond its first block; their sum is ``growth``.
        hidden: bytes that the names of whiteouts take.
        exempt: units of the directories of rule 4.
        mapped: name of a map -> its units.
    """

    __slots__ = (
        "exempt",
        "form",
        "fs",
        "grown",
        "growth",
        "hidden",
        "host",
        "inodes",
        "mapped",
        "names",
        "small",
        "units",
    )

    def __init__(self, fs: str, form: Form) -> None:
        self.fs = fs
        self.host = host_of(fs)
        self.form = form
        self.clear()

    def clear(self) -> None:
        """Reset the sums to nothing."""
        self.units = self.inodes = self.small = self.names = self.growth = self.hidden = self.exempt = 0
        self.grown: dict[int, int] = {}
        self.mapped: dict[bytes, int] = {}

    def name_cost(self, name: bytes) -> int:
        """Bytes of a name, if directories do not show them."""
        host = self.host
        return host.name + host.letter * len(name)

    def hidden_cost(self, name: bytes) -> int:
        """Bytes that the name of a whiteout takes."""
        return 24 + len(name) if self.host.grows or not self.host.name else self.name_cost(name)

    def beyond(self, more: int = 0) -> int:
        """Units that rule 3 counts, with ``more`` bytes."""
        taken = (self.growth + self.small) * UNIT + self.names + self.host.inode * self.inodes + more
        if self.host.grows:
            taken -= self.hidden  # names of whiteouts make directories grow, too, and are counted by rule 4
        return max(0, units(taken) - FREE_SMALL)

    def counted(self) -> int:
        """Units of rules 1 to 3."""
        return self.units + self.beyond()

    def total(self) -> int:
        """Units of all rules."""
        return max(self.counted(), self.exempt + units(self.hidden) - FREE_WHITEOUTS)

    def sums(self) -> Sums | None:
        """The parts; None if there are whiteouts or growing directories."""
        if self.host.grows or self.hidden or self.exempt or self.mapped:
            return None
        return Sums(self.units, self.small, self.names, self.inodes)

    def become(self, sums: Sums) -> None:
        """Set the count to the sum of the parts."""
        self.clear()
        self.units, self.small, self.names, self.inodes = sums

    def usage(self) -> Usage:
        """The use, in the units for users."""
        return Usage(bytes=self.total() * UNIT, inodes=self.inodes)

    def take(self, room: Room) -> None:
        """Count so much more."""
        self.units += room.large
        self.small += room.small

    def directory(self, fd: int) -> int:
        """Count the blocks of an open directory; returns its inode."""
        st = os.fstat(fd)
        if self.host.grows:
            self.grew(st)
        return st.st_ino

    def grew(self, st: os.stat_result) -> None:
        """The same from a stat result."""
        now = (units(st.st_size) if self.host.sized else st.st_blocks // 8) - 1
        before = self.grown.get(st.st_ino, 0)
        if now > 0 and now != before:
            self.grown[st.st_ino] = now
            self.growth += now - before
        elif now <= 0 and before:
            self.forget_growth(st.st_ino)

    def forget_growth(self, ino: int) -> None:
        """Remove the growth of a directory that is gone, or of minimal size."""
        self.growth -= self.grown.pop(ino, 0)

    def hide(self, name: bytes) -> None:
        """Count a whiteout."""
        self.hidden += self.hidden_cost(name)

    def inode(self, fd: int, name: bytes, st: os.stat_result, found: Sizes | None, *, data: bool) -> None:
        """Count one object (not a whiteout) with its xattrs; ``data``: whether its data is in this layer."""
        form = self.form
        cost = xattr_room(found, form)
        if stat.S_ISDIR(st.st_mode):
            if self.host.grows:
                self.grew(st)
            if found and form.exempt in found:
                self.exempt += 1 + cost.large + cost.small
                return
            self.units += 1
        elif stat.S_ISREG(st.st_mode):
            if data:
                whole = units(st.st_size)
                prealloc = bool(found) and form.prealloc in found  # type: ignore[operator]
                # st_blocks can be right by chance if it counts more than data
                if found or st.st_blocks != whole * 8 or whole > self.host.certain:
                    whole = measure_file(fd, name, st, prealloc, self.fs)
                self.units += whole
        elif stat.S_ISLNK(st.st_mode):
            self.units += link_units(st.st_size)
        self.take(cost)
        self.inodes += 1

    def root(self, fd: int) -> None:
        """Count the parts of the layer as a whole: its root's xattrs and growth, the maps of its redirect files."""
        self.take(inode_xattrs(fd, b"", self.form))
        self.directory(fd)
        if xattr.try_get(fd, b"", self.form.row) is not None:
            self.maps(fd)

    def maps(self, root: int) -> None:
        """Count the maps of a layer's redirect files, which are beside its root."""
        try:
            fd = os.open(MAP_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        except OSError:
            return  # a layer without its maps cannot be read either; its reader reports that
        try:
            self.directory(fd)
            with os.scandir(fd) as found:
                for entry in found:
                    if not entry.name.endswith(".new"):
                        self.map(os.fsencode(entry.name), entry.stat(follow_symlinks=False).st_size)
        finally:
            os.close(fd)

    def map(self, name: bytes, size: int) -> None:
        """Count a map of ``size`` bytes; 0 for a removed one."""
        before = self.mapped.pop(name, 0)
        now = units(size)
        if now:
            self.mapped[name] = now
        self.small += now - before


# -- the walk -----------------------------------------------------------------------------------


def measure(layer: Layer, form: Form, pause: Callable[[], None] | None = None) -> Usage:
    """Count a layer from the disk: the same measure, by a walk that follows no link.

    Args:
        pause: called after each directory and every hundred names; vanishing objects are not counted.

    Raises:
        OSError: a directory cannot be read.
    """
    return walk(layer, form, pause).usage()


def walk(layer: Layer, form: Form, pause: Callable[[], None] | None = None) -> Tally:
    """The sums of a layer; arguments as for :func:`measure`."""
    tally = Tally(files.fs_name(layer.root.fd), form)
    tally.root(layer.root.open())
    seen: dict[int, bool] = {}
    pending = [layer.root]
    opened = []  # a child opens its parent again if need be, so they are closed together
    while pending:
        source = pending.pop()
        if source is not layer.root:
            opened.append(source)
        try:
            fd = source.open()
            with os.scandir(b"/proc/self/fd/%d" % fd) as found:
                names = [entry.name for entry in found]
        except FileNotFoundError:
            if pause is None:
                raise
            continue
        for number, name in enumerate(names):
            if pause is not None and number % 100 == 0:
                pause()
            try:
                if _count_name(tally, fd, name, seen):
                    pending.append(source.child(name))
            except FileNotFoundError:
                if pause is None:
                    raise
        source.descriptors.trim()
    for source in opened:
        source.close()
    return tally


def _count_name(tally: Tally, fd: int, name: bytes, seen: dict[int, bool]) -> bool:
    """Count the object of a name in an open directory; returns whether it is a directory."""
    form = tally.form
    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
    if whiteout.is_whiteout(st) or (form.dotwh and name.startswith(WH_PREFIX)):
        tally.hide(name)
        return False
    is_dir = stat.S_ISDIR(st.st_mode)
    linked = st.st_nlink > 1 and not is_dir
    known = seen.get(st.st_ino) if linked else None
    found = sizes(fd, name) if known is None else None
    hides = bool(found) and form.whiteout in found if known is None else known  # type: ignore[operator]
    if linked:
        seen[st.st_ino] = hides
    if hides:
        tally.hide(name)
        return False
    tally.names += tally.name_cost(name)
    if known is not None:
        return False
    tally.inode(fd, name, st, found, data=not found or form.metacopy not in found)
    return is_dir


def names_cost(tally: Tally, names: Iterable[bytes]) -> int:
    """The bytes of all whiteouts' names."""
    return sum(map(tally.hidden_cost, names))
