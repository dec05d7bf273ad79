"""The log of events: a bounded table of the index, written in the transaction of the change that an event describes.

Rules:

1. An event and its change are one transaction: neither exists without the other, even after a kill.
2. Sequence numbers have no gaps. So a reader that finds one knows how many events were deleted before it came.
3. The newest :data:`KEPT` are kept, give or take :data:`TRIM`.

Threads: the functions take the connection of the calling thread (:mod:`cowfs.index.database`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from cowfs.index.records import pairs_of
from cowfs.model import Event

__all__ = ["KEPT", "add", "before", "ends", "read"]

KEPT = 100_000
"""Events that are kept: ten seconds of 10,000 changes a second, months of a quiet store; about 20 MB at most."""

TRIM = 1024
"""How often the oldest are deleted, in events."""


def add(
    connection: sqlite3.Connection, type: str, action: str, actor: str, attributes: Mapping[str, str], at: int
) -> int:
    """Add one event inside the open transaction, and return its sequence number."""
    import json

    from cowfs._log import Part

    Part("cowfs.store").info("%s %s %s", type, action, actor)
    told = json.dumps(dict(attributes), sort_keys=True) if attributes else "{}"
    row = connection.execute(
        "INSERT INTO events (time, type, action, actor, attributes) VALUES (?, ?, ?, ?, ?)",
        (at, type, action, actor, told),
    )
    seq = row.lastrowid or 0
    if seq % TRIM == 0:
        connection.execute("DELETE FROM events WHERE seq <= ?", (seq - KEPT,))
    return seq


def read(connection: sqlite3.Connection, after: int, count: int) -> list[Event]:
    """Events behind a sequence number, oldest first."""

    found = connection.execute("SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (after, count)).fetchall()
    return [
        Event(
            seq=seq,
            time=time,
            type=type,
            action=action,
            actor=actor,
            attributes=pairs_of(attributes),
        )
        for seq, time, type, action, actor, attributes in found
    ]


def before(connection: sqlite3.Connection, time: int) -> int:
    """The last sequence number that is, like all before it, earlier than a time; the clock may have gone backwards."""
    row = connection.execute("SELECT seq FROM events WHERE time >= ? ORDER BY seq LIMIT 1", (time,)).fetchone()
    return int(row[0]) - 1 if row is not None else ends(connection)[1]


def ends(connection: sqlite3.Connection) -> tuple[int, int]:
    """The oldest and the newest sequence number; (1, 0) when there is no event."""
    first, last = connection.execute("SELECT min(seq), max(seq) FROM events").fetchone()
    return (int(first), int(last)) if first is not None else (1, 0)
