"""The paths of a target that an archive wrote, and the data of its files that a later member removes."""

from __future__ import annotations

import os
import stat

from cowfs.archive.headerlog import LogWriter
from cowfs.archive.reader import Reader

__all__ = ["Displaced", "Written"]

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOSTLY_HOLES = 64 << 20  # bytes


class Written:
    """The paths that an archive wrote, as hashes; a target that started empty needs none.

    Attributes:
        all: everything in the target is the archive's.
    """

    def __init__(self, target: int) -> None:
        with os.scandir(target) as entries:
            self.all = next(entries, None) is None
        self._hashes: set[int] = set()

    def has(self, path: bytes) -> bool:
        """Whether a path is the archive's."""
        return self.all or hash(path) in self._hashes

    def add(self, path: bytes) -> None:
        """Record that this path is the archive's from now on."""
        if not self.all:
            self._hashes.add(hash(path))

    def add_way(self, path: bytes) -> None:
        """Record that this path and the directories above it are the archive's from now on."""
        if self.all:
            return
        hashes = self._hashes
        while path and hash(path) not in hashes:
            hashes.add(hash(path))
            path = path.rpartition(b"/")[0]


class Displaced:
    """Saves the data of this archive's files that go away: it is needed to reproduce the archive.

    Args:
        log: None saves nothing.
    """

    def __init__(self, log: LogWriter | None, reader: Reader, written: Written) -> None:
        self._log, self._reader, self._written = log, reader, written
        self._saved = 0

    def save(self, dirfd: int, name: bytes, path: bytes, st: os.stat_result, ordinal: int) -> None:
        """Save the data of a file that member ``ordinal`` removes."""
        if self._log is None or not stat.S_ISREG(st.st_mode) or not st.st_size or not self._written.has(path):
            return
        self._saved += st.st_size
        if self._saved > 4 * self._reader.offset + (256 << 20):
            self._log.give_up()  # the same holes repeat
            return
        if st.st_size > _MOSTLY_HOLES and st.st_blocks * 512 < st.st_size // 2:
            self._log.give_up()  # holes as large as these are not worth a copy
            return
        fd = os.open(name, _READ, dir_fd=dirfd)
        try:
            self._log.saved(path, ordinal, iter(lambda: os.read(fd, 1 << 18), b""))
        finally:
            os.close(fd)
