"""The verb ``statistics``: all that a mount's server counts, in one answer."""

from __future__ import annotations

from typing import Any

from cowfs.fuse.loop import Session
from cowfs.mounting.served import ServedMount
from cowfs.mounting.verbs.basic import counted
from cowfs.mounting.verbs.table import verb

__all__: list[str] = []


@verb("statistics")
def _statistics(server: ServedMount, arguments: dict[str, Any]) -> dict[str, Any]:
    """Use, limit, requests by kind, work done (:class:`cowfs.union.work.Work`), and the requests that were timed while somebody looked.

    Args:
        timed: whether to time requests from now on; else "timed" is null.

    Returns:
        usage, limit: as of the verb ``usage``; usage is null while a big upper layer without a limit is being counted.
        requests: opcode -> count. nodes: that are in memory. work: see there.
        timed: see :meth:`cowfs.fuse.timing.Timing.watch`; null also for a front end that cannot.
    """

    timed = bool(arguments.get("timed", True))

    def look() -> dict[str, Any]:
        session = server.session
        return {
            "requests": dict(session.counters),
            "nodes": len(server.view.nodes),
            "work": server.view.work.told(),
            "timed": session.timing.watch() if timed and isinstance(session, Session) else None,
        }

    return {**server.call(look), **counted(server)}
