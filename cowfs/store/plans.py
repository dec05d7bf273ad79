"""The mount of a snapshot, for any engine: the driver's plan, and the records made of it. Nothing is mounted here."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING
from cowfs.driver.interface import Driver
from cowfs.driver.plan import MountPlan
from cowfs.index.database import Row
from cowfs.model import Kind, Limit, Mount
from cowfs.store import layers, limit_loop
from cowfs.store.lookup import must_be_mountable, must_be_sound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup

__all__ = ["Plans"]


class Plans:
    """Plans and records of mounts."""

    def __init__(self, context: Context, lookup: Lookup) -> None:
        self.context = context
        self._lookup = lookup

    def mounts(self, key: str, *, mount_type: str | None = None) -> tuple[Mount, ...]:
        """As :meth:`cowfs.Store.mounts`."""
        return self.records(self._lookup.keyed(key), mount_type)

    def records(self, row: Row, mount_type: str | None) -> tuple[Mount, ...]:
        """Records of the mounts that make a snapshot's tree, of one type or the one that suits host, user and limit;
        its limit is handed to its holder."""
        self.at_rest(row)
        if type(self.context.driver).mounts is Driver.mounts:
            record = self.plan(row).record(mount_type)
            self.hand_limit(row, by_server=record.type.startswith("fuse."))
            return (record,)
        # A driver without plans describes its mounts itself, and gets the parent for a view of a whole layer.
        must_be_mountable(row)
        id, *parents = [id for _, id in self.context.index.chain(row.num)]
        readonly = row.kind is Kind.VIEW
        if readonly and self.context.driver.capabilities.whole and parents:
            id, *parents = parents
        limit = row.limit.over(row.base)
        return self.context.driver.mounts(id, parents, readonly=readonly, limit=limit, mount_type=mount_type)

    def plan(self, row: Row, *, committed: bool = False, chain: Sequence[tuple[int, str]] | None = None) -> MountPlan:
        """The driver's plan for a snapshot, for any engine; a committed one only if allowed.

        Args:
            chain: (number, id) of the snapshot and its ancestors, nearest first, if they were read already.
        """
        if not committed or row.kind is not Kind.COMMITTED:
            must_be_mountable(row)
        must_be_sound(row)
        id, *parents = [id for _, id in chain or self.context.index.chain(row.num)]
        if row.kind is Kind.ACTIVE:
            layers.not_plain(self.context.driver, id)
        return self.context.driver.plan(id, parents, readonly=row.kind is Kind.VIEW, limit=row.limit.over(row.base))

    def at_rest(self, row: Row) -> None:
        """Bring an active snapshot's tree out of a limit engine's image into its directory.

        Raises:
            FailedPrecondition: it is mounted by that engine.
        """
        if row.kind is Kind.ACTIVE and limit_loop.has_image(self.context.driver, row.id):
            with layers.hold(self.context.driver, self.context.index, row, "use"):
                pass

    def hand_limit(self, row: Row, *, by_server: bool) -> None:
        """Hand a snapshot's limit to its holder: cowfs's server, or else the driver. A mount of the kernel keeps its limit."""
        if not self.context.driver.capabilities.own_limit or row.kind is not Kind.ACTIVE or self.context.index.refused:
            return
        if not by_server or layers.kernel_mount_of(self.context.driver.tree(row.id)) is None:
            self.context.driver.limit(row.id, Limit() if by_server else row.limit)
