"""The containers of a store by their records, for programs without a daemon."""

from __future__ import annotations

import json
import os

from cowfs.errors import InvalidArgument

__all__ = ["FOLDER", "cgroup_of", "key_of", "name_of", "names"]

FOLDER = os.path.join("service", "containers")
"""Of the records, in a store."""


def name_of(root: str, id: str) -> str | None:
    """The name of a container; None where there is no record of it."""
    try:
        with open(os.path.join(root, FOLDER, id, "container.json"), "rb") as file:
            return str(json.load(file)["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cgroup_of(root: str, id: str) -> str:
    """The control group of a container's run; "" where it has none."""
    try:
        with open(os.path.join(root, FOLDER, id, "run.json"), "rb") as file:
            return str(json.load(file)["cgroup"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"/cowfs/{id}"  # of a run of before, or of one that is being recorded


def names(root: str) -> dict[str, str]:
    """The names of all containers of a store, by id."""
    try:
        ids = os.listdir(os.path.join(root, FOLDER))
    except OSError:
        return {}
    return {id: name for id in ids if (name := name_of(root, id)) is not None}


def key_of(root: str, reference: str) -> str | None:
    """The key of a container's snapshot, by its name, id, or the beginning of an id; None where there is none.

    Raises:
        InvalidArgument: several ids begin so.
    """
    known = names(root)
    wanted = reference.removeprefix("/")
    found = [id for id, name in known.items() if name == wanted] or [
        id for id in known if wanted and id.startswith(wanted)
    ]
    if len(found) > 1:
        raise InvalidArgument(f"{reference!r} is the beginning of {len(found)} containers' ids")
    return f"container/{found[0]}" if found else None
