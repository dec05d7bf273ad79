"""Advisory locks of files and directories: taking one, waiting for one, finding its holder.

Rules: a lock belongs to an open file description, so it ends with its last descriptor, however the process ends, and
works between threads. flock(2) for whole files; an open file description's lock (fcntl(2), F_OFD_SETLK) for one byte of
a file that many share. A lock that another process holds is an answer (False, None), never an error; a file system
without locks is an OSError.
"""

from __future__ import annotations

import fcntl
import os
import struct

__all__ = ["holder", "lock", "lock_byte", "open_locked"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux


def lock(fd: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Take the lock of an open file or directory. Returns whether it was free.

    Args:
        fd: a descriptor; the lock is held until its last duplicate is closed.
        shared: share the lock with others that take it so.
        wait: wait as long as it takes; the answer is True then.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def open_locked(path: str, *, flags: int = _DIRECTORY, shared: bool = False, wait: bool = False) -> int | None:
    """A descriptor of a directory (or file, by ``flags``) that holds its lock; None while another process holds the lock.

    Raises:
        OSError: it cannot be opened, or its file system has no locks.
    """
    fd = os.open(path, flags)
    try:
        if lock(fd, shared=shared, wait=wait):
            return fd
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def lock_byte(fd: int, offset: int) -> bool:
    """Take the lock of one byte of a file that is open for writing. Returns whether it was free."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES (fcntl(2))
        return False
    return True


def unlock_bytes(fd: int) -> None:
    """Release every byte lock of this open file description, also for a forked process that has a copy of it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def holder(fd: int) -> int | None:
    """The process that holds a flock on this inode, from /proc/locks (proc(5)), or None if unknown.

    The device is not compared: btrfs shows another one there than stat(2) does.
    """
    inode = str(os.fstat(fd).st_ino)
    try:
        with open("/proc/locks", encoding="utf-8") as file:
            for line in file:
                fields = line.split()
                if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode and int(fields[4]) > 0:
                    return int(fields[4])
    except (OSError, IndexError, ValueError):
        pass
    return None
