"""The parent directory of each forgotten node, in 16 bytes a node, so that file handles outlive the node.

A dict of ints would take 150 bytes an entry. This is an open-addressing table over two arrays of 64-bit numbers; 0 is a
free slot, 1 (the root's id, which is never forgotten) one that was freed.
"""

from __future__ import annotations

from array import array

_FREE, _FREED = 0, 1
_SPREAD = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: neighbouring ids land far apart
_WORD = (1 << 64) - 1


class Parents:
    """id -> id of its parent directory. Owner: the view's thread.

    >>> parents = Parents()
    >>> parents[17] = 5
    >>> parents.get(17), parents.get(18), len(parents)
    (5, None, 1)
    >>> parents.discard(17)
    >>> parents.get(17), len(parents)
    (None, 0)
    """

    __slots__ = ("_count", "_keys", "_shift", "_used", "_values")

    def __init__(self) -> None:
        self._count = 0  # entries
        self._used = 0  # slots that are not free: entries and freed ones
        self._make(8)

    def _make(self, bits: int) -> None:
        self._shift = 64 - bits
        self._keys = array("Q", bytes(8 << bits))
        self._values = array("Q", bytes(8 << bits))

    def __len__(self) -> int:
        return self._count

    def _slot(self, id: int) -> int:
        """The slot of ``id``, or -1."""
        keys = self._keys
        mask = len(keys) - 1
        slot = (id * _SPREAD & _WORD) >> self._shift
        while True:
            key = keys[slot]
            if key == id:
                return slot
            if key == _FREE:
                return -1
            slot = slot + 1 & mask

    def get(self, id: int) -> int | None:
        """The parent's id, or ``None``."""
        slot = self._slot(id)
        return None if slot < 0 else self._values[slot]

    def __setitem__(self, id: int, parent: int) -> None:
        keys = self._keys
        mask = len(keys) - 1
        slot = (id * _SPREAD & _WORD) >> self._shift
        while True:
            key = keys[slot]
            if key == id:
                break
            if key == _FREE:
                keys[slot] = id
                self._count += 1
                self._used += 1
                break
            slot = slot + 1 & mask
        self._values[slot] = parent
        if self._used * 5 > len(keys) * 4:
            self._grow(self._count)

    def reserve(self, count: int) -> None:
        """Have room for so many entries.

        Called while nodes are made, so that a storm of forgets neither needs memory nor copies a full table.
        """
        if count * 5 > len(self._keys) * 4:
            self._grow(count)

    def discard(self, id: int) -> None:
        """Forget an id."""
        slot = self._slot(id)
        if slot >= 0:
            self._keys[slot] = _FREED
            self._count -= 1

    def _grow(self, count: int) -> None:
        """Make the table anew for ``count`` entries, at least those it has."""
        keys, values = self._keys, self._values
        bits = 8
        while (1 << bits) * 2 < count * 3:
            bits += 1
        entries, self._count, self._used = self._count, 0, 0
        self._make(bits)
        if not entries:
            return
        for id, parent in zip(keys, values, strict=True):
            if id > _FREED:
                self[id] = parent
