"""Starting threads on a host that may have none to give.

``threading.Thread.start`` raises when the system has no thread to give, but waits without end for a thread that has no
memory to begin with (seen under RLIMIT_AS). A server must do neither: :meth:`Thread.start` reports that there is no
thread, and the caller goes another way or tries again later.
"""

from __future__ import annotations

import _thread
import contextlib
import time
from collections.abc import Callable

from cowfs._typed import Final

__all__ = ["Thread"]

#: seconds that a thread may take to begin; after a failure no other is tried for as long
_BEGIN: Final = 2.0
_AGAIN: Final = 5.0

_not_before = 0.0  # monotonic time


class Thread:
    """A function that :meth:`start` runs in a thread of its own. It ends with the process.

    Args:
        name: the thread's name.
    """

    __slots__ = ("_begun", "_claim", "_ended", "_function", "_name")

    def __init__(self, function: Callable[[], object], name: str) -> None:
        self._function = function
        self._name = name
        self._begun = _thread.allocate_lock()
        self._claim = _thread.allocate_lock()  # its holder decides whether the function runs
        self._ended = _thread.allocate_lock()

    def start(self) -> bool:
        """Start the thread. Returns whether that was possible; only after a failure may it be called again."""
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
            return  # too late: the caller has gone another way
        self._begun.release()
        with contextlib.suppress(MemoryError):
            import threading  # imported late: a command that starts no thread needs none of it

            threading.current_thread().name = self._name
        try:
            self._function()
        finally:
            self._ended.release()

    def join(self, timeout: float = -1) -> bool:
        """Wait for the end of the thread, for some seconds at most. Returns whether it has ended."""
        if not self._ended.acquire(timeout=timeout):
            return False
        self._ended.release()
        return True
