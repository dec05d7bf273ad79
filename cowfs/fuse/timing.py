"""The duration of requests, measured on demand.

Strategy. Reading a clock before and after each request would slow down every mount. So a call of :meth:`Timing.watch`
replaces the loop's handlers by timed ones, in place, and the first request after :data:`WATCH` seconds without a call
puts the plain ones back: an unwatched mount pays nothing.

A time is that of the loop: the work of workers for a request (a copy-up, an fsync) is not included.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING, Any, Final
from cowfs.fuse import abi

if TYPE_CHECKING:
    from cowfs.fuse.handlers.names import Handler
    from cowfs.fuse.tree import Tree

__all__ = ["WATCH", "Timing"]

WATCH: Final = 30.0
_ASKING: Final = frozenset((abi.LOOKUP, abi.READDIR, abi.READDIRPLUS))
"""Requests about names: answered from memory (a hit) or by looking into layers or index (a miss)."""


class Timing:
    """The figures of the timed requests so far.

    Owner: the loop's thread.

    Args:
        handlers: the loop's table. looked: gives a number that grows with each read of layers or index.
    """

    def __init__(self, handlers: list[Handler], looked: Callable[[], int]) -> None:
        self._handlers, self._looked = handlers, looked
        self._plain: list[Handler] = []  # while timed ones are in their place
        self._until = 0
        self._since = self._seconds = 0.0
        self._counts = [0] * len(handlers)
        self._nanoseconds = [0] * len(handlers)
        self._longest = [0] * len(handlers)
        self.hits = self.misses = 0

    def watch(self) -> dict[str, Any]:
        """Time requests for the next seconds, and return the figures so far.

        Returns:
            seconds: the time span of the measurement. requests: name of an opcode -> [count, seconds of all, seconds
                of the longest].
            hits, misses: requests about names that were answered from memory, and that were not.
        """
        now = time.monotonic()
        if self._plain and time.monotonic_ns() > self._until:
            self._end()
        if self._plain:
            self._seconds += now - self._since
        else:
            self._plain = list(self._handlers)
            self._handlers[:] = [self._timed(opcode, handler) for opcode, handler in enumerate(self._plain)]
        self._since = now
        self._until = time.monotonic_ns() + int(WATCH * 1e9)
        return {
            "seconds": self._seconds,
            "requests": {
                abi.NAMES[opcode]: [count, self._nanoseconds[opcode] / 1e9, self._longest[opcode] / 1e9]
                for opcode, count in enumerate(self._counts)
                if count
            },
            "hits": self.hits,
            "misses": self.misses,
        }

    def _end(self) -> None:
        self._handlers[:] = self._plain
        self._plain = []
        self._seconds += WATCH

    def _timed(self, opcode: int, handler: Handler) -> Handler:
        clock, counts, nanoseconds, longest = time.monotonic_ns, self._counts, self._nanoseconds, self._longest
        looked = self._looked
        asking = opcode in _ASKING

        def run(buf: memoryview, n: int, unique: int, nodeid: int) -> Any:
            before = looked() if asking else 0
            begun = clock()
            if begun > self._until:
                if self._plain:
                    self._end()
                return handler(buf, n, unique, nodeid)
            try:
                return handler(buf, n, unique, nodeid)
            finally:
                taken = clock() - begun
                counts[opcode] += 1
                nanoseconds[opcode] += taken
                if taken > longest[opcode]:
                    longest[opcode] = taken
                if asking:
                    if looked() == before:
                        self.hits += 1
                    else:
                        self.misses += 1

        return run


def looked_into(view: Tree) -> Callable[[], int]:
    """A number that grows with each read of a view's layers or index for a name or a directory."""
    return lambda: len(view.nodes) + view.work.directories_read
