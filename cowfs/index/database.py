"""The index: the records of snapshots, and the place of each file.

Strategy. One SQLite file in WAL mode, used by many processes and threads at once. A reader never
waits. A writer takes the write lock with BEGIN IMMEDIATE, so that no transaction fails half way for want of it, and
holds it for a few statements and renames: long work (copying, unpacking, reading a layer, packing records) is done
before.

The index only records states; the store decides about the order of files against records.

Threads: each thread has its own connection, made when first used and again after a fork.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.errors import Corrupt, CowfsError, FailedPrecondition, NotFound, Unsupported
from cowfs.index import events, records, schema
from cowfs.index.connection import BUSY_SECONDS, Connection, connect
from cowfs.index.records import CHAIN, INFO, ROW, Row, Tag, info_of, row_of
from cowfs.model import Event, Info, Usage
from cowfs.sys.faults import point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cowfs.index.transaction import Transaction

__all__ = ["Index", "Row", "Tag"]


SWEPT = 1000
"""Records that one transaction of a sweep deletes."""

_NO_ROOM = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EROFS,
}
"""SQLite's errors for a file that it cannot write, and the errno of each where the file system takes a file all the same."""

"""SQL that turns format N into N + 1, by N. Format 1 is schema.sql as it first was."""


"""Columns of snapshots that an older format has not, by format: so it is read where it cannot be migrated."""


def _is_text(name: str) -> bool:
    """Whether SQLite can look up a name; no snapshot has one with a lone surrogate (bytes that were not UTF-8)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Local(threading.local):
    """One thread's connection, and the process that made it."""

    pid: int | None = None
    connection: Connection | None = None


class Index:
    """The index file of one store.

    Args:
        path: the file; made if it is missing and ``create`` is set.
        fsync: whether a committed transaction must survive a power loss.

    Raises:
        NotFound: the file is missing, and ``create`` is not set.
        Corrupt: the file is not an index, or is damaged.
        Unsupported: a newer cowfs wrote it.
    """

    def __init__(self, path: str, *, create: bool = False, fsync: bool = True) -> None:
        self.path = path
        self._fsync = fsync
        self._local = _Local()
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()  # guarded by _lock
        self._lock = threading.Lock()
        self._closed = False
        if not create and not os.path.exists(path):
            raise NotFound(f"no index at {path}", remedy="make the store with 'cowfs init'")
        self._prepare()

    # ------------------------------------------------------------ connections

    def _connection(self) -> Connection:
        local = self._local
        if local.pid != os.getpid():
            if self._closed:
                raise FailedPrecondition(f"the store {os.path.dirname(self.path)} is closed", remedy="open it again")
            # A connection must not be used across a fork: the child drops it without closing.
            local.connection = self._connect()
            local.pid = os.getpid()
        connection = local.connection
        assert connection is not None
        if connection.seen is not None and connection.is_stale(self.path):
            self.renew()
            return self._connection()
        return connection

    def _connect(self) -> Connection:
        connection = connect(self.path, fsync=self._fsync)
        if connection.refused:
            self._complete(connection)
        with self._lock:
            self._open.add(connection)
        return connection

    @property
    def refused(self) -> int:
        """The errno of every write by this thread's connection: EROFS, ENOSPC or EDQUOT; 0 if it can write."""
        with self._errors():
            return self._connection().refused

    def renew(self) -> None:
        """Open this thread's connection anew: there may be room now."""
        connection, self._local.pid = self._local.connection, None
        if connection is not None:
            connection.close()

    @staticmethod
    def _complete(connection: Connection) -> None:
        """Make an index that cannot be migrated look migrated, by temporary views that hide its tables."""
        lacking = schema.LACKING.get(int(connection.execute("PRAGMA user_version").fetchone()[0]))
        if lacking is None:
            return
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("CREATE TEMP TABLE events (seq, time, type, action, actor, attributes)")
        if lacking:
            connection.execute(f"CREATE TEMP VIEW snapshots AS SELECT *, {lacking} FROM main.snapshots")
            connection.execute("CREATE TEMP TABLE configs (digest TEXT PRIMARY KEY, data TEXT NOT NULL)")

    def close(self) -> None:
        """Close every thread's connection. Idempotent; the index is of no use afterwards."""
        self._closed = True
        with self._lock:
            connections = list(self._open)
            self._open.clear()
        for connection in connections:
            connection.close()
        self._local = _Local()

    def _prepare(self) -> None:
        with self._errors():
            connection = self._connection()
            version = self._version(connection)
            if version == schema.FORMAT or (version in schema.LACKING and connection.refused):
                return
            if connection.refused:
                raise OSError(connection.refused, os.strerror(connection.refused), self.path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                version = self._version(connection)
                if version == 0:
                    self._script(connection, schema.first_schema())
                    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
                    import uuid

                    facts = {"uuid": str(uuid.uuid4()), "created": str(time.time_ns())}
                    connection.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
                    version = 1
                while version < schema.FORMAT:
                    self._script(connection, schema.MIGRATIONS[version])
                    version += 1
                connection.execute(f"PRAGMA user_version = {schema.FORMAT}")
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise

    def _version(self, connection: Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        application = int(connection.execute("PRAGMA application_id").fetchone()[0])
        if version == 0 and not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return 0
        if application != schema.APPLICATION_ID:
            raise Corrupt(f"{self.path} is not the index of a cowfs store", remedy="give the store's own directory")
        if version < 1:
            raise self._damaged(f"it has format {version}")
        if version > schema.FORMAT:
            raise Unsupported(
                f"{self.path} has format {version}, this cowfs knows up to {schema.FORMAT}", remedy="upgrade cowfs"
            )
        return version

    @staticmethod
    def _script(connection: Connection, script: str) -> None:
        """Run statements inside the open transaction (``executescript`` would commit it)."""
        statement = ""
        for line in script.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                connection.execute(statement)
                statement = ""

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate SQLite errors into cowfs errors."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except UnicodeDecodeError as error:  # the module's own, of a message of SQLite's with damaged text in it
            raise self._damaged(error.object.decode("utf-8", "backslashreplace")) from error
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            raise self._translate(code, error) from error

    def _damaged(self, why: object) -> Corrupt:
        return Corrupt(
            f"the index {self.path} is damaged: {why}",
            remedy="restore it from a backup; the layers beside it are untouched",
        )

    def _translate(self, code: int, error: Exception) -> Exception:
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(error)
        if code == sqlite3.SQLITE_BUSY:
            return FailedPrecondition(f"the index {self.path} stayed locked for {BUSY_SECONDS:.0f} s")
        if code in _NO_ROOM:
            from cowfs.sys import files

            refused = files.why_no_room(os.path.dirname(self.path)) or _NO_ROOM[code]
            text = str(error) if refused == errno.EIO else os.strerror(refused)
            return OSError(refused, text, self.path)
        return CowfsError(f"the index {self.path}: {error}")

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """One writing transaction: all of it happens, or nothing.

        Reads of this index in the same thread see the transaction's writes.
        """
        from cowfs.index.transaction import Transaction

        with self._errors():
            connection = self._connection()
            if connection.refused:
                self.renew()
                connection = self._connection()
            if connection.refused:
                raise OSError(connection.refused, os.strerror(connection.refused), self.path)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield Transaction(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[None]:
        """Several reads of one and the same state."""
        with self._errors():
            connection = self._connection()
            if connection.in_transaction:
                yield
                return
            connection.execute("BEGIN")
            try:
                yield
            finally:
                connection.execute("COMMIT")

    # ------------------------------------------------------------------ facts

    def meta(self, key: str) -> str | None:
        """A fact about the store: ``driver``, ``form``, ``uuid``, ``created``."""
        with self._errors():
            row = self._connection().execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> str:
        """Set a fact once; a second caller gets the first one's value."""
        with self.write():
            connection = self._connection()
            connection.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            return str(connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])

    # -------------------------------------------------------------- snapshots

    def find(self, name: str) -> Row | None:
        """The snapshot with this key or name."""
        if not _is_text(name):
            return None
        with self._errors():
            row = self._connection().execute(ROW + "WHERE s.name = ?", (name,)).fetchone()
        return None if row is None else row_of(row)

    def get(self, name: str) -> Row:
        """The snapshot with this key or name.

        Raises:
            NotFound: there is no such snapshot.
        """
        row = self.find(name)
        if row is None:
            raise NotFound(f"no snapshot {name!r}", remedy="'cowfs ls' shows what there is")
        return row

    def by_num(self, num: int) -> Row:
        """The snapshot with this number.

        Raises:
            NotFound: it is not there, and nothing refers to it: another process removed it.
            Corrupt: it is not there, and another snapshot or a tag refers to it.
        """
        with self._errors():
            row = self._connection().execute(ROW + "WHERE s.num = ?", (num,)).fetchone()
        if row is None:
            raise records.gone(self._connection(), num)
        return row_of(row)

    def by_chain(self, chain_id: str, parent: int | None) -> list[Row]:
        """Committed snapshots with this chain id on this parent (None: on nothing), the oldest first."""
        return list(self._rows("s.chain_id = ? AND s.parent IS ? AND s.damage IS NULL", (chain_id, parent)))

    def beginning(self, text: str) -> list[Row]:
        """At most two snapshots whose names begin with a prefix."""
        if not _is_text(text):
            return []
        return list(self._rows("s.name >= ? AND s.name < ?", (text, text[:-1] + chr(ord(text[-1]) + 1)), page=512))[:2]

    def find_num(self, num: int) -> Row | None:
        """The snapshot with this number."""
        return next(self._rows("s.num = ?", (num,)), None)

    def find_id(self, id: str) -> Row | None:
        """The snapshot whose directory the driver calls ``id``."""
        return next(self._rows("s.id = ?", (id,)), None)

    def rows(self) -> Iterator[Row]:
        """All snapshots in the order of their making, read in pages: a snapshot removed meanwhile may be missing."""
        return self._rows("1")

    def rows_on(self, num: int) -> list[Row]:
        """The snapshots whose parent this is."""
        return list(self._rows("s.parent = ?", (num,)))

    def damaged(self) -> list[Row]:
        """The snapshots in quarantine."""
        return list(self._rows("s.damage IS NOT NULL"))

    def _rows(self, where: str, values: tuple[object, ...] = (), *, page: int = 512) -> Iterator[Row]:
        """Snapshots by a condition over the columns of ``s``, in pages so that no transaction stays open."""
        after = -1
        while True:
            with self._errors():
                found = (
                    self._connection()
                    .execute(ROW + f"WHERE ({where}) AND s.num > ? ORDER BY s.num LIMIT ?", (*values, after, page))
                    .fetchall()
                )
            for values_of_row in found:
                yield row_of(values_of_row)
            if len(found) < page:
                return
            after = found[-1][0]

    def infos(self, *, page: int = 2048) -> Iterator[Info]:
        """The public records of all snapshots, in the order of their making, in pages as :meth:`rows`."""
        after = -1
        while True:
            with self._errors():
                found = self._connection().execute(INFO, (after, page)).fetchall()
            yield from map(info_of, found)
            if len(found) < page:
                return
            after = found[-1][0]

    def chain(self, num: int | None) -> list[tuple[int, str]]:
        """(number, id) of a snapshot and its ancestors, nearest first; empty for None. Errors as :meth:`by_num`."""
        if num is None:
            return []
        with self._errors():
            found = self._connection().execute(CHAIN, (num,)).fetchall()
            if not found:
                raise records.gone(self._connection(), num)
        return found

    def children(self, num: int) -> list[str]:
        """Names of the snapshots whose parent this is, a few of them."""
        with self._errors():
            found = self._connection().execute("SELECT name FROM snapshots WHERE parent = ? LIMIT 4", (num,)).fetchall()
        return [row[0] for row in found]

    # ---------------------------------------------------------------- records

    def record(self, digest: bytes) -> bytes:
        """A directory record's bytes (:class:`cowfs.index.directory.Records`).

        Raises:
            Corrupt: the record is missing.
        """
        with self._errors():
            row = self._connection().execute("SELECT data FROM records WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            from cowfs.index.directory import EMPTY

            if digest == EMPTY.storage:
                return b"E" + bytes(8)
            raise Corrupt(f"the index has no record {digest.hex()}", remedy="run 'cowfs check'")
        data: bytes = row[0]
        return data

    @property
    def spool(self) -> str | None:
        """The directory for files without a name: that of the index; None (the host's own) if it is not writable."""
        root = os.path.dirname(self.path)
        return None if self.refused else root

    def record_children(self, digest: bytes) -> bytes | None:
        """The digests of the records that a directory record points at, concatenated; None if the record is missing."""
        with self._errors():
            row = self._connection().execute("SELECT children FROM records WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else bytes(row[0])

    def sweep(self) -> int:
        """Delete the records that no snapshot's tree reaches, and return their number.

        Reachable records are found without the write lock; those of snapshots made since then are added under it, in
        each of many short transactions, so that other writers never wait long and the log stays small.
        """
        marked: set[bytes] = set()
        with self.read():
            seen = self.changes()
            self._mark(marked)
            every = [digest for (digest,) in self._connection().execute("SELECT digest FROM records")]
        unused = [digest for digest in every if digest not in marked]
        del every
        deleted = 0
        for at in range(0, len(unused), SWEPT) or (0,):
            with self.write() as change:
                others = self.changes() >> 40
                if others != seen >> 40:  # another connection wrote meanwhile
                    self._mark(marked)
                    seen = others << 40
                now = [digest for digest in unused[at : at + SWEPT] if digest not in marked]
                change.remove_records(now)
                if at + SWEPT >= len(unused):
                    change.drop_configs()
                point("gc.swept")
            deleted += len(now)
        point("gc.committed")
        return deleted

    def unreached(self) -> int:
        """The number of records that :meth:`sweep` would delete now."""
        marked: set[bytes] = set()
        with self.read():
            self._mark(marked)
            every = self._connection().execute("SELECT digest FROM records")
            return sum(digest not in marked for (digest,) in every)

    def _mark(self, marked: set[bytes]) -> None:
        """Add the digests of all records that a snapshot's tree reaches."""
        from cowfs.index.directory import root_digest

        roots = self._connection().execute("SELECT root_storage FROM snapshots WHERE root_storage IS NOT NULL")
        todo = [root_digest(storage) for (storage,) in roots]
        while todo:
            digest = todo.pop()
            if digest in marked:
                continue
            marked.add(digest)
            below = self.record_children(digest)
            if below is not None:
                todo += [below[at : at + 32] for at in range(0, len(below), 32)]

    def reserve(self) -> int:
        """Reserve a number for a snapshot that will be inserted later; a number is never used twice."""
        with self.write():
            connection = self._connection()
            bump = "UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'snapshots' RETURNING seq"
            row = connection.execute(bump).fetchone()
            if row is None:
                connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('snapshots', 0)")
                row = connection.execute(bump).fetchone()
            return int(row[0])

    # --------------------------------------------------------- configurations

    def config_of(self, num: int) -> str | None:
        """The configuration of the image that a snapshot was made from; None if unknown."""
        query = "SELECT c.data FROM snapshots AS s JOIN configs AS c ON c.digest = s.config WHERE s.num = ?"
        with self._errors():
            row = self._connection().execute(query, (num,)).fetchone()
        return None if row is None else str(row[0])

    def diff_form(self, num: int) -> int | None:
        """The form of the export that gave a snapshot's diff id; None for the diff id of an archive, or of an older cowfs."""
        with self._errors():
            row = self._connection().execute("SELECT diff_form FROM snapshots WHERE num = ?", (num,)).fetchone()
        return None if row is None else row[0]

    # ------------------------------------------------------------------- tags

    def tag(self, name: str) -> Tag | None:
        """The tag of this name."""
        if not _is_text(name):
            return None
        return next(iter(self._tags("t.name = ?", (name,))), None)

    def tags(self) -> list[Tag]:
        """All tags, in the order of their names."""
        return self._tags("1")

    def tags_of(self, num: int) -> list[Tag]:
        """The tags of a snapshot."""
        return self._tags("t.target = ?", (num,))

    def _tags(self, where: str, values: tuple[object, ...] = ()) -> list[Tag]:
        with self._errors():
            found = (
                self._connection()
                .execute(
                    "SELECT t.name, s.name, t.config, t.created FROM tags AS t JOIN snapshots AS s ON s.num = t.target"
                    f" WHERE {where} ORDER BY t.name",
                    values,
                )
                .fetchall()
            )
        return [
            Tag(name=name, target=target, config=config, created=created) for name, target, config, created in found
        ]

    # ----------------------------------------------------------------- events

    def events(self, after: int, count: int) -> list[Event]:
        """Events behind a sequence number, oldest first, ``count`` at most;"""
        with self._errors():
            return events.read(self._connection(), after, count)

    def event_at(self, time: int) -> int:
        """The sequence number of the last event before a time (nanoseconds since 1970); 0 when there is none."""
        with self._errors():
            return events.before(self._connection(), time)

    def event_range(self) -> tuple[int, int]:
        """Sequence numbers of the oldest and the newest event that are kept; (1, 0) when there is none."""
        with self._errors():
            return events.ends(self._connection())

    def changes(self) -> int:
        """A number, for this thread, that changes with every write by any connection."""
        with self._errors():
            connection = self._connection()
            return int(connection.execute("PRAGMA data_version").fetchone()[0]) << 40 | connection.total_changes

    # ----------------------------------------------------------------- totals

    def layers(self) -> list[tuple[int, int | None, str, str, int | None]]:
        """As :func:`cowfs.index.records.layers`."""
        with self._errors():
            return records.layers(self._connection())

    def held(self) -> tuple[list[tuple[int, int | None, int]], dict[str, int]]:
        """As :func:`cowfs.index.records.held`."""
        with self._errors():
            return records.held(self._connection())

    def ids(self) -> set[str]:
        """The driver's ids of all snapshots."""
        with self._errors():
            return {id for (id,) in self._connection().execute("SELECT id FROM snapshots")}

    def counts(self) -> dict[str, int]:
        """The number of snapshots, by kind."""
        with self._errors():
            return dict(self._connection().execute("SELECT kind, count(*) FROM snapshots GROUP BY kind").fetchall())

    def used(self) -> Usage:
        """The usage of all committed layers together."""
        with self._errors():
            return records.used(self._connection())

    def reclaimable(self) -> Usage:
        """The usage of the committed layers that have neither tag nor child."""
        with self._errors():
            return records.reclaimable(self._connection())

    def damage_of_file(self) -> list[str]:
        """SQLite's messages about damage of the file itself, ten at most; empty when it is sound."""
        with self._errors():
            lines = [line for (line,) in self._connection().execute("PRAGMA quick_check(10)")]
        return [line for line in lines if line != "ok"]
