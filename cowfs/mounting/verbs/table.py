"""The table of verbs: each module of this package enters its own.

Rules: a verb is called in its connection's thread, gets the served mount and the message, and returns what the answer's "ok"
holds, or raises a :class:`~cowfs.errors.CowfsError`. Whatever touches the view goes through
:meth:`ServedMount.call <cowfs.mounting.served.ServedMount.call>`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cowfs.mounting.served import ServedMount

__all__ = ["VERBS", "Verb", "verb"]

Verb = Callable[[ServedMount, dict[str, Any]], dict[str, Any]]

VERBS: dict[str, Verb] = {}


def verb(name: str) -> Callable[[Verb], Verb]:
    """Register a verb of the control socket."""

    def register(function: Verb) -> Verb:
        VERBS[name] = function
        return function

    return register
