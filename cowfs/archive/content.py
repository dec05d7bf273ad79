"""A file's bytes: from the archive into an open file, hashed on the way.

Strategy. Most files lie in one chunk of the stream and are written and hashed in one go, without a
copy. A sparse file's segments are written at their places and the holes left.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from cowfs.archive import header
from cowfs.archive.header import Member
from cowfs.archive.reader import Reader

__all__ = ["Content", "write"]


class Content:
    """Fills files from a reader's current member.

    Args:
        on_file: called with (path, sha256 hex) of each file whose data was hashed.
        on_inode: called with (inode number, sha256 hex), "" for a file that was not hashed.
    """

    def __init__(
        self,
        reader: Reader,
        on_file: Callable[[bytes, str], object] | None,
        on_inode: Callable[[int, str], object] | None,
    ) -> None:
        self._reader, self._on_file, self._on_inode = reader, on_file, on_inode
        self._hash = on_file is not None or on_inode is not None

    def fill(self, fd: int, member: Member, path: bytes) -> None:
        """Write the member's data to the new, empty file ``fd``."""
        if member.segments is not None:
            self._sparse(fd, member, path)
            return
        piece = self._reader.whole()
        if piece is None:
            self._long(fd, path)
            return
        if piece:
            write(fd, piece)
        if self._hash:
            self.tell(fd, path, hashlib.sha256(piece).hexdigest())

    def _long(self, fd: int, path: bytes) -> None:
        """Data that does not lie in one chunk."""
        hasher = hashlib.sha256() if self._hash else None
        for piece in self._reader.data():
            if hasher is not None:
                hasher.update(piece)
            write(fd, piece)
        if hasher is not None:
            self.tell(fd, path, hasher.hexdigest())

    def _sparse(self, fd: int, member: Member, path: bytes) -> None:
        assert member.segments is not None
        pieces = self._reader.data()
        piece = memoryview(b"")
        for offset, length in header.iter_segments(member.segments):
            os.lseek(fd, offset, os.SEEK_SET)
            while length:
                if not piece:
                    piece = next(pieces)
                part = piece[:length]
                piece = piece[len(part) :]
                length -= len(part)
                write(fd, part)
        for _ in pieces:  # nothing is left but the check that nothing is missing
            pass
        os.truncate(fd, member.size)
        if self._hash:
            mostly_data = member.size <= 4 * member.stored + (1 << 20)
            self.tell(fd, path, _digest_of(fd) if mostly_data else "")

    def tell(self, fd: int, path: bytes, digest: str) -> None:
        """Report a file's digest, "" where it was not computed."""
        if self._on_file is not None and digest:
            self._on_file(path, digest)
        if self._on_inode is not None:
            self._on_inode(os.fstat(fd).st_ino, digest)


def write(fd: int, data: memoryview) -> None:
    """All of it: a short write is followed by the one that says why."""
    done = os.write(fd, data)
    while done < len(data):
        done += os.write(fd, data[done:])


def _digest_of(fd: int) -> str:
    hasher = hashlib.sha256()
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while data := os.read(again, 1 << 20):
            hasher.update(data)
    finally:
        os.close(again)
    return hasher.hexdigest()
