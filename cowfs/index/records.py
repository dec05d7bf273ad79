"""The records of one snapshot and of one image's name, and the statements that read them."""

from __future__ import annotations

from collections.abc import Mapping

from cowfs._record import field, record
from cowfs.errors import Corrupt, CowfsError, NotFound
from cowfs.model import Info, Kind, Limit, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3

    from cowfs.index.entry import Pair

__all__ = [
    "CHAIN",
    "INFO",
    "KINDS",
    "ROW",
    "Row",
    "Tag",
    "gone",
    "held",
    "layers",
    "pairs_of",
    "reclaimable",
    "row_of",
    "used",
]


@record(frozen=True, slots=True, kw_only=True)
class Row:
    """One snapshot as the index keeps it; the columns are described in schema.sql."""

    num: int
    id: str
    name: str
    kind: Kind
    parent: int | None
    depth: int
    labels: Mapping[str, str] = field(default_factory=dict)
    created: int
    updated: int
    limit: Limit
    shares_limit: bool
    base: Usage
    usage: Usage | None
    root: Pair | None
    diff_id: str | None
    chain_id: str | None
    damage: str | None
    parent_name: str | None

    def info(self) -> Info:
        """The public record of the snapshot."""
        return Info(
            name=self.name,
            kind=self.kind,
            parent=self.parent_name,
            labels=self.labels,
            created=self.created,
            updated=self.updated,
            id=self.id,
            limit=self.limit,
            usage=self.usage,
            diff_id=self.diff_id,
        )


@record(frozen=True, slots=True, kw_only=True)
class Tag:
    """A name for an image: the top snapshot of its chain, and its configuration (JSON, "" for a plain tree)."""

    name: str
    target: str
    config: str
    created: int


ROW = """
SELECT s.num, s.id, s.name, s.kind, s.parent, s.depth, s.labels, s.created, s.updated, s.limit_bytes, s.limit_inodes,
       s.base_bytes, s.base_inodes, s.bytes, s.inodes, s.root_content, s.root_storage, s.diff_id, s.chain_id, s.damage,
       s.shares_limit,
       (SELECT p.name FROM snapshots AS p WHERE p.num = s.parent)
FROM snapshots AS s
"""
INFO = """
SELECT s.num, s.name, s.kind, s.labels, s.created, s.updated, p.name, s.id, s.limit_bytes, s.limit_inodes, s.bytes, s.inodes, s.diff_id
FROM snapshots AS s LEFT JOIN snapshots AS p ON p.num = s.parent
WHERE s.num > ? ORDER BY s.num LIMIT ?
"""
NO_LIMIT = Limit()
_REMEDY = "restore it from a backup; the layers beside it are untouched"


class _Kinds(dict[str, Kind]):
    def __missing__(self, value: object) -> Kind:
        raise Corrupt(f"the index is damaged: a snapshot has the kind {value!r}", remedy=_REMEDY)


KINDS = _Kinds({kind.value: kind for kind in Kind})
CHAIN = """
WITH RECURSIVE chain (num, parent, id, depth) AS (
    SELECT num, parent, id, depth FROM snapshots WHERE num = ?
    UNION ALL
    SELECT s.num, s.parent, s.id, s.depth FROM snapshots AS s JOIN chain ON s.num = chain.parent
)
SELECT num, id FROM chain ORDER BY depth DESC
"""


def info_of(values: tuple) -> Info:  # type: ignore[type-arg]
    """The public record of a row of :data:`INFO`."""
    _, name, kind, labels, created, updated, parent, id_, limit_bytes, limit_inodes, bytes_, inodes, diff_id = values
    return Info(
        name=name,
        kind=KINDS[kind],
        parent=parent,
        labels=pairs_of(labels),
        created=created,
        updated=updated,
        id=id_,
        limit=NO_LIMIT
        if limit_bytes is None and limit_inodes is None
        else Limit(bytes=limit_bytes, inodes=limit_inodes),
        usage=None if bytes_ is None else Usage(bytes=bytes_, inodes=inodes),
        diff_id=diff_id,
    )


def pairs_of(text: str) -> dict[str, str]:
    """Labels of a snapshot, or attributes of an event, as the index keeps them: a JSON object, which is mostly empty.

    Raises:
        Corrupt: it is something else.
    """
    if text == "{}":
        return {}
    import json

    try:
        pairs = json.loads(text)
    except (TypeError, ValueError):
        pairs = None
    if not isinstance(pairs, dict):
        raise Corrupt(f"the index is damaged: {text!r} is no object of JSON", remedy=_REMEDY)
    return pairs


def row_of(values: tuple) -> Row:  # type: ignore[type-arg]
    (num, id_, name, kind, parent, depth, labels, created, updated, limit_bytes, limit_inodes, base_bytes, base_inodes,
     bytes_, inodes, content, storage, diff_id, chain_id, damage, shares_limit, parent_name) = values  # fmt: skip
    return Row(
        num=num,
        id=id_,
        name=name,
        kind=KINDS[kind],
        parent=parent,
        depth=depth,
        labels=pairs_of(labels),
        created=created,
        updated=updated,
        limit=Limit(bytes=limit_bytes, inodes=limit_inodes),
        shares_limit=bool(shares_limit),
        base=Usage(bytes=base_bytes, inodes=base_inodes),
        usage=None if bytes_ is None else Usage(bytes=bytes_, inodes=inodes),
        root=None if content is None else (content, storage),
        diff_id=diff_id,
        chain_id=chain_id,
        damage=damage,
        parent_name=parent_name,
    )


def layers(connection: sqlite3.Connection) -> list[tuple[int, int | None, str, str, int | None]]:
    """(number, parent's number, name, kind, bytes of its own; None until committed) of all snapshots, by one query."""
    return connection.execute("SELECT num, parent, name, kind, bytes FROM snapshots ORDER BY num").fetchall()


def held(connection: sqlite3.Connection) -> tuple[list[tuple[int, int | None, int]], dict[str, int]]:
    """(number, parent's number, bytes of its own) of all committed snapshots; and the numbers of those with tags, by name."""
    rows = connection.execute(
        "SELECT num, parent, bytes FROM snapshots WHERE bytes IS NOT NULL ORDER BY num"
    ).fetchall()
    tagged = connection.execute("SELECT name, num FROM snapshots WHERE num IN (SELECT target FROM tags)").fetchall()
    return rows, dict(tagged)


def used(connection: sqlite3.Connection) -> Usage:
    """The usage of all committed layers together."""
    return _sum(connection, "1")


def reclaimable(connection: sqlite3.Connection) -> Usage:
    """The usage of the committed layers that have neither tag nor child."""
    return _sum(
        connection,
        "kind = 'committed' AND NOT EXISTS (SELECT 1 FROM snapshots AS c WHERE c.parent = s.num)"
        " AND NOT EXISTS (SELECT 1 FROM tags AS t WHERE t.target = s.num)",
    )


def _sum(connection: sqlite3.Connection, where: str) -> Usage:
    query = f"SELECT coalesce(sum(bytes), 0), coalesce(sum(inodes), 0) FROM snapshots AS s WHERE {where}"
    size, inodes = connection.execute(query).fetchone()
    return Usage(bytes=size, inodes=inodes)


def gone(connection: sqlite3.Connection, num: int) -> CowfsError:
    """The error for a number that no snapshot has: NotFound for one that a process removed, Corrupt if something refers to it."""
    asked = "SELECT 1 FROM snapshots WHERE parent = ? UNION ALL SELECT 1 FROM tags WHERE target = ? LIMIT 1"
    if connection.execute(asked, (num, num)).fetchone() is None:
        return NotFound("a snapshot was removed meanwhile by another process", remedy="try again")
    return Corrupt(f"the index refers to snapshot {num}, which is gone", remedy="run 'cowfs check'")
