"""The function of a verb by its name; verbs that most mounts never need are imported at the first call of one."""

from __future__ import annotations

from collections.abc import Callable

from cowfs.mounting.verbs import basic  # noqa: F401 - it registers its verbs
from cowfs.mounting.verbs.table import VERBS, Verb

__all__ = ["find_verb", "names"]


def _compact() -> None:
    from cowfs.mounting.verbs import compact  # noqa: F401


def _live() -> None:
    from cowfs.mounting.verbs import live  # noqa: F401


def _restack() -> None:
    from cowfs.mounting.verbs import restack  # noqa: F401


def _statistics() -> None:
    from cowfs.mounting.verbs import statistics  # noqa: F401


_LATE: dict[str, Callable[[], None]] = {
    "absorb": _restack,
    "compact": _compact,
    "freeze": _live,
    "readonly": _live,
    "restack": _restack,
    "rollback": _live,
    "statistics": _statistics,
    "subvolume": _live,
    "sync": _live,
}


def find_verb(name: str) -> Verb | None:
    """The verb of a name, imported on demand."""
    if name in _LATE and name not in VERBS:
        _LATE[name]()
    return VERBS.get(name)


def names() -> list[str]:
    """All verbs, sorted."""
    return sorted({*VERBS, *_LATE})
