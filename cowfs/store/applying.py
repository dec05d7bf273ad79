"""Layer archives into a snapshot, and what is kept of them.

A layer that came from an archive is exported as that archive, byte for byte: its headers are kept beside the layer
(``cowfs-headers``), and the row has the diff id. A row gets it only if nothing in the layer has changed since: no
ctime is later than the one of ``cowfs-applied``, which is the very file that was made then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from cowfs import archive, images
from cowfs.index.database import Row
from cowfs.index.directory import DIGEST, Pair, Records
from cowfs.store.checking import UpkeepVerbs
from cowfs.store.digest_table import ByInode
from cowfs.store.layers import (
    UNKNOWN,
    KeptDigests,
    SameData,
    hold,
    mark_time,
    marked_time,
    settle_times,
    unmark,
    untouched,
)
from cowfs.store.reserve import names_full
from cowfs.sys import xattr
from cowfs.sys.faults import point
from cowfs.sys.regular import read_small

if TYPE_CHECKING:
    from cowfs.index import scan
    from cowfs.store.content import IndexedTree

__all__ = ["APPLIED", "HEADERS", "ArchiveVerbs", "Progress", "counter"]

HEADERS = "cowfs-headers"
APPLIED = "cowfs-applied"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: not known)."""


class ArchiveVerbs(UpkeepVerbs):
    """apply, and the ids that come of it."""

    @names_full
    def apply(
        self,
        key: str,
        stream: BinaryIO,
        *,
        options: archive.ApplyOptions | None = None,
        diff_id: str | None = None,
        progress: Progress | None = None,
    ) -> archive.Applied:
        """Unpack an OCI layer tar into an active snapshot.

        Args:
            key: an active snapshot that nobody has mounted.
            stream: the archive, plain or compressed; a pipe will do.
            options: bounds, and what to do without privilege.
            diff_id: what its digest must be.
            progress: told how much was read.

        Raises:
            NotFound: no such key.
            FailedPrecondition: not active, or mounted.
            InvalidArgument: the archive is damaged or hostile; the message names the entry.
            Corrupt: another digest than asked for.

        After an error the snapshot holds a part of the archive.
        """
        row = self._active(key)
        with hold(self.driver, row, "apply to"):
            row = self._active(key, row.num)
            fresh = untouched(self.driver, row.id)
            _forget(self.driver.directory(row.id))
            above = self.index.by_num(row.parent) if row.parent is not None else None
            applied, digests = self._unpack(
                row.id, stream, self._content_of(above), options, diff_id, counter(progress, key)
            )
            point("apply.unpacked")
            settle_times(self.driver)
            KeptDigests.save(self.driver, row.id, digests)
            if fresh:
                mark_time(self.driver, f"{self.driver.directory(row.id)}/{APPLIED}", applied.diff_id)
            else:
                _forget(self.driver.directory(row.id))
            point("apply.synced")
        return applied

    def _unpack(
        self,
        id: str,
        stream: BinaryIO,
        lower: archive.Tree | None,
        options: archive.ApplyOptions | None,
        diff_id: str | None,
        progress: Callable[[int, int], object] | None,
        blob_digest: str | None = None,
        budget: archive.Budget | None = None,
    ) -> tuple[archive.Applied, ByInode]:
        """Unpack into a layer; the digests of the files by inode."""
        directory, tree = self.driver.directory(id), self.driver.tree(id)
        digests = ByInode(DIGEST)

        def on_inode(inode: int, digest: str) -> None:
            digests[inode] = bytes.fromhex(digest) or UNKNOWN

        if options is not None and options.owners != "fail":
            from cowfs.store.owners import mark

            mark(directory, options.owners)
        with self.driver.open_tree(id), open(f"{directory}/{HEADERS}", "w+b") as log:
            applied = archive.apply_layer(
                stream,
                tree,
                form="plain" if self.driver.capabilities.whole else self.driver.form.name,
                lower=_RootOnly(tree) if self.driver.capabilities.whole and lower is not None else lower,
                options=options,
                log=log,
                on_inode=on_inode,
                progress=progress,
                diff_id=diff_id,
                blob_digest=blob_digest,
                budget=budget,
            )
            log.flush()
            if self.driver.fsync:
                os.fsync(log.fileno())
        return applied, digests

    def _content(self, root: Pair, records: Records) -> IndexedTree:
        """A tree as archives want to read it."""
        from cowfs.store.content import IndexedTree
        from cowfs.store.owners import Recorded

        return IndexedTree(records, root, SameData(self.driver, self.index), Recorded(self.driver, self.index))

    def _content_of(self, row: Row | None) -> IndexedTree | None:
        return None if row is None or row.root is None else self._content(row.root, self.index)

    def _archive_of(self, row: Row, scanned: scan.Scanned) -> tuple[str | None, str | None]:
        """(diff id, chain id) of a layer that is exactly what one archive made it."""
        path = f"{self.driver.directory(row.id)}/{APPLIED}"
        mark = marked_time(self.driver, path)
        if mark is None or scanned.latest >= mark:
            _forget(self.driver.directory(row.id))
            return None, None
        diff_id = read_small(path).decode("ascii").strip()
        return diff_id, self._chain_id(row.parent, diff_id)

    def _chain_id(self, parent: int | None, diff_id: str) -> str | None:
        """Of a layer over a snapshot; None where that has none itself (OCI image-spec, "Layer ChainID")."""
        if parent is None:
            return diff_id
        above = self.index.by_num(parent).chain_id
        return None if above is None else images.digest_of(f"{above} {diff_id}".encode())


class _RootOnly:
    """Beneath a whole layer there is nothing but what was copied: only its root may be empty and count."""

    def __init__(self, tree: str) -> None:
        fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            own = archive.DirTree(fd)
            self._root = own.stat(b"")
            self._xattrs = xattr.read_all(fd, b"")
        finally:
            os.close(fd)

    def stat(self, path: bytes) -> archive.LowerStat | None:
        return None if path else self._root

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        return {} if path else self._xattrs

    def names(self, path: bytes) -> list[bytes]:
        return []

    def readlink(self, path: bytes) -> bytes:
        raise FileNotFoundError(2, os.strerror(2), path)

    def read(self, path: bytes) -> Iterator[bytes]:
        raise FileNotFoundError(2, os.strerror(2), path)

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        raise FileNotFoundError(2, os.strerror(2), path)


def counter(progress: Progress | None, what: str, total: int = 0) -> Callable[[int, int], object] | None:
    """A progress function as :mod:`cowfs.archive` calls it."""
    if progress is None:
        return None
    tell = progress
    return lambda done, _entries: tell(what, done, total)


def _forget(directory: str) -> None:
    """The layer is no longer what one archive made it."""
    for name in (APPLIED, HEADERS):
        unmark(f"{directory}/{name}")
