"""Conversion of a server's answers into records."""

from __future__ import annotations

from cowfs._typed import Any
from cowfs.model import Limit, Statistics, Timed, Usage

__all__ = ["statistics_of"]


def statistics_of(found: dict[str, Any]) -> Statistics:
    """The statistics in a server's answer."""
    taken = found["timed"] or {"seconds": 0.0, "requests": {}, "hits": 0, "misses": 0}
    return Statistics(
        usage=Usage(**found["usage"]) if found["usage"] is not None else None,
        limit=Limit(**found["limit"]),
        requests=found["requests"],
        nodes=found["nodes"],
        timed_seconds=taken["seconds"],
        timed={name: Timed(*figures) for name, figures in taken["requests"].items()},
        hits=taken["hits"],
        misses=taken["misses"],
        **found["work"],
    )
