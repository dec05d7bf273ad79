"""The store: an index and a driver, put together into containerd's verbs.

Rules:

1. A verb checks first, then does long work without any lock (copying, reading a layer, packing records), then writes in
one short transaction that checks again. 2. Files precede rows: a row is committed when its directory is on the disk
under its final name,
   and a directory is deleted when its row is gone. :mod:`cowfs.store.staging` has the table.
3. Each writer of a layer holds an exclusive flock on its tree: the server of a mount, an apply, a commit, a remove. So
the second one can name the first. 4. No verb walks the tree of a committed snapshot: the index has it.

Threads: a store may be used by any number of threads and, opened anew, of processes.
"""

from __future__ import annotations

from collections.abc import Mapping

from cowfs._typed import TYPE_CHECKING
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.index.database import Row
from cowfs.model import SMALLEST_LIMIT, Kind, Limit, Mount, parse_count, parse_size
from cowfs.store import layers
from cowfs.store.key_lock import turn
from cowfs.store.names import check_key, check_labels, new_id
from cowfs.store.reserve import names_full
from cowfs.store.staging import discard, finish, staged, sweep
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted
    from cowfs.store.naming import Naming
    from cowfs.store.plans import Plans

__all__ = ["MAX_DEPTH", "Snapshots"]

MAX_DEPTH = 2000
"""Layers in a chain: what one mount opens at most."""


class Snapshots:
    """Making and removing snapshots."""

    def __init__(self, context: Context, lookup: Lookup, plans: Plans, mounted: Mounted, naming: Naming) -> None:
        self.context = context
        self._lookup = lookup
        self._plans = plans
        self._mounted = mounted
        self._naming = naming

    def prepare(
        self,
        key: str,
        parent: str | None = None,
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """As :meth:`cowfs.Store.prepare`."""
        limit = Limit(
            bytes=None if size is None else parse_size(size, least=SMALLEST_LIMIT),
            inodes=None if inodes is None else parse_count(inodes),
        )
        row = self._create(key, parent, Kind.ACTIVE, limit, labels or {})
        return self._plans.records(row, mount_type)

    def view(
        self,
        key: str,
        parent: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """As :meth:`cowfs.Store.view`."""
        return self._plans.records(self._create(key, parent, Kind.VIEW, Limit(), labels or {}), mount_type)

    def fork(
        self,
        name: str,
        *keys: str,
        size: str | int | None = None,
        inodes: str | int | None = None,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> dict[str, tuple[Mount, ...]]:
        """As :meth:`cowfs.Store.fork`."""
        for key in keys:
            self._lookup.must_be_free(key)
        return {
            key: self.prepare(key, name, size=size, inodes=inodes, labels=labels, mount_type=mount_type) for key in keys
        }

    @names_full
    def _create(self, key: str, parent: str | None, kind: Kind, limit: Limit, labels: Mapping[str, str]) -> Row:
        check_key(key, "key")
        check_labels(labels)
        above = self._lookup.parent(parent) if parent is not None else None
        self._lookup.must_be_free(key)
        config = self._lookup.config_at(parent, above)
        chain = [id for _, id in self.context.index.chain(above.num if above is not None else None)]
        if len(chain) >= MAX_DEPTH:
            raise InvalidArgument(f"{parent!r} has {len(chain)} layers, {MAX_DEPTH} are allowed", remedy="cowfs squash")
        with staged(self.context.driver, self.context.index, new_id()) as layer:
            point("create.made")
            # A view of a whole layer is mounted from the parent itself: no data is copied.
            copied = [] if kind is Kind.VIEW and self.context.driver.capabilities.whole else chain
            try:
                base = self.context.driver.create(layer.staged, copied, limit)
            except FileNotFoundError:
                if above is not None:
                    self._lookup.must_be_whole(above)
                raise
            if self.context.driver.capabilities.whole and chain:
                layers.mark_copied(self.context.driver, layer.staged, chain[0], only_root=not copied)
            point("create.filled")
            point("create.synced")
            with self.context.index.write() as change:
                self._lookup.must_be_free(key)
                if above is not None:
                    self._lookup.parent(above.name, above.num)
                change.add_snapshot(
                    id=layer.id,
                    name=key,
                    kind=kind,
                    parent=None if above is None else (above.num, above.depth),
                    labels=labels,
                    limit=limit,
                    base=base,
                    config=config,
                )
                point("create.recorded")
                layer.publish()
                point("create.renamed")
        point("create.committed")
        return self.context.index.get(key)

    @names_full
    def remove(self, name: str, *, chain: bool = False, mounted: bool = False, defer: bool = False) -> list[str]:
        """As :meth:`cowfs.Store.remove`."""
        row = self.context.index.find(name)
        if row is None:
            tag = self.context.index.tag(name)
            if tag is None:
                raise NotFound(f"no snapshot or tag {name!r}", remedy="'cowfs ls' shows what there is")
            self._naming.untag(name)
            row = self.context.index.find(tag.target) if chain else None
            if row is None or self.context.index.children(row.num) or self.context.index.tags_of(row.num):
                return []
        removed = []
        while True:
            parent = row.parent
            with turn(self.context.root, row.name):
                self._remove(row, mounted=mounted, defer=defer)
            removed.append(row.name)
            if not chain or parent is None:
                return removed
            row = self.context.index.by_num(parent)
            if self.context.index.children(row.num) or self.context.index.tags_of(row.num):
                return removed

    def _remove(self, row: Row, *, mounted: bool, defer: bool) -> None:
        with self._mounted.alone(row, "remove", mounted=mounted, missing_ok=True) as alone:
            self.context.freeing(lambda: self._remove_record(row))
            point("remove.committed")
            discard(self.context.driver, row.id, later=True)
        if alone and not defer:  # the tree is not open now, not even here: some drivers cannot delete an open tree
            finish(self.context.driver, row.id)

    def cleanup(self) -> list[str]:
        """As :meth:`cowfs.Store.cleanup`."""
        return sweep(self.context.driver, self.context.index)

    def _remove_record(self, row: Row) -> None:
        with self.context.index.write() as change:
            now = self.context.index.get(row.name)
            if now.num != row.num:
                raise NotFound(f"no snapshot {row.name!r}: it was replaced meanwhile")
            children = self.context.index.children(row.num)
            if children:
                raise FailedPrecondition(
                    f"{row.name!r} has children: {', '.join(children)}", remedy="remove those first"
                )
            tags = self.context.index.tags_of(row.num)
            if tags:
                raise FailedPrecondition(
                    f"{row.name!r} is tagged {', '.join(tag.name for tag in tags)}",
                    remedy=f"cowfs rm {tags[0].name} drops the tag",
                )
            change.remove(row.num)
            point("remove.deleted")
