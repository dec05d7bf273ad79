"""Disk images of snapshots, for virtual machines: the driver makes one, this module writes it in the requested form."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING
from cowfs.errors import InvalidArgument
from cowfs.format import qcow2
from cowfs.model import Kind, parse_size
from cowfs.store.names import new_id
from cowfs.store.staging import staged
from cowfs.sys.files import data_ranges

if TYPE_CHECKING:
    from typing import BinaryIO

    from cowfs.driver.interface import Driver
    from cowfs.index.database import Index, Row
    from cowfs.store.context import Context
    from cowfs.store.reading import Reading

__all__ = ["FORMATS", "DiskCounts", "Disks"]

FORMATS = ("raw", "qcow2")
_PIECE = 1 << 20


@record(frozen=True, slots=True, kw_only=True)
class DiskCounts:
    """A disk that was written.

    Attributes:
        size: of the disk, bytes.
        written: bytes of the file, holes left out.
    """

    size: int
    written: int


class Disks:
    """Disks of committed snapshots."""

    def __init__(self, context: Context, reading: Reading) -> None:
        self.context = context
        self._reading = reading

    def export_disk(
        self, name: str, target: BinaryIO, *, format: str = "raw", size: str | int | None = None
    ) -> DiskCounts:
        """As :meth:`cowfs.Store.export_disk`."""
        return _export(
            self.context.driver, self.context.index, self._reading.resolve(name), target, format=format, size=size
        )


def _export(
    driver: Driver, index: Index, row: Row, target: BinaryIO, *, format: str, size: str | int | None
) -> DiskCounts:
    if format not in FORMATS:
        raise InvalidArgument(f"no disk format {format!r}", remedy=" or ".join(FORMATS))
    if row.kind is not Kind.COMMITTED:
        raise InvalidArgument(f"{row.name!r} is not committed", remedy="use commit or snapshot first")
    wanted = 0 if size is None else parse_size(size)
    with staged(driver, index, new_id()) as scratch:
        try:
            with driver.disk(row.id, scratch.staged, wanted) as (fd, whole):
                written = _write(target, format, fd, whole)
        finally:
            driver.remove(scratch.staged)
    return DiskCounts(size=whole, written=written)


def _write(target: BinaryIO, format: str, fd: int, size: int) -> int:
    """Write a disk that can be read from a descriptor, and return the bytes written."""

    def read(start: int, count: int) -> bytes:
        return os.pread(fd, count, start).ljust(count, b"\0")

    ranges = [(start, min(end, size)) for start, end in data_ranges(fd, size)]
    if format == "qcow2":
        written = qcow2.write(target, size, ranges, read)
    else:
        written = _write_raw(target, size, _pieces(ranges), fd)
    target.flush()
    return written


def _pieces(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in ranges:
        for at in range(start, end, _PIECE):
            yield at, min(_PIECE, end - at)


def _write_raw(target: BinaryIO, size: int, pieces: Iterator[tuple[int, int]], fd: int) -> int:
    """Write a disk as it is; a file gets holes, another stream zeros."""
    seekable = target.seekable()
    start = target.tell() if seekable else 0
    at = written = 0

    def skip_to(offset: int) -> None:
        nonlocal at
        if seekable:
            target.seek(start + offset)
        else:
            while at < offset:
                at += target.write(bytes(min(_PIECE, offset - at)))
        at = offset

    for offset, count in pieces:
        data = os.pread(fd, count, offset)
        if not data.strip(b"\0"):
            continue
        skip_to(offset)
        target.write(data)
        at += len(data)
        written += len(data)
    if seekable:
        target.truncate(start + size)
    else:
        skip_to(size)
    return written
