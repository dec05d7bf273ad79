"""Changes of an index by any process, as one number for all threads of a process."""

from __future__ import annotations

import os
import threading

from cowfs.index.connection import Connection, connect

__all__ = ["Watcher"]


class Watcher:
    """A connection that only watches: SQLite tells it whether another connection, of this process or not, has committed since.

    Source: SQLite, PRAGMA data_version.

    Args:
        path: of the index.

    Threads: any; one lock guards the connection.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: Connection | None = None  # guarded by _lock
        self._turn = 0  # guarded by _lock: grows with each new connection, whose numbers begin anew
        self._pid = 0

    def version(self) -> tuple[int, int]:
        """A pair that is equal to an earlier one only if nothing was committed in between."""
        with self._lock:
            if self._connection is None or self._pid != os.getpid() or self._connection.is_stale(self._path):
                self._drop()
                self._connection = connect(self._path, fsync=False)
                self._pid = os.getpid()
                self._turn += 1
            return self._turn, int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the connection; the next call opens another one."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if (
            self._connection is not None and self._pid == os.getpid()
        ):  # a forked child leaves its parent's connection alone
            self._connection.close()
        self._connection = None
