"""The commit: an active snapshot becomes an immutable one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from cowfs._typed import TYPE_CHECKING
from cowfs.errors import Unsupported
from cowfs.index.database import Row
from cowfs.index.transaction import Committed
from cowfs.model import Info
from cowfs.store import layers
from cowfs.store.key_lock import turn
from cowfs.store.names import check_key, check_labels
from cowfs.store.reserve import names_full
from cowfs.sys import trees
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.store.archived import Archived
    from cowfs.store.compacting import Compacting
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted
    from cowfs.store.scanning import Scanning

__all__ = ["Committing"]


class Committing:
    """The commit: the layer is read, then one transaction makes it immutable."""

    def __init__(
        self,
        context: Context,
        lookup: Lookup,
        scanning: Scanning,
        mounted: Mounted,
        archived: Archived,
        compacting: Compacting,
    ) -> None:
        self.context = context
        self._lookup = lookup
        self._scanning = scanning
        self._mounted = mounted
        self._archived = archived
        self._compacting = compacting

    def commit(
        self,
        key: str,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        replace_labels: bool = False,
        digests: bool = False,
        mounted: bool = False,
        compact: bool = False,
        kernel_image: bool = False,
    ) -> Info:
        """As :meth:`cowfs.Store.commit`."""
        if kernel_image:
            from cowfs.store import kernel_image as images

            why = images.why_not(self.context.driver)
            if why:
                raise Unsupported(f"no image for kernel mounts: {why}", remedy="leave it out")
        if compact and self.context.driver.capabilities.row:
            self._compacting.compact(key)
        row = self._commit_in_turn(
            key, name, labels or {}, replace_labels=replace_labels, digests=digests, mounted=mounted
        )
        if kernel_image:
            images.build(self.context.driver, self.context.index, row)
        return row.info()

    @names_full
    def _commit_in_turn(
        self, key: str, name: str, labels: Mapping[str, str], *, replace_labels: bool, digests: bool, mounted: bool
    ) -> Row:
        with turn(self.context.root, key):
            return self._commit(key, name, labels, replace_labels=replace_labels, digests=digests, mounted=mounted)

    def _commit(
        self, key: str, name: str, labels: Mapping[str, str], *, replace_labels: bool, digests: bool, mounted: bool
    ) -> Row:
        check_key(name)
        check_labels(labels)
        row = self._lookup.active(key)
        if name != key:
            self._lookup.must_be_free(name)
        with self._mounted.alone(row, "commit", mounted=mounted) as alone:
            row = self._lookup.active(key, row.num)
            if alone:
                self.context.driver.freeze(row.id)
            else:
                self.context.driver.settle(row.id)
            point("commit.frozen")
            # Nobody writes in the layer any more: the disk works while we read it.
            with trees.syncing(self.context.driver.tree(row.id)) if self.context.driver.fsync else nullcontext():
                scanned = self._scanning.scan_row(
                    row, layers.KeptDigests.load(self.context.driver, row.id, compute=digests)
                )
                diff_id, chain_id = self._archived.archive_of(row, scanned)
                point("commit.scanned")
                if scanned.held is not None:
                    self.context.driver.note(row.id, scanned.held, scanned.sums or ())
            point("commit.synced")
            merged = {**({} if replace_labels else row.labels), **labels}
            committed = Committed(
                usage=scanned.usage, root=scanned.root, records=scanned.pending.new, diff_id=diff_id, chain_id=chain_id
            )
            with self.context.index.write() as change:
                self._lookup.active(key, row.num)
                if name != key:
                    self._lookup.must_be_free(name)
                change.commit_active(row.num, name, merged, committed)
                point("commit.recorded")
        point("commit.committed")
        return self.context.index.get(name)
