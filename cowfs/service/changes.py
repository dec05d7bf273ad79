"""``docker diff``: what a snapshot changed, as Docker counts and lists it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cowfs.store import Store

__all__ = ["changes"]

_KINDS = {"changed": 0, "added": 1, "deleted": 2}


def changes(store: Store, key: str, before: str | None = None) -> Iterator[tuple[str, int]]:
    """Paths that are changed (0), added (1) and deleted (2), in order, the directories above them among them.

    Args:
        key: a key or a name.
        before: another than the one that it stands on.

    Raises:
        NotFound: no such snapshot.
    """
    told: dict[str, int] = {}
    for change in store.diff(key) if before is None else store.diff(before, key):
        if not change.path:
            continue
        path = "/" + os.fsdecode(change.path)
        above = os.path.dirname(path)
        while above != "/" and above not in told:
            told[above] = 0
            above = os.path.dirname(above)
        told[path] = _KINDS[change.kind]
    yield from sorted(told.items())
