"""Usage of snapshots, and changes from one to another. Nothing walks the tree of a committed snapshot."""

from __future__ import annotations

from collections.abc import Iterator

from cowfs._typed import TYPE_CHECKING
from cowfs.index import compare
from cowfs.index.database import Row
from cowfs.index.directory import Pending
from cowfs.model import Change, Kind, Usage

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.mounted import Mounted
    from cowfs.store.reading import Reading
    from cowfs.store.scanning import Scanning

__all__ = ["Queries"]


class Queries:
    """Usage and changes."""

    def __init__(self, context: Context, reading: Reading, scanning: Scanning, mounted: Mounted) -> None:
        self.context = context
        self._reading = reading
        self._scanning = scanning
        self._mounted = mounted

    def usage(self, name: str) -> Usage:
        """As :meth:`cowfs.Store.usage`."""
        row = self._reading.resolve(name)
        if row.usage is not None:
            return row.usage
        if row.kind is Kind.VIEW:
            return Usage()
        from cowfs.store import limit_loop

        try:
            whole = (
                self._mounted.usage_of(row)
                or limit_loop.used(self.context.driver, row.id)
                or self.context.driver.usage(row.id)
            )
        except FileNotFoundError:
            if self._reading.resolve(name).id == row.id:  # NotFound: removed meanwhile
                raise
            return self.usage(name)
        base = self._scanning.copied(row)
        base = (
            base if base.bytes >= 0 else Usage()
        )  # a negative one is what live snapshots hold (cowfs.store.switching)
        return Usage(bytes=max(0, whole.bytes - base.bytes), inodes=max(0, whole.inodes - base.inodes))

    def diff(self, a: str, b: str | None = None) -> Iterator[Change]:
        """As :meth:`cowfs.Store.diff`."""
        after = self._reading.resolve(b if b is not None else a)
        if b is not None:
            before: Row | None = self._reading.resolve(a)
        else:
            before = self.context.index.by_num(after.parent) if after.parent is not None else None
        pending = Pending(self.context.index)
        old = self._scanning.tree(before, pending) if before is not None else None
        new = self._scanning.tree(after, pending)
        return compare.compare(pending, old, new, self._scanning.same_data)
