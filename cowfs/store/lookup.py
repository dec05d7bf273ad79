"""Rows by key and name, with the errors of verbs for unfit ones.

Rule: a check that a verb makes before it begins is made again in the transaction that it ends with; ``num`` is then the row
that was found first.
"""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING
from cowfs.errors import AlreadyExists, Corrupt, FailedPrecondition, InvalidArgument, NotFound
from cowfs.index.database import Row
from cowfs.index.transaction import NameTaken
from cowfs.model import Kind

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.reading import Reading

__all__ = ["Lookup", "kind_words", "must_be_mountable", "must_be_sound"]


class Lookup:
    """Find rows, and refuse those that a verb cannot use. Only :meth:`must_be_whole` reads more than the index."""

    def __init__(self, context: Context, reading: Reading) -> None:
        self.context = context
        self._reading = reading

    def keyed(self, name: str) -> Row:
        """The row of a key or name; the error for a tag tells that it is one.

        Raises:
            NotFound: no such snapshot.
        """
        row = self.context.index.find(name)
        if row is None and (tag := self.context.index.tag(name)) is not None:
            raise NotFound(
                f"no snapshot {name!r}: it is a tag of {tag.target!r}, which is committed",
                remedy=f"'cowfs prepare KEY {name}' makes one to write in, 'cowfs view KEY {name}' one to read",
            )
        return row if row is not None else self.context.index.get(name)

    def active(self, key: str, num: int | None = None) -> Row:
        """The row of an active snapshot.

        Raises:
            NotFound: no such key; or it is not ``num`` any more.
            FailedPrecondition: not active.
            Corrupt: in quarantine.
        """
        row = self.keyed(key)
        if num is not None and row.num != num:
            raise NotFound(f"no snapshot {key!r}: it was replaced meanwhile")
        if row.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"{key!r} is {kind_words(row.kind)}, not active")
        must_be_sound(row)
        return row

    def parent(self, name: str, num: int | None = None) -> Row:
        """The row of a committed snapshot, as a parent of another one.

        Raises:
            NotFound: no such name or tag; or it is not ``num`` any more.
            InvalidArgument: not committed.
            Corrupt: in quarantine.
        """
        row = self.context.index.get(name) if num is not None else self._reading.resolve(name)
        if num is not None and row.num != num:
            raise NotFound(f"no snapshot {name!r}: it was replaced meanwhile")
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(
                f"{name!r} is {kind_words(row.kind)}, a parent must be committed", remedy="commit it first"
            )
        must_be_sound(row)
        return row

    def must_be_free(self, name: str, *, for_tag: bool = False) -> None:
        """Refuse a key or name that a snapshot has, or (it would hide it) a tag."""
        if self.context.index.find(name) is not None:
            raise NameTaken(name)
        if not for_tag and self.context.index.tag(name) is not None:
            raise AlreadyExists(f"{name!r} is a tag", remedy=f"choose another name, or drop it: cowfs rm {name}")

    def config_at(self, name: str | None, row: Row | None) -> str:
        """The configuration of the image of a name: the tag's, else the one that the snapshot was made from."""
        if name is None or row is None:
            return ""
        tag = self.context.index.tag(name) if name != row.name else None
        if tag is not None and tag.config:
            return tag.config
        own = self.context.index.config_of(row.num)
        if own is not None:
            return own
        tags = [tag for tag in self.context.index.tags_of(row.num) if tag.config]
        return min(tags, key=lambda tag: (tag.created, tag.name)).config if tags else ""

    def must_be_whole(self, row: Row) -> None:
        """Raise the error for a missing file of a snapshot's layer: the snapshot was removed meanwhile, or has lost its layer."""
        if self.context.index.get(row.name).num != row.num:
            raise NotFound(f"no snapshot {row.name!r}: it was replaced meanwhile")
        problems = self.context.driver.check(row.id)
        if problems:
            raise Corrupt(f"{row.name!r}: {problems[0]}", remedy="run 'cowfs check'")


def must_be_sound(row: Row) -> None:
    """Raise Corrupt for a snapshot in quarantine."""
    if row.damage is not None:
        raise Corrupt(
            f"{row.name!r} is in quarantine: {row.damage}", remedy="restore the layer, then 'cowfs check --repair'"
        )


def must_be_mountable(row: Row) -> None:
    """Refuse a snapshot that cannot be mounted in any way."""
    if row.kind is Kind.COMMITTED:
        raise FailedPrecondition(f"{row.name!r} is committed", remedy="mount a view of it, or mount it read-only")
    must_be_sound(row)


def kind_words(kind: Kind) -> str:
    """A kind of snapshot, as the complement of "is" in a sentence."""
    return {Kind.ACTIVE: "active", Kind.VIEW: "a view", Kind.COMMITTED: "committed"}[kind]
