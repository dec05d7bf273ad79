"""Memory for requests and answers."""

from __future__ import annotations

import mmap

__all__ = ["lazy"]


def lazy(size: int) -> mmap.mmap:
    """Memory that takes no more room than the longest use so far: most mounts never see a megabyte at once."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
