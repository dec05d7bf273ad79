"""The verb ``compact``, a mount server's part of `cowfs compact`.

One call works for a short time and returns its progress; the caller repeats it until "finished". So progress needs no
second channel, and a caller that goes away leaves only compacted files behind.

Threads: called in a connection's thread of the control socket. The loop thread does one small piece at a time, between
requests; this thread waits for the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument
from cowfs.mounting.served import ServedMount
from cowfs.mounting.verbs.table import Stream, streamed, verb
from cowfs.row.compact import SHARE, Progress, compact

__all__: list[str] = []

_SECONDS = 0.5

_lock = threading.Lock()
_running: WeakKeyDictionary[ServedMount, Iterator[Progress]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """``compact``: the files whose own blocks are at least this share of them, from 0 to 1."""

    share: float | None = None


@verb("compact", Compact)
def _compact(server: ServedMount, arguments: Compact) -> dict[str, Any]:
    """Begin to compact, or go on: the files whose own blocks are at least ``share`` of them.

    Returns:
        files, skipped, done, todo, path: see :class:`~cowfs.row.compact.Progress`; finished: whether all files are done.
    """
    share = SHARE if arguments.share is None else arguments.share
    if not 0 <= share <= 1:
        raise InvalidArgument(f"not a share from 0 to 1: {share!r}")
    view = server.view
    if view.upper is None or server.spec.readonly:
        raise FailedPrecondition("a read-only mount has nothing to compact")
    told = Progress()
    finished = view.rows is None
    if not finished:
        with _lock:  # one step at a time for all callers
            steps = _running.pop(server, None) or compact(view, share=share, call=server.call)
            end = time.monotonic() + _SECONDS
            try:
                for step in steps:
                    told = step
                    if time.monotonic() > end:
                        _running[server] = steps
                        break
                else:
                    finished = True
            except OSError as error:
                name = told.path.decode(errors="replace")
                raise CowfsError(f"compaction stopped at {name}: {error.strerror}") from None
    return {
        "files": told.files,
        "skipped": told.skipped,
        "done": told.done,
        "todo": told.todo,
        "path": told.path.decode(errors="surrogateescape"),
        "finished": finished,
    }


@streamed("compact", Compact)
def _stream(server: ServedMount, arguments: Compact) -> Stream:
    """Compact to the end, with news twice a second. Files are compacted one by one; the departure of the client ends it."""
    while True:
        told = _compact(server, arguments)
        if told["finished"] or server.pause(0):
            return told
        yield told
