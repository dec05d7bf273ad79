"""The verbs that every mount has: status, limit, unmount."""

from __future__ import annotations

import os
from types import EllipsisType
from typing import Any

from cowfs._record import record
from cowfs.errors import FailedPrecondition, InvalidArgument
from cowfs.model import Limit
from cowfs.mounting import mountpoint
from cowfs.mounting.served import ServedMount
from cowfs.mounting.verbs.arguments import Nothing
from cowfs.mounting.verbs.table import verb

__all__ = ["counted"]

_PATIENCE = 1.0  # seconds that a status waits for a count


@record(frozen=True, slots=True, kw_only=True)
class Limits:
    """``limit``: bytes and a count, None for none; omitted ones stay."""

    bytes: int | EllipsisType | None = ...
    inodes: int | EllipsisType | None = ...


@record(frozen=True, slots=True, kw_only=True)
class Umount:
    """``umount``: lazily, even in use."""

    lazy: bool = False


@verb("alive", Nothing)
def _alive(server: ServedMount, arguments: Nothing) -> dict[str, Any]:
    """Whether the mount still exists, or its server is about to end. The answer does not wait for the loop."""
    return {"pid": os.getpid(), "connected": server.session.connected}


@verb("info", Nothing)
def _info(server: ServedMount, arguments: Nothing) -> dict[str, Any]:
    """Everything about the mount, use and limit included."""
    from dataclasses import asdict

    return {**asdict(server.spec), **server.facts(), **counted(server)}


@verb("usage", Nothing)
def _usage(server: ServedMount, arguments: Nothing) -> dict[str, Any]:
    """Used and allowed bytes and inodes. Without a limit the upper layer is walked, which may take its time."""
    return counted(server, None)


def counted(server: ServedMount, patience: float | None = _PATIENCE) -> dict[str, Any]:
    """Used and allowed bytes and inodes; "usage" is null when there is no count within ``patience`` seconds."""
    used = server.counter.usage(patience)
    limit = server.stack.limit or Limit()
    return {
        "usage": None if used is None else {"bytes": used.bytes, "inodes": used.inodes},
        "limit": {"bytes": limit.bytes, "inodes": limit.inodes},
    }


@verb("limit", Limits)
def _limit(server: ServedMount, arguments: Limits) -> dict[str, Any]:
    """Change the limit: ``bytes`` and ``inodes``, a number or null for none; omitted ones stay."""
    if server.stack.upper is None or server.spec.readonly:
        raise FailedPrecondition("a read-only mount has no limit")
    if server.spec.io == "passthrough":
        raise FailedPrecondition("no limit can hold with io=passthrough", remedy="mount again without --io passthrough")
    now = server.stack.limit or Limit()
    values = {"bytes": now.bytes, "inodes": now.inodes}
    for key in values:
        value = {"bytes": arguments.bytes, "inodes": arguments.inodes}[key]
        if not isinstance(value, EllipsisType):
            if value is not None and value <= 0:
                raise InvalidArgument(f"not a limit of {key}: {value!r}")
            values[key] = value
    limit = Limit(**values)
    upper = server.stack.upper if server.spec.factory else None  # of a store, which keeps the limit in its index

    def change() -> None:
        if upper is not None and limit and server.view.space is None:
            from cowfs.mounting.index_view import count_from_now

            count_from_now(server.view, upper)
        server.view.set_limit(limit or None)

    server.call(change)
    server.stack.keep_limit(limit or None)
    if upper is not None and limit != now:
        from cowfs.mounting.index_view import keep_limit

        keep_limit(upper, limit)
    return counted(server)


@verb("counters", Nothing)
def _counters(server: ServedMount, arguments: Nothing) -> dict[str, Any]:
    """Requests served so far, by opcode."""
    return {"counters": dict(server.session.counters), "nodes": server.call(lambda: len(server.view.nodes))}


@verb("umount", Umount)
def _umount(server: ServedMount, arguments: Umount) -> dict[str, Any]:
    """Unmount. The connection ends when the server has closed everything."""
    mountpoint.detach(server.spec.mountpoint, lazy=arguments.lazy)
    return {}
