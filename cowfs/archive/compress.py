"""Streams in and out of an archive: compression, digests and limits, on a thread of their own.

Strategy. A layer is read once. The reading thread pulls from the source, hashes what it read
(the blob digest), decompresses, hashes that (the diff id) and hands over chunks of at most
``CHUNK`` bytes; the caller's thread parses and extracts meanwhile. Inflating, hashing and
reading release the interpreter lock, so both cores work. Writing is the mirror image.

Threads: :class:`Unpacker` and :class:`Packer` own one daemon thread each. The queue is the only
thing both sides touch; digests and totals are read by the caller after the thread has ended.

Sources: OCI image-spec ``layer.md`` and ``descriptor.md`` (the bytes to hash).
"""

from __future__ import annotations

import hashlib
import os
import queue
import struct
import threading
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from cowfs._typed import Any, BinaryIO
from cowfs.archive.decode import CHUNK, SNIFF, decoder_for, zstandard
from cowfs.archive.options import Budget
from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded

__all__ = ["COMPRESSIONS", "Packer", "Source", "Unpacker"]

_QUEUED = 8


class Source(ABC):
    """Bytes pulled in chunks and taken out in blocks; subclasses give :meth:`next_chunk`.

    Attributes:
        offset: position in the uncompressed stream of the next byte to be taken.
    """

    __slots__ = ("_chunk", "_end", "_pos", "_start")

    def __init__(self) -> None:
        self._chunk: bytes = b""
        self._pos = self._end = self._start = 0

    @abstractmethod
    def next_chunk(self) -> bytes:
        """The next bytes, ``b""`` at the end."""

    @property
    def offset(self) -> int:
        return self._start + self._pos

    def _fill(self) -> bool:
        self._start += self._end
        self._chunk = self.next_chunk()
        self._pos, self._end = 0, len(self._chunk)
        return self._end > 0

    def take(self, count: int) -> bytes:
        """Exactly ``count`` bytes, or fewer at the end of the stream."""
        start = self._pos
        stop = start + count
        if stop <= self._end:
            self._pos = stop
            return self._chunk[start:stop]
        parts = [self._chunk[start:]]
        missing = count - len(parts[0])
        self._pos = self._end
        while missing and self._fill():
            part = self._chunk[:missing]
            self._pos = len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def at_hand(self, count: int) -> memoryview | None:
        """The next ``count`` bytes without copying if the current chunk has them all."""
        start = self._pos
        stop = start + count
        if stop > self._end:
            return None
        self._pos = stop
        return memoryview(self._chunk)[start:stop]

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next ``count`` bytes without copying; fewer at the end of the stream."""
        while count:
            if self._pos == self._end and not self._fill():
                return
            start = self._pos
            stop = min(self._end, start + count)
            self._pos = stop
            count -= stop - start
            yield memoryview(self._chunk)[start:stop]

    def skip(self, count: int) -> int:
        """Drop ``count`` bytes; returns the number of bytes dropped."""
        done = 0
        for piece in self.pieces(count):
            done += len(piece)
        return done


class _Stop(Exception):
    """End the thread, since the caller has gone."""


class Unpacker(Source):
    """A stream, decompressed and hashed on its own thread.

    Args:
        stream: anything with ``read(n)``; a pipe will do.
        max_bytes: LimitExceeded is raised once the uncompressed stream is longer.
        tee: gets every byte exactly as read from ``stream``.
        budget: charged with the uncompressed stream.

    Attributes (valid after :meth:`finish`):
        size, diff_id: of the uncompressed stream. blob_size, blob_digest: of ``stream`` as it is.
        compression: "none", "gzip", "zstd", "bzip2" or "xz".
    """

    __slots__ = (
        "_blob", "_budget", "_diff", "_head", "_queue", "_stopped", "_stream", "_tee", "_thread", "blob_size", "compression",
        "max_bytes", "read_bytes", "size",
    )  # fmt: skip

    def __init__(
        self, stream: BinaryIO, *, max_bytes: int, tee: BinaryIO | None = None, budget: Budget | None = None
    ) -> None:
        super().__init__()
        self._budget = budget
        self._stream, self._tee, self.max_bytes = stream, tee, max_bytes
        self._diff, self._blob = hashlib.sha256(), hashlib.sha256()
        self.size = self.blob_size = self.read_bytes = 0
        self.compression = "none"
        self._head = b""
        self._stopped = False
        self._queue: queue.Queue[bytes | BaseException] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._run, name="cowfs-unpack", daemon=True)
        self._thread.start()

    def _read(self, count: int) -> bytes:
        if self._stopped:
            raise _Stop
        if self._head:
            data, self._head = self._head[:count], self._head[count:]
            return data
        data = self._stream.read(count)
        if data:
            self.blob_size += len(data)
            if self.compression != "none":
                self._blob.update(data)
            if self._tee is not None:
                self._tee.write(data)
        return data

    def _run(self) -> None:
        put = self._queue.put
        try:
            head = b""
            while len(head) < SNIFF and (more := self._stream.read(CHUNK)):
                head += more
            self.compression, decoder = decoder_for(head)
            self.blob_size = len(head)
            if self.compression != "none":
                self._blob.update(head)
            if self._tee is not None:
                self._tee.write(head)
            self._head = head
            for chunk in decoder(self._read):
                self.size += len(chunk)
                if self.size > self.max_bytes:
                    raise LimitExceeded(
                        f"archive is longer than {self.max_bytes} bytes uncompressed", remedy="raise --max-size"
                    )
                if self._budget is not None:
                    self._budget.spend(len(chunk))
                self._diff.update(chunk)
                put(chunk)
                if self._stopped:
                    return
            put(b"")
        except _Stop:
            pass
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread, raised there
            put(error)

    def next_chunk(self) -> bytes:
        item = self._queue.get()
        if isinstance(item, bytes):
            if not item:
                self._queue.put(item)  # the end stays the end
            self.read_bytes = self.blob_size
            return item
        self._queue.put(item)
        raise item

    def finish(self) -> None:
        """Read to the end (so that the digests cover it all) and end the thread."""
        while self._pos != self._end or self._fill():
            self._pos = self._end
        self._thread.join()

    def stop(self) -> None:
        """Give up early; a thread blocked in the stream's ``read`` is left to end on its own."""
        self._stopped = True
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join(0.2)

    @property
    def diff_id(self) -> str:
        return "sha256:" + self._diff.hexdigest()

    @property
    def blob_digest(self) -> str:
        return self.diff_id if self.compression == "none" else "sha256:" + self._blob.hexdigest()


# Writing --------------------------------------------------------------------------------------


class _Store:
    """The encoder that changes nothing."""

    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class _ParallelGzip:
    """One gzip member out of chunks that are deflated side by side, each with the one before as its dictionary.

    The cuts depend on the data alone, so neither the number of threads nor their timing shows.
    """

    _HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # no name, time 0, no system: the same everywhere
    _WINDOW = 32 << 10

    def __init__(self, level: int | None) -> None:
        self._level = 6 if level is None else level
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[bytes]] = deque()
        self._ahead = 2 * (os.cpu_count() or 1)
        self._window = b""
        self._crc = self._size = 0
        self._head = self._HEAD

    def compress(self, data: bytes) -> bytes:
        if not data:
            return b""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "cowfs-gzip")
        self._jobs.append(self._pool.submit(self._deflate, data, self._window))
        self._window = data[-self._WINDOW :]
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        done, self._head = self._head, b""
        while len(self._jobs) > self._ahead:
            done += self._jobs.popleft().result()
        return done

    def _deflate(self, data: bytes, window: bytes) -> bytes:
        engine = zlib.compressobj(self._level, zlib.DEFLATED, -15, zdict=window)
        return engine.compress(data) + engine.flush(zlib.Z_SYNC_FLUSH)

    def flush(self) -> bytes:
        done = self._head + b"".join(job.result() for job in self._jobs)
        self.stop()
        # an empty last block, then the trailer of RFC 1952
        return done + b"\x03\0" + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF)

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _zstd(level: int | None) -> Any:
    return zstandard().ZstdCompressor(level=3 if level is None else level, write_checksum=True).compressobj()


COMPRESSIONS: dict[str, Callable[[int | None], Any]] = {
    "none": lambda level: _Store(),
    "gzip": _ParallelGzip,
    "zstd": _zstd,
}


class Packer:
    """The way out: hashed, compressed, hashed again and written on a thread of its own.

    Args:
        out: anything with ``write(bytes)``.
        compression: a key of :data:`COMPRESSIONS`. level: the compressor's own scale.

    Attributes (valid after :meth:`close`):
        size, diff_id: of the bytes written. blob_size, blob_digest: of the bytes that reached ``out``.
    """

    def __init__(self, out: BinaryIO, compression: str = "none", level: int | None = None) -> None:
        if compression not in COMPRESSIONS:
            raise InvalidArgument(f"unknown compression {compression!r}", remedy="use " + ", ".join(COMPRESSIONS))
        self._out = out
        self._encoder = COMPRESSIONS[compression](level)
        self._compressed = compression != "none"
        self._diff, self._blob = hashlib.sha256(), hashlib.sha256()
        self.size = self.blob_size = 0
        self._parts: list[bytes | memoryview] = []
        self._pending = 0
        self._rest = b""
        self._queue: queue.Queue[bytes | None] = queue.Queue(_QUEUED)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cowfs-pack", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep draining, so that the writer never blocks
            try:
                self._diff.update(data)
                if self._compressed:
                    self._compress(data)
                else:
                    self._emit(data)
            except BaseException as error:  # noqa: BLE001  raised in the caller's thread
                self._error = error

    def _compress(self, data: bytes) -> None:
        """Feed the encoder in chunks of one size: the output must not depend on the cuts of the input."""
        data = self._rest + data
        whole = len(data) - len(data) % CHUNK
        for start in range(0, whole, CHUNK):
            self._emit(self._encoder.compress(data[start : start + CHUNK]))
        self._rest = data[whole:]

    def _emit(self, data: bytes) -> None:
        if data:
            self.blob_size += len(data)
            if self._compressed:
                self._blob.update(data)
            done = self._out.write(data)
            while done is not None and done < len(data):  # a raw file may take less
                data = data[done:]
                done = self._out.write(data)

    def write(self, data: bytes | memoryview) -> None:
        """Queue ``data``; it must not change afterwards (bytes, or a view of bytes)."""
        self._parts.append(data)
        self._pending += len(data)
        if self._pending >= CHUNK:
            self._push()

    def write_all(self, *parts: bytes) -> None:
        """:meth:`write` for several."""
        self._parts += parts
        self._pending += sum(map(len, parts))
        if self._pending >= CHUNK:
            self._push()

    def _push(self) -> None:
        if self._error is not None:
            raise self._error
        if self._parts:
            self.size += self._pending
            self._queue.put(b"".join(self._parts))
            self._parts, self._pending = [], 0

    def close(self) -> None:
        """Flush everything to ``out`` (which stays open). Raises the errors of writing."""
        self._push()
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._rest:
            self._emit(self._encoder.compress(self._rest))
        self._emit(self._encoder.flush())

    def abandon(self) -> None:
        """End the thread without finishing the stream."""
        self._error = self._error or CowfsError("abandoned")
        self._queue.put(None)
        self._thread.join()
        if isinstance(self._encoder, _ParallelGzip):
            self._encoder.stop()

    @property
    def diff_id(self) -> str:
        return "sha256:" + self._diff.hexdigest()

    @property
    def blob_digest(self) -> str:
        return "sha256:" + self._blob.hexdigest() if self._compressed else self.diff_id
