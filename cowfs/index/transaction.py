"""One write transaction of the index: every change that a verb may make has a name here.

Rule: the connection is private. A verb of the store reads through :class:`~cowfs.index.database.Index` (inside the transaction
its own writes are seen) and writes through these methods; all of it happens, or nothing.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping

from cowfs._record import record
from cowfs.errors import AlreadyExists
from cowfs.index import events
from cowfs.index.directory import Pair
from cowfs.model import Kind, Limit, Usage

__all__ = ["Committed", "NameTaken", "Transaction"]

NewRecords = Mapping[bytes, tuple[bytes, bytes]]
"""Directory records by digest: (digests of the records that one points at, its bytes)."""


class NameTaken(AlreadyExists):
    """Another snapshot has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the name {name!r} is taken", remedy="choose another, or remove what has it")


@record(frozen=True, slots=True, kw_only=True)
class Committed:
    """The part of a record that only a committed snapshot has.

    Attributes:
        usage: of its own layer.
        root: the two digests of its tree's root.
        records: the directory records of the tree that the index may lack.
        diff_id: ``sha256:...`` of the layer's uncompressed archive, if the layer is one.
        chain_id: OCI image-spec, config.md, "Layer ChainID".
    """

    usage: Usage
    root: Pair
    records: NewRecords
    diff_id: str | None = None
    chain_id: str | None = None


def _digest(config: str) -> str:
    from hashlib import sha256  # imported late: it loads a library, and most verbs only read

    return f"sha256:{sha256(config.encode()).hexdigest()}"


class Transaction:
    """The changes of one transaction; :meth:`Index.write <cowfs.index.database.Index.write>` makes it.

    Threads: belongs to the thread that began it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    # -- snapshots --------------------------------------------------------------------------------

    def add_snapshot(
        self,
        *,
        id: str,
        name: str,
        kind: Kind,
        parent: tuple[int, int] | None,
        labels: Mapping[str, str],
        limit: Limit | None = None,
        base: Usage | None = None,
        shares_limit: bool = False,
        created: int | None = None,
        num: int | None = None,
        config: str | None = None,
        committed: Committed | None = None,
    ) -> None:
        """Record a snapshot.

        Args:
            id: the driver's.
            name: its key, or the name of a committed one.
            kind: active, view or committed.
            parent: (number, depth) of the snapshot beneath.
            labels: kept with it.
            limit: on its own layer.
            base: use that does not count for the limit (a negative one counts, though other layers hold it).
            shares_limit: the parent was made of it while it was active, so one limit covers both.
            created: nanoseconds since 1970; now by default.
            num: a number that was reserved.
            config: the configuration of the image that it is made from (JSON).
            committed: given for a committed one.

        Raises:
            NameTaken: another snapshot has the name.
        """
        now = time.time_ns()
        limit, base = limit or Limit(), base or Usage()
        values: dict[str, object] = {
            "num": num,
            "id": id,
            "name": name,
            "kind": kind.value,
            "parent": None if parent is None else parent[0],
            "depth": 0 if parent is None else parent[1] + 1,
            "labels": _labels(labels),
            "created": now if created is None else created,
            "updated": now,
            "limit_bytes": limit.bytes,
            "limit_inodes": limit.inodes,
            "base_bytes": base.bytes,
            "base_inodes": base.inodes,
            "shares_limit": int(shares_limit),
            "config": self._keep_config(config) if config else None,
        }
        if committed is not None:
            self.add_records(committed.records)
            values |= _committed(committed)
        columns = ", ".join(values)
        places = ", ".join("?" * len(values))
        try:
            self._connection.execute(f"INSERT INTO snapshots ({columns}) VALUES ({places})", tuple(values.values()))
        except sqlite3.IntegrityError:
            raise NameTaken(name) from None
        self.record_event("snapshot", _MADE[kind], name, {"parent": self._name_of(parent[0])} if parent else {})

    def commit_active(self, num: int, name: str, labels: Mapping[str, str], committed: Committed) -> None:
        """Make an active snapshot a committed one under a name.

        Raises:
            NameTaken: another snapshot has the name.
        """
        now = time.time_ns()
        values: dict[str, object] = {
            "name": name,
            "kind": Kind.COMMITTED.value,
            "labels": _labels(labels),
            "created": now,
            "updated": now,
            **_committed(committed),
        }
        self.add_records(committed.records)
        key = self._name_of(num)
        try:
            self._set(num, values)
        except sqlite3.IntegrityError:
            raise NameTaken(name) from None
        self.record_event("snapshot", "commit", name, {"key": key, "bytes": str(committed.usage.bytes)})

    def rename(self, num: int, name: str) -> None:
        """Give a snapshot another key or name.

        Raises:
            NameTaken: another snapshot has it.
        """
        old = self._name_of(num)
        try:
            self._set(num, {"name": name, "updated": time.time_ns()})
        except sqlite3.IntegrityError:
            raise NameTaken(name) from None
        self.record_event("snapshot", "rename", name, {"from": old})

    def set_labels(self, num: int, labels: Mapping[str, str], updated: int) -> None:
        """Replace the labels of a snapshot."""
        self._set(num, {"labels": _labels(labels), "updated": updated})

    def restore(self, num: int, *, labels: Mapping[str, str], created: int, updated: int) -> None:
        """Give a snapshot the labels and times (nanoseconds since 1970) that it had in another index."""
        self._set(num, {"labels": _labels(labels), "created": created, "updated": updated})

    def set_archive(self, num: int, diff_id: str, chain_id: str | None, *, form: int) -> None:
        """Keep the digest of the archive that an export in this form gave; the chain id only if there is none yet."""
        self._connection.execute(
            "UPDATE snapshots SET diff_id = ?, chain_id = coalesce(chain_id, ?), diff_form = ? WHERE num = ?",
            (diff_id, chain_id, form, num),
        )

    def forget_archive(self, num: int) -> None:
        """Drop the digest of a layer that is not the archive with that digest: neither it nor its descendants are
        layers of that image."""
        self._set(num, {"diff_id": None, "diff_form": None})
        self._connection.execute(
            "WITH RECURSIVE above (num) AS (SELECT ? UNION SELECT s.num FROM snapshots AS s JOIN above ON s.parent = above.num)"
            " UPDATE snapshots SET chain_id = NULL WHERE num IN above",
            (num,),
        )

    def set_root(self, num: int, root: Pair) -> None:
        """Record another tree for a committed snapshot."""
        self._set(num, {"root_content": root[0], "root_storage": root[1]})

    def set_damage(self, num: int, why: str | None) -> None:
        """Put a snapshot in quarantine, or (None) take it out."""
        self._set(num, {"damage": why})
        self.record_event("store", "quarantine" if why else "release", self._name_of(num), {"why": why} if why else {})

    def set_limit(self, num: int, limit: Limit) -> None:
        """Set the limit of an active snapshot."""
        self._set(num, {"limit_bytes": limit.bytes, "limit_inodes": limit.inodes, "updated": time.time_ns()})
        told = {"size": limit.bytes, "inodes": limit.inodes}
        self.record_event(
            "limit",
            "changed",
            self._name_of(num),
            {key: "none" if now is None else str(now) for key, now in told.items()},
        )

    def set_base(self, num: int, base: Usage) -> None:
        """Set the use of a snapshot that does not count for its limit."""
        self._set(num, {"base_bytes": base.bytes, "base_inodes": base.inodes})

    def stand_on(
        self, num: int, parent: tuple[int, int] | None, *, base: Usage, shares_limit: bool, id: str | None = None
    ) -> None:
        """Give an active snapshot another parent, and another directory where ``id`` is given."""
        values: dict[str, object] = {
            "parent": None if parent is None else parent[0],
            "depth": 0 if parent is None else parent[1] + 1,
            "base_bytes": base.bytes,
            "base_inodes": base.inodes,
            "shares_limit": int(shares_limit),
        }
        if id is not None:
            values |= {"id": id, "updated": time.time_ns()}
        self._set(num, values)

    def replace_layer(self, num: int, *, id: str, parent: int | None, usage: Usage, shares_limit: bool) -> None:
        """Record that a snapshot's layer now holds its parent's as well, and is the layer of no archive any more."""
        self._set(
            num,
            {
                "id": id,
                "parent": parent,
                "bytes": usage.bytes,
                "inodes": usage.inodes,
                "shares_limit": int(shares_limit),
                "diff_id": None,
                "chain_id": None,
            },
        )

    def lower(self, num: int, root: Pair | None) -> None:
        """Record that one layer fewer is beneath a snapshot, and the new record of its tree's root."""
        content, storage = root if root is not None else (None, None)
        self._connection.execute(
            "UPDATE snapshots SET depth = depth - 1, root_content = ?, root_storage = ? WHERE num = ?",
            (content, storage, num),
        )

    def remove(self, num: int) -> None:
        """Delete the record of a snapshot that has neither child nor tag."""
        self.record_event("snapshot", "remove", self._name_of(num))
        self._connection.execute("DELETE FROM snapshots WHERE num = ?", (num,))

    def _name_of(self, num: int) -> str:
        found = self._connection.execute("SELECT name FROM snapshots WHERE num = ?", (num,)).fetchone()
        return str(found[0]) if found else ""

    def _set(self, num: int, values: Mapping[str, object]) -> None:
        columns = ", ".join(f"{column} = ?" for column in values)
        self._connection.execute(f"UPDATE snapshots SET {columns} WHERE num = ?", (*values.values(), num))

    # -- directory records ------------------------------------------------------------------------

    def add_records(self, new: NewRecords) -> None:
        """Store directory records; those already there are kept."""
        self._connection.executemany(
            "INSERT OR IGNORE INTO records VALUES (?, ?, ?)",
            ((digest, children, data) for digest, (children, data) in new.items()),
        )

    def replace_records(self, new: NewRecords) -> None:
        """Store directory records in place of those with the same digests, which are damaged."""
        self._connection.executemany("DELETE FROM records WHERE digest = ?", ((digest,) for digest in new))
        self.add_records(new)

    def remove_records(self, digests: Iterable[bytes]) -> None:
        """Delete unreferenced directory records."""
        self._connection.executemany("DELETE FROM records WHERE digest = ?", ((digest,) for digest in digests))

    # -- configurations and tags ------------------------------------------------------------------

    def _keep_config(self, config: str) -> str:
        digest = _digest(config)
        self._connection.execute("INSERT OR IGNORE INTO configs VALUES (?, ?)", (digest, config))
        return digest

    def drop_configs(self) -> None:
        """Delete the configurations that no snapshot has."""
        self._connection.execute(
            "DELETE FROM configs WHERE digest NOT IN (SELECT config FROM snapshots WHERE config IS NOT NULL)"
        )

    def set_tag(self, name: str, num: int, config: str, *, created: int | None = None) -> None:
        """Make a tag, or move it; ``created`` is nanoseconds since 1970, now by default."""
        now = time.time_ns() if created is None else created
        self._connection.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)", (name, num, config, now))
        self.record_event("image", "tag", name, {"name": name, "snapshot": self._name_of(num), **_image(config)})

    def drop_tag(self, name: str) -> None:
        """Delete a tag; its snapshot stays."""
        found = self._connection.execute("SELECT config FROM tags WHERE name = ?", (name,)).fetchone()
        self._connection.execute("DELETE FROM tags WHERE name = ?", (name,))
        self.record_event("image", "untag", name, {"name": name, **_image(found[0] if found else "")})

    # -- events -----------------------------------------------------------------------------------

    def record_event(
        self, type: str, action: str, actor: str, attributes: Mapping[str, str] | None = None, *, at: int | None = None
    ) -> int:
        """Add an event of this transaction to the log, and return its sequence number.

        Args:
            type, action, actor, attributes: as in :class:`cowfs.model.Event`.
            at: nanoseconds since 1970, of something that happened earlier; now by default.
        """
        return events.add(self._connection, type, action, actor, attributes or {}, time.time_ns() if at is None else at)


_MADE = {Kind.ACTIVE: "prepare", Kind.VIEW: "view", Kind.COMMITTED: "create"}


def _image(config: str) -> dict[str, str]:
    """The attribute ``image``: the id of the image with this configuration."""
    return {"image": _digest(config)} if config else {}


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return "{}"  # as most snapshots have it, without the import
    import json

    return json.dumps(dict(labels), sort_keys=True)


def _committed(committed: Committed) -> dict[str, object]:
    content, storage = committed.root
    return {
        "bytes": committed.usage.bytes,
        "inodes": committed.usage.inodes,
        "root_content": content,
        "root_storage": storage,
        "diff_id": committed.diff_id,
        "chain_id": committed.chain_id,
    }
