"""Writes that the host has no room for wait for it, for a while: what is above a block device takes ENOSPC for a defect, and loses data.

Only sessions with ``SessionOptions.patience`` have it. A write that failed so, or was cut short, is served again as a whole, four
times a second; other requests go on meanwhile. After the time is over it fails as it did.

Threads: all but the timer's one call runs in the loop thread.
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING
from cowfs.fuse import abi, codec

if TYPE_CHECKING:
    from cowfs.fuse.handlers.names import Handler

__all__ = ["Patience"]

_INTERVAL = 0.25  # seconds
_SIZE = struct.Struct("<I")
_ASKED, _WRITTEN = 56, 16  # where a WRITE request tells its size, and its answer how much was written (fuse.h)


class Patience:
    """The writes of one session that wait for room.

    Args:
        seconds: how long each may.
        post: has a function run in the loop thread.
        dispatch: serves a request.
    """

    def __init__(
        self, seconds: float, post: Callable[[Callable[[], None]], None], dispatch: Callable[[bytes], None]
    ) -> None:
        self._seconds = seconds
        self._post = post
        self._dispatch = dispatch
        self._since: dict[int, float] = {}  # unique -> when it was served first
        self._waiting: list[bytes] = []

    def around(self, opcode: int, handler: Handler) -> Handler:
        """A handler that waits where another one finds no room."""
        is_write = opcode == abi.WRITE

        def patient(buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
            try:
                reply = handler(buf, n, unique, nodeid)
                if not is_write or not isinstance(reply, bytes):
                    short = False
                else:
                    short = _SIZE.unpack_from(reply, _WRITTEN)[0] < _SIZE.unpack_from(buf, _ASKED)[0]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._wait(bytes(buf[:n]), unique):
                    raise
                return None
            if short and self._wait(bytes(buf[:n]), unique):
                return None
            if self._since:
                self._since.pop(unique, None)
            return reply

        return patient

    def _wait(self, request: bytes, unique: int) -> bool:
        """Have a request served again later; no, once its time is over."""
        now = time.monotonic()
        if now - self._since.setdefault(unique, now) > self._seconds:
            del self._since[unique]
            return False
        self._waiting.append(request)
        if len(self._waiting) == 1:
            timer = threading.Timer(_INTERVAL, self._post, [self._again])
            timer.daemon = True
            timer.start()
        return True

    def _again(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._dispatch(request)
