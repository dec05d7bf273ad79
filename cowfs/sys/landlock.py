"""Landlock: a process gives up, for good, all files but those beneath some directories; no privilege is needed.

Source: landlock(7), include/uapi/linux/landlock.h. Rule: with less than the second version of the interface a file could not be
renamed into another directory any more, so such a kernel counts as one that has none.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from contextlib import suppress

from cowfs.sys._libc import syscall

__all__ = ["LEAST", "restrict", "version"]

LEAST = 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_RULESET, _RULE = struct.Struct("<QQQ"), struct.Struct("<Qi")
#: Rights on files as they came: all of version 1 (execute ... make_sym), refer, truncate, ioctl on devices.
_SINCE = ((1, (1 << 13) - 1), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
_OF_A_FILE = 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # write, read, truncate, ioctl
_SCOPE_ABSTRACT_SOCKETS = 1
_SCOPES_SINCE = 6


def version() -> int:
    """The interface's version here; 0 where the kernel has none that is of use, or it is switched off."""
    try:
        found = syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError as error:
        if error.errno in (
            errno.ENOSYS,
            errno.EOPNOTSUPP,
            errno.EPERM,
        ):  # EPERM: a seccomp filter of a container engine's
            return 0
        raise
    return found if found >= LEAST else 0


def restrict(root: str, files: Iterable[int] = (), *, sockets: bool) -> bool:
    """Leave this thread, and all that it starts, only what is beneath a directory; whether the kernel can do that.

    The thread must have given up gaining privilege (:func:`cowfs.sys.capabilities.no_new_privileges`).

    Args:
        root: the directory.
        files: descriptors of files elsewhere that may be opened by their descriptor once more, such as /dev/stdout.
        sockets: also leave it only those abstract sockets that it, or what it starts, has made (Linux 6.12; before, it is not done).

    Raises:
        OSError: EPERM and so on.
    """
    now = version()
    if not now:
        return False
    rights = sum(bits for since, bits in _SINCE if since <= now)
    scopes = _SCOPE_ABSTRACT_SOCKETS if sockets and now >= _SCOPES_SINCE else 0
    size = 8 if now < 4 else 16 if now < _SCOPES_SINCE else 24
    ruleset = syscall(_CREATE_RULESET, _RULESET.pack(rights, 0, scopes)[:size], size, 0)
    try:
        place = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscall(_ADD_RULE, ruleset, _PATH_BENEATH, _RULE.pack(rights, place), 0)
        finally:
            os.close(place)
        for fd in files:
            with suppress(OSError):  # EBADFD: a pipe or a socket, of which it asks nothing; EINVAL: a directory
                syscall(_ADD_RULE, ruleset, _PATH_BENEATH, _RULE.pack(rights & _OF_A_FILE, fd), 0)
        syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True
