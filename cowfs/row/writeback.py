"""Bringing redirect files to the disk without fsync: one thread a view, which sleeps while nothing is dirty."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable

from cowfs.row.map import Log
from cowfs.sys.threads import Thread

#: seconds between two rounds
INTERVAL = 5.0
_MOST_DIRTY = 512


class Syncer:
    """Brings dirty files to the disk every few seconds. Its lock guards ``dirty`` only.

    Args:
        durable: whether files must reach the disk; a volatile view only marks.
        most: the number of dirty files from which on a writer waits.
    """

    def __init__(self, durable: bool, most: int = 4 * _MOST_DIRTY) -> None:
        self.durable = durable
        self._most = most
        self._many = min(_MOST_DIRTY, most // 2)
        self.dirty: dict[Log, int] = {}  # log -> a descriptor of the data, owned here; -1 if none is needed
        self.orphaned: set[Log] = set()  # to close once they are clean
        self._lock = threading.Lock()
        self._round = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        self._thread: Thread | None = None

    def add(self, log: Log, data_fd: int) -> None:
        """Add a map that was clean before a record was appended."""
        if not self.durable:
            with self._lock:
                self.dirty[log] = -1
            return
        if len(self.dirty) >= self._most:
            with contextlib.suppress(OSError):
                self.sync()
        fd = os.dup(data_fd)
        with self._lock:
            known = self.dirty.setdefault(log, fd)
            many = len(self.dirty) > self._many
        if known != fd:
            os.close(fd)
        if self._thread is None:
            thread = Thread(self._run, "cowfs-row-sync")
            if thread.start():  # else the next call tries again, and writers sync when many are dirty
                self._thread = thread
        if many or len(self.dirty) == 1:
            self._wake.set()

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(INTERVAL if self.dirty else None)
            if self._wake.is_set() and not self._ended and len(self.dirty) <= self._many:
                self._wake.clear()  # a file is dirty now: wait a while
                continue
            self._wake.clear()
            if not self._ended:
                try:
                    self.sync()
                except (OSError, MemoryError):  # try again; fsync reports the error to its caller
                    self._wake.wait(INTERVAL)

    def sync(self, logs: Iterable[Log] | None = None) -> None:
        """Do one round, of all files or of some; any thread. Raises OSError after all were tried."""
        failure: OSError | None = None
        with self._round:
            with self._lock:
                wanted = self.dirty if logs is None else self.dirty.keys() & set(logs)
                todo = [(log, self.dirty[log], log.end) for log in wanted]
            for log, fd, upto in todo:
                try:
                    if self.durable:
                        os.fsync(fd)
                except OSError as error:
                    failure = error
                    log.fail(error)  # fsync reports it to its caller
                try:
                    log.mark_synced(upto)
                    if logs is not None:
                        log.sync()
                except OSError as error:  # the map's own host is full: again in the next round
                    failure = error
                    continue
                with self._lock:
                    if log.dirty and log.failure is None:
                        continue
                    del self.dirty[log]
                    close = log in self.orphaned
                    self.orphaned.discard(log)
                if fd >= 0:
                    os.close(fd)
                if close:
                    log.close()
        if failure is not None:
            raise failure

    def leave(self, log: Log) -> bool:
        """Leave an unneeded log here. Returns whether it will be closed here."""
        with self._lock:
            if log not in self.dirty:
                return False
            if not self.durable:
                with contextlib.suppress(OSError):  # no room for the mark: later, or at the end
                    log.mark_synced(log.end)
                    del self.dirty[log]
                    return False
            self.orphaned.add(log)
            return True

    def take_back(self, name: bytes) -> Log | None:
        """The log of a map, if it was left here and is not clean yet: a second one would not know its end."""
        with self._lock:
            for log in self.orphaned:
                if log.name == name:
                    self.orphaned.discard(log)
                    return log
        return None

    def close(self) -> None:
        """Do a last round, and end the thread."""
        self._ended = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.sync()
        finally:
            for log, fd in self.dirty.items():
                if fd >= 0:
                    os.close(fd)
                log.close()
            self.dirty.clear()
