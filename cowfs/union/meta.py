"""Everything about an inode but its data: one record."""

from __future__ import annotations

from cowfs._typed import NamedTuple

__all__ = ["Meta"]


class Meta(NamedTuple):
    """Everything about an inode but its data, as the layers store it (not as it is shown)."""

    mode: int
    uid: int
    gid: int
    size: int
    rdev: int
    atime: int
    mtime: int
    xattrs: dict[bytes, bytes]
