"""Threads that can be had, or not.

``threading.Thread.start`` raises when the system has no thread to give, but waits without end for one that was given and had no
memory to begin with (seen under RLIMIT_AS). A server must do neither: whoever wants a thread here is told that there
is none, and has another way or tries again later.
"""

from __future__ import annotations

import _thread
import contextlib
import time
from collections.abc import Callable
from typing import Final

__all__ = ["Thread"]

#: seconds that a thread may take to begin, and for which no other is tried after one did not
_BEGIN: Final = 2.0
_AGAIN: Final = 5.0

_not_before = 0.0  # monotonic time


class Thread:
    """A function that runs in a thread of its own once :meth:`start` said so. It ends with the process.

    Args:
        name: what :func:`threading.current_thread` says in it.
    """

    __slots__ = ("_begun", "_claim", "_ended", "_function", "_name")

    def __init__(self, function: Callable[[], object], name: str) -> None:
        self._function = function
        self._name = name
        self._begun = _thread.allocate_lock()
        self._claim = _thread.allocate_lock()  # whoever gets it decides whether the function runs
        self._ended = _thread.allocate_lock()

    def start(self) -> bool:
        """Start it; whether that was possible. Once only, unless it was not."""
        global _not_before
        if time.monotonic() < _not_before:
            return False
        self._begun.acquire(blocking=False)
        self._ended.acquire(blocking=False)
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError):
            return False
        if self._begun.acquire(timeout=_BEGIN) or not self._claim.acquire(blocking=False):
            return True
        _not_before = time.monotonic() + _AGAIN
        self._claim = _thread.allocate_lock()
        return False

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return  # so late that nobody counts on it any more
        self._begun.release()
        with contextlib.suppress(MemoryError):
            import threading  # a command that starts no thread does without

            threading.current_thread().name = self._name
        try:
            self._function()
        finally:
            self._ended.release()

    def join(self, timeout: float = -1) -> bool:
        """Wait until it has ended, seconds; whether it has."""
        if not self._ended.acquire(timeout=timeout):
            return False
        self._ended.release()
        return True
