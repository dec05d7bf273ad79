"""A table of values by inode number, for all files of a large layer.

Strategy: a dict takes 150 bytes for each file beside its value, ten times the budget for a layer of a million.
So records of one length (the number, then the value) lie one after another in a few thousand byte strings, by the low bits
of the number, and one is found by searching its string: short ones, since neighbouring files have neighbouring numbers.
"""

from __future__ import annotations

from collections import defaultdict

__all__ = ["ByInode"]

_BITS = (1 << 12) - 1


class ByInode:
    """Values of ``length`` bytes by inode number. Threads: one writes, then any may read."""

    __slots__ = ("_strings", "_width")

    def __init__(self, length: int) -> None:
        self._width = 8 + length
        self._strings: defaultdict[int, bytearray] = defaultdict(bytearray)

    def __setitem__(self, inode: int, value: bytes) -> None:
        """Store a value; the last one for a number counts."""
        if len(value) + 8 != self._width:
            raise ValueError(f"{len(value)} bytes instead of {self._width - 8}")
        self._strings[inode & _BITS] += inode.to_bytes(8, "little") + value

    def __bool__(self) -> bool:
        return bool(self._strings)

    def get(self, inode: int) -> bytes | None:
        """The value of a number."""
        string = self._strings.get(inode & _BITS)
        if string is None:
            return None
        key = inode.to_bytes(8, "little")
        at = string.rfind(key)
        while at > 0 and at % self._width:  # these bytes in the middle of another record
            at = string.rfind(key, 0, at + 7)
        return None if at < 0 else bytes(string[at + 8 : at + self._width])
