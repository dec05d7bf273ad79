"""Layers read into records, and trees read out of them.

A layer is walked once, when its snapshot is made; everything else reads the resulting records.
"""

from __future__ import annotations

from cowfs._record import replace
from cowfs._typed import TYPE_CHECKING
from cowfs.driver.interface import Driver
from cowfs.index import compare
from cowfs.index.database import Row
from cowfs.index.directory import Entry, Pair, Pending, Records, encode
from cowfs.model import Kind, Usage
from cowfs.store import layers
from cowfs.store.layers import SameData
from cowfs.store.lookup import must_be_sound

if TYPE_CHECKING:
    from cowfs.index import scan
    from cowfs.store.content import IndexedTree
    from cowfs.store.context import Context

__all__ = ["Scanning"]


class Scanning:
    """Records of layers."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def scan_row(self, row: Row, known: scan.KnownDigest | None = None, *, links: bool = True) -> scan.Scanned:
        """Read a layer over its parent's tree."""
        parent = self.context.index.by_num(row.parent) if row.parent is not None else None
        return self.scan_at(row.id, row.num, parent, known, self.copied(row), links=links)

    def copied(self, row: Row) -> Usage:
        """The part of a layer's tree that was copied from its parent; the base of a key may cover several layers."""
        if not row.shares_limit or not self.context.driver.capabilities.whole or row.parent is None:
            return row.base
        return self.context.driver.held(self.context.index.by_num(row.parent).id)

    def scan_at(
        self,
        id: str,
        num: int,
        parent: Row | None,
        known: scan.KnownDigest | None,
        copied: Usage,
        *,
        links: bool = True,
    ) -> scan.Scanned:
        """Read the layer ``id`` over a parent's tree, as the snapshot with the number ``num``.

        Args:
            known: digests of files that are known already.
            copied: the copied use of a whole layer, which does not count.
            links: record hard links; off: as before 2026-12.
        """
        from cowfs.index import scan

        base = parent.root if parent is not None else None
        form = self.context.driver.form
        with layers.opened_tree(self.context.driver, id) as fd:
            if not self.context.driver.capabilities.whole:
                return scan.scan_delta(
                    fd, num=num, form=form, base=base, records=self.context.index, known=known, links=links
                )
            same = layers.Unchanged(self.context.driver, self.context.index, id, fd)
            scanned = self.scan_changes(id, num, parent, fd, same, known) if links else None
            if scanned is None:
                scanned = scan.scan_full(
                    fd, num=num, form=form, base=base, records=self.context.index, same=same, known=known, links=links
                )
            whole = scanned.usage
            usage = Usage(bytes=max(0, whole.bytes - copied.bytes), inodes=max(0, whole.inodes - copied.inodes))
            return replace(scanned, usage=usage, held=whole)

    def scan_changes(
        self,
        id: str,
        num: int,
        parent: Row | None,
        fd: int,
        same: scan.SameAsParent,
        known: scan.KnownDigest | None,
    ) -> scan.Scanned | None:
        """Read only the changed parts of a whole layer, by its driver; None if the whole layer has to be read."""
        noted = (
            self.context.driver.noted(parent.id)
            if parent is not None and type(self.context.driver).changes is not Driver.changes
            else None
        )
        if parent is None or parent.root is None or noted is None or not noted[1]:
            return None
        from cowfs.index import rescan
        from cowfs.union.measure import Sums

        with self.context.driver.changes(id, parent.id) as changes, self.context.driver.open_tree(parent.id) as old:
            if changes is None:
                return None
            try:
                return rescan.scan_changes(
                    fd, old, paths=changes.paths, names=changes.names, sums=Sums(*noted[1]), num=num, form=self.context.driver.form,
                    base=parent.root, records=self.context.index, same=same, known=known,
                )  # fmt: skip
            except rescan.CannotTellError:
                return None

    def tree(self, row: Row, pending: Pending) -> Pair:
        """The root entry of a snapshot's tree; records missing in the index go to ``pending``."""
        must_be_sound(row)
        if row.root is not None:
            return row.root
        if row.kind is Kind.VIEW:
            if row.parent is None:
                return encode(b"", Entry(0o40755, ref=pending.empty()))
            return self.tree(self.context.index.by_num(row.parent), pending)
        scanned = self.scan_row(row, layers.KeptDigests.load(self.context.driver, row.id))
        pending.new.update(scanned.pending.new)
        return scanned.root

    @property
    def same_data(self) -> compare.SameData:
        """As :meth:`cowfs.Store.same_data`."""
        return layers.SameData(self.context.driver, self.context.index)

    def content(self, root: Pair, records: Records) -> IndexedTree:
        """A tree for archives."""
        from cowfs.store.content import IndexedTree
        from cowfs.store.owners import Recorded

        return IndexedTree(
            records,
            root,
            SameData(self.context.driver, self.context.index),
            Recorded(self.context.driver, self.context.index),
        )

    def content_of(self, row: Row | None) -> IndexedTree | None:
        """The tree of a committed snapshot for archives; None without a snapshot, or without records."""
        return None if row is None or row.root is None else self.content(row.root, self.context.index)
