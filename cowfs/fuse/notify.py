"""Invalidations of the kernel's caches, sent from a thread of their own.

Rule: a notification is never written by a thread that answers requests, nor by one that holds a lock which
answering needs. The kernel may wait for a request to be answered before the write returns (INVAL_INODE waits for
the write-back of a dirty mapped page): sent from the serving loop it hangs server and writer for good.

:class:`Notifier`'s methods only queue, and may be called from any thread.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from queue import SimpleQueue

from cowfs.fuse import abi, codec, log
from cowfs.sys.threads import Thread


class Notifier:
    """Queue of notifications for one connection, and the thread that writes them.

    ``unsupported`` holds the notify codes that the kernel refused: it is filled as they are tried. ``sent`` counts
    accepted notifications by code, those answered with ENOENT ("nothing of that is cached") included.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: SimpleQueue[bytes | threading.Event | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._lock = threading.Lock()  # guards _thread only; never held while writing
        self.unsupported: set[int] = set()
        self.sent: dict[int, int] = {}

    def inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> None:
        """Drop a node's attributes and pages (``offset`` < 0: attributes only)."""
        self.send(codec.notify_inval_inode(nodeid, offset, length))

    def inval_entry(self, parent: int, name: bytes) -> None:
        """Drop one name of a directory, also a negative one."""
        self.send(codec.notify_inval_entry(parent, name))

    def delete(self, parent: int, child: int, name: bytes) -> None:
        """Drop one name, and notify watchers of its deletion."""
        self.send(codec.notify_delete(parent, child, name))

    def prune(self, nodeids: Sequence[int]) -> None:
        """Ask the kernel to forget these nodes if they are unused (Linux 6.18)."""
        for start in range(0, len(nodeids), abi.PRUNE_BATCH):
            self.send(codec.notify_prune(list(nodeids[start : start + abi.PRUNE_BATCH])))

    def inc_epoch(self) -> None:
        """Make every name that the kernel knows stale (Linux 6.16)."""
        self.send(codec.notify_inc_epoch())

    def send(self, message: bytes) -> None:
        """Queue one encoded notification."""
        self._queue.put(message)
        self._start()

    def _start(self) -> bool:
        """Start the thread, if it does not run. Returns False if that failed; the next message tries again."""
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = Thread(self._run, "cowfs-notifier")
                    if not thread.start():
                        return False
                    self._thread = thread
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all messages queued before are sent to the kernel; False after ``timeout`` seconds.

        Not from the loop thread: the kernel may need it to answer first.
        """
        if self._queue.empty() and self._thread is None:
            return True
        if not self._start():
            return False
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout)

    def close(self) -> None:
        """End the thread. Only once the loop has ended or the connection is gone."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while True:
            message = self._queue.get()
            if message is None:
                return
            if isinstance(message, threading.Event):
                message.set()
                continue
            code = abi.OUT_HEADER.unpack_from(message)[1]
            try:
                os.write(self._fd, message)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOSYS):
                    self.unsupported.add(code)
                    continue
                if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY):
                    log.warning("notification %s failed: %s", abi.NOTIFY_NAMES.get(code, code), error)
                    continue
            self.sent[code] = self.sent.get(code, 0) + 1
