"""The files of removed snapshots are deleted in the background: an engine's removal takes constant time."""

from __future__ import annotations

import threading

from cowfs.errors import CowfsError
from cowfs.service.logs import log
from cowfs.store import Store

__all__ = ["Cleaner"]

_AGAIN = 5.0  # seconds until files that a mount still used are looked at again


class Cleaner:
    """A thread that deletes what was removed with ``defer``, as soon as no mount uses it.

    Threads: :meth:`wake` and :meth:`close` may be called from any.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._left = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cowfs-cleanup", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Something was removed."""
        self._left.set()

    def close(self) -> None:
        """End the thread, after what it is deleting. The next sweep deletes the rest."""
        self._ending.set()
        self._left.set()
        self._thread.join(60.0)

    def _run(self) -> None:
        while not self._ending.is_set():
            self._left.wait(_AGAIN)
            self._left.clear()
            try:
                self._store.cleanup()
            except (CowfsError, OSError) as error:
                log.warning("files of removed snapshots: %s", error)
