"""A file's bytes: from the archive into an open file, hashed on the way.

Strategy. Most files lie in one chunk of the stream and are written in one go, without a copy. They
are hashed on a thread of its own, a batch at a time, out of the same chunks: hashing releases the
interpreter lock, so it costs the extraction nothing where a core is free. A sparse file's
segments are written at their places and the holes left; its digest is read back.

Threads: batches go one way through a bounded queue, finished digests come back through a deque that
the caller's thread empties; the callbacks run on the caller's thread, in archive order.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable

from cowfs._typed import Any
from cowfs.archive import header
from cowfs.archive.header import Member
from cowfs.archive.reader import Reader

__all__ = ["Content", "write"]


# (running hash, piece, None): more of a long file; (running hash, None, key): its end; (None, piece, key): all of a file
_Item = tuple[Any, memoryview | None, "_Key | None"]
_Key = tuple[int, bytes]  # inode number (0 where nobody asked), path
_BATCH = 128 << 10
_BATCHES = 16


class _Hasher:
    """Digests on a thread of its own; it starts with the first full batch."""

    def __init__(self) -> None:
        self._batch: list[_Item] = []
        self._size = 0
        self._queue: queue.Queue[list[_Item] | None] = queue.Queue(_BATCHES)
        self._thread: threading.Thread | None = None
        self.done: deque[tuple[_Key, str]] = deque()

    def add(self, running: Any, piece: memoryview | None, key: _Key | None) -> None:
        self._batch.append((running, piece, key))
        self._size += 512 + (len(piece) if piece is not None else 0)
        if self._size >= _BATCH:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cowfs-hash", daemon=True)
                self._thread.start()
            self._queue.put(self._batch)
            self._batch, self._size = [], 0

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            self._hash(batch)

    def _hash(self, batch: list[_Item]) -> None:
        sha256, done = hashlib.sha256, self.done
        for running, piece, key in batch:
            if running is None:
                assert piece is not None and key is not None
                done.append((key, sha256(piece).hexdigest()))
            elif piece is not None:
                running.update(piece)
            else:
                assert key is not None
                done.append((key, running.hexdigest()))

    def finish(self) -> None:
        """Wait until every added digest is done."""
        self.stop()
        self._hash(self._batch)
        self._batch = []

    def stop(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None


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
        self._hasher = _Hasher() if on_file is not None or on_inode is not None else None

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
        if self._hasher is not None:
            self._hasher.add(None, piece, self._key(fd, path))
            if self._hasher.done:
                self._report()

    def _key(self, fd: int, path: bytes) -> _Key:
        return os.fstat(fd).st_ino if self._on_inode is not None else 0, path

    def _long(self, fd: int, path: bytes) -> None:
        """Write data that lies in several chunks."""
        hasher = self._hasher
        running = hashlib.sha256() if hasher is not None else None
        for piece in self._reader.data():
            write(fd, piece)
            if hasher is not None:
                hasher.add(running, piece, None)
        if hasher is not None:
            hasher.add(running, None, self._key(fd, path))

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
        for _ in pieces:  # only the check of the length is left
            pass
        os.truncate(fd, member.size)
        if self._hasher is not None:
            mostly_data = member.size <= 4 * member.stored + (1 << 20)
            self.tell(fd, path, _digest_of(fd) if mostly_data else "")

    def tell(self, fd: int, path: bytes, digest: str) -> None:
        """Report a digest, "" if there is none, in archive order."""
        if self._hasher is not None:
            self._hasher.add(_Known(digest), None, self._key(fd, path))

    def _report(self) -> None:
        assert self._hasher is not None
        done = self._hasher.done
        while done:
            (inode, path), digest = done.popleft()
            if self._on_file is not None and digest:
                self._on_file(path, digest)
            if self._on_inode is not None:
                self._on_inode(inode, digest)

    def finish(self) -> None:
        """Report what is left."""
        if self._hasher is not None:
            self._hasher.finish()
            self._report()

    def abandon(self) -> None:
        """Report nothing more."""
        if self._hasher is not None:
            self._hasher.stop()


class _Known:
    """A digest that needs no hashing, in the place of a running hash."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    def hexdigest(self) -> str:
        return self._digest


def write(fd: int, data: memoryview) -> None:
    """Write all of it: the write after a short one raises the cause."""
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
