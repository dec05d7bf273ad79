"""The shares of a server's descriptors.

Strategy. A process may have a bounded number of descriptors (RLIMIT_NOFILE); past it every open fails, the control
socket's included. So every use has a share: the descriptor opened longest ago is closed to stay within it, and opened
again when it is next needed. An unlinked file that a program holds cannot be opened again: its descriptor holds it up
to a share, and beyond that a name in the work directory does (:func:`cowfs.union.holding.hold`). A reserve belongs to
nobody: control connections, jobs of the workers, and the descriptors that one operation needs for its own length.

Each user of a share closes between operations only, since one may hold several.
"""

from __future__ import annotations

import os
import resource

from cowfs._typed import Final, NamedTuple

#: the smallest share, however few descriptors there are
LEAST: Final = 4
#: the largest share: more of one kind gain nothing
MOST: Final = 4096
#: for control connections, jobs and the operation at hand
RESERVE: Final = 40


class Shares(NamedTuple):
    """The number of descriptors that each use may have.

    Attributes:
        directories: directories of layers.
        files: data of files that can be opened again by name.
        nameless: data of files that cannot.
        removed: directories without a name.
        levels: files beneath redirect files.
        maps: maps of redirect files.
        jobs: jobs that wait for a worker, two each.
    """

    directories: int
    files: int
    nameless: int
    removed: int
    levels: int
    maps: int
    jobs: int


def share_out(budget: int | None = None) -> Shares:
    """Share out the descriptors that this process may still open.

    Args:
        budget: the share of directories, and that of files, in place of the computed ones.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    rest = (1 << 20) if soft == resource.RLIM_INFINITY else soft - _in_use() - RESERVE

    def share(part: int) -> int:
        return max(LEAST, min(MOST, rest // part))

    return Shares(budget or share(4), budget or share(4), share(8), share(32), share(16), share(24), share(32))


def _in_use() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 64


__all__ = ["Shares", "share_out"]
