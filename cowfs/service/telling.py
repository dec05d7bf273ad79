"""Events of what has happened already: a full disk does not make them errors, and does not lose them either."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cowfs.errors import CowfsError
from cowfs.service.logs import log
from cowfs.service.waiting import Waiting, Waits

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["Teller"]

KEPT = 10_000
"""Events for which there is no place in the file either, and which are kept in memory; older ones are given up."""

PAUSE = 1.0
"""Seconds between two looks for room."""


class Teller:
    """Records events in the store's log, in their order; those without room wait in a file (:mod:`cowfs.service.waiting`).

    Threads: any; one of its own while something waits.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._file = Waiting(store.root, durable=store.driver.fsync)
        self._late: deque[Waits] = deque(maxlen=KEPT)  # guarded by _lock
        self._looking = False  # guarded by _lock

    def begin(self) -> None:
        """Take the room for the file, and record the events that an earlier daemon or its supervisors left in it."""
        try:
            self._file.reserve()
        except OSError as error:
            log.warning("events of a full disk would be kept in memory alone: %s", error.strerror)
        self.catch_up()

    def tell(self, type: str, action: str, actor: str, attributes: Mapping[str, str]) -> None:
        """Record an event, after those that wait; one without room is recorded as soon as there is some, with its time."""
        event: Waits = (type, action, actor, dict(attributes), time.time_ns())
        with self._lock:
            if self._catch_up():
                try:
                    self._store.record_event(type, action, actor, attributes, at=event[4])
                    return
                except OSError as error:
                    if not _no_room(error):
                        raise
            if self._late or not self._file.append(event):
                self._late.append(event)
            self._look()

    def catch_up(self) -> None:
        """Record the events that wait, as far as there is room."""
        with self._lock:
            self._catch_up()

    def _catch_up(self) -> bool:
        """Record the events that wait; False if there is no room for them."""
        try:
            self._file.drain(self._store)
            while self._late:
                type, action, actor, attributes, at = self._late[0]
                self._store.record_event(type, action, actor, attributes, at=at)
                self._late.popleft()
        except OSError as error:
            if not _no_room(error):
                raise
            self._look()
            return False
        return True

    def _look(self) -> None:
        """Look for room, now and then, until there is some."""
        if not self._looking:
            self._looking = True
            log.warning("events wait for room on the disk")
            threading.Thread(target=self._wait, name="cowfs-waiting", daemon=True).start()

    def _wait(self) -> None:
        while True:
            time.sleep(PAUSE)
            with self._lock:
                try:
                    if not self._catch_up():
                        continue
                    log.info("the events that waited are recorded")
                except (CowfsError, OSError) as error:
                    log.warning("events that wait are recorded by the next daemon: %s", error)
                self._looking = False
                return


def _no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
