"""The verbs of the index alone: a store opened without its driver, for programs that only read.

Strategy: :class:`Reading` has the verbs that read nothing but the index, so that a process which lists snapshots imports no
driver, no FUSE and no archive. :class:`cowfs.Store` has them, too. :class:`cowfs.store.look.Look` is a store opened for
them alone: without making, sweeping or counting, and without a lock. For a verb that needs more than the index, it
opens the whole store.
"""

from __future__ import annotations

from cowfs.errors import InvalidArgument, NotFound, Unsupported
from cowfs.index.database import Index, Row, Tag
from cowfs.sys import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cowfs.model import Info
    from cowfs.store.filters import Filter

__all__ = ["Reading", "must_read"]

DIGEST = "sha256:"
"""How the names of layers begin."""


def must_read(path: str, form: str) -> None:
    """Raise Unsupported if this user cannot read the layers of a store."""
    if form == "trusted" and not host.can_trusted_xattr():
        raise Unsupported(
            f"the layers of {path} have trusted.overlay.* attributes, which this user cannot read",
            remedy="run as root, or use a store of your own",
        )


def _parsed(filters: str | Iterable[str]) -> Filter | None:
    given = [filters] if isinstance(filters, str) else list(filters)
    if not given:
        return None
    from cowfs.store.filters import parse

    return parse(given)


class Reading:
    """The verbs that read the index alone."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def resolve(self, name: str) -> Row:
        """As :meth:`cowfs.Store.resolve`."""
        row = self.index.find(name)
        if row is not None:
            return row
        tag = self.index.tag(name)
        if tag is None and (row := self._abbreviated(name)) is not None:
            return row
        if tag is None:
            raise NotFound(f"no snapshot or tag {name!r}", remedy="'cowfs ls' and 'cowfs images' show what there is")
        return self.index.get(tag.target)

    def _abbreviated(self, name: str) -> Row | None:
        """The only snapshot whose digest begins so: ``sha256:`` and four digits at least.

        Raises:
            InvalidArgument: several begin so.
        """
        if not name.startswith(DIGEST) or len(name) < len(DIGEST) + 4:
            return None
        found = self.index.beginning(name)
        if len(found) > 1:
            raise InvalidArgument(f"several snapshots begin with {name!r}", remedy="write more digits")
        return found[0] if found else None

    def stat(self, name: str) -> Info:
        """As :meth:`cowfs.Store.stat`."""
        return self.resolve(name).info()

    def exists(self, name: str) -> bool:
        """As :meth:`cowfs.Store.exists`."""
        return self.index.find(name) is not None

    def walk(self, filters: str | Iterable[str] = (), *, reverse: bool = False) -> Iterator[Info]:
        """As :meth:`cowfs.Store.walk`."""
        return self._walk(_parsed(filters), reverse)

    def walk_rows(self, filters: str | Iterable[str] = ()) -> Iterator[Row]:
        """As :meth:`cowfs.Store.walk_rows`."""
        wanted = _parsed(filters)
        return (row for row in self.index.rows() if wanted is None or wanted(row.info()))

    def _walk(self, wanted: Filter | None, reverse: bool) -> Iterator[Info]:
        infos: Iterable[Info] = self.index.infos()
        if reverse:
            infos = reversed(list(infos))
        for info in infos:
            if wanted is None or wanted(info):
                yield info

    def chain(self, name: str) -> list[Info]:
        """As :meth:`cowfs.Store.chain`."""
        return [self.index.by_num(num).info() for num, _ in self.index.chain(self.resolve(name).num)]

    def tags(self) -> list[Tag]:
        """As :meth:`cowfs.Store.tags`."""
        return self.index.tags()
