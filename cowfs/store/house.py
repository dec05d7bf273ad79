"""Garbage collection, and the removal of needless snapshots."""

from __future__ import annotations

import time
from collections.abc import Iterable

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument
from cowfs.index.database import Row
from cowfs.model import Kind
from cowfs.store import filters as filter_language, kernel_image, layers, staging
from cowfs.store.names import RUN_KEY
from cowfs.store.reserve import names_full
from cowfs.store.staging import sweep

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.reading import Reading
    from cowfs.store.recovery import Recovery
    from cowfs.store.snapshots import Snapshots

__all__ = ["OWNED", "Collected", "House", "Pruned"]

OWNED = ("cowfs.service.", "containerd.io/")
"""Labels that begin so: the snapshot belongs to the service or an engine, which removes it itself."""


@record(frozen=True, slots=True, kw_only=True)
class Collected:
    """The result of gc: directories deleted (relative to the store), and the number of records."""

    directories: tuple[str, ...] = ()
    records: int = 0


@record(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The snapshots that :meth:`House.prune` removed, or would remove.

    Attributes:
        names: snapshots, children before parents.
        bytes: of their layers, as recorded.
        kept: snapshots left because a mount or another verb uses them, with the reason.
    """

    names: tuple[str, ...]
    bytes: int
    kept: tuple[tuple[str, str], ...] = ()


class House:
    """Finding and deleting garbage, and needless snapshots."""

    def __init__(self, context: Context, reading: Reading, recovery: Recovery, snapshots: Snapshots) -> None:
        self.context = context
        self._reading = reading
        self._recovery = recovery
        self._snapshots = snapshots

    def gc(self) -> Collected:
        """As :meth:`cowfs.Store.gc`."""
        self._recovery.recover_with_room()
        return self._gc()

    @names_full
    def _gc(self) -> Collected:
        directories = self.context.freeing(lambda: sweep(self.context.driver, self.context.index, everything=True))
        directories += self.context.freeing(lambda: kernel_image.sweep(self.context.driver, self.context.index))
        records = self.context.freeing(self.context.index.sweep)

        def tell() -> None:
            with self.context.index.write() as change:
                change.record_event("store", "gc", "", {"directories": str(len(directories)), "records": str(records)})

        self.context.freeing(tell)
        return Collected(directories=tuple(directories), records=records)

    def garbage(self) -> tuple[list[str], int]:
        """As :meth:`cowfs.Store.garbage`."""
        from cowfs.store import kernel_image

        left = staging.leftovers(self.context.driver, self.context.index)
        orphans = [f"layers/{id}" for id in staging.orphans(self.context.driver, self.context.index)]
        images = kernel_image.unused(self.context.driver, self.context.index)
        return sorted({*left, *orphans, *images}), self.context.index.unreached()

    def prune(
        self,
        filters: Iterable[str] = (),
        *,
        every: bool = False,
        older: float = 0,
        keep: int = 0,
        dry_run: bool = False,
    ) -> Pruned:
        """As :meth:`cowfs.Store.prune`."""
        if older < 0 or keep < 0:
            raise InvalidArgument("an age or count is not negative")
        wanted = filter_language.parse(filters)
        before = time.time_ns() - int(older * 1e9)
        rows = list(self.context.index.rows())
        tagged = {tag.target for tag in self._reading.tags()}
        children: dict[int, int] = {}
        for row in rows:
            if row.parent is not None:
                children[row.parent] = children.get(row.parent, 0) + 1
        could = {
            row.num: row
            for row in rows
            if row.name not in tagged
            and (every or _is_left_over(row))
            and not any(label.startswith(OWNED) for label in row.labels)
            and max(row.created, row.updated) <= before
            and (wanted is None or wanted(row.info()))
        }
        tops = sorted(
            (row for row in could.values() if not children.get(row.num)), key=lambda row: (row.created, row.num)
        )
        names: list[str] = []
        kept: list[tuple[str, str]] = []
        size = 0
        for top in tops[: len(tops) - keep] if keep else tops:
            one: Row | None = top
            while one is not None and one.num in could and not children.get(one.num):
                why = self._removed_or_why_not(one, dry_run)
                if why:
                    kept.append((one.name, why))
                    break
                names.append(one.name)
                size += one.usage.bytes if one.usage is not None else 0
                if one.parent is not None:
                    children[one.parent] -= 1
                one = could.get(one.parent) if one.parent is not None else None
        return Pruned(names=tuple(names), bytes=size, kept=tuple(kept))

    def _removed_or_why_not(self, row: Row, dry_run: bool) -> str:
        try:
            if dry_run:
                self._must_be_free(row)
            else:
                self._snapshots.remove(row.name)
        except CowfsError as error:
            return str(error)
        return ""

    def _must_be_free(self, row: Row) -> None:
        with layers.hold(self.context.driver, self.context.index, row, "remove", missing_ok=True, at_rest=False):
            pass

    def removable(self, name: str, *, chain: bool = False) -> list[str]:
        """As :meth:`cowfs.Store.removable`."""
        row = self.context.index.find(name)
        gone: set[str] = set()
        if row is None:
            target = self._reading.resolve(name)
            gone = {name}
            if not chain or self.context.index.children(target.num) or self._tags_but(target, gone):
                return []
            row = target
        found = [row.name]
        self._must_be_removable(row, gone)
        while chain and row.parent is not None:
            above = self.context.index.by_num(row.parent)
            if len(self.context.index.rows_on(above.num)) > 1 or self._tags_but(above, gone):
                break
            self._must_be_free(above)
            found.append(above.name)
            row = above
        return found

    def _tags_but(self, row: Row, gone: set[str]) -> list[str]:
        return [tag.name for tag in self.context.index.tags_of(row.num) if tag.name not in gone]

    def _must_be_removable(self, row: Row, gone: set[str]) -> None:
        children, tags = self.context.index.children(row.num), self._tags_but(row, gone)
        if children:
            raise FailedPrecondition(f"{row.name!r} has children: {', '.join(children)}", remedy="remove those first")
        if tags:
            raise FailedPrecondition(
                f"{row.name!r} is tagged {', '.join(tags)}", remedy=f"cowfs rm {tags[0]} drops the tag"
            )
        self._must_be_free(row)


def _is_left_over(row: Row) -> bool:
    if row.kind is Kind.COMMITTED:
        return row.name.startswith("sha256:")
    return row.kind is Kind.ACTIVE and row.name.startswith(RUN_KEY)
