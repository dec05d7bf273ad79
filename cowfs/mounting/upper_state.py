"""The record beside a kept upper: its layers and its limit.

An upper means nothing without the layers beneath it, so a mount over other layers is refused. Paths are relative to the
record, so that a stack can be moved as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs.errors import Corrupt
from cowfs.model import Limit
from cowfs.sys import atomic
from cowfs.sys.regular import read_small

__all__ = ["HIDDEN", "RECORD", "layers_of", "limit_of", "lookup_record", "read_record", "record_places", "write_record"]

RECORD = "state.json"
HIDDEN = ".cowfs"
"""Directory beside the layers for what cowfs keeps there; ending of the one beside an upper."""


def record_places(upper: str) -> tuple[str, ...]:
    """The possible directories of the record of an upper, the usual one first."""
    parent, name = os.path.split(upper.rstrip("/"))
    return (os.path.join(parent, f".{name}{HIDDEN}"), parent)


def lookup_record(upper: str) -> tuple[tuple[str, ...], Limit] | None:
    """Layers (bottom first) and limit recorded beside an upper directory, or None when there is no record.

    Raises:
        Corrupt: a damaged record.
    """
    upper = os.path.realpath(upper)
    for place in record_places(upper):
        found = read_record(place)
        if found and os.path.realpath(os.path.join(place, str(found.get("upper")))) == upper:
            return layers_of(place, found), limit_of(found)
    return None


def read_record(place: str) -> dict[str, object] | None:
    """The record in a directory, or None.

    Raises:
        Corrupt: a damaged record.
    """
    import json

    path = os.path.join(place, RECORD)
    try:
        data = json.loads(read_small(path).decode("utf-8", "surrogateescape"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Corrupt(
            f"{path} cannot be read: {error}", remedy="remove it if you know the layers of this upper"
        ) from None
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list) or not isinstance(data.get("upper"), str):
        raise Corrupt(f"{path} is not a record of cowfs", remedy="remove it if you know the layers of this upper")
    return data


def layers_of(place: str, record: dict[str, object]) -> tuple[str, ...]:
    """The layers of a record that lies in ``place``, bottom first, absolute."""
    layers = record["layers"]
    assert isinstance(layers, list)
    return tuple(os.path.normpath(os.path.join(place, str(layer))) for layer in layers)


def limit_of(record: dict[str, object]) -> Limit:
    """The limit of a record."""

    def number(name: str) -> int | None:
        value = record.get(name)
        return value if isinstance(value, int) else None

    return Limit(bytes=number("size"), inodes=number("inodes"))


def write_record(place: str, layers: Sequence[str], upper: str, limit: Limit) -> None:
    """Write a record, wholly or not at all."""
    import json

    data = {
        "version": 1,
        "upper": os.path.relpath(upper, place),
        "layers": [os.path.relpath(layer, place) for layer in layers],
        "size": limit.bytes,
        "inodes": limit.inodes,
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    atomic.write_file(os.path.join(place, RECORD), text.encode("utf-8", "surrogateescape"))
