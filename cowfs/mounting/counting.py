"""Counting the upper layer of a mount that has no limit, while the mount goes on.

A view with a limit keeps its count. A view without a limit keeps none, so a request for the use needs a walk, which
must not delay other requests: the thread of the asking connection makes it, over descriptors of its own, with a pause
after every hundred names. A request meanwhile waits for the running walk.

Threads: :class:`Counter` is called from connections' threads, and asks the loop thread only for the upper layer.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from functools import partial

from cowfs._typed import TYPE_CHECKING
from cowfs.model import Usage
from cowfs.sys.threads import Thread
from cowfs.union.layers import Descriptors, Layer
from cowfs.union.measure import measure

if TYPE_CHECKING:
    from cowfs.mounting.served import ServedMount

__all__ = ["Counter"]

_PAUSE = 0.0002  # seconds: long enough for the loop to get the interpreter's lock
_FEW = 64  # descriptors of directories


class Counter:
    """The count of one mount's upper layer."""

    def __init__(self, server: ServedMount) -> None:
        self._server = server
        self._changed = threading.Condition()
        self._walking = False
        self._done = 0  # walks that ended
        self._last: Usage | None = None
        self._error: OSError | None = None

    def usage(self, patience: float | None = None) -> Usage | None:
        """Use of the upper layer.

        Args:
            patience: seconds to wait at most for a walk; the result is then that of the last walk, if there was one.

        Raises:
            OSError: the upper layer cannot be read.
        """
        kept = self._server.call(self._kept)
        if isinstance(kept, Usage):
            return kept
        return self._walked(kept, patience)

    def _kept(self) -> Usage | int:
        """In the loop thread: the count of a view that has one, else a descriptor of its upper layer."""
        view = self._server.view
        if view.space is not None or view.upper is None:
            return view.usage()
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=view.upper.root.open())

    def _walked(self, root: int, patience: float | None) -> Usage | None:
        with self._changed:
            wanted = self._done + 1
            if self._walking:
                os.close(root)
                wanted += 1 if patience is None else 0  # a running walk may have begun before the changes in question
            else:
                self._start(root)
            end = None if patience is None else time.monotonic() + patience
            while self._done < wanted:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return self._last
                self._changed.wait(left)
                if self._done < wanted and not self._walking:
                    again = self._server.call(self._kept)
                    if isinstance(again, Usage):
                        return again
                    self._start(again)
            if self._error is not None:
                raise self._error
            return self._last

    def _start(self, root: int) -> None:
        self._walking = True
        if not Thread(partial(self._walk, root), "cowfs-count").start():
            self._walk(root)  # in this thread, while other requests wait; the lock is reentrant

    def _walk(self, root: int) -> None:
        found: Usage | None = None
        failed: OSError | None = None
        try:
            layer = Layer(b"/proc/self/fd/%d" % root, 0, Descriptors(_FEW))
            try:
                found = measure(layer, self._server.view.form, lambda: time.sleep(_PAUSE))
            finally:
                layer.close()
        except OSError as error:
            failed = error
        except MemoryError:
            failed = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        finally:
            os.close(root)
            with self._changed:
                self._walking = False
                self._done += 1
                self._error = failed
                self._last = found if failed is None else self._last
                self._changed.notify_all()
