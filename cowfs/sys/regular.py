"""Files of our own that lie where a stranger may have put something else under their name.

A layer, a store or an upper that came from elsewhere may have a FIFO, a device, a symbolic link or a sparse file of any size where
we expect a small file: opening the first would wait for ever, the others lead out, or fill the memory. Rules: the
object is looked at before it is opened, so that no device is ever opened; opening never waits and follows nothing; what
was opened is looked at again; and who reads says how much it may be.
"""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["SMALL", "open_regular", "read_small"]

#: Bytes that a note of ours may have at most. The longest are records of mounts, with the paths of their layers.
SMALL = 16 << 20

_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_regular(path: str | bytes, flags: int = os.O_RDONLY, *, dir_fd: int | None = None) -> int:
    """Open an existing regular file and nothing else.

    Args:
        flags: how; O_CREAT and O_TRUNC are for files that may be taken as they are, and not for this.
        dir_fd: directory that ``path`` is relative to.

    Returns:
        A descriptor, the caller's.

    Raises:
        OSError: ENOENT; EIO for anything but a regular file; else as open(2).
    """
    _check(os.stat(path, dir_fd=dir_fd, follow_symlinks=False), path)
    fd = os.open(path, flags | _SAFE, dir_fd=dir_fd)
    try:
        _check(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(st: os.stat_result, path: str | bytes) -> None:
    if not stat.S_ISREG(st.st_mode):
        raise OSError(errno.EIO, "not a regular file", path)


def read_small(path: str | bytes, *, dir_fd: int | None = None, limit: int = SMALL) -> bytes:
    """All of a small regular file.

    Raises:
        OSError: as :func:`open_regular`; EFBIG for more than ``limit`` bytes.
    """
    fd = open_regular(path, dir_fd=dir_fd)
    try:
        parts, left = [], limit + 1
        while left and (part := os.read(fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(fd)
    if not left:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", path)
    return b"".join(parts)
