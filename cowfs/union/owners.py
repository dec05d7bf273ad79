"""The owner of a file, if it differs from the inode's.

Three options change that, and combine in this order: an *override* xattr that records owner and
mode (``user.containers.override_stat``, containers/storage; also ``user.fuseoverlayfs.*``), *maps*
between ids in the layers and ids shown, and *squash*, which shows one owner for everything.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from cowfs.sys import xattr
from cowfs.union.options import IdRange, Options

OVERFLOW = 65534


def map_out(number: int, ranges: Sequence[IdRange]) -> int:
    """The id shown for one in the layers; the overflow id when no range has it."""
    for inside, outside, count in ranges:
        if inside <= number < inside + count:
            return outside + number - inside
    return OVERFLOW if ranges else number


def map_in(number: int, ranges: Sequence[IdRange]) -> int:
    """The id stored for one that a user gave. Raises EOVERFLOW when no range has it."""
    for inside, outside, count in ranges:
        if outside <= number < outside + count:
            return inside + number - outside
    if ranges:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    return number


def _placed(number: int, ranges: Sequence[IdRange], squash: int | None) -> int:
    if squash is not None:
        return -1
    try:
        return map_in(number, ranges)
    except OSError:
        return OVERFLOW


class Owners:
    """Translates owners both ways. Stateless."""

    __slots__ = ("gids", "override", "squash_gid", "squash_uid", "uids")

    def __init__(self, options: Options) -> None:
        self.uids, self.gids = options.uid_map, options.gid_map
        self.squash_uid, self.squash_gid = options.squash_uid, options.squash_gid
        self.override = options.override_xattr

    def show(self, st: os.stat_result, fd: int, name: bytes) -> tuple[int, int, int]:
        """The (mode, uid, gid) to show for an inode."""
        mode, uid, gid = st.st_mode, st.st_uid, st.st_gid
        if self.override is not None and not stat.S_ISLNK(mode):
            value = xattr.try_get(fd, name, self.override)
            if value is not None:
                uid, gid, mode = _parse_override(value, mode)
        return self.show_ids(mode, uid, gid)

    def show_ids(self, mode: int, uid: int, gid: int) -> tuple[int, int, int]:
        """The same from numbers."""
        uid = self.squash_uid if self.squash_uid is not None else map_out(uid, self.uids)
        gid = self.squash_gid if self.squash_gid is not None else map_out(gid, self.gids)
        return mode, uid, gid

    def stored(self, uid: int, gid: int) -> tuple[int, int]:
        """(uid, gid) to store for what a user gave; -1 leaves one alone."""
        if uid != -1:
            uid = -1 if self.squash_uid is not None else map_in(uid, self.uids)
        if gid != -1:
            gid = -1 if self.squash_gid is not None else map_in(gid, self.gids)
        return uid, gid

    def stored_new(self, uid: int, gid: int) -> tuple[int, int]:
        """(uid, gid) to store for the maker of an object. An id outside every range may still create; the overflow id then owns the object.

        A container engine writes into its containers from outside (/etc/mtab, mount points), as fuse-overlayfs lets it.
        """
        return _placed(uid, self.uids, self.squash_uid), _placed(gid, self.gids, self.squash_gid)

    def record(self, fd: int, name: bytes, mode: int, uid: int, gid: int) -> bool:
        """Store owner and mode in the override xattr. Returns False without that option."""
        if self.override is None or stat.S_ISLNK(mode):
            return False
        value = f"{uid}:{gid}:{stat.S_IMODE(mode):04o}".encode()
        xattr.setx(fd, name, self.override, value)
        return True


def _parse_override(value: bytes, mode: int) -> tuple[int, int, int]:
    """``uid:gid:mode[:type]``; a malformed value is ignored, since layers come from strangers."""
    fields = value.split(b":")
    try:
        return int(fields[0]), int(fields[1]), stat.S_IFMT(mode) | (int(fields[2], 8) & 0o7777)
    except (IndexError, ValueError):
        return 0, 0, mode


def make_owners(options: Options) -> Owners | None:
    """The translation of owners; ``None`` if owners are the inodes', which costs nothing."""
    changed = (
        options.uid_map
        or options.gid_map
        or options.squash_uid is not None
        or options.squash_gid is not None
        or options.override_xattr is not None
    )
    return Owners(options) if changed else None
