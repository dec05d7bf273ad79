"""Reading and changing the limit of a snapshot, mounted or not; :mod:`cowfs.store.limit_engine` has the engines."""

from __future__ import annotations

from contextlib import ExitStack
from types import EllipsisType

from cowfs._typed import TYPE_CHECKING
from cowfs.index.database import Row
from cowfs.model import SMALLEST_LIMIT, Kind, Limit, parse_count, parse_size
from cowfs.store import limit_loop
from cowfs.store.layers import hold, kernel_mount_of
from cowfs.store.limit_engine import DriverEngine, LimitEngine, ServerEngine
from cowfs.store.limit_loop import LoopEngine

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted
    from cowfs.store.reading import Reading
    from cowfs.store.recovery import Recovery

__all__ = ["Limits"]


class Limits:
    """Limits of active snapshots; the record and the engine that holds it are changed together."""

    def __init__(
        self, context: Context, reading: Reading, lookup: Lookup, mounted: Mounted, recovery: Recovery
    ) -> None:
        self.context = context
        self._reading = reading
        self._lookup = lookup
        self._mounted = mounted
        self._recovery = recovery

    def limit(
        self,
        name: str,
        *,
        size: str | int | EllipsisType | None = ...,
        inodes: str | int | EllipsisType | None = ...,
    ) -> Limit:
        """As :meth:`cowfs.Store.limit`."""
        if isinstance(size, EllipsisType) and isinstance(inodes, EllipsisType):
            return self._reading.resolve(name).limit
        with self._recovery.turn(name):
            return self._change(name, size, inodes)

    def _change(
        self, name: str, size: str | int | EllipsisType | None, inodes: str | int | EllipsisType | None
    ) -> Limit:
        row = self._lookup.active(name)
        limit = Limit(
            bytes=row.limit.bytes
            if isinstance(size, EllipsisType)
            else None
            if size is None
            else parse_size(size, least=SMALLEST_LIMIT),
            inodes=row.limit.inodes
            if isinstance(inodes, EllipsisType)
            else None
            if inodes is None
            else parse_count(inodes),
        )
        with ExitStack() as held:
            engine = self._engine_of(row)
            if engine is not None:
                engine.change(limit)
            else:
                held.enter_context(hold(self.context.driver, self.context.index, row, "limit", at_rest=False))
            with self.context.index.write() as change:
                now = self._lookup.active(name, row.num)
                if limit != now.limit:  # a server has recorded it already
                    change.set_limit(row.num, limit)
        return self.context.index.get(name).limit

    def limit_engine(self, name: str) -> str | None:
        """As :meth:`cowfs.Store.limit_engine`."""
        row = self._reading.resolve(name)
        if row.kind is not Kind.ACTIVE or not row.limit:
            return None
        engine = self._engine_of(row)
        return None if engine is None else engine.name

    def _engine_of(self, row: Row) -> LimitEngine | None:
        """The engine that holds an active snapshot to its limit now; None if it is not mounted."""
        server = self._mounted.server_of(row)
        if server is not None:
            return ServerEngine(server["socket"])
        if limit_loop.has_image(self.context.driver, row.id):
            return (
                LoopEngine(self.context.driver, row.id, row.base)
                if limit_loop.is_mounted(self.context.driver, row.id)
                else None
            )
        if self.context.driver.capabilities.own_limit and kernel_mount_of(self.context.driver.tree(row.id)) is not None:
            return DriverEngine(self.context.driver, row.id, row.name)
        return None
