"""Redirect files in a store, through real mounts: live snapshots, rollback, squash, compaction, a killed server."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs import mounting
from cowfs.errors import Unsupported
from cowfs.store import Store

SIZE = 2 << 20


@pytest.fixture
def store(space: Path) -> Iterator[Store]:
    (space / "mnt").mkdir()
    with Store.open(space / "store", driver="row", fsync=False) as opened:
        opened.prepare("make")
        with opened.mount("make", space / "mnt"):
            (space / "mnt" / "big").write_bytes(random.Random(1).randbytes(SIZE))
            (space / "mnt" / "other").write_bytes(random.Random(2).randbytes(SIZE))
        opened.commit("make", "base")
        yield opened


def poke(path: Path, model: bytearray, rnd: random.Random, times: int = 20) -> None:
    with path.open("r+b", buffering=0) as file:
        for _ in range(times):
            offset, data = rnd.randrange(SIZE - 9000), rnd.randbytes(rnd.randrange(1, 9000))
            os.pwrite(file.fileno(), data, offset)
            model[offset : offset + len(data)] = data


def test_live_snapshots_rollback_and_squash_of_a_redirect_file(store: Store, space: Path) -> None:
    mnt, rnd = space / "mnt", random.Random(3)
    model = bytearray((random.Random(1)).randbytes(SIZE))
    states: dict[str, bytes] = {}
    store.prepare("work", "base")
    with store.mount("work", mnt):
        with (mnt / "big").open("r+b", buffering=0) as held:
            for name in ("one", "two", "three"):
                poke(mnt / "big", model, rnd)
                store.snapshot("work", name)
                states[name] = bytes(model)
                os.pwrite(held.fileno(), b"between", 100)
                model[100:107] = b"between"
                os.fsync(held.fileno())
                assert (mnt / "big").read_bytes() == bytes(model)
        store.rollback("work", "two")
        assert (mnt / "big").read_bytes() == states["two"]
    store.remove("three")
    store.squash("one")
    assert store.check().problems == []
    store.view("look", "two")
    with store.mount("look", mnt):
        assert (mnt / "big").read_bytes() == states["two"]
    with store.mount("work", mnt):
        assert (mnt / "big").read_bytes() == states["two"]


def test_usage_is_what_was_written(store: Store, space: Path) -> None:
    store.prepare("work", "base", size="64k")
    with store.mount("work", space / "mnt") as mount:
        with (space / "mnt" / "big").open("r+b", buffering=0) as file:
            for block in (3, 77, 200):
                os.pwrite(file.fileno(), bytes(4096), block * 4096)
            os.fsync(file.fileno())
        assert mount.usage().bytes == 3 * 4096
    assert store.usage("work").bytes == 3 * 4096


def test_commit_compacts_when_asked(store: Store, space: Path) -> None:
    mnt = space / "mnt"
    store.prepare("work", "base")
    with store.mount("work", mnt):
        with (mnt / "big").open("r+b", buffering=0) as file:
            for at in range(0, SIZE * 9 // 10, 1 << 16):
                os.pwrite(file.fileno(), b"n" * (1 << 16), at)
        wanted = (mnt / "big").read_bytes()
        assert store.compact("work").files == 1
        assert (mnt / "big").read_bytes() == wanted
    store.commit("work", "done", compact=True)
    tree = Path(store.driver.tree(store.index.get("done").id))
    assert (tree / "big").read_bytes() == wanted
    assert store.check().problems == []


def test_other_drivers_have_nothing_to_compact(space: Path) -> None:
    with Store.open(space / "plain", driver="overlay", fsync=False) as other:
        other.prepare("work")
        with pytest.raises(Unsupported):
            other.compact("work")


_WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA synchronous=FULL")
number = db.execute("SELECT max(n) FROM t").fetchone()[0]
while True:
    number += 1
    db.execute("BEGIN")
    db.execute("INSERT INTO t VALUES (?, ?)", (number, "x" * (number * 37 % 3000)))
    db.execute("UPDATE t SET v = v || 'y' WHERE n = ?", (number * 7919 % number,))
    db.execute("COMMIT")
    print(number, flush=True)
"""


def test_sqlite_survives_kills_of_the_server(store: Store, space: Path, request: pytest.FixtureRequest) -> None:
    """Every acknowledged transaction is there, and the database is whole."""
    mnt, rnd = space / "mnt", random.Random(request.config.getoption("--seed"))
    store.prepare("db")
    with store.mount("db", mnt):
        db = sqlite3.connect(mnt / "data")
        db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, v TEXT)")
        db.executemany("INSERT INTO t VALUES (?, ?)", ((n, "z" * 900) for n in range(2000)))
        db.commit()
        db.close()
    store.commit("db", "data")
    store.prepare("run", "data")
    for _ in range(request.config.getoption("--kills") // 5):
        handle = store.mount("run", mnt)
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WRITER), str(mnt / "data")],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        time.sleep(0.1 + rnd.random() * 0.4)
        os.kill(handle.pid, signal.SIGKILL)
        told, _ = writer.communicate(timeout=60)
        said = [int(line) for line in told.split("\n")[:-1]]
        mounting.umount(mnt)  # its server is gone
        with store.mount("run", mnt):
            db = sqlite3.connect(mnt / "data")
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            if said:
                assert db.execute("SELECT count(*) FROM t WHERE n <= ?", (said[-1],)).fetchone()[0] == said[-1] + 1
            db.close()
