"""Writing a disk image as qcow2, version 3: in one pass, to a stream, and only the clusters that hold something.

Strategy: all clusters that will be written are known before the first byte is. So the file is laid out at once: header, reference counts, first-level table,
second-level tables, then data in the order of the disk. Each cluster has one reference. Nothing is compressed, and there is
neither a backing file nor a snapshot.

Source: QEMU's docs/interop/qcow2.txt. All numbers are big endian.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Iterator

from cowfs._typed import BinaryIO

__all__ = ["CLUSTER", "write"]

CLUSTER = 1 << 16
_BITS = 16
_COPIED = 1 << 63  # of an entry: the cluster has exactly one reference
_ENTRIES = CLUSTER // 8  # of a second-level table, or in a cluster of another one
_COUNTS = CLUSTER // 2  # reference counts of 16 bits in a block
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
assert _HEADER.size == 104

Ranges = Iterable[tuple[int, int]]


def write(out: BinaryIO, size: int, ranges: Ranges, read: Callable[[int, int], bytes]) -> int:
    """Write a disk.

    Args:
        out: a stream; a pipe will do.
        size: of the disk, bytes; a multiple of 512.
        ranges: where it may hold anything else than zeros: (start, end), in bytes, sorted and disjoint.
        read: (start, count) -> that many bytes of the disk.

    Returns:
        Bytes written.

    Raises:
        OSError: as of ``out`` and ``read``.
    """
    clusters = _with_data(ranges, size, read)
    tables = sorted({number // _ENTRIES for number in clusters})
    total = -(-size // CLUSTER)
    first_level = -(-total // _ENTRIES)
    first_clusters = max(1, -(-first_level * 8 // CLUSTER))
    fixed = 1 + first_clusters + len(tables) + len(clusters)
    blocks, heads = _counting(fixed)
    count = fixed + blocks + heads
    first_at = 1 + heads + blocks
    tables_at = first_at + first_clusters
    data_at = tables_at + len(tables)

    header = _HEADER.pack(
        b"QFI\xfb", 3, 0, 0, _BITS, size, 0, first_level, first_at * CLUSTER, CLUSTER, heads, 0, 0, 0, 0, 0, 4, 104
    )  # fmt: skip
    out.write(header.ljust(CLUSTER, b"\0"))
    out.write(_numbers((1 + heads + number) * CLUSTER for number in range(blocks)).ljust(heads * CLUSTER, b"\0"))
    out.write((b"\0\1" * count).ljust(blocks * CLUSTER, b"\0"))
    where = {number: tables_at + place for place, number in enumerate(tables)}
    out.write(
        _numbers(where[number] * CLUSTER | _COPIED if number in where else 0 for number in range(first_level)).ljust(
            first_clusters * CLUSTER, b"\0"
        )
    )
    for table, entries in _second_level(clusters, data_at):
        assert table in where
        out.write(entries)
    for number in clusters:
        start = number * CLUSTER
        out.write(read(start, min(CLUSTER, size - start)).ljust(CLUSTER, b"\0"))
    return count * CLUSTER


def _with_data(ranges: Ranges, size: int, read: Callable[[int, int], bytes]) -> array[int]:
    """The numbers of the clusters that hold anything else than zeros, in order."""
    found = array("Q")
    last = -1
    for start, end in ranges:
        for number in range(max(start // CLUSTER, last + 1), -(-min(end, size) // CLUSTER)):
            last = number
            if read(number * CLUSTER, min(CLUSTER, size - number * CLUSTER)).strip(b"\0"):
                found.append(number)
    return found


def _counting(fixed: int) -> tuple[int, int]:
    """(blocks of reference counts, clusters of the table that names them) for a file that has ``fixed`` clusters besides."""
    blocks = heads = 0
    while True:
        wanted = -(-(fixed + blocks + heads) // _COUNTS)
        wanted_heads = -(-wanted // _ENTRIES)
        if (wanted, wanted_heads) == (blocks, heads):
            return blocks, heads
        blocks, heads = wanted, wanted_heads


def _second_level(clusters: array[int], data_at: int) -> Iterator[tuple[int, bytes]]:
    """Each second-level table with data in it: (its number, its cluster)."""
    entries = [0] * _ENTRIES
    current = -1
    for place, number in enumerate(clusters):
        if number // _ENTRIES != current:
            if current >= 0:
                yield current, _numbers(entries)
            current = number // _ENTRIES
            entries = [0] * _ENTRIES
        entries[number % _ENTRIES] = (data_at + place) * CLUSTER | _COPIED
    if current >= 0:
        yield current, _numbers(entries)


def _numbers(values: Iterable[int]) -> bytes:
    listed = list(values)
    return struct.pack(f">{len(listed)}Q", *listed)
