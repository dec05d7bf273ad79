"""Live snapshots and rollbacks. :mod:`cowfs.store.switching` has the order of their steps."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cowfs._typed import TYPE_CHECKING
from cowfs.driver.interface import Driver
from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.model import Info
from cowfs.store.names import check_key, check_labels
from cowfs.store.reserve import names_full
from cowfs.store.staging import discard
from cowfs.store.switching import Switch

if TYPE_CHECKING:
    from cowfs.index.database import Row
    from cowfs.store.context import Context
    from cowfs.store.instant import Instant
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted
    from cowfs.store.reading import Reading
    from cowfs.store.recovery import Recovery
    from cowfs.store.switching import Switching

__all__ = ["LABEL", "Live"]

LABEL = "cowfs.snapshot-of"
"""Label of snapshots made by :meth:`Live.snapshot`: the key they were made of."""


class Live:
    """Snapshots and rollbacks of active snapshots, mounted or not."""

    def __init__(
        self,
        context: Context,
        reading: Reading,
        lookup: Lookup,
        mounted: Mounted,
        instant: Instant,
        switching: Switching,
        recovery: Recovery,
    ) -> None:
        self.context = context
        self._reading = reading
        self._lookup = lookup
        self._mounted = mounted
        self._instant = instant
        self._switching = switching
        self._recovery = recovery

    @names_full
    def snapshot(self, key: str, name: str, *, labels: Mapping[str, str] | None = None) -> Info:
        """As :meth:`cowfs.Store.snapshot`."""
        check_key(name)
        check_labels(labels or {})
        with self._recovery.turn(key):
            return self._snapshot(key, name, labels or {})

    def _snapshot(self, key: str, name: str, labels: Mapping[str, str]) -> Info:
        row = self._lookup.active(key)
        self._lookup.must_be_free(name)
        self._can_switch("snapshot")
        switch = Switch("snapshot", row.num, name, {**row.labels, **labels, LABEL: key})
        if self.context.driver.capabilities.snapshots:
            self._instant.snapshot(row, name, switch.labels, self._mounted.server_of(row, made_by="store"))
            return self.context.index.get(name).info()
        self._switching.switch(row, switch, [id for _, id in self.context.index.chain(row.num)], "freeze")
        return self.context.index.get(name).info()

    @names_full
    def rollback(self, key: str, name: str, *, keep: str | None = None) -> Info:
        """As :meth:`cowfs.Store.rollback`."""
        if keep is not None:
            check_key(keep)
        with self._recovery.turn(key):
            return self._rollback(key, name, keep)

    def _rollback(self, key: str, name: str, keep: str | None) -> Info:
        row = self._lookup.active(key)
        ancestor = self._reading.resolve(name)
        if ancestor.num not in [num for num, _ in self.context.index.chain(row.parent)]:
            raise InvalidArgument(f"{name!r} is not an ancestor of {key!r}", remedy=f"'cowfs log {key}' shows them")
        self._can_switch("rollback")
        whole = self.context.driver.capabilities.whole
        if whole and (where := self._mounted.mounted_at(key)) is not None:
            why = self._why_not_under(row)
            if why:
                raise FailedPrecondition(f"{key!r} is mounted at {where}: {why}", remedy=f"cowfs umount {where}")
        if keep is not None:
            self._snapshot(key, keep, {})
            row = self._lookup.active(key)
        switch = Switch("rollback", row.num, ancestor.name, {})
        chain = [id for _, id in self.context.index.chain(ancestor.num)]
        base, _ = self._switching.base_at(row, ancestor)
        counts = {"bytes": base.bytes, "inodes": base.inodes}
        if whole:
            self._switching.switch(row, switch, chain, "replace", base=counts)
            return self._switched(key, row)
        self._switching.switch(
            row,
            switch,
            chain,
            "rollback",
            layer=self.context.driver.tree(ancestor.id),
            base=counts,
            lowers=[self.context.driver.tree(id) for _, id in self.context.index.chain(row.parent)],
            num=ancestor.num,
            index=self.context.index.path,
        )
        return self._switched(key, row)

    def _switched(self, key: str, former: Row) -> Info:
        """Discard the layer that a key stood on before its rollback."""
        if os.path.isdir(self.context.driver.directory(former.id)):
            discard(self.context.driver, former.id)
        return self.context.index.get(key).info()

    def _why_not_under(self, row: Row) -> str:
        """The reason why the tree under a mount cannot be put back, with a driver of whole trees; "" if it can."""
        driver = self.context.driver
        if type(driver).open_tree is not Driver.open_tree:
            return f"the driver {driver.name} puts back what is not mounted"
        if self._mounted.server_of(row, made_by="store") is None:
            return "a mount of the kernel goes on with the tree that it has"
        return ""

    def _can_switch(self, verb: str) -> None:
        if not (self.context.driver.capabilities.live or self.context.driver.capabilities.snapshots):
            raise Unsupported(
                f"the driver {self.context.driver.name} keeps whole trees: no {verb}", remedy="use commit and prepare"
            )
