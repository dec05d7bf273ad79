"""Who uses a directory: flock(2) on it, /proc/locks, and the kernel's overlay mounts, which take no lock."""

from __future__ import annotations

import os
import time

from cowfs.errors import FailedPrecondition
from cowfs.sys import locks

__all__ = ["lock", "refuse_kernel_mount"]

_TRIES, _PAUSE = 40, 0.025  # one second: a server that was just unmounted from outside is still closing


def lock(directory: str, *, shared: bool) -> int:
    """A descriptor that holds the lock of a directory until it is closed; waits up to a second for it.

    Raises:
        FailedPrecondition: somebody else holds it; the message names the process.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for attempt in range(_TRIES):
        if locks.lock(fd, shared=shared):
            return fd
        if attempt < _TRIES - 1:
            time.sleep(_PAUSE)
    holder = locks.holder(fd)
    os.close(fd)
    raise FailedPrecondition(
        f"{directory} is in use by {f'process {holder}' if holder else 'another process'}",
        remedy="unmount that one first (cowfs mounts lists them), or use another --upper, or --ephemeral",
    )


def refuse_kernel_mount(upper: str) -> None:
    """The kernel lets any number of mounts share an upper, and each then corrupts the other's view.

    Raises:
        FailedPrecondition: an overlay mount of this namespace has it.
    """
    from cowfs.sys.mounts import mountinfo

    identity = _identity(upper)
    for entry in mountinfo():
        if entry.fstype != "overlay":
            continue
        for option in entry.super_options.split(b","):
            path = option.removeprefix(b"upperdir=")
            if path != option and (os.fsdecode(path) == upper or _identity(os.fsdecode(path)) == identity):
                raise FailedPrecondition(
                    f"{upper} is in use by the kernel's overlay mount at {os.fsdecode(entry.target)}",
                    remedy=f"umount {os.fsdecode(entry.target)}",
                )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino)
