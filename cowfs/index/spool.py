"""A mapping of byte strings that moves to a file once it is large, for records that a verb may not store yet.

Rule: the file has no name (O_TMPFILE where the host has it), so a killed process leaves nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, MutableMapping

from cowfs._typed import BinaryIO, NamedTuple

__all__ = ["Spill"]

BUDGET = 16 << 20
"""Bytes kept in memory; what comes later goes to the file."""


class _Place(NamedTuple):
    offset: int
    first: int
    second: int


Two = tuple[bytes, bytes]


class Spill(MutableMapping[bytes, Two]):
    """Pairs of byte strings by key. Threads: one at a time.

    Args:
        directory: the directory of the file, if one is needed; None: the host's temporary directory.
    """

    __slots__ = ("_directory", "_end", "_file", "_held", "_size")

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._held: dict[bytes, Two | _Place] = {}
        self._file: BinaryIO | None = None
        self._size = self._end = 0

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __setitem__(self, key: bytes, value: Two) -> None:
        first, second = value
        self._size += len(first) + len(second)
        self._held[key] = value if self._size <= BUDGET else self._written(first, second)

    def _written(self, first: bytes, second: bytes) -> _Place:
        if self._file is None:
            import tempfile

            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115  (lives as long as this object)
        place = _Place(self._end, len(first), len(second))
        left = memoryview(first + second)
        while left:
            try:
                count = os.pwrite(self._file.fileno(), left, self._end)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self._directory is None:
                    raise
                self._move()
                continue
            self._end += count
            left = left[count:]
        return place

    def _move(self) -> None:
        """Go on in the host's temporary directory: the file system of ``directory`` is full."""
        import shutil
        import tempfile

        assert self._file is not None
        former, self._directory = self._file, None
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (lives as long as this object)
        former.seek(0)
        with former:
            shutil.copyfileobj(former, self._file)

    def __getitem__(self, key: bytes) -> Two:
        found = self._held[key]
        return self._read(found) if isinstance(found, _Place) else found

    def get(self, key: bytes, default: Two | None = None) -> Two | None:  # type: ignore[override]
        found = self._held.get(key)
        if found is None:
            return default
        return self._read(found) if isinstance(found, _Place) else found

    def _read(self, place: _Place) -> Two:
        assert self._file is not None
        data = os.pread(self._file.fileno(), place.first + place.second, place.offset)
        if len(data) != place.first + place.second:
            raise OSError(5, "a temporary file became shorter")
        return data[: place.first], data[place.first :]

    def __delitem__(self, key: bytes) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held
