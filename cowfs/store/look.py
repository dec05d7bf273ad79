"""A store opened for reading the index: a command that lists snapshots imports no more than it needs.

The whole store is opened for the first verb that needs it.
"""

from __future__ import annotations

import os

from cowfs.index.database import Index, Row, Tag
from cowfs.store.opening import INDEX, default_root, make_root
from cowfs.store.reading import Reading, must_read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from cowfs.index.compare import SameData
    from cowfs.index.directory import Entry
    from cowfs.model import Change, Info, Usage
    from cowfs.store.store import Store
    from cowfs.store.totals import Totals

__all__ = ["Look"]


class Look:
    """A store opened for reading the index. Made by :meth:`open`; a context manager.

    Threads: belongs to one.
    """

    def __init__(self, root: str, index: Index, *, driver: str, fsync: bool) -> None:
        self.root = root
        self._reading = Reading(index)
        self._driver = driver
        self._fsync = fsync
        self._store: Store | None = None

    @classmethod
    def open(cls, root: str | os.PathLike[str] | None = None, *, driver: str = "auto", fsync: bool = True) -> Self:
        """Open the store in a directory, which must exist; errors as of :meth:`cowfs.Store.open`."""
        path = os.path.abspath(os.fspath(root) if root is not None else default_root())
        make_root(path, create=False)
        index = Index(os.path.join(path, INDEX), fsync=fsync)
        made = cls(path, index, driver=driver, fsync=fsync)
        try:
            if (
                index.refused
            ):  # on a full host a connection may have the file to itself: the store must not have another
                index.close()
                made._reading = Reading(made.store().index)
                return made
            form = index.meta("form")
            if form is None or index.meta("driver_class") is None or driver not in ("auto", index.meta("driver")):
                made.store()  # not whole yet, or the wrong one
            else:
                must_read(path, form)
        except BaseException:
            made.close()
            raise
        return made

    @property
    def index(self) -> Index:
        """The index."""
        return self._reading.index

    def store(self) -> Store:
        """The whole store, opened on first use; closed with this."""
        if self._store is None:
            from cowfs.store.store import Store

            self._store = Store.open(self.root, driver=self._driver, create=False, fsync=self._fsync)
        return self._store

    def close(self) -> None:
        """Close it. Idempotent."""
        self.index.close()
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resolve(self, name: str) -> Row:
        """As :meth:`cowfs.Store.resolve`."""
        return self._reading.resolve(name)

    def stat(self, name: str) -> Info:
        """As :meth:`cowfs.Store.stat`."""
        return self._reading.stat(name)

    def exists(self, name: str) -> bool:
        """As :meth:`cowfs.Store.exists`."""
        return self._reading.exists(name)

    def walk(self, filters: str | Iterable[str] = (), *, reverse: bool = False) -> Iterator[Info]:
        """As :meth:`cowfs.Store.walk`."""
        return self._reading.walk(filters, reverse=reverse)

    def walk_rows(self, filters: str | Iterable[str] = ()) -> Iterator[Row]:
        """As :meth:`cowfs.Store.walk_rows`."""
        return self._reading.walk_rows(filters)

    def chain(self, name: str) -> list[Info]:
        """As :meth:`cowfs.Store.chain`."""
        return self._reading.chain(name)

    def tags(self) -> list[Tag]:
        """As :meth:`cowfs.Store.tags`."""
        return self._reading.tags()

    def usage(self, name: str) -> Usage:
        """As :meth:`cowfs.Store.usage`."""
        usage = self.resolve(name).usage
        return usage if usage is not None else self.store().usage(name)

    def totals(self) -> Totals:
        """As :meth:`cowfs.Store.totals`."""
        from cowfs.store.totals import sum_up

        return sum_up(self.root, self.index)

    def diff(self, a: str, b: str | None = None) -> Iterator[Change]:
        """As :meth:`cowfs.Store.diff`: of committed snapshots without the driver, unless the bytes of files must be compared."""
        after = self.resolve(b if b is not None else a)
        if b is not None:
            before: Row | None = self.resolve(a)
        else:
            before = self.index.by_num(after.parent) if after.parent is not None else None
        rows = [row for row in (before, after) if row is not None]
        if any(row.root is None or row.damage is not None for row in rows):
            return self.store().diff(a, b)
        from cowfs.index.compare import compare

        same: list[SameData] = []

        def same_data(a_path: bytes, a: Entry, b_path: bytes, b: Entry) -> bool:
            if not same:
                same.append(self.store().same_data)
            return same[0](a_path, a, b_path, b)

        return compare(self.index, before.root if before is not None else None, after.root, same_data)
