"""Compaction by writing a redirect file anew: for one whose blocks lie scattered, so that it reads like a plain file.

Strategy. Hosts place a written block as if the blocks before it would follow, and put blocks filled in later around it:
such a file reads at half the speed or less for ever. So its data is copied in order to a fresh file, the *twin*, in the
work directory; that is brought to the disk, gets the file's attributes, and takes its place by one rename. The redirect
file stays what it was until then, so a crash costs the twin and nothing else.

Reading and writing go on. Writes to a part that was copied already are noted, and that part is copied again; the twin
takes the place only if no write was noted since its last sync, so all synced data is on the disk there, too. A file
that is always written faster than that is compacted in place, and so is one with several names, with room reserved by
fallocate(2), or that does not fit twice within the limit.

Threads: a :class:`Twin` belongs to the view's thread; a :class:`Piece` and :meth:`Twin.sync` to whoever compacts.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING, Final
from cowfs.row import map as row_map
from cowfs.row.readahead import Ahead
from cowfs.sys import files, xattr
from cowfs.union import stored
from cowfs.union.measure import NOTHING
from cowfs.union.quota import UNIT, Blocks, total_of, units

if TYPE_CHECKING:
    from cowfs.row.file import RowFile

#: bytes copied in one go
STEP: Final = 1 << 20
#: a file with more extents than one for so many bytes lies scattered
PIECE: Final = 1 << 20
#: the number of attempts to catch up with concurrent writers
ROUNDS: Final = 8

_PUNCH = files.FALLOC_FL_PUNCH_HOLE | files.FALLOC_FL_KEEP_SIZE


def scattered(fd: int) -> bool:
    """Whether writing a file anew pays off; False if the host does not tell its layout, or if it has reserved room."""
    found = files.extents(fd, sync=True)  # dirty data looks like reserved room on ext4
    if found is None or any(flags & files.FIEMAP_EXTENT_UNWRITTEN for _, _, flags in found):
        return False
    return len(found) > 1 + os.fstat(fd).st_size // PIECE


class Piece:
    """A part of a file to copy, once, in any thread.

    Attributes:
        left: bytes still to copy after it.
    """

    def __init__(
        self, fd: int, start: int, end: int, ranges: list[tuple[int, int]], read: Callable[[memoryview], int], left: int
    ) -> None:
        self._fd, self._start, self._end = fd, start, end
        self._ranges = ranges
        self._read = read
        self.left = left

    def copy(self) -> int:
        """Copy the part. Returns the number of data bytes. Raises OSError."""
        data = memoryview(bytearray(self._end - self._start))
        self._read(data)
        for start, end in self._ranges:
            while start < end:
                start += os.pwrite(self._fd, data[start - self._start : end - self._start], start)
        return sum(end - start for start, end in self._ranges)


class Twin:
    """The fresh file.

    Attributes:
        dead: whether it can no longer take the place.
    """

    def __init__(self, file: RowFile) -> None:
        """Raises OSError: of making a file."""
        view = file.rows.view
        work = view.stack.workdir
        assert work is not None
        self._file, self._node = file, file.node
        self._view, self._work, self._space = view, work, view.space
        self._blocks = Blocks()  # its counted units
        self._at = 0  # before this it is copied...
        self._now: row_map.Ranges = []  # ... but for this, which is copied in this round ...
        self._again: row_map.Ranges = []  # ... and this, in the next
        self._ahead = Ahead()
        self.dead = False
        self._temp = work.temp()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._temp, flags, 0o600, dir_fd=work.fd)
        file.succeeded_by(self)

    def give_up(self) -> None:
        """Give up the replacement."""
        self.dead = True

    def changed(self, start: int, end: int) -> None:
        """Note a change of the file's data in [start, end)."""
        if start < self._at:
            self._again = row_map.merge([*self._again, (start, min(end, self._at))])

    def next(self) -> Piece | None:
        """The next piece to copy; ``None`` at the end of this round. Raises ENOSPC at the limit."""
        file, size = self._file, self._file.size
        if not self._usable():
            return None
        if self._at < size:
            start, stop = self._at, min(self._at + STEP, size)
            self._at = stop
            self._ahead.follow(file, start, stop)
            self._ahead.wait(file, start, stop)
        elif self._now:
            start, end = self._now[0]
            stop = min(end, start + STEP)
            self._now[:1] = [(stop, end)] if stop < end else []
            files.fallocate(self._fd, _PUNCH, start, stop - start)
        else:
            os.ftruncate(self._fd, size)
            return None
        stop = max(start, min(stop, size))
        ranges = file.data_in(start, stop)
        self._count(ranges)
        left = max(0, size - self._at) + sum(end - start for start, end in self._now)
        return Piece(self._fd, start, stop, ranges, file.reader(start, stop - start), left)

    def _usable(self) -> bool:
        """Whether the file is still that of the upper layer, under its only name."""
        view, node = self._view, self._node
        same = node.data is self._file and self._file.writable and view.stack.workdir is self._work
        if not same or node.parent is None or node in view.table.names:
            self.dead = True
        return not self.dead

    def _count(self, ranges: list[tuple[int, int]]) -> None:
        space = self._space
        if space is None:
            return
        for start, end in ranges:
            first, last = start // UNIT, units(end)
            space.need(sum(b - a for a, b in self._blocks.missing(first, last)))
            space.add(self._blocks.add(first, last))

    def sync(self) -> None:
        """Bring the twin to the disk; any thread."""
        if self._view.must_sync:
            os.fsync(self._fd)

    def finish(self) -> bool:
        """Take the file's place, if there was no write in this round. Returns whether that was done. Raises OSError."""
        file, node = self._file, self._node
        if self._again or self._now or self._at < file.size:
            self._now, self._again = row_map.merge(self._now + self._again), []
            return False
        if not self._usable():
            return False
        own = file.own_fd()
        if os.fstat(own).st_nlink != 1:
            self.dead = True
            return False
        assert node.where is not None
        self._dress(own)
        before = total_of(self._space.count(node)) if self._space is not None else 0
        marks = self._space.xattrs(own, None) if self._space is not None else NOTHING
        with stored.kept_times(node.where):
            os.rename(self._temp, node.name, src_dir_fd=self._work.fd, dst_dir_fd=node.where.open())
        file.rows.replaced(file, self._fd)
        self._fd = -1
        if self._space is not None:
            node.space = None
            self._space.add(total_of(self._space.count(node)) - before - self._blocks.total)
            self._space.xattrs_changed(node, self._space.xattrs(node.fd, None).over(marks))
        return True

    def _dress(self, own: int) -> None:
        """The file's owner, xattrs, mode and times, as it has them on the disk."""
        form, fd = self._view.form, self._fd
        st = os.fstat(own)
        os.fchown(fd, st.st_uid, st.st_gid)
        for attribute, value in xattr.read_all(own, b"").items():
            if attribute not in (form.row, form.prealloc):
                xattr.setx(fd, b"", attribute, value)
        os.fchmod(fd, st.st_mode & 0o7777)
        os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))

    def end(self) -> None:
        """Close the twin, and delete it unless it took the place."""
        self._file.succeeded_by(None)
        if self._fd < 0:
            return
        os.close(self._fd)
        self._work.discard(self._temp)
        if self._space is not None and self._space is self._view.space:
            self._space.add(-self._blocks.total)
        self._fd = -1


__all__ = ["PIECE", "ROUNDS", "STEP", "Piece", "Twin", "scattered"]
