"""How a server shares out its descriptors.

Strategy. A process may have so many descriptors (RLIMIT_NOFILE); past that nothing opens any more, the control socket
included. So every use has a share, and what was opened longest ago is closed to stay within it and opened again when
next needed. What cannot be opened again, an unlinked file that a program holds, is held by its descriptor up to
a share, and beyond it by a name in the work directory (:func:`cowfs.union.holding.hold`). A reserve belongs to nobody: control
connections, jobs of the workers, and the descriptors that one operation needs for its own length.

Each user of a share closes between operations only, since one may hold several.
"""

from __future__ import annotations

import os
import resource
from typing import Final, NamedTuple

#: descriptors that a share never goes below, however few there are
LEAST: Final = 4
#: more than this many of one kind gain nothing
MOST: Final = 4096
#: for control connections, jobs and the operation at hand
RESERVE: Final = 40


class Shares(NamedTuple):
    """How many descriptors each use may have.

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
    """Share out what this process may have besides what it has open now.

    Args:
        budget: that many for directories and as many for files, for callers who know better.
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
