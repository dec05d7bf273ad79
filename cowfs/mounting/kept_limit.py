"""The limit that a mount of an engine got while it was mounted, kept in its work directory for the mounts to come.

An engine's mount has no record beside its upper (:mod:`cowfs.mounting.upper_state`), and its options come from the engine, for all containers
alike. A limit that somebody set for the one container must survive `podman stop` and `podman start`, and hold for `podman cp` to a container that does
not run. The work directory is the mount's own, and goes with the container.

Rule: the newest word counts. The record says what the options asked when the limit was set; where they ask something else now, they are newer.
"""

from __future__ import annotations

import json
import os

from cowfs.errors import Corrupt
from cowfs.model import Limit
from cowfs.sys import atomic
from cowfs.sys.regular import read_small

__all__ = ["NAME", "read", "write"]

NAME = "limit.json"


def read(work: str, asked: Limit) -> Limit:
    """The limit of a mount whose options ask for ``asked``.

    Raises:
        Corrupt: the record cannot be read.
    """
    path = os.path.join(work, NAME)
    try:
        text = read_small(path)
    except FileNotFoundError:
        return asked
    except OSError as error:
        raise _corrupt(path, error.strerror or "not to be read") from None
    try:
        data = json.loads(text)
        limit, then = (Limit(bytes=data[name]["size"], inodes=data[name]["inodes"]) for name in ("limit", "asked"))
        for number in (limit.bytes, limit.inodes):
            if number is not None and (type(number) is not int or number <= 0):
                raise ValueError("no limit")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _corrupt(path, "no record of a limit") from None
    return limit if then == asked else asked


def write(work: str, asked: Limit, limit: Limit) -> None:
    """Keep a limit. Raises OSError."""
    told = {name: {"size": each.bytes, "inodes": each.inodes} for name, each in (("limit", limit), ("asked", asked))}
    atomic.write_file(os.path.join(work, NAME), json.dumps(told).encode() + b"\n")


def _corrupt(path: str, why: str) -> Corrupt:
    return Corrupt(f"{path}: {why}", remedy="remove it; the limit is then the one of the mount's options")
