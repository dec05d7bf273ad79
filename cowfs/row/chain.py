"""Reading through a chain of redirect files.

Strategy. Opened for the first time, a file reads the maps of its chain once, bottom first, into one list of
extents (:mod:`cowfs.row.extents`). From then on a read is one bisection and one preadv(2) a segment, at any depth.
Descriptors of the levels beneath are opened when first read and given back by :meth:`Chain.release`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING, Protocol
from cowfs.format.redirect import Ref
from cowfs.row.extents import INFINITY, ZEROS, Extents
from cowfs.row.map import Loaded, Log
from cowfs.row.readahead import Ahead, Hints, plan
from cowfs.union.filedata import Lower
from cowfs.union.layers import Layer, Source
from cowfs.union.node import FileData, Node
from cowfs.union.quota import UNIT

if TYPE_CHECKING:
    from cowfs.row.readahead import Pilot
    from cowfs.row.writeback import Syncer
    from cowfs.union.core import Core

#: a read with more segments than this fetches the main level's span whole and patches the others into it
_FEW = 3
_NOWAIT = getattr(os, "RWF_NOWAIT", 8)
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Level:
    """One file of a chain, below the top one.

    Attributes:
        where, name: where it is; of a frozen layer, so it never moves.
        fd: its descriptor, or -1.
    """

    __slots__ = ("fd", "name", "where")

    def __init__(self, where: Source, name: bytes, fd: int = -1) -> None:
        self.where = where
        self.name = name
        self.fd = fd


class Owner(Protocol):
    """The interface of all redirect files of a view (:class:`cowfs.row.redirects.Rows`) for one of them.

    Attributes:
        copies: a read from more levels than this is not handed to another thread: that takes a descriptor of each.
        drop_synced: whether data leaves the host's page cache once it is synced.
    """

    view: Core
    pilot: Pilot
    syncer: Syncer
    copies: int
    drop_synced: bool

    def resolve(self, file: Chain) -> None:
        """Give a file its chain: the levels beneath and the owner of each extent."""

    def opening(self, file: Chain) -> None:
        """A level of a file is about to be opened."""

    def released(self, file: Chain) -> None:
        """All levels of a file were closed."""

    def trim_logs(self) -> None:
        """Close the maps opened longest ago, above their share."""

    def open_log(self, file: Chain, loaded: Loaded | None) -> Log:
        """The map of a file of the upper layer, made at the first need."""

    def wrote(self, file: Chain, log: Log) -> None:
        """A record was appended."""

    def close_log(self, file: Chain, log: Log) -> None:
        """Take over the map of a file."""

    def drop_map(self, layer: Layer, ref: Ref) -> None:
        """Remove an unreferenced map."""

    def make_plain(self, file: Chain) -> None:
        """Make a file that shows nothing of its base a plain one."""

    def replaced(self, file: Chain, fd: int) -> None:
        """Switch a file to the plain file, open as ``fd``, that has taken its place."""


class Successor(Protocol):
    """The file that is to take another's place (:class:`cowfs.row.rewrite.Twin`)."""

    def changed(self, start: int, end: int) -> None:
        """Note a change of the file's data in [start, end)."""

    def give_up(self) -> None:
        """Give up the replacement."""


class Chain(FileData):
    """A redirect file and its base, for reading. Owner: the view's thread.

    Attributes:
        node: the node, once there is one.
        layer: the layer with the file, and with its map.
        where, name: the file in a frozen layer; ``None`` if the node itself has them.
        behind: the metacopy's place when the file stands for one's data, else ``None``.
        ref: its reference; ``None`` for a file that never had a name while it was written.
        base_end: the end of the visible part of the base, bytes; never more than ``size``.
        size: st_size.
        extents: the owner of each extent; ``None`` until the first use.
        levels: the chain beneath, level 0 first; the file itself is level ``len(levels)``.
        log: the map, once a block was written.
        older: maps of frozen levels that were not on the disk yet when this one was made.
        loaded: the map as it was read, until it is appended to.
        end_stale: whether ``base_end`` is smaller than the reference on disk says.
        ref_dirty: whether the reference changed since the last fsync.
        ahead: the reading ahead of a reader.
        twin: the file that is to take its place, while it is compacted.
    """

    pieced = stays = True

    __slots__ = (
        "ahead",
        "base_end",
        "behind",
        "end_stale",
        "extents",
        "layer",
        "levels",
        "loaded",
        "log",
        "name",
        "node",
        "older",
        "ref",
        "ref_dirty",
        "rows",
        "size",
        "twin",
        "where",
    )

    def __init__(self, rows: Owner, layer: Layer, where: Source | None, name: bytes, ref: Ref | None) -> None:
        self.rows = rows
        self.layer = layer
        self.where = where
        self.name = name
        self.ref = ref
        self.node: Node
        self.behind: Lower | None = None
        self.base_end = 0
        self.size = 0
        self.ahead = Ahead()
        self.twin: Successor | None = None
        self.extents: Extents | None = None
        self.levels: list[Level] = []
        self.log: Log | None = None
        self.older: list[Log] = []
        self.loaded: Loaded | None = None
        self.end_stale = False
        self.ref_dirty = False

    # -- for the view --------------------------------------------------------------------------

    def bind(self, node: Node) -> None:
        """The node whose data this is."""
        self.node = node

    @property
    def home(self) -> Layer:
        return self.layer

    @property
    def path(self) -> bytes | None:
        return self.behind.path if self.behind is not None else None

    @property
    def writable(self) -> bool:
        """Whether it is in the upper layer: a frozen one is redirected again."""
        view = self.rows.view
        where = self.node.where
        return self.where is None and (where is None or where.layer is view.stack.upper) and not view.readonly

    def shown(self, st: os.stat_result) -> tuple[int, int]:
        base = self.ref.base_blocks if self.ref is not None else 0
        return st.st_size, min(-(-st.st_size // UNIT) * 8, st.st_blocks + base)

    def own_fd(self) -> int:
        """The descriptor of the file itself (do not close it)."""
        node = self.node
        if node.fd < 0:
            view = self.rows.view
            view.open_files.trim()
            if self.writable:
                view.open_files.use(node, view.open_own(node), writable=True)
            else:
                where, name = self.place()
                view.open_files.use(node, os.open(name, _FLAGS, dir_fd=where.open()), writable=False)
        return node.fd

    def place(self) -> tuple[Source, bytes]:
        """The place of the file itself."""
        if self.where is not None:
            return self.where, self.name
        assert self.node.where is not None
        return self.node.where, self.node.name

    def in_layers(self, layers: set[Layer]) -> bool:
        if self.layer in layers:
            return True
        self.load()
        return any(level.where.layer in layers for level in self.levels)

    def found_at(self) -> object:
        return super().found_at() if self.where is not None else None

    @property
    def pilot(self) -> Pilot:
        """The thread that gives hints to the host."""
        return self.rows.pilot

    def succeeded_by(self, twin: Successor | None) -> None:
        """Set the file that is being made to take this one's place, or ``None``."""
        self.twin = twin

    def mapped(self) -> None:
        """Note that there is a map now; the writing side records it on the disk."""

    def _fd(self, owner: int) -> int:
        levels = self.levels
        if owner == len(levels):
            fd = self.node.fd
            return fd if fd >= 0 else self.own_fd()
        level = levels[owner]
        if level.fd < 0:
            self.rows.opening(self)
            level.fd = os.open(level.name, _FLAGS, dir_fd=level.where.open())
        return level.fd

    def release(self) -> None:
        """Give back the descriptors of the levels beneath; the next read opens them again."""
        for level in self.levels:
            fd, level.fd = level.fd, -1
            if fd >= 0:
                os.close(fd)
        self.rows.released(self)

    def rebase(self) -> None:
        """Read the chain again at the next use, since the layers beneath were replaced."""
        self.release()
        self.levels, self.extents = [], None

    def close(self) -> None:
        """Release everything when the node goes; the map, too, if the file has lost its name."""
        self.release()
        node = self.node
        if node.parent is None and self.ref is not None and self.layer is self.rows.view.upper and self.writable:
            gone = node.fd < 0 or node.where is not None or os.fstat(node.fd).st_nlink == 0
            if gone:
                self.rows.drop_map(self.layer, self.ref)
        log, self.log = self.log, None
        if log is not None:
            self.rows.close_log(self, log)

    def stand_for(self, metacopy: Lower) -> None:
        """Mark the file as that of a metacopy."""
        self.behind = metacopy

    def give_up_log(self) -> Log | None:
        """Hand over the map, if it is open."""
        log, self.log = self.log, None
        return log

    def drop_log(self) -> None:
        """Close the map; the next write opens it again."""
        log, self.log = self.log, None
        if log is not None:
            clean = not log.dirty and log.failure is None
            self.loaded = Loaded([], log.end, log.synced, 0, False) if clean else None
            self.rows.close_log(self, log)

    def load(self) -> Extents:
        """Read the chain's maps, once.

        Raises:
            OSError: EIO when a map or a base is missing or damaged.
        """
        if self.extents is None:
            self.size = os.fstat(self.own_fd()).st_size
            self.rows.resolve(self)
        assert self.extents is not None
        return self.extents

    def adopt(self, extents: Extents, levels: list[Level], loaded: Loaded) -> None:
        """Take the levels from :meth:`Rows.resolve`, and lay the own blocks over them."""
        assert self.ref is not None
        self.levels = levels
        self.base_end = min(self.ref.base_end, self.size)
        self.end_stale = self.base_end < self.ref.base_end
        self.loaded = loaded
        lay(extents, loaded, self.ref.shift, self.base_end, len(levels))
        self.extents = extents

    def resume(self) -> None:
        """Bring records to the disk; the writing side overrides this."""

    def stand_alone(self) -> None:
        """Make all of it its own (a frozen file that was compacted meanwhile)."""
        self.levels, self.base_end, self.extents = [], 0, Extents()

    # -- reading ------------------------------------------------------------------------------

    def pread(self, offset: int, buffer: memoryview, flags: int = 0) -> int:
        """Read into ``buffer``; fewer bytes only at the end of the file.

        Raises:
            OSError: EIO; EAGAIN with ``flags`` RWF_NOWAIT if the read would wait for the disk.
        """
        if self.extents is None:
            self.load()
        end = min(offset + len(buffer), self.size)
        if offset >= end:
            return 0
        if not flags:
            return self._read(offset, end, buffer)
        sequential = self.ahead.follow(self, offset, end)
        try:
            done = self._read(offset, end, buffer, flags)
        except BlockingIOError:
            if sequential:
                self.ahead.wait(self, offset, end)
            raise
        if done < end - offset and sequential:
            self.ahead.wait(self, offset, end)
        return done

    def _read(self, offset: int, end: int, buffer: memoryview, flags: int = 0) -> int:
        assert self.extents is not None
        runs = list(self.extents.runs(offset, end))
        if len(runs) == 1:
            return self._read_run(runs[0][2], offset, buffer[: end - offset], flags)
        for start, stop, owner in plan(runs) if len(runs) > _FEW else runs:
            part = buffer[start - offset : stop - offset]
            if self._read_run(owner, start, part, flags) < len(part):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return end - offset

    def hints(self, start: int, end: int) -> Hints:
        """The hints for the host before a read of [start, end)."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for first, last, owner in plan(list(self.load().runs(start, end))):
            if owner != ZEROS:
                wanted.setdefault(owner, []).append((first, last))
        if len(wanted) > self.rows.copies:
            return []
        return [(os.dup(self._fd(owner)), ranges) for owner, ranges in wanted.items()]

    def _read_run(self, owner: int, offset: int, buffer: memoryview, flags: int = 0) -> int:
        if owner == ZEROS:
            buffer[:] = bytes(len(buffer))
            return len(buffer)
        fd = self._fd(owner)
        done = os.preadv(fd, [buffer], offset, flags)
        while done < len(buffer):
            if flags:
                return done
            more = os.preadv(fd, [buffer[done:]], offset + done)
            if not more:
                raise OSError(errno.EIO, "a file beneath is shorter than it was", self.node.name)
            done += more
        return done

    def fetch(self, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        self.pread(start, memoryview(data))
        return data

    def stream(self, offset: int, length: int) -> Callable[[memoryview], int]:
        """:meth:`reader` for a read in sequence."""
        end = min(offset + length, self.size)
        cold = self.ahead.was_cold()
        if self.ahead.follow(self, offset, end) and cold:
            self.ahead.wait(self, offset, end)
        return self.reader(offset, length)

    def reader(self, offset: int, length: int) -> Callable[[memoryview], int]:
        """A read to run once in any thread, without concurrent writes: it fills a buffer and returns the number of bytes."""
        end = min(offset + length, self.size)
        runs = list(self.load().runs(offset, end)) if offset < end else []
        runs = plan(runs) if len(runs) > _FEW else runs
        owners = {owner for _, _, owner in runs if owner != ZEROS}
        if len(owners) > self.rows.copies:
            return _from(self.fetch(offset, end))
        copies = {owner: os.dup(self._fd(owner)) for owner in owners}

        def read(buffer: memoryview) -> int:
            try:
                for start, stop, owner in runs:
                    part = buffer[start - offset : stop - offset]
                    if owner == ZEROS:
                        part[:] = bytes(len(part))
                        continue
                    done = _at_once(copies[owner], part, start)
                    if done < len(part):
                        self.ahead.met_cold()
                    while done < len(part):
                        got = os.preadv(copies[owner], [part[done:]], start + done)
                        if not got:
                            raise OSError(errno.EIO, "a file beneath is shorter than it was")
                        done += got
            finally:
                for fd in copies.values():
                    os.close(fd)
            return max(0, end - offset)

        return read

    def data_in(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that hold data; the rest is zeros."""
        found: list[tuple[int, int]] = []
        for at, stop, owner in self.load().runs(start, end):
            fd = self._fd(owner) if owner != ZEROS else -1
            while fd >= 0 and at < stop:
                try:
                    data = os.lseek(fd, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    break
                if data >= stop:
                    break
                at = min(os.lseek(fd, data, os.SEEK_HOLE), stop)
                if found and found[-1][1] == data:
                    data = found.pop()[0]
                found.append((data, at))
        return found

    def lseek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE. Raises ENXIO past the end."""
        extents = self.load()
        if offset < 0 or offset >= self.size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), self.node.name)
        for start, stop, owner in extents.runs(offset, self.size):
            try:
                if owner == ZEROS:
                    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
                found = os.lseek(self._fd(owner), start, whence)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                found = stop if whence == os.SEEK_DATA else start
            if found < stop:
                return found
        if whence == os.SEEK_HOLE:
            return self.size
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), self.node.name)


def _from(data: bytearray) -> Callable[[memoryview], int]:
    """A read that is done already."""

    def read(buffer: memoryview) -> int:
        buffer[: len(data)] = data
        return len(data)

    return read


def _at_once(fd: int, part: memoryview, offset: int) -> int:
    """Read the part in memory. Returns the number of bytes."""
    try:
        return os.preadv(fd, [part], offset, _NOWAIT)
    except OSError:  # nothing in memory, or a host that cannot tell
        return 0


def lay(extents: Extents, loaded: Loaded, shift: int, base_end: int, owner: int) -> None:
    """Lay a level's blocks, and all from ``base_end`` on, over the levels beneath."""
    alone = -(-base_end >> shift) << shift
    extents.put(base_end, alone, ZEROS)
    extents.put(alone, INFINITY, owner)
    for first, last in loaded.ranges:
        start = first << shift
        if start >= alone:
            break
        extents.put(start, min(last << shift, alone), owner)
