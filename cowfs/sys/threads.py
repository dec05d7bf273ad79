"""Starting threads where there may be no room for one more."""

from __future__ import annotations

import threading

__all__ = ["started"]


def started(thread: threading.Thread) -> bool:
    """Start a thread; whether that was possible.

    It is not where a limit of processes or of memory is reached (RLIMIT_NPROC, RLIMIT_AS, cgroups): whoever asks has
    another way, or tries again later.
    """
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        return False
    return True
