"""The owner of each byte range in a redirect chain: one flat, sorted list for the whole chain.

Strategy: level 0 is the plain file at the bottom, level n the n-th redirect above it. Segments cover
[0, infinity) without gaps; segment k is ``starts[k]`` to ``starts[k + 1]`` and belongs to
``owners[k]``; neighbours never have the same owner. So a read is one bisection, however long the chain
is, and a new block is one splice. Two packed arrays: 12 bytes a segment.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

#: "to the end of the file, however long it gets", bytes
INFINITY = 1 << 62
#: the owner of bytes that no level holds: they are zeros
ZEROS = -1


class Extents:
    """The segments of one file. Owner: the view's thread.

    >>> extents = Extents()
    >>> extents.put(4096, 8192, 1)
    >>> list(extents.runs(0, 10000))
    [(0, 4096, 0), (4096, 8192, 1), (8192, 10000, 0)]
    """

    __slots__ = ("owners", "starts")

    def __init__(self) -> None:
        self.starts = array("q", [0])
        self.owners = array("i", [0])

    def copy(self) -> Extents:
        """An independent copy."""
        twin = Extents()
        twin.starts, twin.owners = self.starts[:], self.owners[:]
        return twin

    def put(self, start: int, end: int, owner: int) -> None:
        """Give [start, end) to ``owner``."""
        if start >= end:
            return
        starts, owners = self.starts, self.owners
        low = bisect_right(starts, start) - 1
        high = bisect_left(starts, end, low + 1)
        last = owners[high - 1]
        if high - low == 1 and last == owner:
            return
        new_starts: list[int] = []
        new_owners: list[int] = []
        if starts[low] < start:
            if owners[low] == owner:
                start = starts[low]
            else:
                new_starts.append(starts[low])
                new_owners.append(owners[low])
        elif low > 0 and owners[low - 1] == owner:
            low -= 1
            start = starts[low]
        new_starts.append(start)
        new_owners.append(owner)
        if high == len(starts) or starts[high] > end:
            if last != owner and end < INFINITY:
                new_starts.append(end)
                new_owners.append(last)
        elif owners[high] == owner:
            high += 1
        starts[low:high] = array("q", new_starts)
        owners[low:high] = array("i", new_owners)

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, owner) of every segment in [start, end), cut to it."""
        starts, owners = self.starts, self.owners
        index = bisect_right(starts, start) - 1
        count = len(starts)
        while start < end:
            index += 1
            stop = starts[index] if index < count else end
            if stop > end:
                stop = end
            yield start, stop, owners[index - 1]
            start = stop

    def has_all(self, start: int, end: int, owner: int) -> bool:
        """Whether all of [start, end) belongs to ``owner``."""
        index = bisect_right(self.starts, start)
        return self.owners[index - 1] == owner and (index == len(self.starts) or self.starts[index] >= end)

    def share(self, owner: int, end: int) -> int:
        """The number of bytes of [0, end) that belong to ``owner``."""
        return sum(stop - start for start, stop, who in self.runs(0, end) if who == owner)
