"""Events of the store: what the library, the command, mounts and the daemon did, read from the index's log.

Strategy. The log is a table of the index (:mod:`cowfs.index.events`), so a follower needs no process to talk to: it looks
whether anybody wrote (SQLite's ``data_version``, a read of shared memory) and reads what is new. No event is lost while a
reader keeps up with the :data:`~cowfs.index.events.KEPT` newest; a reader that does not gets one ``log lost`` event
with the number of those that it missed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

from cowfs.model import Event
from cowfs.store.snapshots import StoreCore

__all__ = ["EventVerbs"]

PAGE = 1000
PAUSE = 0.02
"""Seconds between two looks of a follower."""


class EventVerbs(StoreCore):
    """events, watch."""

    def events(
        self,
        *,
        since: int | None = None,
        until: int | None = None,
        after: int | None = None,
        follow: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """Events, oldest first.

        Args:
            since: not those earlier than this time, nanoseconds since 1970.
            until: not those later than this time; a follower ends then.
            after: not those up to this sequence number.
            follow: go on with what happens from now on; without ``since`` and ``after`` with nothing else.
            stop: asked by a follower about fifty times a second; a true answer ends it.

        Yields:
            Events; ``log lost`` with the attribute ``count`` in place of those that were deleted before they were read.

        Raises:
            FailedPrecondition: the store is closed.
        """
        first, last = self.index.event_range()
        at = after if after is not None else first - 1
        if since is not None:
            at = max(at, self.index.event_at(since), first - 1)
        elif after is None and follow:
            at = last
        return self._events(at, until, follow, stop)

    def _events(self, at: int, until: int | None, follow: bool, stop: Callable[[], bool] | None) -> Iterator[Event]:
        while True:
            seen = self.index.changes()
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
                if self.index.changes() != seen:
                    break
                time.sleep(PAUSE)

    def _new(self, at: int) -> Iterator[Event]:
        while True:
            found = self.index.events(at, PAGE)
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
        """Add an event of something that is no change of the index itself; its sequence number.

        Args:
            type, action, actor, attributes: as in :class:`cowfs.Event`.
            at: when it happened, nanoseconds since 1970; now by default.

        Raises:
            OSError: there is no room for it (ENOSPC, EDQUOT, EROFS).
        """
        with self.index.write() as change:
            return change.record_event(type, action, actor, attributes, at=at)

    def watch(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call a function with each event from now on, from a thread of its own (which a fork does not take along).

        Args:
            callback: gets each :class:`cowfs.Event`; what it raises ends the thread.

        Returns:
            A function that ends it; after it has returned no call is made any more.

        Raises:
            FailedPrecondition: the store is closed.
        """
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
