"""Dropping capabilities(7) for good before a program is started."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Collection

from cowfs._typed import Final
from cowfs.sys._libc import check, libc

__all__ = ["CONTAINER", "NET_RAW", "drop_all_but", "no_new_privileges", "undumpable"]

NET_RAW: Final = 13
#: The capabilities that root in a container keeps by default, with Docker, podman and cowfs: CHOWN, DAC_OVERRIDE,
#: FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW, SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP
#: (include/uapi/linux/capability.h).
CONTAINER: Final = frozenset((0, 1, 3, 4, 5, 6, 7, 8, 10, NET_RAW, 18, 27, 29, 31))

_PR_SET_DUMPABLE, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _CLEAR_ALL = 4, 23, 24, 47, 4
_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3: Final = 0x20080522


def _prctl(option: int, argument: int) -> int:
    return check(libc.prctl(option, *map(ctypes.c_ulong, (argument, 0, 0, 0))))


def drop_all_but(kept: Collection[int]) -> None:
    """Drop every other capability for good, from this thread and all that it will start.

    Raises:
        OSError: EPERM, this thread lacks CAP_SETPCAP.
    """
    for number in range(64):
        try:
            held = _prctl(_PR_CAPBSET_READ, number)
        except OSError:  # EINVAL: this kernel has no more
            break
        if held and number not in kept:
            _prctl(_PR_CAPBSET_DROP, number)
    _prctl(_PR_CAP_AMBIENT, _CLEAR_ALL)
    header = ctypes.create_string_buffer(struct.pack("<Ii", _VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: the low words, then the high ones
    check(libc.capget(header, sets))
    words = struct.unpack("<6I", sets.raw)
    masks = [sum(1 << number % 32 for number in kept if number // 32 == half) for half in (0, 0, 0, 1, 1, 1)]
    fewer = [word & mask for word, mask in zip(words, masks, strict=True)]
    fewer[2] = fewer[5] = 0
    check(libc.capset(header, struct.pack("<6I", *fewer)))


def undumpable() -> None:
    """Close this process's /proc/PID to every process without CAP_SYS_PTRACE in the namespace where its program was started."""
    _prctl(_PR_SET_DUMPABLE, 0)


def no_new_privileges() -> None:
    """Let no program that is started from now on gain privilege by set-id bits or file capabilities (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
