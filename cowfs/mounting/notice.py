"""The notice that a mount's server leaves beside its upper layer: its process, mount point and control socket.

So the server of a layer is found by reading the layer's directory, without asking other servers.

Rule 1. A notice is true only while the upper layer is locked; without a lock it is left over, and the next exclusive
holder of the lock drops it. (Its server cannot: before the lock is free, the end would look like a verb at work; after, the
notice may be another server's.)
Rule 2. A mount without a notice works: on a full or read-only host there is none, and a search for a server asks all of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from cowfs._typed import NamedTuple

__all__ = ["PREFIX", "Notice", "drop", "found", "leave"]

PREFIX = "cowfs-server-"


class Notice(NamedTuple):
    """One server's notice.

    Attributes:
        socket: its control socket.
        pid: the process, by its number in its own pid namespace.
        mountpoint: absolute path in its mount namespace.
        device: of the mount, as mountinfo writes it: "0:48".
        label: a snapshot's key, or "" for a mount that no store made.
    """

    socket: str
    pid: int
    mountpoint: str
    device: str
    label: str


def leave(directory: str, notice: Notice, *, alone: bool) -> str | None:
    """Leave a notice in a directory, and return its path, or None if the directory is not writable.

    Args:
        alone: the caller holds the lock exclusively: existing notices are left over.
    """
    import json

    from cowfs.sys.atomic import write_file

    path = _path(directory, notice)
    try:
        if alone:
            drop(directory)
        write_file(path, os.fsencode(json.dumps(notice._asdict(), ensure_ascii=False)), durable=False)
    except OSError:
        return None
    return path


def remove(directory: str, notice: Notice) -> None:
    """Remove the notice of a server that is about to release its locks."""
    with contextlib.suppress(OSError):
        os.unlink(_path(directory, notice))


def _path(directory: str, notice: Notice) -> str:
    return os.path.join(directory, PREFIX + notice.device.rpartition(":")[2])


def found(directories: Iterable[str]) -> list[Notice]:
    """The notices in some directories, left over ones included."""
    notices = []
    for directory in directories:
        for path in _paths(directory):
            import json  # now that there is one: most layers have none

            try:
                with open(path, encoding="utf-8", errors="surrogateescape", opener=_careful) as file:
                    data = json.loads(file.read(1 << 16))
                kinds = Notice.__annotations__
                values = {name: data[name] for name in kinds}
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if all(isinstance(values[name], int if name == "pid" else str) for name in kinds):
                notices.append(Notice(**values))
    return notices


def drop(directory: str) -> None:
    """Remove all notices of a directory. Only for the exclusive holder of the layer's lock."""
    for path in _paths(directory):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _paths(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except (OSError, ValueError):  # ValueError: a damaged index names a directory with a NUL
        return []
    return [os.path.join(directory, name) for name in names if name.startswith(PREFIX)]


def _careful(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
