"""The *map* of a redirect file, as it is on disk (docs/row.md); its *reference* is :mod:`cowfs.format.redirect`.

A redirect file is a sparse file of the logical size in the upper layer. The **reference**, an xattr on it, names its
base; the **map**, a separate file beside the layer, lists the present blocks.

Rules:

1. Presence is never inferred from holes: a block is present because a record says so, or because it
   lies at or past ``base_end``, from where on the file stands alone.
2. The map only grows; the order of its records has no meaning. The part of the base that still shows must be able to
   shrink: it is ``base_end`` in the reference, which the host journals together with the file's size.
3. A record is written after its data was written. So in the boot that wrote it (``boot_id``) it is valid, however the
process ended. After another boot it is valid if a SYNC record, written after the data had reached the disk, covers it.
4. A record whose checksum fails ends the map: it was torn. It is cut off before anything is appended.

Layout, little endian:
``<8sHBB16s32xI`` magic, version, log2 of the block size, 0, boot id, CRC-32 of those 60 bytes; then records ``<IIQ``
CRC-32 (of the rest, seeded with the record's offset), count, first | kind << 56.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress

from cowfs.format.redirect import VERSION, Ref, bad
from cowfs.sys import process
from cowfs.sys.regular import open_regular

_HEAD = struct.Struct("<8sHBB16s32x")
_CRC = struct.Struct("<I")
_BODY = struct.Struct("<IQ")
_RECORD = struct.Struct("<IIQ")
HEAD_SIZE = _HEAD.size + _CRC.size
RECORD_SIZE = _RECORD.size
assert (HEAD_SIZE, RECORD_SIZE) == (64, 16)

_MAGIC = b"COWFSROW"
_WRITE, _SYNC = 1, 2
_KIND_SHIFT, _FIRST_MASK = 56, (1 << 56) - 1
_MAX_COUNT = (1 << 32) - 1
_PIECE = 1 << 20  # bytes of a map that are read at once

Ranges = list[tuple[int, int]]


@functools.cache
def boot_id() -> bytes:
    """This boot's identity, 16 bytes (random(4), /proc/sys/kernel/random/boot_id)."""
    return bytes.fromhex(process.boot_id().replace("-", ""))


def _header(shift: int) -> bytes:
    head = _HEAD.pack(_MAGIC, VERSION, shift, 0, boot_id())
    return head + _CRC.pack(zlib.crc32(head))


def _record(offset: int, kind: int, count: int, first: int) -> bytes:
    body = _BODY.pack(count, first | kind << _KIND_SHIFT)
    return _CRC.pack(zlib.crc32(body, offset & 0xFFFFFFFF)) + body


def _writes(offset: int, ranges: Ranges) -> bytes:
    parts: list[bytes] = []
    for first, end in ranges:
        while first < end:
            count = min(end - first, _MAX_COUNT)
            parts.append(_record(offset + RECORD_SIZE * len(parts), _WRITE, count, first))
            first += count
    return b"".join(parts)


class Loaded:
    """A map as read.

    Attributes:
        ranges: the present blocks, [first, end), sorted and disjoint.
        end: the offset of the next record, bytes.
        synced: the end of the records of durable data, bytes.
        records: the number of WRITE records read.
        stale: whether it must be written anew before anything is appended: another boot wrote it.
    """

    __slots__ = ("end", "ranges", "records", "stale", "synced")

    def __init__(self, ranges: Ranges, end: int, synced: int, records: int, stale: bool) -> None:
        self.ranges = ranges
        self.end = end
        self.synced = synced
        self.records = records
        self.stale = stale


def parse(data: bytes, shift: int, name: bytes) -> Loaded:
    """Read a map.

    Args:
        data: the whole file.
        shift: the one in the reference.

    Raises:
        OSError: EIO when it is of another version or block size.
    """
    if len(data) < HEAD_SIZE or zlib.crc32(data[: _HEAD.size]) != _CRC.unpack_from(data, _HEAD.size)[0]:
        if data.strip(b"\0"):
            raise bad("map header is damaged", name)
        return Loaded([], 0, 0, 0, True)  # it never reached the disk, so none of its data did
    magic, version, its_shift, _, its_boot = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != VERSION or its_shift != shift:
        raise bad(f"map of version {version}, block size {1 << its_shift}", name)
    found: list[tuple[int, int, int]] = []
    offset, synced = HEAD_SIZE, HEAD_SIZE
    for crc, count, packed in _RECORD.iter_unpack(data[HEAD_SIZE : len(data) - (len(data) - HEAD_SIZE) % RECORD_SIZE]):
        if zlib.crc32(_BODY.pack(count, packed), offset & 0xFFFFFFFF) != crc:
            break
        kind, first = packed >> _KIND_SHIFT, packed & _FIRST_MASK
        if kind == _WRITE:
            found.append((first, first + count, offset))
        elif kind == _SYNC:
            synced = max(synced, offset + RECORD_SIZE if first == offset else first)
        else:
            raise bad(f"map record of kind {kind}", name)
        offset += RECORD_SIZE
    same_boot = its_boot == boot_id()
    if not same_boot:
        found = [item for item in found if item[2] < synced]
    return Loaded(
        merge([(first, end) for first, end, _ in found]), offset, min(synced, offset), len(found),
        not same_boot,
    )  # fmt: skip


def merge(ranges: Ranges) -> Ranges:
    """The ranges, sorted and disjoint."""
    merged: Ranges = []
    last = -1
    for start, end in sorted(ranges):
        if start <= last:
            if end > last:
                merged[-1] = (merged[-1][0], end)
                last = end
        else:
            merged.append((start, end))
            last = end
    return merged


def read(dirfd: int, ref: Ref) -> Loaded:
    """Read the map of a reference in an open map directory.

    Raises:
        OSError: ENOENT, EIO.
    """
    if not ref.has_map:
        return Loaded([], 0, 0, 0, True)
    return parse(_read_all(dirfd, ref.map_name), ref.shift, ref.map_name)


def _read_all(dirfd: int, name: bytes) -> bytes:
    """A map, up to where a whole piece is zeros: no record is there, so a sparse file takes no memory for its holes."""
    fd = open_regular(name, dir_fd=dirfd)
    parts = []
    try:
        left = os.fstat(fd).st_size
        while left > 0 and (part := os.read(fd, min(left, _PIECE))):
            parts.append(part)
            left -= len(part)
            if not part.strip(b"\0"):
                break
    finally:
        os.close(fd)
    return b"".join(parts)


class Log:
    """A map open for appending.

    Any thread may call; ``_lock`` orders the records, whose checksums depend on where they stand. So a map has only
    one: a caller that wants it again while it waits for its last sync takes it back (``Syncer.take_back``).

    Attributes:
        name: the map's file name.
        failure: an fsync of the data failed. The host has dropped the data that it could not write (fsync(2), errors),
            so later successes have no meaning: no record is marked any more, and a reboot brings back the old blocks.
    """

    __slots__ = ("_lock", "end", "failure", "fd", "name", "synced")

    def __init__(self, name: bytes, fd: int, end: int, synced: int) -> None:
        self._lock = threading.Lock()
        self.name = name
        self.fd = fd
        self.end = end
        self.synced = synced
        self.failure: OSError | None = None

    def fail(self, error: OSError) -> None:
        """Record that an fsync of the data failed."""
        self.failure = error

    @classmethod
    def create(cls, dirfd: int, ref: Ref) -> Log:
        """A new, empty map. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(ref.map_name, flags, 0o600, dir_fd=dirfd)
        try:
            _write_all(fd, _header(ref.shift))
        except BaseException:
            os.close(fd)
            os.unlink(ref.map_name, dir_fd=dirfd)
            raise
        return cls(ref.map_name, fd, HEAD_SIZE, HEAD_SIZE)

    @classmethod
    def open(cls, dirfd: int, ref: Ref, loaded: Loaded, *, durable: bool) -> Log:
        """Continue a map that was read; one of another boot is written anew first."""
        end, synced = loaded.end, loaded.synced
        if loaded.stale:
            end = synced = rewrite(dirfd, ref.map_name, ref.shift, loaded.ranges, durable=durable)
        fd = open_regular(ref.map_name, os.O_RDWR | os.O_APPEND, dir_fd=dirfd)
        try:
            if os.fstat(fd).st_size > end:
                os.ftruncate(fd, end)
        except BaseException:
            os.close(fd)
            raise
        return cls(ref.map_name, fd, end, synced)

    @property
    def dirty(self) -> bool:
        """Whether a record is valid in this boot only."""
        return self.end > self.synced

    def append(self, first: int, end: int) -> None:
        """Record that blocks [first, end) are present; their data has been written.

        Raises:
            OSError: of the host; then nothing was appended.
        """
        with self._lock:
            self._add(_writes(self.end, [(first, end)]))

    def mark_synced(self, upto: int) -> None:
        """Record that the data of all records before ``upto`` is on the disk."""
        with self._lock:
            if self.fd >= 0 and upto > self.synced and self.failure is None:
                self._add(_record(self.end, _SYNC, 0, upto))
                self.synced = self.end if self.end - RECORD_SIZE == upto else upto

    def _add(self, data: bytes) -> None:
        try:
            _write_all(self.fd, data)
        except OSError:
            os.ftruncate(self.fd, self.end)
            raise
        self.end += len(data)

    def sync(self) -> None:
        """Bring the map itself to the disk."""
        with self._lock:
            fd = os.dup(self.fd) if self.fd >= 0 else -1
        if fd >= 0:
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _write_all(fd: int, data: bytes) -> int:
    done = 0
    while done < len(data):
        count = os.write(fd, data[done:])
        if count <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count
    return done


def rewrite(dirfd: int, name: bytes, shift: int, ranges: Ranges, *, durable: bool) -> int:
    """Replace a map by the shortest one with the same blocks. The data must be on the disk already.

    Args:
        durable: sync it before it takes the old one's place.

    Returns:
        Its length, bytes.
    """
    temp = name + b".new"
    records = _writes(HEAD_SIZE, ranges)
    end = HEAD_SIZE + len(records)
    with suppress(FileNotFoundError):
        os.unlink(temp, dir_fd=dirfd)  # of a rewrite that was killed
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
    try:
        _write_all(fd, _header(shift) + records + _record(end, _SYNC, 0, end))
        if durable:
            os.fdatasync(fd)
    except BaseException:
        os.unlink(temp, dir_fd=dirfd)
        raise
    finally:
        os.close(fd)
    os.rename(temp, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
    return end + RECORD_SIZE


def seal(dirfd: int, sync: Callable[[], None] | None) -> int:
    """Make every map of a frozen layer valid for good, and short.

    Args:
        dirfd: the open map directory.
        sync: brings the layer's data to the disk; called at most once, and only if a map depends on this boot.
            ``None``: without durability against power cuts.

    Returns:
        The number of maps.

    Raises:
        OSError: EIO for a damaged map.
    """
    names = [os.fsencode(name) for name in os.listdir(dirfd)]
    synced = sync is None
    count = 0
    for name in names:
        if name.endswith(b".new"):  # a rewrite that was killed
            os.unlink(name, dir_fd=dirfd)
            continue
        count += 1
        data = _read_all(dirfd, name)
        shift = data[10] if len(data) >= HEAD_SIZE else 12
        loaded = parse(data, shift, name)
        if not loaded.end:
            continue  # its header never reached the disk: no block is present
        dirty = loaded.end > loaded.synced and not loaded.stale
        if dirty and not synced and sync is not None:
            sync()
            synced = True
        if dirty or loaded.stale or loaded.records > 2 * len(loaded.ranges) + 8:
            rewrite(dirfd, name, shift, loaded.ranges, durable=sync is not None)
    return count
