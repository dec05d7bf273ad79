"""A snapshot's tree for archives: attributes from the index, data from the layers.

Strategy: nothing is mounted and no directory is listed. A path is looked up in the records; only a
regular file's bytes are read, from the layer that the record names. A walk asks for a directory's names before its
entries: listings are kept for that, so each record is read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from cowfs import archive
from cowfs.index.directory import Entry, Pair, Records, decode, entries, join
from cowfs.index.scan import locate
from cowfs.store.layers import LayerFile, SameData
from cowfs.store.owners import Recorded

__all__ = ["IndexedTree"]

_CHUNK = 1 << 20
_KEPT = 64  # listings, the latest ones: as deep as trees go


class IndexedTree:
    """A :class:`cowfs.archive.Tree` of one snapshot.

    Args:
        records: the index, or pending records over it.
        root: the root entry.
        data: opens files in layers.
        owners: gives the real owners.

    Threads: one at a time.
    """

    def __init__(self, records: Records, root: Pair, data: SameData, owners: Recorded) -> None:
        self._records = records
        self._root = root
        self._data = data
        self._owners = owners
        self._listings: dict[bytes, tuple[dict[bytes, Pair], bytes]] = {}
        self._latest: tuple[bytes, tuple[Entry | None, bytes]] | None = None

    def _entry(self, path: bytes) -> tuple[Entry | None, bytes]:
        if self._latest is not None and self._latest[0] == path:
            return self._latest[1]
        found = self._listed(path) or self._located(path)
        self._latest = path, found
        return found

    def _listed(self, path: bytes) -> tuple[Entry | None, bytes] | None:
        """The entry from a kept listing, None if there is no such listing."""
        parent, _, name = path.rpartition(b"/")
        listing = self._listings.get(parent) if path else None
        if listing is None:
            return None
        pair = listing[0].get(name)
        where = join(listing[1], name)
        if pair is None:
            return None, where
        entry = decode(pair)
        return entry, (entry.base if entry.is_dir else entry.path) or where

    def _located(self, path: bytes) -> tuple[Entry | None, bytes]:
        pair, where = locate(self._records, self._root, path)
        return (decode(pair) if pair is not None else None), where

    def _must(self, path: bytes) -> tuple[Entry, bytes]:
        entry, where = self._entry(path)
        if entry is None:
            raise FileNotFoundError(2, os.strerror(2), path)
        return entry, where

    def stat(self, path: bytes) -> archive.LowerStat | None:
        """The attributes of a path, None if it does not exist."""
        entry, _ = self._entry(path)
        if entry is None:
            return None
        owner = self._owners.owner(entry, path)
        return archive.LowerStat(
            mode=owner.mode,
            uid=owner.uid,
            gid=owner.gid,
            size=entry.size,
            mtime=entry.mtime_ns,
            rdev=owner.rdev,
            nlink=max(1, entry.nlink),
            ident=entry.file,
        )

    def names(self, path: bytes) -> list[bytes]:
        """The entries of a directory."""
        entry, where = self._must(path)
        if entry.ref is None:
            raise NotADirectoryError(20, os.strerror(20), path)
        found = entries(self._records, entry.ref.storage)
        if len(self._listings) >= _KEPT:
            del self._listings[next(iter(self._listings))]
        self._listings[path] = found, where
        return list(found)

    def readlink(self, path: bytes) -> bytes:
        """A symbolic link's target."""
        return self._must(path)[0].target

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        """Extended attributes as users see them, without the one that records an owner."""
        return self._owners.others(self._must(path)[0])

    def open(self, path: bytes) -> LayerFile | None:
        """The file that holds a regular file's bytes; None for an empty one."""
        entry, where = self._must(path)
        return self._data.open(entry.layer, where) if entry.size else None

    def digest(self, path: bytes) -> bytes | None:
        """The SHA-256 of a regular file's bytes, if the index has it."""
        return self._must(path)[0].digest

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """A regular file's bytes with their offsets, without its holes."""
        entry, where = self._must(path)
        if not entry.size:
            return
        with self._data.open(entry.layer, where) as file:
            for start, end in file.data_ranges():
                while start < end and (piece := file.pread(min(_CHUNK, end - start), start)):
                    yield start, piece
                    start += len(piece)

    def read(self, path: bytes) -> Iterator[bytes]:
        """A regular file's bytes, in pieces."""
        entry, where = self._must(path)
        if not entry.size:
            return
        with self._data.open(entry.layer, where) as file:
            at = 0
            while data := file.pread(_CHUNK, at):
                yield data
                at += len(data)
