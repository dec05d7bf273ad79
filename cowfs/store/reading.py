"""What the index alone can tell: a store opened without its driver, for programs that only look.

Strategy: :class:`Reading` has the verbs that read nothing but the index, so that a process which lists snapshots imports no
driver, no FUSE and no archive. :class:`cowfs.Store` has them, too. :class:`Look` is a store opened for them alone: nothing is
made, swept or counted again, and no lock is taken. Where more is needed than the index, it opens the whole store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowfs.errors import NotFound, Unsupported
from cowfs.index.database import Index, Row, Tag
from cowfs.sys import host

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cowfs.model import Info
    from cowfs.store.filters import Filter

__all__ = ["Reading", "must_read"]


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
        """Whether a key or name is taken (tags do not count). Only the index is read.

        Args:
            name: a key or name.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.index.find(name) is not None

    def walk(self, filters: str | Iterable[str] = (), *, reverse: bool = False) -> Iterator[Info]:
        """List all snapshots, in the order of their making. Only the index is read.

        Snapshots made or removed meanwhile may be there or not; no lock is held in between.

        Args:
            filters: :mod:`cowfs.store.filters`, one or several; one of them must match.
            reverse: the newest first.

        Raises:
            InvalidArgument: a filter cannot be read.
        """
        wanted = None
        given = [filters] if isinstance(filters, str) else list(filters)
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
        """List a snapshot and its ancestors, nearest first. Only the index is read.

        Args:
            name: a key, a name or a tag.

        Raises:
            NotFound: no such snapshot.
        """
        return [self.index.by_num(num).info() for num, _ in self.index.chain(self.resolve(name).num)]

    def tags(self) -> list[Tag]:
        """List all tags, by name. Only the index is read.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.index.tags()
