"""The events that a mount's server records in the log of events of the store whose snapshot it serves.

Rules:

1. The server records each event, for every way to mount and unmount. A killed server records no end.
2. No caller that waits for the mount waits for the log; the end is recorded before the layer is unlocked, so that a
process that finds the layer free also finds the event. 3. An event that cannot be recorded is dropped, with a line in
   the server's log, since the mount matters more. So is an event for which there is hardly room: SQLite shares memory
   with other processes in a file, and a process that touches a page of it that the host cannot hold any more is killed
   (SIGBUS).
"""

from __future__ import annotations

import os
import threading
import time

from cowfs._typed import TYPE_CHECKING, Final
from cowfs.errors import CowfsError
from cowfs.fuse import log
from cowfs.sys.threads import Thread

if TYPE_CHECKING:
    from cowfs.mounting.request import MountSpec
    from cowfs.mounting.resources import Stack

__all__ = ["Chronicle"]

QUIET: Final = 60.0
"""Seconds after an event of a limit that was reached in which no other is recorded for the same mount."""

ROOM: Final = 8 << 20
PART: Final = 16
"""Bytes that must be free on the store's file system for an event to be recorded, or that part of a small one: btrfs says that some are where none is."""


class Chronicle:
    """The events of one mount; a mount without a store has none."""

    def __init__(self, spec: MountSpec, stack: Stack) -> None:
        root = os.path.dirname(stack.upper or "").rpartition("/layers/")[0] if spec.factory else ""
        self._index = os.path.join(root, "index.db") if root else ""
        self._key, self._mountpoint = spec.label, spec.mountpoint
        self._lock = threading.Lock()
        self._begun = self._ended = False  # guarded by _lock
        self._again = 0.0  # the view's thread

    def begin(self) -> None:
        """Record that the mount answers."""
        with self._lock:
            if self._ended:
                return  # the mount was gone before its start was recorded
            self._begun = True
            self._record("mount", "mount", {"mountpoint": self._mountpoint, "pid": str(os.getpid())})

    def end(self) -> None:
        """Record that the mount is gone."""
        with self._lock:
            self._ended = True
            if self._begun:
                self._record("mount", "unmount", {"mountpoint": self._mountpoint, "pid": str(os.getpid())})

    def reached(self) -> None:
        """Record that the limit refused a change. Called in the view's thread, so it does not wait."""
        now = time.monotonic()
        if self._index and now >= self._again:
            self._again = now + QUIET
            Thread(lambda: self._record("limit", "reached", {"mountpoint": self._mountpoint}), "cowfs-event").start()

    def _record(self, type: str, action: str, attributes: dict[str, str]) -> None:
        if not self._index:
            return
        from cowfs.index.database import Index

        try:
            host = os.statvfs(self._index)
            room = min(ROOM, host.f_blocks * host.f_frsize // PART)
            if host.f_bavail * host.f_frsize < room or (host.f_files and not host.f_favail):
                log.warning("the event %s %s is not recorded: no room", type, action)
                return
            index = Index(self._index, fsync=False)  # a mount does not survive the host either
            try:
                if index.refused:
                    return  # a read-only store
                with index.write() as change:
                    change.record_event(type, action, self._key, attributes)
            finally:
                index.close()
        except (CowfsError, OSError) as error:
            log.warning("the event %s %s is not recorded: %s", type, action, error)
