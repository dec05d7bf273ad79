"""Names, tags and labels of snapshots: the mutable part of a committed one."""

from __future__ import annotations

import time
from collections.abc import Mapping

from cowfs._typed import TYPE_CHECKING
from cowfs.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from cowfs.index.database import Row, Tag
from cowfs.model import Info, Kind
from cowfs.store import layers
from cowfs.store.key_lock import turn
from cowfs.store.lookup import kind_words
from cowfs.store.names import check_key, check_labels, check_name
from cowfs.store.reserve import names_full
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.reading import Reading
    from cowfs.store.recovery import Recovery

__all__ = ["Naming"]


class Naming:
    """Names, tags and labels."""

    def __init__(self, context: Context, reading: Reading, lookup: Lookup, recovery: Recovery) -> None:
        self.context = context
        self._reading = reading
        self._lookup = lookup
        self._recovery = recovery

    @names_full
    def update(self, name: str, labels: Mapping[str, str | None], *, replace: bool = False) -> Info:
        """As :meth:`cowfs.Store.update`."""
        check_labels(labels)
        with self.context.index.write() as change:
            row = self._reading.resolve(name)
            merged = {**({} if replace else row.labels), **labels}
            kept = {key: value for key, value in merged.items() if value is not None}
            now = max(time.time_ns(), row.updated + 1)  # a clock that went backwards changes nothing
            change.set_labels(row.num, kept, now)
            point("update.recorded")
        return self._reading.resolve(name).info()

    @names_full
    def tag(self, name: str, target: str, *, config: str | None = None, move: bool = True) -> Tag:
        """As :meth:`cowfs.Store.tag`."""
        check_name(name, "tag")
        row = self._reading.resolve(target)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(
                f"{target!r} is {kind_words(row.kind)}, a tag names committed ones", remedy="commit it first"
            )
        kept = self._lookup.config_at(target, row) if config is None else config
        with self.context.index.write() as change:
            self._lookup.must_be_free(name, for_tag=True)
            self._lookup.parent(row.name, row.num)
            had = self.context.index.tag(name)
            if had is not None and not move:
                raise AlreadyExists(f"the tag {name!r} exists", remedy=f"cowfs rm {name} drops it")
            if config is None and target == row.name and had is not None and had.target == row.name and had.config:
                kept = had.config  # the tag stays where it is
            change.set_tag(name, row.num, kept)
        tag = self.context.index.tag(name)
        assert tag is not None
        return tag

    @names_full
    def untag(self, name: str) -> None:
        """As :meth:`cowfs.Store.untag`."""

        def drop() -> None:
            with self.context.index.write() as change:
                if self.context.index.tag(name) is None:
                    raise NotFound(f"no tag {name!r}", remedy="'cowfs images' shows what there is")
                change.drop_tag(name)

        self.context.freeing(drop)

    def config(self, name: str) -> str:
        """As :meth:`cowfs.Store.config`."""
        row: Row | None = self._reading.resolve(name)
        found = self._lookup.config_at(name, row)
        while not found and row is not None and row.parent is not None:
            row = self.context.index.by_num(row.parent)
            found = self._lookup.config_at(row.name, row)
        return found

    @names_full
    def rename(self, old: str, new: str) -> None:
        """As :meth:`cowfs.Store.rename`."""
        row = self.context.index.find(old)
        if row is None:
            self._rename_tag(old, new)
            return
        check_key(new)
        self._lookup.must_be_free(new)
        with turn(self.context.root, old, new):
            self._recovery.recover()
            if row.kind is Kind.COMMITTED:
                self._rename(row, new)
                return
            with layers.hold(self.context.driver, self.context.index, row, "rename", at_rest=False):
                self._rename(row, new)

    def _rename(self, row: Row, new: str) -> None:
        with self.context.index.write() as change:
            now = self.context.index.get(row.name)
            if now.num != row.num:
                raise FailedPrecondition(f"{row.name!r} was replaced meanwhile", remedy="try again")
            self._lookup.must_be_free(new)
            change.rename(row.num, new)

    def _rename_tag(self, old: str, new: str) -> None:
        check_name(new, "tag")
        self._reading.resolve(old)
        with self.context.index.write() as change:
            tag = self.context.index.tag(old)
            if tag is None:
                self.context.index.get(old)  # one existed a moment ago
                return
            self._lookup.must_be_free(new, for_tag=True)
            if self.context.index.tag(new) is not None:
                raise AlreadyExists(f"the tag {new!r} exists", remedy=f"cowfs rm {new} drops it")
            change.set_tag(new, self.context.index.get(tag.target).num, tag.config)
            change.drop_tag(old)
