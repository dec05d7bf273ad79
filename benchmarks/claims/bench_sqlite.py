"""Claim: a sqlite database of a base image runs under each backend; transactions a second.

One row updated a transaction, at random, in a database of 100,000 rows that lies in the lower layer; journal in WAL
mode, synchronous=FULL, so that each transaction is an fsync. The first transaction's copy-up is inside. Afterwards
the database must pass its integrity check, or the sample does not count.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from ..lab import databases, trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed
from ..lab.peers import FO1, FO2
from ..lab.stores import COW

ROWS = 100_000


def _build(draft: Path) -> None:
    with sqlite3.connect(draft / "data.sqlite") as connection:
        connection.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, note TEXT)")
        connection.executemany("INSERT INTO account VALUES (?, 0, ?)", ((n, f"note {n} " * 8) for n in range(ROWS)))
    connection.close()


def measure(lab: Lab) -> None:
    base = trees.built(lab, "sqlite", _build)
    for number, subject in lab.rounds(lab.wanted(databases.SUBJECTS), min(3, lab.profile.rounds)):
        with lab.trying(subject), databases.over(lab, subject, base, 2 << 30) as at:
            lab.record("transactions", subject, _rate(lab, at / "data.sqlite", number))


def _rate(lab: Lab, file: Path, number: int) -> float:
    count = lab.profile.transactions
    rng = lab.rng(str(number))
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

        def work() -> None:
            for _ in range(count):
                connection.execute("UPDATE account SET balance = balance + 1 WHERE id = ?", (rng.randrange(ROWS),))

        took = timed(work)
        if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise RuntimeError("the database is damaged")
        if connection.execute("SELECT sum(balance) FROM account").fetchone() != (count,):
            raise RuntimeError("transactions are missing")
        return count / took
    finally:
        connection.close()


CLAIM = Claim(
    name="sqlite",
    title="sqlite",
    why="Many services keep their state in a sqlite file of their image or volume.",
    topic="row",
    metrics=(Metric(name="transactions", unit="1/s", title="transactions a second", higher_is_better=True),),
    subjects=databases.SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="transactions",
            subject=COW,
            against=(FO1, FO2),
            at_least=1.0,
            says="sqlite transactions, overlay against fuse-overlayfs",
        ),
    ),
)


def test_sqlite(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
