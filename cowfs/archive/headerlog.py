"""The parts of an archive that its files do not hold, kept beside the layer.

Strategy. The export of a layer that came from an archive has the same bytes, whichever program wrote them. The
log is the archive with the file data taken out: headers, padding and end blocks, compressed.
Read back by the same :class:`~cowfs.archive.reader.Reader`, each header names the file whose data belongs behind it, so
no second format describes the first. Only data that the layer does not have any more (a file listed twice, a whiteout
with contents) is kept too, in a section of its own.

The file: ``MAGIC``, a gzip stream of the stripped archive, a gzip stream of saved data
(records of ``RECORD``, path, data), a JSON trailer, and ``TAIL`` (length of the trailer, magic).

:func:`rebuild` verifies the digest of its output: a layer that was changed since is Corrupt.

The idea of keeping the stripped archive is tar-split's (vbatts/tar-split), the format is not.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator

from cowfs._typed import Any, BinaryIO
from cowfs.archive import header
from cowfs.archive.compress import Packer, Source
from cowfs.archive.decode import CHUNK, gunzip
from cowfs.archive.names import Meaning, canonical, meaning, show
from cowfs.archive.reader import Reader
from cowfs.errors import Corrupt, CowfsError
from cowfs.sys.files import open_beneath

__all__ = ["LogWriter", "read_trailer", "rebuild"]

MAGIC = b"cowfs-headers-1\n"
TAIL = struct.Struct("<Q8s")
_TAIL_MAGIC = b"cowfslog"
RECORD = struct.Struct("<QQQ")  # bytes of the path, bytes of the data, the member that displaced it
_MAX_SAVED = 10_000
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BIG = 1 << 62


class LogWriter:
    """Written while an archive is applied; ``out`` needs only ``write``."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        out.write(MAGIC)
        self._headers = Packer(out, "gzip", 1)
        self._spool: tempfile.SpooledTemporaryFile[bytes] | None = None
        self._saved = 0
        self.raw = self._headers.write

    def saved(self, path: bytes, ordinal: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Keep data of ``path`` that the finished layer will lack.

        Args:
            ordinal: the member that displaced it; or, for data that never reached a file, its own.
        """
        self._saved += 1
        if self._saved > _MAX_SAVED:
            for _ in pieces:
                pass
            return
        if self._spool is None:
            self._spool = tempfile.SpooledTemporaryFile(1 << 20)  # noqa: SIM115  closed with the log
        spool = self._spool
        start = spool.tell()
        spool.write(RECORD.pack(len(path), 0, ordinal) + path)
        size = 0
        for piece in pieces:
            spool.write(piece)
            size += len(piece)
        end = spool.tell()
        spool.seek(start)
        spool.write(RECORD.pack(len(path), size, ordinal))
        spool.seek(end)

    def give_up(self) -> None:
        """Give up the log: the layer will be exported like one made here."""
        self._saved = _MAX_SAVED + 1

    def close(self, *, diff_id: str, size: int, entries: int) -> int:
        """Write the end; returns the bytes of the whole log."""
        self._headers.close()
        start = len(MAGIC) + self._headers.blob_size
        saved_size = 0
        if self._spool is not None:
            packer = Packer(self._out, "gzip", 1)
            self._spool.seek(0)
            while data := self._spool.read(CHUNK):
                packer.write(data)
            packer.close()
            saved_size = packer.blob_size
            self._spool.close()
        trailer = json.dumps(
            {
                "diff_id": diff_id,
                "size": size,
                "entries": entries,
                "headers": self._headers.blob_size,
                "saved": saved_size,
                "complete": self._saved <= _MAX_SAVED,
            }
        ).encode()
        self._out.write(trailer + TAIL.pack(len(trailer), _TAIL_MAGIC))
        return start + saved_size + len(trailer) + TAIL.size

    def abandon(self) -> None:
        """End the thread; the log is unusable."""
        self._headers.abandon()
        if self._spool is not None:
            self._spool.close()


def read_trailer(log: BinaryIO) -> dict[str, Any]:
    """The trailer of a seekable log: diff_id, size, entries and so on. Raises Corrupt if it is no log, or cut short."""
    try:
        if log.seek(0) or log.read(len(MAGIC)) != MAGIC:
            raise Corrupt("not a header log")
        log.seek(-TAIL.size, os.SEEK_END)
        length, magic = TAIL.unpack(log.read(TAIL.size))
        if magic != _TAIL_MAGIC:
            raise Corrupt("header log is cut short")
        log.seek(-TAIL.size - length, os.SEEK_END)
        trailer = json.loads(log.read(length))
    except (OSError, ValueError, OverflowError, struct.error) as error:
        raise Corrupt(f"header log is damaged: {error}") from None
    if not isinstance(trailer, dict) or not all(
        isinstance(trailer.get(key), int) and trailer[key] >= 0 for key in ("size", "entries", "headers", "saved")
    ):
        raise Corrupt("header log is damaged")
    return trailer


class _Section(Source):
    """One gzip section of a log."""

    def __init__(self, log: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        log.seek(start)
        left = length

        def read(count: int) -> bytes:
            nonlocal left
            data = log.read(min(count, left))
            left -= len(data)
            return data

        self._chunks = gunzip(read)

    def next_chunk(self) -> bytes:
        try:
            return next(self._chunks, b"")
        except (CowfsError, zlib.error) as error:
            raise Corrupt(f"header log is damaged: {error}") from None


def rebuild(log: BinaryIO, layer: int, out: BinaryIO, *, compression: str = "none") -> tuple[str, int]:
    """Write the archive that the layer came from, byte for byte.

    Args:
        log: the side file, seekable. layer: descriptor of the layer directory.
        compression: "none", "gzip" or "zstd" around it (the original compression is not kept).

    Returns:
        (sha256 digest, bytes) of the bytes that reached ``out``.

    Raises:
        Corrupt: the log is damaged, or the layer has changed; ``out`` is then worthless.
    """
    trailer = read_trailer(log)
    if not trailer.get("complete"):
        raise Corrupt("header log is incomplete: the archive replaced too many of its own files")
    headers, saved = int(trailer["headers"]), int(trailer["saved"])
    with tempfile.TemporaryFile() as spool:
        kept = _load_saved(log, len(MAGIC) + headers, saved, spool)
        packer = Packer(out, compression)
        files = _Files(layer)
        try:
            reader = Reader(
                _Section(log, len(MAGIC), headers), raw=packer.write, stripped=True, max_entries=_BIG, max_header=_BIG
            )
            for member in reader:
                if not member.stored:
                    continue
                path = canonical(member.name, max_path=_BIG, max_depth=_BIG, whiteouts=True)
                what, _ = meaning(path)
                if what is Meaning.ENTRY:
                    # the data of a member is displaced by the next member that displaced any at its path
                    found = next((item for item in kept.get(path, ()) if item[0] > member.ordinal), None)
                else:
                    found = next((item for item in kept.get(member.name, ()) if item[0] == member.ordinal), None)
                if found is not None:
                    _copy(spool.fileno(), found[1], found[2], member, packer)
                else:
                    _copy_file(files, path, member, packer)
            packer.close()
        except BaseException:
            packer.abandon()
            raise
        finally:
            files.close()
    if packer.diff_id != trailer["diff_id"]:
        raise Corrupt(f"layer does not match its archive any more: {packer.diff_id} instead of {trailer['diff_id']}")
    return packer.blob_digest, packer.blob_size


def member_names(log: BinaryIO) -> Iterator[bytes]:
    """The path of each member of the archive, canonical, in archive order. Raises Corrupt: the log is damaged."""
    trailer = read_trailer(log)
    section = _Section(log, len(MAGIC), int(trailer["headers"]))
    for member in Reader(section, stripped=True, max_entries=_BIG, max_header=_BIG):
        yield canonical(member.name, max_path=_BIG, max_depth=_BIG, whiteouts=True)


def _load_saved(log: BinaryIO, start: int, length: int, spool: BinaryIO) -> dict[bytes, list[tuple[int, int, int]]]:
    """(ordinal, offset in ``spool``, bytes) of each version kept, by path, in archive order."""
    kept: dict[bytes, list[tuple[int, int, int]]] = {}
    if not length:
        return kept
    section = _Section(log, start, length)
    position = 0
    while head := section.take(RECORD.size):
        if len(head) < RECORD.size:
            raise Corrupt("header log is cut short")
        path_size, size, ordinal = RECORD.unpack(head)
        path = section.take(path_size)
        for piece in section.pieces(size):
            spool.write(piece)
        kept.setdefault(path, []).append((ordinal, position, size))
        position += size
    spool.flush()
    return kept


class _Files:
    """Files of the layer by path; the directory of the one before stays open, since archives go directory by directory."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._path: bytes | None = None
        self._dir = -1

    def open(self, path: bytes) -> int:
        """Open a file without following links. Raises Corrupt if there is none."""
        parent, _, name = path.rpartition(b"/")
        try:
            if parent != self._path:
                self.close()
                self._dir = open_beneath(self._layer, parent, os.O_PATH | os.O_DIRECTORY)
                self._path = parent
            return os.open(name, _READ, dir_fd=self._dir)
        except OSError as error:
            raise Corrupt(f"layer has no {show(path)} any more: {error.strerror}") from None

    def close(self) -> None:
        if self._path is not None:
            os.close(self._dir)
            self._path = None


def _copy_file(files: _Files, path: bytes, member: header.Member, packer: Packer) -> None:
    fd = files.open(path)
    try:
        st = os.fstat(fd)
        size = st.st_size
        if not stat.S_ISREG(st.st_mode) or size != member.size:
            raise Corrupt(f"layer file {show(path)} is not what the archive held")
        if size <= CHUNK and size == member.stored and member.segments is None:
            data = os.read(fd, size)
            if len(data) == size:
                packer.write(data)
                return
        _copy(fd, 0, size, member, packer)
    finally:
        os.close(fd)


def _copy(fd: int, base: int, length: int, member: header.Member, packer: Packer) -> None:
    """Write the stored bytes of a member from its file: all of it, or the segments of a sparse one."""
    if (member.segments is None and member.stored != length) or (member.size > length and member.segments is not None):
        raise Corrupt(f"layer file {show(member.name)} is not as long as the archive held")
    ranges = [(0, length)] if member.segments is None else header.iter_segments(member.segments)
    for start, count in ranges:
        while count:
            data = os.pread(fd, min(count, CHUNK), base + start)
            if not data:
                raise Corrupt(f"layer file {show(member.name)} is cut short")
            packer.write(data)
            start += len(data)
            count -= len(data)
