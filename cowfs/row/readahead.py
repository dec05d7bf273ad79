"""Reading ahead in a redirect file, for programs that read in sequence, in all of its levels.

Strategy. The host reads ahead in a file that is read in sequence. It cannot do so for a redirect file: the levels
beneath are read around the written blocks, and the file itself a block here and there, with a wait for each. So, once a
read in sequence had to wait for the disk, the next megabytes are requested with POSIX_FADV_WILLNEED: the whole span of
the level that has most of them, and the segments of the others, all at once, so that the disk has many requests to work
on. These are only hints; data in memory costs a look-up in the host's page cache.

Threads: a hint may wait (for a queue of the disk, for the host's own extent map), so :class:`Pilot` gives them from a
thread of its own. The view's thread, which alone knows the extents, chooses them.
"""

from __future__ import annotations

import contextlib
import os
from queue import SimpleQueue

from cowfs._typed import Final, Protocol
from cowfs.row.extents import ZEROS
from cowfs.sys.threads import Thread

#: The most bytes asked for ahead of a reader; the first time twice what it reads.
MOST: Final = 8 << 20
#: Hints that wait for the thread; while there are so many, none is added.
_QUEUE: Final = 4

Runs = list[tuple[int, int, int]]
"""(start, end, owner) of segments."""
Hints = list[tuple[int, list[tuple[int, int]]]]
"""(descriptor, ours to close; (start, end) of what to ask for)."""


def plan(runs: Runs) -> Runs:
    """The pieces for reading neighbouring segments: the span of the level that has most of them, then the others.

    A later piece lies over an earlier one.

    >>> plan([(0, 10, 0), (10, 11, 1), (11, 20, 0), (20, 21, 2)])
    [(0, 20, 0), (10, 11, 1), (20, 21, 2)]
    """
    held: dict[int, int] = {}
    for start, stop, owner in runs:
        held[owner] = held.get(owner, 0) + stop - start
    held.pop(ZEROS, None)
    if not held:
        return runs
    main = max(held, key=held.__getitem__)
    first = next(start for start, _, owner in runs if owner == main)
    last = next(stop for _, stop, owner in reversed(runs) if owner == main)
    return [(first, last, main), *(run for run in runs if run[2] != main)]


class Pilot:
    """The thread of one view that gives hints; started by the first."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Hints | None] = SimpleQueue()
        self._thread: Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether the queue is full."""
        return self._queue.qsize() >= _QUEUE

    def give(self, hints: Hints) -> None:
        """Queue hints; any thread."""
        if self._thread is None:
            thread = Thread(self._run, "cowfs-row-ahead")
            if not thread.start():
                for fd, _ in hints:
                    os.close(fd)
                return
            self._thread = thread
        self._queue.put(hints)

    def _run(self) -> None:
        while (hints := self._queue.get()) is not None:
            for fd, ranges in hints:
                with contextlib.suppress(OSError, MemoryError):
                    for start, end in ranges:
                        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_WILLNEED)
                os.close(fd)

    def close(self) -> None:
        """Finish the queued hints, and end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None


class Readable(Protocol):
    """The interface of the file for this module."""

    size: int

    @property
    def pilot(self) -> Pilot: ...

    def hints(self, start: int, end: int) -> Hints:
        """The hints for the host before a read of [start, end)."""


class Ahead:
    """The state of reading ahead in one file. Owner: the view's thread.

    Attributes:
        next: the end of the last read.
        asked: the end of the requested range; 0 if there is none.
        window: bytes of the last request ahead of the reader.
        cold: a read in another thread had to wait for the disk (set there).
    """

    __slots__ = ("asked", "cold", "next", "window")

    def __init__(self) -> None:
        self.cold = False
        self.next = 0
        self.asked = 0
        self.window = 0

    def met_cold(self) -> None:
        """Note that a read had to wait for the disk; any thread."""
        self.cold = True

    def was_cold(self) -> bool:
        """Whether a read had to wait since the last call."""
        cold, self.cold = self.cold, False
        return cold

    def follow(self, chain: Readable, offset: int, end: int) -> bool:
        """Note a read of [offset, end). Returns whether it follows the last one."""
        sequential = self.next <= offset <= max(self.next, self.asked)
        if not sequential:
            self.asked = self.window = 0
        elif self.asked and self.asked < min(end + self.window // 2, chain.size):
            self._ask(chain, max(self.asked, end), end)
        self.next = end
        return sequential

    def wait(self, chain: Readable, offset: int, end: int) -> None:
        """Begin to read ahead, since a read in sequence has to wait for the disk."""
        if not self.asked:
            self.window = end - offset
            self._ask(chain, offset, end)

    def _ask(self, chain: Readable, start: int, end: int) -> None:
        if chain.pilot.busy:
            return
        self.window = min(2 * self.window, MOST)
        self.asked = min(end + self.window, chain.size)
        chain.pilot.give(chain.hints(start, self.asked))
