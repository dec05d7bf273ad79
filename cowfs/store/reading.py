"""What the index alone can tell: a store opened without its driver, for programs that only look.

Strategy: :class:`Reading` has the verbs that read nothing but the index, so that a process which lists snapshots imports no
driver, no FUSE and no archive. :class:`cowfs.Store` has them, too. :class:`Look` is a store opened for them alone: nothing is
made, swept or counted again, and no lock is taken. Where more is needed than the index, it opens the whole store.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from cowfs.errors import NotFound, Unsupported
from cowfs.index.database import Index, Row, Tag
from cowfs.store.opening import INDEX, default_root, make_root
from cowfs.sys import host

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cowfs.index.compare import SameData
    from cowfs.index.directory import Entry
    from cowfs.model import Change, Info, Usage
    from cowfs.store.filters import Filter
    from cowfs.store.store import Store

__all__ = ["Look", "Reading", "must_read"]


def must_read(path: str, form: str) -> None:
    """Raise Unsupported where this user cannot read the layers of a store."""
    if form == "trusted" and not host.can_trusted_xattr():
        raise Unsupported(
            f"the layers of {path} have trusted.overlay.* attributes, which this user cannot read",
            remedy="run as root, or use a store of your own",
        )


class Reading:
    """The verbs that read the index alone.

    Attributes:
        root: the store's directory, absolute.
        index: the index.
    """

    root: str
    index: Index

    def resolve(self, name: str) -> Row:
        """The row of a snapshot, or of the one that a tag names.

        Raises:
            NotFound: neither.
        """
        row = self.index.find(name)
        if row is not None:
            return row
        tag = self.index.tag(name)
        if tag is None:
            raise NotFound(f"no snapshot or tag {name!r}", remedy="'cowfs ls' and 'cowfs images' show what there is")
        return self.index.get(tag.target)

    def stat(self, name: str) -> Info:
        """One snapshot.

        Raises:
            NotFound: no such key, name or tag.
        """
        return self.resolve(name).info()

    def exists(self, name: str) -> bool:
        """Whether a key or name is taken."""
        return self.index.find(name) is not None

    def walk(self, filters: Iterable[str] = (), *, reverse: bool = False) -> Iterator[Info]:
        """All snapshots, in the order of their making.

        Snapshots made or removed meanwhile may be there or not; no lock is held in between.

        Args:
            filters: :mod:`cowfs.store.filters`; one of them must match.

        Raises:
            InvalidArgument: a filter cannot be read.
        """
        wanted = None
        given = list(filters)
        if given:
            from cowfs.store.filters import parse

            wanted = parse(given)
        return self._walk(wanted, reverse)

    def _walk(self, wanted: Filter | None, reverse: bool) -> Iterator[Info]:
        infos: Iterable[Info] = self.index.infos()
        if reverse:
            infos = reversed(list(infos))
        for info in infos:
            if wanted is None or wanted(info):
                yield info

    def chain(self, name: str) -> list[Info]:
        """A snapshot and its ancestors, nearest first."""
        return [self.index.by_num(num).info() for num, _ in self.index.chain(self.resolve(name).num)]

    def tags(self) -> list[Tag]:
        """All tags, by name."""
        return self.index.tags()


class Look(Reading):
    """A store opened for looking. Made by :meth:`open`; a context manager.

    Threads: belongs to one.
    """

    def __init__(self, root: str, index: Index, *, driver: str, fsync: bool) -> None:
        self.root = root
        self.index = index
        self._driver = driver
        self._fsync = fsync
        self._store: Store | None = None

    @classmethod
    def open(cls, root: str | os.PathLike[str] | None = None, *, driver: str = "auto", fsync: bool = True) -> Self:
        """Open the store in a directory, which must be one; errors as of :meth:`cowfs.Store.open`."""
        path = os.path.abspath(os.fspath(root) if root is not None else default_root())
        make_root(path, create=False)
        index = Index(os.path.join(path, INDEX), fsync=fsync)
        made = cls(path, index, driver=driver, fsync=fsync)
        try:
            form = index.meta("form")
            if form is None or index.meta("driver_class") is None or driver not in ("auto", index.meta("driver")):
                made.store()  # not whole yet, or the wrong one
            else:
                must_read(path, form)
        except BaseException:
            made.close()
            raise
        return made

    def store(self) -> Store:
        """The whole store, opened on first use; closed with this."""
        if self._store is None:
            from cowfs.store.store import Store

            self._store = Store.open(self.root, driver=self._driver, create=False, fsync=self._fsync)
        return self._store

    def close(self) -> None:
        """Let go of it. Idempotent."""
        self.index.close()
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def usage(self, name: str) -> Usage:
        """As :meth:`cowfs.Store.usage`."""
        usage = self.resolve(name).usage
        return usage if usage is not None else self.store().usage(name)

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
