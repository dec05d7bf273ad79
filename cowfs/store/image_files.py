"""The files of EROFS images: made by one process at a time, sealed with a digest, compared with it once a boot.

Rules:

1. An image is whole or missing: it is written as ``NAME.new`` under the lock of its folder, and renamed. So a second
   maker, a thread of this process or another process, waits and finds it.
2. The last 32 bytes are the seal: the SHA-256 of everything before.
3. Its first use since the boot compares that, which also brings the file into the page cache. An xattr then has the
   boot, inode, size and mtime that were compared: a later use that finds them the same does not read the file again, and
   asks for its pages instead, since EROFS itself reads metadata page by page, each when it is wanted.
4. A ``NAME.new`` whose folder nobody has locked is what a killed maker left: the next maker or gc removes it.

Threads: any.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from cowfs.sys import atomic, locks

__all__ = ["SEAL", "UNFINISHED", "is_sound", "locked", "make", "sealed"]

SEAL = 32
UNFINISHED = ".new"
_SEEN = "user.cowfs.seen"
_CHUNK = 1 << 20
_PREFETCH = 32 << 20  # bytes of an image that a mount asks for at most
_BOOT = "/proc/sys/kernel/random/boot_id"


@contextmanager
def locked(folder: str, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a folder of images. Yields whether it is held: not if ``wait`` is False and a maker has it.

    Raises:
        OSError: there is no such folder, or it has no locks.
    """
    fd = locks.open_locked(folder, wait=wait)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def make(path: str, write: Callable[[BinaryIO], None], *, durable: bool) -> None:
    """Make an image, unless a sound one is there by the time when it is this maker's turn.

    Args:
        path: of the image, in a folder that exists.
        write: writes it into an empty file.
        durable: it is on the disk at the end.

    Raises:
        OSError: of writing: nothing is left, and a damaged image that was there still is.
    """
    with locked(os.path.dirname(path), wait=True):
        if is_sound(path):
            return
        new = path + UNFINISHED
        with suppress(FileNotFoundError):
            os.unlink(new)  # of a maker that was killed
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "r+b") as file:
                write(file)
                file.seek(0, os.SEEK_END)
                file.write(_digest(fd, file.tell()))
                file.flush()
                if durable:
                    os.fsync(fd)
                _mark(fd)
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise
        if durable:
            atomic.fsync_directory(os.path.dirname(path))


def is_sound(path: str) -> bool:
    """Whether an image is there and agrees with its seal. Brings it into the page cache, up to a bound.

    Raises:
        OSError: it is there, and cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if _marked(fd) == _now(fd):
            os.posix_fadvise(fd, 0, _PREFETCH, os.POSIX_FADV_WILLNEED)
            return True
        if not sealed(fd):
            return False
        _mark(fd)
        return True
    finally:
        os.close(fd)


def sealed(fd: int) -> bool:
    """Whether an open image agrees with its seal; it is read whole."""
    end = os.fstat(fd).st_size - SEAL
    return end > 0 and os.pread(fd, SEAL, end) == _digest(fd, end)


def _digest(fd: int, size: int) -> bytes:
    digest, at = hashlib.sha256(), 0
    while at < size and (data := os.pread(fd, min(_CHUNK, size - at), at)):
        digest.update(data)
        at += len(data)
    return digest.digest()


def _now(fd: int) -> bytes:
    with open(_BOOT, "rb") as file:
        boot = file.read().strip()
    st = os.fstat(fd)
    return b"%s %d %d %d %d" % (boot, st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns)


def _marked(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, _SEEN)
    except OSError:  # none, or the host has no xattrs: it is compared each time
        return None


def _mark(fd: int) -> None:
    with suppress(OSError):  # as above, or a read-only store
        os.setxattr(fd, _SEEN, _now(fd))
