"""One connection to the index file, adapted to the abilities of its file system.

===============================  ==========================================================================================
the file system                  how the file is opened
===============================  ==========================================================================================
takes writes                     as SQLite does: a log and shared memory beside it, which the last one to close removes
without a free byte, and others  the same: the shared memory is there already
have it open
read-only, or read-only here     ``mode=ro``: reads log and shared memory of who has it open, or was killed
(a bind mount)
either, and nobody has it open   ``immutable``: nothing beside it is needed. It is opened anew as soon as it changed.
without a free byte, and its     exclusively: what shared memory would hold is kept in this process
writer was killed
===============================  ==========================================================================================

Source: sqlite.org/wal.html, "Read-Only Databases" and "Use of WAL Without Shared-Memory"; sqlite.org/uri.html.
"""

from __future__ import annotations

import errno
import os
import sqlite3

from cowfs.errors import FailedPrecondition

__all__ = ["BUSY_SECONDS", "WAL_PAGES", "Connection", "connect"]

BUSY_SECONDS = 60.0
WAL_PAGES = 256
"""Pages that the write-ahead log grows to, and is cut to after a large transaction: a megabyte, a quarter of SQLite's own."""

_Signature = tuple[int, int, int, int]


class Connection(sqlite3.Connection):
    """A connection that can be referred to weakly (a thread that ends drops its own).

    Attributes:
        refused: the errno of every write by it: EROFS, ENOSPC, EDQUOT; 0 if it can write.
        seen: of a file opened as immutable: its state at that time.
    """

    refused: int = 0
    seen: _Signature | None = None

    def __del__(self) -> None:
        """Closed with its last reference, as ever; Python 3.13 warns of it where nobody says so."""
        try:
            self.close()
        except sqlite3.Error:
            pass  # it was never opened

    def is_stale(self, path: str) -> bool:
        """Whether a file that was opened as immutable has changed since, or is about to."""
        return self.seen is not None and (self.seen != _signature(path) or _size(f"{path}-wal") > 0)


def connect(path: str, *, fsync: bool) -> Connection:
    """Open an index, for writing if it can be written.

    Raises:
        sqlite3.Error: the file is unreadable.
        FailedPrecondition: it was in use when its file system became read-only.
    """
    if os.path.exists(path) and os.statvfs(path).f_flag & os.ST_RDONLY:
        return _for_reading(path, errno.EROFS)
    connection = _open(path)
    try:
        connection.execute(f"PRAGMA synchronous = {'FULL' if fsync else 'OFF'}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA trusted_schema = OFF")  # a store may come from elsewhere
        connection.execute("PRAGMA cache_size = -16384")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_PAGES * 4096}")
        connection.execute("PRAGMA user_version").fetchone()  # the first reader makes log and shared memory
    except sqlite3.OperationalError as error:
        connection.close()
        from cowfs.sys import files

        refused = files.why_no_room(os.path.dirname(path))
        if not refused or error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            raise
        return _for_reading(path, refused)
    return connection


def _for_reading(path: str, refused: int) -> Connection:
    log = f"{path}-wal"
    if os.path.exists(log) and os.path.exists(f"{path}-shm"):
        connection = _open(path, "mode=ro")
        try:
            connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError:
            connection.close()
        else:
            connection.refused = refused
            return connection
    if not _size(log):
        seen = _signature(path)
        connection = _open(path, "mode=ro&immutable=1")
        connection.seen = seen
    elif refused == errno.EROFS:
        raise FailedPrecondition(
            f"{path} was in use when its file system became read-only",
            remedy="make it writable once: 'cowfs ls' will do",
        )
    else:
        connection = _open(path)
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA user_version").fetchone()
    connection.refused = refused
    return connection


def _open(path: str, how: str = "") -> Connection:
    name = path
    if how:
        name = f"file:{_escaped(path)}?{how}"
    return sqlite3.connect(
        name,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        factory=Connection,
        uri=bool(how),
    )


def _escaped(path: str) -> str:
    r"""A path for an URI of SQLite, which takes any bytes (sqlite.org/uri.html); urllib would take 5 ms to import.

    >>> _escaped("/a b?c/\udcff")
    '/a%20b%3Fc/%FF'
    """
    plain = b"/._-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    return "".join(chr(byte) if byte in plain else f"%{byte:02X}" for byte in os.fsencode(path))


def _signature(path: str) -> _Signature:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
