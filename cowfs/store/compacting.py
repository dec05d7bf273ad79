"""Compaction of the redirect files of an active snapshot (driver ``row``), mounted or not.

Only writable layers are compacted: the records of a committed snapshot have its blocks.
"""

from __future__ import annotations

from collections.abc import Callable

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING, Any
from cowfs.errors import CowfsError, Unsupported
from cowfs.index.database import Row
from cowfs.store import layers
from cowfs.store.reserve import names_full

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted

__all__ = ["Compacted", "Compacting", "OnProgress"]


@record(frozen=True, slots=True, kw_only=True)
class Compacted:
    """The result of a compaction.

    Attributes:
        files: redirect files that are plain files now.
        skipped: redirect files left as they are: their own share was too small, or the limit was reached.
        bytes: bytes copied from the parents.
    """

    files: int
    skipped: int
    bytes: int


OnProgress = Callable[[str, int, int], None]
"""Called with the path in work, bytes copied so far, bytes that this file still lacks."""


class Compacting:
    """Compaction of redirect files of active snapshots."""

    def __init__(self, context: Context, lookup: Lookup, mounted: Mounted) -> None:
        self.context = context
        self._lookup = lookup
        self._mounted = mounted

    @names_full
    def compact(self, key: str, *, share: float | None = None, on_progress: OnProgress | None = None) -> Compacted:
        """As :meth:`cowfs.Store.compact`."""
        from cowfs.row.compact import SHARE

        share = SHARE if share is None else share
        row = self._lookup.active(key)
        if not self.context.driver.capabilities.row:
            raise Unsupported(
                f"the driver {self.context.driver.name} has nothing to compact", remedy="it is for the driver row"
            )
        server = self._mounted.server_of(row, made_by="store")
        if server is not None:
            return self._compact_mounted(server, share, on_progress)
        with layers.hold(self.context.driver, self.context.index, row, "compact"):
            return self._compact_layer(row, share, on_progress)

    def _compact_mounted(self, server: dict[str, Any], share: float, on_progress: OnProgress | None) -> Compacted:
        from cowfs.mounting import protocol

        def say(told: dict[str, Any]) -> None:
            if on_progress is not None:
                on_progress(told["path"], told["done"], told["todo"])

        while True:  # once, except for a server of an older cowfs, whose answer has its progress
            news = protocol.stream(server["socket"], "compact", timeout=600.0, share=share)
            while True:
                try:
                    say(next(news))
                except StopIteration as end:
                    told: dict[str, Any] = end.value
                    break
            say(told)
            if told["finished"]:
                return Compacted(files=told["files"], skipped=told["skipped"], bytes=told["done"])

    def _compact_layer(self, row: Row, share: float, on_progress: OnProgress | None) -> Compacted:
        from cowfs.row.compact import compact_layer

        below = [self.context.driver.tree(id) for _, id in self.context.index.chain(row.parent)]
        if not below:  # no lower layer, so no redirect files
            return Compacted(files=0, skipped=0, bytes=0)
        files = skipped = done = 0
        steps = compact_layer(
            below,
            self.context.driver.tree(row.id),
            self.context.driver.work(row.id),
            form=self.context.driver.form.name,
            share=share,
            durable=self.context.driver.fsync,
        )
        try:
            for told in steps:
                files, skipped, done = told.files, told.skipped, told.done
                if on_progress is not None:
                    on_progress(told.path.decode(errors="surrogateescape"), told.done, told.todo)
        except OSError as error:
            raise CowfsError(f"compaction of {row.name!r} stopped: {error.strerror}") from None
        return Compacted(files=files, skipped=skipped, bytes=done)
