"""One redirect file in use: reads through a whole chain, writes that store only their blocks.

Strategy. Opened for the first time, a file reads the maps of its chain once, bottom first, into one list of
extents (:mod:`cowfs.union.extents`). From then on a read is one bisection and one preadv(2) a segment, at any depth;
a write goes to the file's own descriptor, at its own offset, and then into the map (:mod:`cowfs.union.rowmap`).

Past the block with ``base_end`` the file stands alone: no map says so and none is needed, so appending costs what it
costs on a plain file. Before, a block is either the file's own or a lower level's as a whole, with zeros from ``base_end``
on. A write that covers a block in part reads the rest once and writes all of it, in one pwritev(2).

Order, for a crash at any point: data, then its record; a shorter size, then the smaller ``base_end``; the smaller
``base_end``, then a longer size.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from cowfs.sys import files, xattr
from cowfs.union.extents import INFINITY, ZEROS, Extents
from cowfs.union.lower import Data
from cowfs.union.node import Node
from cowfs.union.rowmap import Loaded, Log, Ref
from cowfs.union.source import Layer, Source
from cowfs.union.space import UNIT, units

if TYPE_CHECKING:
    from cowfs.union.row import Rows

_PUNCH, _KEEP = files.FALLOC_FL_PUNCH_HOLE, files.FALLOC_FL_KEEP_SIZE
#: a read with more segments than this fetches the main level's span whole and patches the others into it
_FEW = 3
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


class RowFile:
    """The data of a redirect file: what a node's ``data`` is. Owner: the view's thread.

    Attributes:
        node: the node, once there is one.
        layer: the layer with the file, and with its map.
        where, name: the file in a frozen layer; ``None`` where the node itself says it.
        behind: the metacopy's place when the file stands for one's data, else ``None``.
        ref: its reference; ``None`` for a file that never had a name while it was written.
        base_end: from here on nothing of the base shows, bytes; never more than ``size``.
        size: st_size.
        extents: who holds what; ``None`` until the first use.
        levels: the chain beneath, level 0 first; the file itself is level ``len(levels)``.
        log: the map, once something was written.
        older: maps of frozen levels that were not on the disk yet when this one was made.
    """

    __slots__ = (
        "_end_stale",
        "_loaded",
        "_ref_dirty",
        "base_end",
        "behind",
        "extents",
        "layer",
        "levels",
        "log",
        "name",
        "node",
        "older",
        "ref",
        "rows",
        "size",
        "where",
    )

    def __init__(self, rows: Rows, layer: Layer, where: Source | None, name: bytes, ref: Ref | None) -> None:
        self.rows = rows
        self.layer = layer
        self.where = where
        self.name = name
        self.ref = ref
        self.node: Node
        self.behind: Data | None = None
        self.base_end = 0
        self.size = 0
        self.extents: Extents | None = None
        self.levels: list[Level] = []
        self.log: Log | None = None
        self.older: list[Log] = []
        self._loaded: Loaded | None = None
        self._end_stale = False
        self._ref_dirty = False

    # -- what the view asks --------------------------------------------------------------------

    def bind(self, node: Node) -> None:
        """The node whose data this is."""
        self.node = node

    @property
    def path(self) -> bytes:
        """What a metacopy's ``redirect`` says. AttributeError for a file that stands for itself."""
        if self.behind is None:
            raise AttributeError("path")
        return self.behind.path

    @property
    def writable(self) -> bool:
        """Whether it is in the upper layer: a frozen one is redirected again."""
        view = self.rows.view
        where = self.node.where
        return self.where is None and (where is None or where.layer is view.upper) and not view.readonly

    def stat_size(self, st: os.stat_result) -> tuple[int, int]:
        """(size, st_blocks) to show."""
        base = self.ref.base_blocks if self.ref is not None else 0
        return st.st_size, min(-(-st.st_size // UNIT) * 8, st.st_blocks + base)

    def own_fd(self) -> int:
        """The descriptor of the file itself (do not close it)."""
        node = self.node
        if node.fd < 0:
            self.rows.make_room()
            view = self.rows.view
            if self.writable:
                node.fd = view.open_own(node)
                node.wfd = True
            else:
                where, name = self.place()
                node.fd = os.open(name, _FLAGS, dir_fd=where.open())
                node.wfd = False
            view.open_files.append(node)
        return node.fd

    def place(self) -> tuple[Source, bytes]:
        """Where the file itself is."""
        if self.where is not None:
            return self.where, self.name
        assert self.node.where is not None
        return self.node.where, self.node.name

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
                self.rows.closing()
                os.close(fd)

    def close(self) -> None:
        """The node goes: give back everything; the map, too, when the file has no name any more."""
        self.release()
        node = self.node
        if node.parent is None and self.ref is not None and self.layer is self.rows.view.upper and self.writable:
            gone = node.fd < 0 or node.where is not None or os.fstat(node.fd).st_nlink == 0
            if gone:
                self.rows.drop_map(self.layer, self.ref)
        log, self.log = self.log, None
        if log is not None:
            self.rows.close_log(log)

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
        """Take what :meth:`Rows.resolve` found beneath, and lay the own blocks over it."""
        assert self.ref is not None
        self.levels = levels
        self.base_end = min(self.ref.base_end, self.size)
        self._end_stale = self.base_end < self.ref.base_end
        self._loaded = loaded
        lay(extents, loaded, self.ref.shift, self.base_end, len(levels))
        self.extents = extents

    def stand_alone(self) -> None:
        """All of it is its own (a frozen file that was compacted meanwhile)."""
        self.levels, self.base_end, self.extents = [], 0, Extents()

    # -- reading ------------------------------------------------------------------------------

    def pread(self, offset: int, buffer: memoryview, flags: int = 0) -> int:
        """Read into ``buffer``; fewer bytes only at the end of the file.

        Raises:
            OSError: EIO; EAGAIN with ``flags`` RWF_NOWAIT when the disk would be waited for.
        """
        extents = self.extents if self.extents is not None else self.load()
        end = min(offset + len(buffer), self.size)
        if offset >= end:
            return 0
        runs = list(extents.runs(offset, end))
        if len(runs) == 1:
            return self._read_run(runs[0][2], offset, buffer[: end - offset], flags)
        if len(runs) > _FEW:
            self._read_many(runs, offset, buffer, flags)
            return end - offset
        for start, stop, owner in runs:
            part = buffer[start - offset : stop - offset]
            if self._read_run(owner, start, part, flags) < len(part):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return end - offset

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

    def _read_many(self, runs: list[tuple[int, int, int]], offset: int, buffer: memoryview, flags: int) -> None:
        """Many segments: the span of the level that has most of it in one call, then the others."""
        held: dict[int, int] = {}
        for start, stop, owner in runs:
            held[owner] = held.get(owner, 0) + stop - start
        held.pop(ZEROS, None)
        main = max(held, key=held.__getitem__)
        first = next(start for start, _, owner in runs if owner == main)
        last = next(stop for _, stop, owner in reversed(runs) if owner == main)
        parts = [(first, last, main)] + [run for run in runs if run[2] != main]
        for start, stop, owner in parts:
            if self._read_run(owner, start, buffer[start - offset : stop - offset], flags) < stop - start:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _fetch(self, start: int, end: int) -> bytearray:
        data = bytearray(end - start)
        self.pread(start, memoryview(data))
        return data

    def reader(self, offset: int, length: int) -> Callable[[memoryview], int]:
        """A read to be run once in any thread, while nobody writes: it fills a buffer and returns how many bytes."""
        end = min(offset + length, self.size)
        runs = list(self.load().runs(offset, end)) if offset < end else []
        owners = {owner for _, _, owner in runs if owner != ZEROS}
        copies = {owner: os.dup(self._fd(owner)) for owner in owners}

        def read(buffer: memoryview) -> int:
            try:
                for start, stop, owner in runs:
                    part = buffer[start - offset : stop - offset]
                    if owner == ZEROS:
                        part[:] = bytes(len(part))
                        continue
                    done = 0
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

    # -- writing ------------------------------------------------------------------------------

    @property
    def own(self) -> int:
        """The file's own level."""
        return len(self.levels)

    def pwrite(self, offset: int, data: memoryview | bytes) -> int:
        """Write; short where the limit or the host's space ends. Raises ENOSPC when nothing fits, EFBIG."""
        length = len(data)
        if not length:
            return 0
        extents = self.load()
        fd = self._ready_to_write()
        end = offset + length
        if end > self.size and self._end_stale:
            self._store_end()
        alone = self.alone
        if offset >= alone or extents.has_all(offset, min(end, alone), self.own):
            return self._write_over(fd, offset, data)
        return self._write_new(fd, offset, memoryview(data))

    def _ready_to_write(self) -> int:
        fd = self.own_fd()
        if not self.node.wfd:  # opened while its layer could not be written
            self.node.fd = self.rows.view.open_own(self.node)
            self.node.wfd = True
            os.close(fd)
            fd = self.node.fd
        return fd

    def _write_over(self, fd: int, offset: int, data: memoryview | bytes) -> int:
        """Where the file is its own already."""
        space, node = self.rows.view.space, self.node
        length = len(data)
        allowed = length if space is None else space.grow(node, offset, length)
        try:
            done = os.pwrite(fd, data if allowed == length else memoryview(data)[:allowed], offset)
        except OSError:
            if space is not None:
                space.recount(node)
            raise
        if done < allowed and space is not None:
            space.recount(node)
        self.size = max(self.size, offset + done)
        return done

    def _write_new(self, fd: int, offset: int, data: memoryview) -> int:
        """Where at least one block is a lower level's."""
        extents, own, alone = self.extents, self.own, self.alone
        assert (extents is not None and self.ref is not None) or self.ref is None
        assert extents is not None
        shift = self.shift
        block = 1 << shift
        end = offset + len(data)
        start, stop = offset, end
        head = tail = b""
        if not extents.has_all(offset, offset + 1, own):
            start = offset & -block
            if start < offset:
                head = bytes(self._fetch(start, offset))
        if end < alone and not extents.has_all(end - 1, end, own):
            stop = max(end, min(-(-end // block) << shift, self.size))
            if end < stop:
                tail = bytes(self._fetch(end, stop))
        log = self._open_log()
        affordable = self._afford(start, stop)
        if affordable <= offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if affordable < stop:
            stop = affordable
            data, tail = data[: stop - offset], tail[: max(0, stop - end)]
        space = self.rows.view.space
        try:
            done = os.pwritev(fd, [part for part in (head, data, tail) if len(part)], start)
        except OSError:
            if space is not None:
                space.recount(self.node)
            raise
        reached = start + done
        whole = reached >= min(stop, alone)
        last = -(-min(reached, alone) >> shift) if whole else reached >> shift
        self.size = max(self.size, reached)
        first = start >> shift
        if first < last:
            if log is not None:
                log.append(first, last)
                self.rows.wrote(self, log)
            extents.put(first << shift, last << shift, own)
        if reached < stop and space is not None:
            space.recount(self.node)
        written = min(reached if whole else last << shift, end) - offset
        if written <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    @property
    def alone(self) -> int:
        """From this block boundary on the file stands alone, bytes."""
        return -(-self.base_end >> self.shift) << self.shift

    @property
    def shift(self) -> int:
        """log2 of the block size."""
        return self.ref.shift if self.ref is not None else 12

    def _afford(self, start: int, stop: int) -> int:
        """How far a write of [start, stop) may go, in whole blocks below ``alone``; counts its units."""
        space = self.rows.view.space
        if space is None:
            return stop
        blocks = space._ranges(self.node)
        left = space.left() + blocks.credit
        if sum(b - a for a, b in blocks.missing(start // UNIT, units(stop))) > left:
            here = start
            while here < stop:
                step = 1 << self.shift if here < self.alone else UNIT
                ahead = min((here // step + 1) * step, stop)
                cost = sum(b - a for a, b in blocks.missing(here // UNIT, units(ahead)))
                if cost > left:
                    break
                left -= cost
                here = ahead
            stop = here
        if start < stop:
            space._count_new(blocks, start // UNIT, units(stop))
        return stop

    def _open_log(self) -> Log | None:
        """The map, made or continued. ``None`` for a file without a name."""
        if self.log is None and self.ref is not None:
            if self._loaded is not None and self._loaded.stale and self.ref.has_map:
                self._clean_tail()
            self.log = self.rows.open_log(self, self._loaded)
            self._loaded = None
        return self.log

    def _clean_tail(self) -> None:
        """After another boot: what a lost record left behind in the block of ``base_end``."""
        assert self.extents is not None
        start, end = self.base_end, self.alone
        space = self.rows.view.space
        if start < end and not self.extents.has_all(start, end, self.own):
            if space is not None:
                space.count(self.node)
            files.fallocate(self.own_fd(), _PUNCH | _KEEP, start, end - start)
            if space is not None:
                space.recount(self.node)

    def _store_ref(self, ref: Ref) -> None:
        self.ref = ref
        self._ref_dirty = True
        xattr.setx(self.own_fd(), b"", self.rows.view.form.row, ref.pack())

    def mapped(self) -> None:
        """Note on disk that there is a map now."""
        assert self.ref is not None
        self._store_ref(self.ref.mapped())

    def _store_end(self) -> None:
        if self.ref is not None:
            self._store_ref(self.ref.ending(self.base_end))
        self._end_stale = False

    def truncate(self, size: int) -> None:
        """Set the size. Nothing of the base shows again where it was cut off."""
        extents = self.load()
        fd = self._ready_to_write()
        space = self.rows.view.space
        if space is not None:
            space.count(self.node)
        if size > self.size and self._end_stale:
            self._store_end()
        os.ftruncate(fd, size)
        self.size = size
        if size < self.base_end:
            self.base_end = size
            self._end_stale = True
            alone = self.alone
            if size < alone and not extents.has_all(size, size + 1, self.own):
                extents.put(size, alone, ZEROS)
            extents.put(alone, INFINITY, self.own)
            self._store_end()
        if space is not None:
            space.cut(self.node, size)
        if size == 0:
            self.rows.make_plain(self)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). Blocks that are still the base's get room reserved; a hole or zeros make them own."""
        self.load()
        fd = self._ready_to_write()
        space, node = self.rows.view.space, self.node
        end = offset + length
        size = self.size
        if not mode & _KEEP and end > size and self._end_stale:
            self._store_end()
        if space is not None:
            space.count(node)
            if not mode & _PUNCH:
                space.allocate(node, offset, length)
        try:
            files.fallocate(fd, mode, offset, length)
            if mode & _KEEP and not mode & _PUNCH and end > size:
                xattr.setx(fd, b"", self.rows.view.form.prealloc, b"y")
        except OSError:
            if space is not None:
                space.recount(node)
            raise
        if space is not None and mode & _PUNCH:
            space.punch(node, offset, length, size)
        if not mode & _KEEP:
            self.size = max(size, end)
        if mode & ~_KEEP and offset < self.base_end:
            self._clear(offset, min(end, self.base_end))

    def _clear(self, offset: int, end: int) -> None:
        """[offset, end), below ``base_end`` and zeros in the own file already, must no longer show the base."""
        extents, shift = self.extents, self.shift
        assert extents is not None
        if extents.has_all(offset, end, self.own):
            return
        first = -(-offset >> shift)
        last = -(-end >> shift) if end == self.base_end else end >> shift
        self._zero(offset, min(first << shift, end))
        if last >= first:
            self._zero(last << shift, end)
        if first < last:
            log = self._open_log()
            if log is not None:
                log.append(first, last)
                self.rows.wrote(self, log)
            extents.put(first << shift, last << shift, self.own)

    def _zero(self, start: int, end: int) -> None:
        """Write zeros to a part of one block, unless that block is the own one."""
        assert self.extents is not None
        while start < end and not self.extents.has_all(start, end, self.own):
            start += self.pwrite(start, bytes(end - start))

    # -- compaction ----------------------------------------------------------------------------

    def missing(self) -> int:
        """How many bytes still show a level beneath."""
        extents = self.load()
        return self.base_end - extents.share(self.own, self.base_end)

    def fill(self, most: int) -> int:
        """Make up to ``most`` bytes of what the levels beneath show the file's own. Returns how many that were.

        Holes stay holes. Raises ENOSPC at the limit; what was filled is filled.
        """
        extents = self.load()
        fd = self._ready_to_write()
        block, own = 1 << self.shift, self.own
        done = at = 0
        while done < most and at < self.base_end:
            for start, stop, owner in extents.runs(at, self.base_end):
                if owner == own:
                    at = stop
                    continue
                at = start
                break
            else:
                break
            hole = self._hole(at)
            if hole > at:
                space = self.rows.view.space
                files.fallocate(fd, _PUNCH | _KEEP, at, hole - at)
                if space is not None:
                    space.punch(self.node, at, hole - at, self.size)
                self._clear(at, hole)
                at = hole
                continue
            stop = min(at + max(block, min(most - done, 1 << 20) & -block), self.base_end)
            done += sum(b - a for a, b, owner in extents.runs(at, stop) if owner != own)
            while at < stop:
                at += self.pwrite(at, memoryview(self._fetch(at, stop)))
        return done

    def _hole(self, at: int) -> int:
        """The end of the whole blocks from ``at`` that are not the own ones and hold no data."""
        assert self.extents is not None
        try:
            data = min(self.lseek(at, os.SEEK_DATA), self.base_end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = self.base_end
        end = data if data == self.base_end else data >> self.shift << self.shift
        for start, _, owner in self.extents.runs(at, max(end, at)):
            if owner == self.own:
                return start
        return end

    # -- durability ---------------------------------------------------------------------------

    def sync_job(self) -> Callable[[bool], None]:
        """What fsync(2) means here, to be run once in any thread: data, then map. The argument: fdatasync(2) will do.

        What was written before its layer was frozen belongs to it.
        """
        if not self.rows.view.must_sync:
            return lambda data_only: None
        syncer = self.rows.syncer
        older = [log for log in self.older if log.dirty]
        if self.log is None and self.writable and self._loaded is not None and self._loaded.end > self._loaded.synced:
            self._open_log()
        log = self.log
        fd = os.dup(self.own_fd()) if self.writable or (log is not None and log.dirty) else -1
        upto = log.end if log is not None else 0
        whole, self._ref_dirty = self._ref_dirty, False

        def job(data_only: bool) -> None:
            if older:
                syncer.sync(older)
            if fd < 0:
                return
            try:
                (os.fdatasync if data_only and not whole else os.fsync)(fd)
                if log is not None and log.failure is not None:
                    raise log.failure
            except OSError as error:
                if log is not None:
                    log.failure = error
                raise
            finally:
                os.close(fd)
            if log is not None and upto > log.synced:
                log.mark_synced(upto)
                log.sync()

        return job


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
