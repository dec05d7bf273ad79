"""One redirect file in use: writes that store only their blocks; see :mod:`cowfs.row.chain` for reading.

Strategy. A write goes to the file's own descriptor, at its own offset, and then into the map (:mod:`cowfs.row.map`).

Past the block with ``base_end`` the file stands alone, without records in the map, so appending costs the same as on a
plain file. Before, a block is either the file's own or a lower level's as a whole, with zeros from ``base_end`` on. A
write that covers a block in part reads the rest once and writes all of it, in one pwritev(2).

Order, for a crash at any point: data, then its record; a shorter size, then the smaller ``base_end``; the smaller
``base_end``, then a longer size.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Container

from cowfs.format.redirect import Ref
from cowfs.row.chain import Chain, Level
from cowfs.row.extents import INFINITY, ZEROS, Extents
from cowfs.row.map import RECORD_SIZE, Log
from cowfs.sys import files, xattr
from cowfs.union.node import Node
from cowfs.union.quota import UNIT, units

_PUNCH, _KEEP = files.FALLOC_FL_PUNCH_HOLE, files.FALLOC_FL_KEEP_SIZE


class RowFile(Chain):
    """The data of a redirect file, for a node's ``data``. Owner: the view's thread."""

    __slots__ = ()

    def follow(self, old: Chain) -> None:
        """Write to this file from now on, instead of the one of a frozen layer before it."""
        self.older = [log for log in old.older if log.dirty]
        frozen = old.give_up_log()
        if frozen is not None:
            if frozen.dirty:
                self.older.append(frozen)
            self.rows.close_log(old, frozen)

    def begin(self, node: Node, levels: list[Level], extents: Extents, size: int, log: Log | None) -> None:
        """Set up a new file, which shows all of its base, ``size`` bytes."""
        self.bind(node)
        self.levels, self.log = levels, log
        self.size = self.base_end = size
        alone = -(-size >> self.shift) << self.shift
        extents.put(size, alone, ZEROS)
        extents.put(alone, INFINITY, len(levels))
        self.extents = extents

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
        if self.log is None:
            self.rows.trim_logs()
        extents = self.load()
        fd = self._ready_to_write()
        end = offset + length
        if self.twin is not None:
            self.twin.changed(offset, end)
        if end > self.size and self.end_stale:
            self._store_end()
        alone = self.alone
        if offset >= alone or extents.has_all(offset, min(end, alone), self.own):
            return self._write_over(fd, offset, data)
        return self._write_new(fd, offset, memoryview(data))

    def _ready_to_write(self) -> int:
        fd = self.own_fd()
        if not self.node.wfd:  # opened while its layer could not be written
            view = self.rows.view
            fd = view.open_own(self.node)
            view.open_files.use(self.node, fd, writable=True)
        return fd

    def _write_over(self, fd: int, offset: int, data: memoryview | bytes) -> int:
        """Write where all blocks are the file's own."""
        space, node = self.rows.view.space, self.node
        length = len(data)
        before = -1 if space is None else space.stretch(node, fd, offset)
        allowed = length if space is None else space.grow(node, offset, length)
        try:
            done = os.pwrite(fd, data if allowed == length else memoryview(data)[:allowed], offset)
            if before >= 0 and space is not None:
                space.stretched(node, fd, before, offset)
        except OSError:
            if space is not None:
                space.recount(node)
            raise
        if done < allowed and space is not None:
            space.recount(node)
        self.size = max(self.size, offset + done)
        return done

    def _write_new(self, fd: int, offset: int, data: memoryview) -> int:
        """Write where at least one block is a lower level's."""
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
                head = bytes(self.fetch(start, offset))
        if end < alone and not extents.has_all(end - 1, end, own):
            stop = max(end, min(-(-end // block) << shift, self.size))
            if end < stop:
                tail = bytes(self.fetch(end, stop))
        log = self._open_log()
        space = self.rows.view.space
        if space is not None and log is not None:
            space.need(0, room=space.map_room(log.name, log.end + 2 * RECORD_SIZE))  # one more when it is synced
        affordable = self._afford(start, stop)
        if affordable <= offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if affordable < stop:
            stop = affordable
            data, tail = data[: stop - offset], tail[: max(0, stop - end)]
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
            self.rows.view.work.redirected_more(last - first)
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
        """The allowed end of a write of [start, stop), in whole blocks below ``alone``; counts its units."""
        space = self.rows.view.space
        if space is None:
            return stop
        blocks = space.ranges_of(self.node)
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
            space.count_new(blocks, start // UNIT, units(stop))
        return stop

    def _open_log(self) -> Log | None:
        """The map, made or continued. ``None`` for a file without a name."""
        if self.log is None and self.ref is not None:
            if self.loaded is not None and self.loaded.stale and self.ref.has_map:
                self._clean_tail()
            self.log = self.rows.open_log(self, self.loaded)
            self.loaded = None
        return self.log

    def resume(self) -> None:
        """Open the map, which makes it dirty again."""
        self._open_log()

    def _clean_tail(self) -> None:
        """After another boot: clear the rest of a lost record in the block of ``base_end``."""
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
        self.ref_dirty = True
        xattr.setx(self.own_fd(), b"", self.rows.view.form.row, ref.pack())

    def mapped(self) -> None:
        """Note on disk that there is a map now."""
        assert self.ref is not None
        self._store_ref(self.ref.mapped())

    def _store_end(self) -> None:
        if self.ref is not None:
            self._store_ref(self.ref.ending(self.base_end))
        self.end_stale = False

    def truncate(self, size: int) -> None:
        """Set the size. A cut part of the base never shows again."""
        extents = self.load()
        fd = self._ready_to_write()
        space = self.rows.view.space
        if space is not None:
            space.count(self.node)
        if size > self.size and self.end_stale:
            self._store_end()
        before = self.size
        if self.twin is not None:
            self.twin.changed(size, INFINITY)
        longer = -1 if space is None else space.stretch(self.node, fd, size)
        os.ftruncate(fd, size)
        if longer >= 0 and space is not None:
            space.stretched(self.node, fd, before, size + UNIT - 1)
        self.size = size
        if size < self.base_end:
            self.base_end = size
            self.end_stale = True
            alone = self.alone
            if size < alone and not extents.has_all(size, size + 1, self.own):
                extents.put(size, alone, ZEROS)
            extents.put(alone, INFINITY, self.own)
            self._store_end()
        if space is not None:
            space.cut(self.node, size, before)
        if size == 0:
            self.rows.make_plain(self)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). Blocks that are still the base's get room reserved; a hole or zeros make them own."""
        self.load()
        fd = self._ready_to_write()
        if self.twin is not None:
            self.twin.give_up()
        space, node = self.rows.view.space, self.node
        end = offset + length
        size = self.size
        if not mode & _KEEP and end > size and self.end_stale:
            self._store_end()
        longer = -1
        if space is not None:
            space.count(node)
            if not mode & _PUNCH:
                longer = space.stretch(node, fd, max(offset, size + 1))
                space.allocate(node, offset, length)
        try:
            files.fallocate(fd, mode, offset, length)
            if longer >= 0 and space is not None:
                space.stretched(node, fd, size, offset)
            if mode & _KEEP and not mode & _PUNCH and end > size:
                xattr.setx(fd, b"", self.rows.view.form.prealloc, b"y")
                if space is not None:
                    space.reserved(node, fd)
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
        """Hide the base in [offset, end), which is below ``base_end`` and has zeros in the own file already."""
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

    def missing(self, owners: Container[int] | None = None) -> int:
        """The number of bytes that still show a level beneath (one of ``owners``)."""
        extents = self.load()  # first, since the base is unknown before
        if owners is None:
            return self.base_end - extents.share(self.own, self.base_end)
        return sum(stop - start for start, stop, owner in extents.runs(0, self.base_end) if owner in owners)

    def fill(self, most: int, owners: Container[int] | None = None) -> int:
        """Copy up to ``most`` visible bytes of the levels beneath into the file. Returns their number.

        The file's times stay. Holes stay holes. Raises ENOSPC at the limit; bytes copied before stay.

        Args:
            owners: only the bytes of these levels.
        """
        self.load()
        fd = self._ready_to_write()
        st = os.fstat(fd)
        try:
            return self._fill(fd, most, owners)
        finally:
            os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))

    def _fill(self, fd: int, most: int, owners: Container[int] | None) -> int:
        extents = self.load()
        block, own = 1 << self.shift, self.own
        done = at = 0
        while done < most and at < self.base_end:
            for start, stop, owner in extents.runs(at, self.base_end):
                if owner == own or (owners is not None and owner not in owners):
                    at = stop
                    continue
                at, edge = start, stop if owners is not None else self.base_end
                break
            else:
                break
            hole = min(self._hole(at), edge)
            if hole > at:
                space = self.rows.view.space
                if space is not None:
                    space.count(self.node)
                files.fallocate(fd, _PUNCH | _KEEP, at, hole - at)
                if space is not None:
                    space.punch(self.node, at, hole - at, self.size)
                self._clear(at, hole)
                at = hole
                continue
            stop = min(at + max(block, min(most - done, 1 << 20) & -block), edge)
            done += sum(b - a for a, b, owner in extents.runs(at, stop) if owner != own)
            while at < stop:
                at += self.pwrite(at, memoryview(self.fetch(at, stop)))
        return done

    def end_base(self, end: int) -> None:
        """Lower ``base_end`` to ``end``; whole blocks from there on are the file's own already."""
        if end < self.base_end:
            self.base_end = end
            self._store_end()

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

    def _may_hang(self) -> bool:
        """Whether the closed map may have records that are valid in this boot only."""
        if self.ref is None or not self.ref.has_map or self.extents is None:
            return False
        return self.loaded is None or self.loaded.end > self.loaded.synced

    # -- durability ---------------------------------------------------------------------------

    def sync_job(self) -> Callable[[bool], None]:
        """The work of fsync(2), to run once in any thread: data, then map. The argument: fdatasync(2) will do.

        Writes before its layer was frozen belong to it.
        """
        if not self.rows.view.must_sync:
            return lambda data_only: None
        syncer = self.rows.syncer
        older = [log for log in self.older if log.dirty]
        if self.log is None and self.writable and self._may_hang():
            self._open_log()
        log = self.log
        fd = os.dup(self.own_fd()) if self.writable or (log is not None and log.dirty) else -1
        upto = log.end if log is not None else 0
        whole, self.ref_dirty = self.ref_dirty, False
        drop = self.rows.drop_synced

        def job(data_only: bool) -> None:
            if older:
                syncer.sync(older)
            if fd < 0:
                return
            try:
                (os.fdatasync if data_only and not whole else os.fsync)(fd)
                if log is not None and log.failure is not None:
                    raise log.failure
                if drop:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                if log is not None:
                    log.fail(error)
                raise
            finally:
                os.close(fd)
            if log is not None and upto > log.synced:
                log.mark_synced(upto)
                log.sync()

        return job
