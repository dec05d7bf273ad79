"""Mode, owner and times of an inode of the upper layer, where it is."""

from __future__ import annotations

import errno
import os
import stat
import time

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import files
from cowfs.union.attr import unpack
from cowfs.union.node import DT_LNK, DT_REG, PLAIN, Node, at

if TYPE_CHECKING:
    from cowfs.union.core import Core

__all__ = ["CAPABILITY", "NOW", "chmod", "chown", "now", "utime"]

#: "the present time", for setattr
NOW = object()
_CLOCK_REALTIME_COARSE = 5  # the clock that the kernel stamps inodes with
CAPABILITY = b"security.capability"


def now() -> int:
    """The time the kernel would stamp now, in ns."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def _reach(node: Node) -> tuple[bytes | int, int | None, bool]:
    """(path or descriptor, dir_fd, follow_symlinks) that reach the inode for os functions."""
    if node.wfd and node.fd >= 0 and node.data is PLAIN:
        return node.fd, None, True
    fd, name = at(node)
    if name:
        return name, fd, False
    return b"/proc/self/fd/%d" % fd, None, True


def chmod(view: Core, node: Node, mode: int) -> None:
    """Set the permission bits; of symbolic links EOPNOTSUPP."""
    if node.type == DT_LNK:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), node.name)
    owners = view.owners
    if node.wfd and node.data is PLAIN and owners is None:
        os.fchmod(node.fd, mode)
        node.attr = None
        return
    fd, name = at(node)
    if owners is not None and owners.override is not None:
        st = os.stat(b"/proc/self/fd/%d/%b" % (fd, name)) if name else os.fstat(fd)
        _, uid, gid = owners.show(st, fd, name)
        owners.record(fd, name, stat.S_IFMT(st.st_mode) | mode, uid, gid)
    elif name:
        os.chmod(name, mode, dir_fd=fd)
    else:
        os.chmod(_reach(node)[0], mode)
    node.attr = None


def chown(view: Core, node: Node, uid: int, gid: int) -> None:
    """Set owner and group; -1 leaves one alone."""
    owners = view.owners
    if owners is not None:
        if owners.override is not None and node.type != DT_LNK:
            now_attr = unpack(view.attr(node))
            mode = now_attr.mode
            if node.type == DT_REG:
                mode &= ~stat.S_ISUID
                if mode & stat.S_IXGRP:
                    mode &= ~stat.S_ISGID
            uid, gid = (now_attr.uid if uid == -1 else uid), (now_attr.gid if gid == -1 else gid)
            owners.record(*at(node), mode, uid, gid)
            node.attr = None
            return
        uid, gid = owners.stored(uid, gid)
    elif node.wfd and node.data is PLAIN:
        os.fchown(node.fd, uid, gid)
        node.attr = None
        return
    path, dir_fd, follow = _reach(node)
    os.chown(path, uid, gid, dir_fd=dir_fd, follow_symlinks=follow)
    node.attr = None


def utime(view: Core, node: Node, atime: object, mtime: object) -> None:
    """Set times: ns since 1970, :data:`NOW`, or None to leave one alone."""
    if (atime is None or mtime is None) and node.wfd and node.data is PLAIN:
        files.futimens(node.fd, now() if atime is NOW else atime, now() if mtime is NOW else mtime)  # type: ignore[arg-type]
        node.attr = None
        return
    path, dir_fd, follow = _reach(node)
    if atime is None or mtime is None:
        st = os.stat(path, dir_fd=dir_fd, follow_symlinks=follow)
        atime = st.st_atime_ns if atime is None else atime
        mtime = st.st_mtime_ns if mtime is None else mtime
    if atime is NOW and mtime is NOW:
        os.utime(path, None, dir_fd=dir_fd, follow_symlinks=follow)
    else:
        stamp = now()
        times = (stamp if atime is NOW else atime, stamp if mtime is NOW else mtime)
        os.utime(path, ns=times, dir_fd=dir_fd, follow_symlinks=follow)  # type: ignore[arg-type]
    node.attr = None
