"""One snapshot's tree as the merged view reads it: from the index, so that no lower layer is scanned."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from cowfs._typed import NamedTuple
from cowfs.errors import Corrupt
from cowfs.index.directory import Pair, Records, decode, entries, join

__all__ = ["Handle", "IndexTree", "Seen"]

_GARBLED = (struct.error, ValueError, IndexError)
"""Errors of unpacking a record whose bytes are not what was written."""


def _damaged(digest: bytes, error: Exception) -> Corrupt:
    return Corrupt(f"the index has a damaged record {digest.hex()}: {error}", remedy="run 'cowfs check --repair'")


class Handle(NamedTuple):
    """A directory of an :class:`IndexTree`: its record, its path, and the base of its files."""

    storage: bytes
    path: bytes
    base: bytes


class Seen(NamedTuple):
    """One entry in the form for the merged view (``cowfs.union.options.Entry``).

    Attributes:
        type: as in readdir(3), DT_*.
        layer: place in the stack, 0 at the bottom; of a directory: the topmost layer that has it.
        path: its path in that layer; None for the path that users see.
        record: a directory's own record.
        file: the file's identity (:attr:`cowfs.index.directory.Entry.file`).
    """

    type: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ino: int
    blocks: int
    rdev: int
    nlink: int
    target: bytes
    xattrs: Mapping[bytes, bytes]
    layer: int
    path: bytes | None
    record: Handle | None
    flags: int
    file: tuple[int, int]


class _Names(Mapping[bytes, Seen]):
    """A directory's entries, each unpacked on demand."""

    __slots__ = ("_handle", "_layers", "_pairs")

    def __init__(self, pairs: dict[bytes, Pair], handle: Handle, layers: Mapping[int, int]) -> None:
        self._pairs = pairs
        self._handle = handle
        self._layers = layers

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, name: object) -> bool:
        return name in self._pairs

    def __getitem__(self, name: bytes) -> Seen:
        pair = self._pairs[name]
        storage, seen, base = self._handle
        try:
            entry = decode(pair)
        except _GARBLED as error:
            raise _damaged(storage, error) from None
        path, handle = entry.path, None
        implied = join(base, name)
        if path is None and base != seen:
            path = implied
        if entry.ref is not None:
            below = implied if entry.base is None else entry.base
            handle = Handle(entry.ref.storage, join(seen, name), below)
        layer = self._layers.get(entry.layer)
        if layer is None:
            raise Corrupt(
                f"the index puts {join(seen, name)!r} in layer {entry.layer}, which is not in this chain",
                remedy="run 'cowfs check'",
            )
        return Seen(
            entry.mode >> 12, entry.mode, entry.uid, entry.gid, entry.size if handle is None else 4096, entry.mtime_ns,
            entry.ino, entry.blocks, entry.rdev, entry.nlink, entry.target, dict(entry.xattrs), layer, path,
            handle, entry.flags, entry.file,
        )  # fmt: skip


class IndexTree:
    """One snapshot's tree as the merged view reads it: the lower layers need no scan.

    Args:
        records: the index.
        root: the snapshot's root entry.
        layers: place in the view's stack of lowers (0 at the bottom) by layer number.
        keep: directories whose packed entries are kept, the least recently used going first.

    Threads: belongs to the view's thread.
    """

    __slots__ = ("_kept", "_layers", "_limit", "_records", "_root")

    def __init__(self, records: Records, root: Pair, layers: Mapping[int, int], *, keep: int = 256) -> None:
        self._records = records
        self._root = root
        self._layers = layers
        self._limit = keep
        self._kept: dict[Handle, _Names] = {}

    @property
    def records(self) -> Records:
        """The source of the records."""
        return self._records

    def root(self) -> Handle:
        """The root directory, an argument for :meth:`entries`."""
        entry = decode(self._root)
        assert entry.ref is not None
        return Handle(entry.ref.storage, b"", entry.base or b"")

    def entries(self, record: Handle) -> Mapping[bytes, Seen]:
        """A directory's entries by name.

        Raises:
            Corrupt: a record is missing, or (on asking for an entry) names a layer that is not
                in the stack.
        """
        kept = self._kept
        found = kept.pop(record, None)
        if found is None:
            try:
                pairs = entries(self._records, record.storage)
            except _GARBLED as error:
                raise _damaged(record.storage, error) from None
            found = _Names(pairs, record, self._layers)
            if len(kept) >= self._limit:
                del kept[next(iter(kept))]
        kept[record] = found
        return found
