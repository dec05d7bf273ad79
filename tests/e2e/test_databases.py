"""Databases in a mount whose server is killed, again and again, at random moments.

Every transaction follows from its number and what the earlier ones left. So after a kill and the
database's own recovery the whole content must be that of some number of transactions: all that
were acknowledged, and at most one more, whose acknowledgement the kill cut off. The database's files
start in a lower layer: the first writes copy them up (overlay) or redirect (row).

Each is killed ``--kills`` / 5 times. PostgreSQL is Debian's, run by its own user in namespaces that end with it.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import pwd
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

cowfs = pytest.importorskip("cowfs")

pytestmark = pytest.mark.slow

ROWS = 300
WRITERS = 3
Row = tuple[int, int, str]
"""n, the last transaction that changed it, text; row -1 counts the transactions."""


def transaction(k: int, table: str = "t") -> list[str]:
    """The statements of transaction ``k``: one row anew, one row longer, the count."""
    text = f"{k:x}-" * (k * 37 % 700)
    return [
        f"UPDATE {table} SET k = {k}, v = '{text}' WHERE n = {k * 7 % ROWS}",
        f"UPDATE {table} SET k = {k}, v = v || '+' WHERE n = {k * 11 % ROWS}",
        f"UPDATE {table} SET k = {k} WHERE n = -1",
    ]


def state_after(count: int) -> list[Row]:
    """The rows that ``count`` transactions leave."""
    rows = [(0, "")] * ROWS
    for k in range(1, count + 1):
        rows[k * 7 % ROWS] = k, f"{k:x}-" * (k * 37 % 700)
        rows[k * 11 % ROWS] = k, rows[k * 11 % ROWS][1] + "+"
    return [(-1, count, ""), *((n, k, v) for n, (k, v) in enumerate(rows))]


def check_rows(rows: list[Row], acknowledged: int, what: str) -> int:
    """The rows are what the acknowledged transactions left, or those and one more; how many there are."""
    count = rows[0][1]
    assert acknowledged <= count <= acknowledged + 1, f"{what}: {count} transactions, {acknowledged} acknowledged"
    expected = state_after(count)
    wrong = [(row, good) for row, good in zip(rows, expected, strict=True) if row != good]
    assert not wrong, f"{what}: not what {count} transactions leave: {wrong[:3]}"
    return count


class Place:
    """A mount over a layer with a database in it, whose server is killed and started anew."""

    def __init__(self, space: Path, driver: str, lower: Path) -> None:
        self.target, self.lower = space / "mnt", lower
        self.target.mkdir()
        self.options: dict[str, Any] = {"upper": space / "upper", "work": space / "work"}
        if driver == "row":
            self.options["row"] = 4096
        self.pid = 0

    def mount(self) -> None:
        self.pid = cowfs.mount([str(self.lower)], str(self.target), **self.options).pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def clear(self) -> None:
        """Unmount, as soon as those that used it have ended."""
        end = time.monotonic() + 20
        while True:
            try:
                cowfs.umount(str(self.target))
                return
            except (OSError, cowfs.CowfsError):
                if time.monotonic() > end:
                    raise
            time.sleep(0.01)


@pytest.fixture(params=["overlay", "row"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> range:
    return range(max(1, request.config.getoption("--kills") // 5))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.config.getoption("--seed"))


# -- sqlite ---------------------------------------------------------------------------------------

SQLITE = (
    f"import sqlite3, sys\nROWS = {ROWS}\n"
    + inspect.getsource(transaction)
    + """
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA synchronous=FULL")
db.execute("PRAGMA journal_mode=" + sys.argv[3])
k = int(sys.argv[2])
while True:
    k += 1
    db.execute("BEGIN IMMEDIATE")
    for statement in transaction(k):
        db.execute(statement)
    db.execute("COMMIT")
    print(k, flush=True)
"""
)


def sqlite_rows(path: Path) -> list[Row]:
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return db.execute("SELECT n, k, v FROM t ORDER BY n").fetchall()
    finally:
        db.close()


def test_sqlite_survives_kills_of_the_server(space: Path, driver: str, rounds: range, rng: random.Random) -> None:
    """Every acknowledged transaction is there, wholly, in both of sqlite's journal modes."""
    lower = space / "lower"
    lower.mkdir()
    db = sqlite3.connect(lower / "data")
    db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, k INTEGER, v TEXT)")
    db.executemany("INSERT INTO t VALUES (?, ?, ?)", state_after(0))
    db.commit()
    db.close()
    place, data = Place(space, driver, lower), space / "mnt" / "data"
    count = acknowledged = 0
    for number in rounds:
        place.mount()
        count = check_rows(sqlite_rows(data), acknowledged, f"before kill {number}")
        writer = subprocess.Popen(
            [sys.executable, "-c", SQLITE, str(data), str(count), ("delete", "wal")[number % 2]],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert writer.stdout is not None
        first = "" if count else writer.stdout.readline()  # on a slow machine, too, it gets to work
        time.sleep(0.05 + rng.random() * 0.3)
        place.kill()
        told, _ = writer.communicate(timeout=60)
        told = first + told
        place.clear()
        acknowledged = max([count, *(int(line) for line in told.split("\n")[:-1])])
    place.mount()
    count = check_rows(sqlite_rows(data), acknowledged, "in the end")
    place.clear()
    assert count > 0, "the writer never got to work"


# -- PostgreSQL -----------------------------------------------------------------------------------


class LibPq:
    """The four calls of PostgreSQL's C library that a writer needs."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libpq.so.5")
        self._lib.PQconnectdb.restype = self._lib.PQexec.restype = ctypes.c_void_p
        self._lib.PQgetvalue.restype = self._lib.PQerrorMessage.restype = ctypes.c_char_p

    def connect(self, conninfo: str) -> int | None:
        """A connection, or None when the server takes none (yet)."""
        link = self._lib.PQconnectdb(conninfo.encode())
        if self._lib.PQstatus(ctypes.c_void_p(link)) == 0:
            return int(link)
        self.close(link)
        return None

    def close(self, link: int) -> None:
        self._lib.PQfinish(ctypes.c_void_p(link))

    def run(self, link: int, sql: str) -> list[tuple[str, ...]]:
        """The rows of the last statement. Raises ConnectionError with the server's words."""
        got = ctypes.c_void_p(self._lib.PQexec(ctypes.c_void_p(link), sql.encode()))
        try:
            if self._lib.PQresultStatus(got) not in (1, 2):  # PGRES_COMMAND_OK, PGRES_TUPLES_OK
                raise ConnectionError(self._lib.PQerrorMessage(ctypes.c_void_p(link)).decode(errors="replace"))
            width = self._lib.PQnfields(got)
            return [
                tuple(self._lib.PQgetvalue(got, row, column).decode() for column in range(width))
                for row in range(self._lib.PQntuples(got))
            ]
        finally:
            self._lib.PQclear(got)


def as_postgres(*command: object) -> list[str]:
    user = ["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=KILL"]
    return ["setpriv", *user, "--", *map(str, command)]


class Postgres:
    """A server over a data directory, alone in its process and IPC namespaces: one kill ends all of it."""

    SETTINGS = (
        "listen_addresses=", "fsync=on", "synchronous_commit=on", "shared_buffers=2MB", "max_connections=10",
        "min_wal_size=2MB", "max_wal_size=4MB", "autovacuum_naptime=1s", "huge_pages=off", "log_min_messages=warning",
    )  # fmt: skip

    def __init__(self, programs: Path, data: Path, sockets: Path) -> None:
        self.where = f"host={sockets} user=postgres dbname=postgres connect_timeout=20"
        self.pq = LibPq()
        settings = [
            word for setting in (*self.SETTINGS, f"unix_socket_directories={sockets}") for word in ("-c", setting)
        ]
        self.log = sockets / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["unshare", "--pid", "--ipc", "--fork", "--kill-child", *as_postgres(programs / "postgres", "-D", data, *settings)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            )  # fmt: skip

    def connect(self) -> int:
        """A connection as soon as it recovered."""
        end = time.monotonic() + 60
        while (link := self.pq.connect(self.where)) is None:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.01)
        return link

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Writer(threading.Thread):
    """Transactions of one table until the server is gone. ``acknowledged`` is the last that it said yes to."""

    def __init__(self, server: Postgres, table: str, done: int) -> None:
        super().__init__()
        self.table, self.acknowledged = table, done
        self._pq, self._link = server.pq, server.connect()

    def run(self) -> None:
        try:
            while True:
                k = self.acknowledged + 1
                self._pq.run(self._link, ";".join(["BEGIN", *transaction(k, self.table), "COMMIT"]))
                self.acknowledged = k
        except ConnectionError:
            self._pq.close(self._link)


AMCHECK = """
CREATE EXTENSION IF NOT EXISTS amcheck;
SELECT bt_index_parent_check(indexrelid, true) FROM pg_index JOIN pg_class ON oid = indexrelid
    WHERE relam = (SELECT oid FROM pg_am WHERE amname = 'btree') AND relpersistence = 'p';
SELECT relname, problem.* FROM pg_class, verify_heapam(pg_class.oid, skip := 'none') AS problem WHERE relkind = 'r'
"""


@pytest.fixture(scope="module")
def programs(can_mount: None) -> Path:
    """The folder of the newest installed PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not found:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    return found[-1].parent


@pytest.fixture(scope="module")
def cluster(programs: Path, scratch: Path) -> Path:
    """A layer with a fresh cluster in the folder ``data``, with checksums."""
    lower = scratch / "cluster"
    data = lower / "data"
    data.mkdir(parents=True, mode=0o755)
    user = pwd.getpwnam("postgres")
    os.chown(data, user.pw_uid, user.pw_gid)
    options = [
        "-A",
        "trust",
        "-k",
        "--locale=C",
        "--encoding=UTF8",
        "--wal-segsize=1",
        "--no-sync",
        "--no-instructions",
    ]
    subprocess.run(as_postgres(programs / "initdb", "-D", data, *options), check=True, capture_output=True, cwd="/")
    return lower


@pytest.fixture
def sockets(public_directory: Path) -> Iterator[Path]:
    """A folder of PostgreSQL's user with a short name (a socket's path has 107 bytes)."""
    user = pwd.getpwnam("postgres")
    with tempfile.TemporaryDirectory(dir=public_directory, prefix="pg") as folder:
        os.chown(folder, user.pw_uid, user.pw_gid)
        yield Path(folder)


def make_tables(server: Postgres) -> None:
    link = server.connect()
    for table in TABLES:
        rows = ", ".join(f"({n}, {k}, '{v}')" for n, k, v in state_after(0))
        server.pq.run(
            link, f"CREATE TABLE {table} (n int PRIMARY KEY, k int, v text); INSERT INTO {table} VALUES {rows}"
        )
    server.pq.close(link)


def check_tables(server: Postgres, counts: dict[str, int], what: str) -> dict[str, int]:
    """Every table holds what its writer was told, and perhaps one more; the counts now."""
    link = server.connect()
    try:
        found = {table: server.pq.run(link, f"SELECT n, k, v FROM {table} ORDER BY n") for table in counts}
        return {
            table: check_rows([(int(n), int(k), v) for n, k, v in found[table]], count, f"{table}, {what}")
            for table, count in counts.items()
        }
    finally:
        server.pq.close(link)


TABLES = [f"t{number}" for number in range(WRITERS)]


def test_postgresql_survives_kills_of_the_server(
    space: Path, driver: str, rounds: range, rng: random.Random, programs: Path, cluster: Path, sockets: Path
) -> None:
    """Every acknowledged transaction of three writers is there, wholly; one kill in six comes while PostgreSQL starts."""
    place, counts = Place(space, driver, cluster), dict.fromkeys(TABLES, 0)

    def start() -> Postgres:
        place.mount()
        return Postgres(programs, place.target / "data", sockets)

    def end(server: Postgres) -> None:
        server.kill()
        place.clear()

    server = start()
    make_tables(server)
    end(server)
    for number in rounds:
        server = start()
        if rng.random() < 1 / 6:
            time.sleep(rng.random() * 0.2)
            place.kill()
            end(server)
            continue
        counts = check_tables(server, counts, f"before kill {number}")
        writers = [Writer(server, table, counts[table]) for table in TABLES]
        for writer in writers:
            writer.start()
        while any(writer.acknowledged == 0 and writer.is_alive() for writer in writers):
            time.sleep(0.01)  # on a slow machine, too, each gets to work
        time.sleep(0.02 + rng.random() * 0.25)
        place.kill()
        end(server)
        for writer in writers:
            writer.join(30)
        counts = {writer.table: writer.acknowledged for writer in writers}
    server = start()
    counts = check_tables(server, counts, "in the end")
    link = server.connect()
    assert server.pq.run(link, AMCHECK) == []
    server.pq.close(link)
    end(server)
    assert min(counts.values()) > 0, "a writer never got to work"
