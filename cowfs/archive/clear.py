"""Removing objects that are in the way, by descriptors: a name leads one step down and never through a link."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

__all__ = ["lstat", "remove_tree"]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def lstat(dirfd: int, name: bytes) -> os.stat_result | None:
    """The attributes of a name itself, None if it does not exist."""
    try:
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def remove_tree(
    parent_fd: int, name: bytes, path: bytes, farewell: Callable[[int, bytes, bytes, os.stat_result], None]
) -> None:
    """Remove a directory and all in it; one descriptor a level.

    Args:
        path: the path of ``name`` in the layer.
        farewell: called with (directory descriptor, name, path, attributes) before the removal of each object that is
            no directory.
    """
    stack: list[tuple[int, bytes, bytes, list[bytes]]] = []

    def enter(dirfd: int, name: bytes, path: bytes) -> None:
        fd = os.open(name, _DIR, dir_fd=dirfd)
        stack.append((fd, name, path, []))
        if os.geteuid():
            os.fchmod(fd, 0o700)
        stack[-1][3].extend(os.fsencode(listed) for listed in os.listdir(fd))

    try:
        enter(parent_fd, name, path)
        while stack:
            fd, own, here, names = stack[-1]
            if not names:
                stack.pop()
                os.close(fd)
                os.rmdir(own, dir_fd=stack[-1][0] if stack else parent_fd)
                continue
            child = names.pop()
            st = lstat(fd, child)
            if st is None:
                continue
            if stat.S_ISDIR(st.st_mode):
                enter(fd, child, here + b"/" + child)
            else:
                farewell(fd, child, here + b"/" + child, st)
                os.unlink(child, dir_fd=fd)
    finally:
        for fd, *_ in stack:
            os.close(fd)
