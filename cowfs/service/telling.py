"""Events of what has happened already: a full disk does not make them errors, and does not lose them either."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cowfs.service.logs import log

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["Teller"]

KEPT = 10_000
"""Events that wait for room; older ones are given up."""


class Teller:
    """Records events in the store's log, in their order.

    Threads: any.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, str, str, Mapping[str, str], int]] = deque(maxlen=KEPT)  # by _lock

    def tell(self, type: str, action: str, actor: str, attributes: Mapping[str, str]) -> None:
        """Record an event, after those that wait; one without room waits for the next call, with its time."""
        with self._lock:
            self._waiting.append((type, action, actor, attributes, time.time_ns()))
            while self._waiting:
                kind, what, who, more, at = self._waiting[0]
                try:
                    self._store.record_event(kind, what, who, more, at=at)
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                        log.warning("%d events wait for room: %s", len(self._waiting), error.strerror)
                        return
                    self._waiting.popleft()
                    raise
                self._waiting.popleft()
