"""Namespaces of the calling process: unshare(2) and the id maps of a user namespace."""

from __future__ import annotations

import os

from cowfs.sys._libc import check, libc

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000


def unshare(flags: int) -> None:
    """unshare(2). The caller must have one thread for CLONE_NEWUSER."""
    check(libc.unshare(flags))


def become_root() -> None:
    """Enter a user namespace in which this user is root, with a mount namespace of its own.

    Raises:
        OSError: EPERM where the host does not allow user namespaces.
    """
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
