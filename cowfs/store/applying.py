"""Layer archives into a snapshot. :mod:`cowfs.store.archived` has the records that are kept of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from cowfs import archive
from cowfs._typed import TYPE_CHECKING, BinaryIO
from cowfs.index.directory import DIGEST
from cowfs.store.archived import APPLIED, HEADERS, forget
from cowfs.store.digest_table import ByInode
from cowfs.store.layers import UNKNOWN, KeptDigests, hold, mark_time, settle_times, untouched
from cowfs.store.reserve import names_full
from cowfs.sys import xattr
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.scanning import Scanning

__all__ = ["Applying", "Progress", "counter"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: not known)."""


class Applying:
    """Layer archives, unpacked into active snapshots and into layers that are being made."""

    def __init__(self, context: Context, lookup: Lookup, scanning: Scanning) -> None:
        self.context = context
        self._lookup = lookup
        self._scanning = scanning

    def apply(
        self,
        key: str,
        stream: BinaryIO,
        *,
        options: archive.ApplyOptions | None = None,
        diff_id: str | None = None,
        progress: Progress | None = None,
    ) -> archive.Applied:
        """As :meth:`cowfs.Store.apply`."""
        return self.apply_with_time(key, stream, None, options=options, diff_id=diff_id, progress=progress)

    @names_full
    def apply_with_time(
        self,
        key: str,
        stream: BinaryIO,
        root_mtime: int | None,
        *,
        options: archive.ApplyOptions | None = None,
        diff_id: str | None = None,
        progress: Progress | None = None,
    ) -> archive.Applied:
        """As :meth:`apply`.

        Args:
            root_mtime: of the root directory, in nanoseconds, where another channel tells it: an archive may leave it out.
        """
        row = self._lookup.active(key)
        with hold(self.context.driver, self.context.index, row, "apply to"):
            row = self._lookup.active(key, row.num)
            fresh = untouched(self.context.driver, row.id)
            forget(self.context.driver.directory(row.id))
            above = self.context.index.by_num(row.parent) if row.parent is not None else None
            applied, digests = self.unpack(
                row.id, stream, self._scanning.content_of(above), options, diff_id, counter(progress, key)
            )
            if root_mtime is not None:
                with self.context.driver.open_tree(row.id) as fd:
                    os.utime(fd, ns=(root_mtime, root_mtime))
            point("apply.unpacked")
            settle_times(self.context.driver)
            KeptDigests.save(self.context.driver, row.id, digests)
            if fresh:
                mark_time(self.context.driver, f"{self.context.driver.directory(row.id)}/{APPLIED}", applied.diff_id)
            else:
                forget(self.context.driver.directory(row.id))
            point("apply.synced")
        return applied

    def unpack(
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
        directory, tree = self.context.driver.directory(id), self.context.driver.tree(id)
        digests = ByInode(DIGEST)

        def on_inode(inode: int, digest: str) -> None:
            digests[inode] = bytes.fromhex(digest) or UNKNOWN

        if options is not None and options.owners != "fail":
            from cowfs.store.owners import mark

            mark(directory, options.owners)
        with self.context.driver.open_tree(id), open(f"{directory}/{HEADERS}", "w+b") as log:
            applied = archive.apply_layer(
                stream,
                tree,
                form="plain" if self.context.driver.capabilities.whole else self.context.driver.form.name,
                lower=_RootOnly(tree) if self.context.driver.capabilities.whole and lower is not None else lower,
                options=options,
                log=log,
                on_inode=on_inode,
                progress=progress,
                diff_id=diff_id,
                blob_digest=blob_digest,
                budget=budget,
            )
            log.flush()
            if self.context.driver.fsync:
                os.fsync(log.fileno())
        return applied, digests


class _RootOnly:
    """Count the root of a whole layer, if it is empty: the layer has no lower one, and the rest was copied."""

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
    """A progress function with the arguments of :mod:`cowfs.archive`."""
    if progress is None:
        return None
    tell = progress
    return lambda done, _entries: tell(what, done, total)
