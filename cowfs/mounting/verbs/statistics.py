"""The verb ``statistics``: all figures of a mount's server, in one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cowfs.errors import InvalidArgument
from cowfs.fuse.loop import Session
from cowfs.mounting.served import ServedMount
from cowfs.mounting.verbs.basic import counted
from cowfs.mounting.verbs.table import Stream, streamed, verb

__all__: list[str] = []

_LONGEST = 60.0  # seconds: a stream notices a closed connection only when it sends


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """``statistics``: whether requests are timed from now on; streamed: seconds from one answer to the next."""

    timed: bool = True
    interval: float = 1.0


@verb("statistics", Statistics)
def _statistics(server: ServedMount, arguments: Statistics) -> dict[str, Any]:
    """Use, limit, requests by kind, work done (:class:`cowfs.union.work.Work`), and the timed requests.

    Args:
        timed: whether to time requests from now on; else "timed" is null.

    Returns:
        usage, limit: as of the verb ``usage``; usage is null while a big upper layer without a limit is being counted.
        requests: opcode -> count. nodes: nodes in memory. work: see there.
        timed: see :meth:`cowfs.fuse.timing.Timing.watch`; null for a front end without it.
    """

    timed = arguments.timed

    def look() -> dict[str, Any]:
        session = server.session
        return {
            "requests": dict(session.counters),
            "nodes": len(server.view.nodes),
            "work": server.view.work.told(),
            "timed": session.timing.watch() if timed and isinstance(session, Session) else None,
        }

    return {**server.call(look), **counted(server)}


@streamed("statistics", Statistics)
def _stream(server: ServedMount, arguments: Statistics) -> Stream:
    """Statistics every ``interval`` seconds, until the client or the mount is gone."""
    if not 0 < arguments.interval <= _LONGEST:
        raise InvalidArgument(
            f"not an interval in seconds: {arguments.interval!r}", remedy=f"more than 0, at most {_LONGEST:g}"
        )
    while True:
        now = _statistics(server, arguments)
        yield now
        if server.pause(arguments.interval):
            return now
