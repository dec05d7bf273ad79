"""Events of the store: the actions of library, command, mounts and daemon, read from the index's log.

Strategy. The log is a table of the index (:mod:`cowfs.index.events`), so a follower needs no server: it checks for
writes (SQLite's ``data_version``, a read of shared memory) and reads new events. No event is lost while a reader keeps
up with the :data:`~cowfs.index.events.KEPT` newest; a reader that does not gets one ``log lost`` event with the number
of those that it missed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

from cowfs._typed import TYPE_CHECKING
from cowfs.model import Event

if TYPE_CHECKING:
    from cowfs.store.context import Context

__all__ = ["Events"]

PAGE = 1000

PAUSE = 0.02
"""Seconds between two looks of a follower."""


class Events:
    """The log of events, written, read and followed."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def events(
        self,
        *,
        since: int | None = None,
        until: int | None = None,
        after: int | None = None,
        follow: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """As :meth:`cowfs.Store.events`."""
        first, last = self.context.index.event_range()
        at = after if after is not None else first - 1
        if since is not None:
            at = max(at, self.context.index.event_at(since), first - 1)
        elif after is None and follow:
            at = last
        return self._events(at, until, follow, stop)

    def _events(self, at: int, until: int | None, follow: bool, stop: Callable[[], bool] | None) -> Iterator[Event]:
        while True:
            seen = self.context.index.changes()
            for event in self._new(at):
                if until is not None and event.time > until:
                    if not follow:
                        return
                else:
                    yield event
                at = event.seq or at
            if not follow:
                return
            while True:
                if (stop is not None and stop()) or (until is not None and time.time_ns() >= until):
                    yield from (event for event in self._new(at) if until is None or event.time <= until)
                    return
                if self.context.index.changes() != seen:
                    break
                time.sleep(PAUSE)

    def _new(self, at: int) -> Iterator[Event]:
        while True:
            found = self.context.index.events(at, PAGE)
            if not found:
                return
            if found[0].seq != at + 1:
                lost = found[0].seq - at - 1
                yield Event(
                    seq=0, time=found[0].time, type="log", action="lost", actor="", attributes={"count": str(lost)}
                )
            yield from found
            at = found[-1].seq

    def record_event(
        self, type: str, action: str, actor: str, attributes: Mapping[str, str] | None = None, *, at: int | None = None
    ) -> int:
        """As :meth:`cowfs.Store.record_event`."""
        with self.context.index.write() as change:
            return change.record_event(type, action, actor, attributes, at=at)

    def watch(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """As :meth:`cowfs.Store.watch`."""
        ended = threading.Event()
        events = self.events(follow=True, stop=ended.is_set)

        def run() -> None:
            for event in events:
                if ended.is_set():
                    return
                callback(event)

        thread = threading.Thread(target=run, name="cowfs-events", daemon=True)
        thread.start()

        def end() -> None:
            ended.set()
            if thread is not threading.current_thread():
                thread.join()

        return end
