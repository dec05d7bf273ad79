"""Opening cowfs's own files in places where a stranger may have put something else under their names.

A layer, a store or an upper that came from elsewhere may have a FIFO, a device, a symbolic link or a sparse file of any
size in place of a small file: opening a FIFO would wait for ever, a link leads outside, a sparse file fills the memory.
Rules: the object is examined before it is opened, so that no device is ever opened; opening never waits and follows no
link; the open object is examined again; and the reader gives a bound on its size.
"""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["SMALL", "open_regular", "read_small"]

#: The most bytes that a note of cowfs may have. The longest are records of mounts, with the paths of their layers.
SMALL = 16 << 20

_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_regular(path: str | bytes, flags: int = os.O_RDONLY, *, dir_fd: int | None = None) -> int:
    """Open an existing regular file and nothing else.

    Args:
        flags: of open(2), without O_CREAT and O_TRUNC.
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
    """The whole content of a small regular file.

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
