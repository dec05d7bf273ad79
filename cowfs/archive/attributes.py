"""The owner, mode, extended attributes and times of extracted objects.

Rule 1: the order is such that no step undoes another: owner (clears set-id bits
and capabilities), mode, attributes (an ACL changes the mode), times.
Rule 2: the overlay's own attributes and the owner override are never taken from an archive.
Rule 3: an attribute that this process may not set is an error, or follows ``ApplyOptions.owners``; it is never dropped silently.
Rule 4: the kernel silently cuts a time to the range of the file system: times out of
the range that all can store are read back, and fractions of a second until one was kept to the nanosecond.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter

from cowfs.archive import header
from cowfs.archive.header import Member
from cowfs.archive.names import show
from cowfs.archive.options import OVERRIDE_XATTR, ApplyOptions
from cowfs.errors import InvalidArgument, Unsupported
from cowfs.sys import xattr

__all__ = ["PLAIN_END", "SET_ID", "Attributes", "drop_acls", "drop_xattr", "is_smuggled"]

PLAIN_END = (1 << 31) * header.NANO  # every file system keeps a time from the epoch to here
SET_ID = stat.S_ISUID | stat.S_ISGID
_VALUE_MAX, _LIST_MAX = 65536, 65536 - 1024  # xattr(7); past the second listxattr(2) fails for everybody
_DENIED = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL})
_NO_XATTR = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.EACCES})

# They would make whiteouts, redirects or other owners.
_SMUGGLED = (b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs.", b"security.fuseoverlayfs.")


class Attributes:
    """The attributes that may be set here, and how.

    Attributes:
        uid, gid: of this process, so of every object just made.
        dropped: extended attributes left out, name to count.
    """

    def __init__(self, options: ApplyOptions) -> None:
        self.uid, self.gid = os.geteuid(), os.getegid()
        self._fine = False  # this file system was seen to keep nanoseconds
        self.dropped: Counter[str] = Counter()
        self._owners, self._xattrs = options.owners, options.xattrs

    def wanted(self, member: Member) -> dict[bytes, bytes]:
        """The member's extended attributes less those that no archive may bring."""
        if not member.xattrs or not self._xattrs:
            return {}
        wanted: dict[bytes, bytes] = {}
        for name, value in member.xattrs.items():
            if is_smuggled(name):
                self.dropped[os.fsdecode(name)] += 1
            else:
                wanted[name] = value
                if len(value) > _VALUE_MAX:
                    raise InvalidArgument(f"extended attribute {show(name)} of {len(value)} bytes")
        if sum(map(len, wanted)) + len(wanted) > _LIST_MAX:
            raise InvalidArgument(f"{len(wanted)} extended attributes are more than can be listed")
        return wanted

    def set(
        self, fd: int, uid: int, gid: int, mode: int, kind: str, attributes: dict[bytes, bytes], *,
        regroup: bool = False,
    ) -> None:  # fmt: skip
        """Owner, mode and extended attributes of an open file or directory; ``regroup``: the owner may be another user."""
        if self._owners == "xattr":
            reach = 0o700 if kind == "dir" else 0o600
            os.chmod(fd, (mode & 0o777) | reach)
            self._set_xattrs(fd, attributes)
            os.setxattr(fd, OVERRIDE_XATTR, b"%d:%d:0%o:%b" % (uid, gid, mode, kind.encode()))
            return
        kept = True
        if regroup or uid != self.uid or gid != self.gid:
            kept = self.chown(fd, uid, gid)
        if attributes:
            if not mode & 0o200 and os.geteuid():  # user.* takes a mode that lets its owner write
                os.fchmod(fd, mode & 0o777 | (0o700 if kind == "dir" else 0o600))
            self._set_xattrs(fd, attributes)
        os.fchmod(fd, mode if kept else mode & ~SET_ID)

    def chown(self, fd: int, uid: int, gid: int) -> bool:
        """True when the owner is set; False when it may stay as it is."""
        try:
            os.fchown(fd, uid, gid)
        except OSError as error:
            return self._unowned(error, uid, gid)
        return True

    def chown_name(self, dirfd: int, name: bytes, member: Member) -> bool:
        try:
            os.chown(name, member.uid, member.gid, dir_fd=dirfd, follow_symlinks=False)
        except OSError as error:
            return self._unowned(error, member.uid, member.gid)
        return True

    def _unowned(self, error: OSError, uid: int, gid: int) -> bool:
        if error.errno not in _DENIED:
            raise error
        if self._owners == "fail":
            raise Unsupported(
                f"owner {uid}:{gid} cannot be set here: {error.strerror}",
                remedy="run as root, or choose --owners xattr or --owners ignore",
            ) from None
        return False

    def _set_xattrs(self, fd: int, attributes: dict[bytes, bytes]) -> None:
        for name, value in attributes.items():
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                self._no_xattr(error, name)

    def name_xattrs(self, dirfd: int, name: bytes, member: Member) -> None:
        for attribute, value in self.wanted(member).items():
            try:
                xattr.setx(dirfd, name, attribute, value)
            except OSError as error:
                self._no_xattr(error, attribute)

    def _no_xattr(self, error: OSError, name: bytes) -> None:
        if error.errno not in _NO_XATTR:
            raise error
        if self._owners == "fail":
            raise Unsupported(
                f"extended attribute {show(name)} cannot be set here: {error.strerror}",
                remedy="apply without xattrs, or choose --owners xattr or --owners ignore",
            ) from None
        self.dropped[os.fsdecode(name)] += 1

    def name_times(self, dirfd: int, name: bytes, member: Member) -> None:
        atime = member.mtime if member.atime is None else member.atime
        os.utime(name, ns=(atime, member.mtime), dir_fd=dirfd, follow_symlinks=False)
        if self.doubtful(member.mtime):
            self._same_time(os.stat(name, dir_fd=dirfd, follow_symlinks=False), member.mtime)

    def doubtful(self, mtime: int) -> bool:
        """Whether this file system may cut a time: one that not all can store, or a fraction while none was seen to be kept."""
        return not 0 <= mtime < PLAIN_END or (not self._fine and mtime % header.NANO != 0)

    def check_time(self, fd: int, mtime: int) -> None:
        """Set times again where the kernel silently cut them to the range of the file system."""
        self._same_time(os.fstat(fd), mtime)

    def _same_time(self, st: os.stat_result, mtime: int) -> None:
        if st.st_mtime_ns == mtime:
            self._fine = self._fine or mtime % 10 != 0
        elif st.st_mtime_ns // header.NANO == mtime // header.NANO:
            raise InvalidArgument(
                f"this file system cannot keep a fraction of a second (.{mtime % header.NANO:09d})",
                remedy="use one that keeps nanoseconds: ext4 with inodes of 256 bytes, xfs, btrfs, tmpfs",
            )
        else:
            raise InvalidArgument(f"this file system cannot keep a time of {mtime // header.NANO} seconds")


def is_smuggled(attribute: bytes) -> bool:
    """Whether an attribute belongs to an overlay or its owner override, which no archive may carry in or out."""
    return attribute.startswith(_SMUGGLED) or attribute == OVERRIDE_XATTR


def drop_xattr(fd: int, name: bytes | str) -> None:
    """Remove an attribute that may not be there."""
    try:
        os.removexattr(fd, name)
    except OSError as error:
        if error.errno not in xattr.ABSENT:
            raise


def drop_acls(fd: int) -> None:
    """Remove what a new object inherited from its directory's default ACL."""
    drop_xattr(fd, "system.posix_acl_access")
    drop_xattr(fd, "system.posix_acl_default")
