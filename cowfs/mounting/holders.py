"""The users of a directory: flock(2) on it, /proc/locks, and the kernel's overlay mounts, which take no lock.

A server holds its locks a little longer than its mount lives: umount(2) returns before the server knows of it. So
:func:`take` waits for a server whose mount is gone, and for no other holder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from cowfs._typed import TYPE_CHECKING, NamedTuple
from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.sys import locks

if TYPE_CHECKING:
    from cowfs.mounting.notice import Notice
    from cowfs.sys.mounts import MountInfo

__all__ = ["Holder", "lock", "refuse_kernel_mount", "share", "take"]

GRACE = 1.0
"""Seconds that a mount waits for a holder that nothing is known of."""
ENDING = 60.0
"""Seconds that a server whose mount is gone has for closing its files."""
_PAUSE = 0.01


class Holder(NamedTuple):
    """The holder of a lock: a process (None: unknown), and the notice of the mount that it serves, if it left one."""

    pid: int | None
    notice: Notice | None

    def __str__(self) -> str:
        who = f"process {self.pid}" if self.pid else "another process"
        return who if self.notice is None else f"{who}, which serves the mount at {self.notice.mountpoint}"


def take(fd: int, places: Iterable[str], *, shared: bool = False, grace: float = 0.0) -> Holder | None:
    """Take the lock of an open directory: None if it was free, else its holder.

    Args:
        fd: of the directory; the lock is held until it is closed.
        places: directories with the holder's possible notice.
        grace: seconds to wait for a holder that left no notice.
    """
    from cowfs.mounting import notice

    begin = time.monotonic()
    while not locks.lock(fd, shared=shared):
        pid = locks.holder(fd)
        told = [one for one in notice.found(places) if pid in (None, one.pid)]
        patience = grace
        if told:
            patience = 0.0 if any(map(_is_mounted, told)) else ENDING
        if time.monotonic() - begin >= patience:
            if locks.lock(fd, shared=shared):  # it ended during the question
                return None
            return Holder(pid, told[0] if told else None)
        time.sleep(_PAUSE)
    return None


def _is_mounted(told: Notice) -> bool:
    """Whether a server that holds its lock still has its mount; else it is about to end.

    Its device number tells little: it is free, and perhaps another mount's, from the moment of the unmount.
    """
    from cowfs.mounting import protocol

    try:
        with protocol.connect(told.socket, protocol.SHORT) as connection:
            if protocol.peer(connection) not in (told.pid, 0):
                return False  # another mount's
            return bool(protocol.talk(connection, "alive", {})["connected"])
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except (OSError, CowfsError, KeyError):
        return _is_in_mountinfo(told)  # the server hangs, or does not know the verb


def _is_in_mountinfo(told: Notice) -> bool:
    from cowfs.sys.mounts import mountinfo

    for process in (told.pid, "self"):
        try:
            entries = mountinfo(process)
        except OSError:
            continue
        return any(entry.dev == told.device and entry.fstype.startswith("fuse.cowfs") for entry in entries)
    return True


def lock(directory: str, *, shared: bool) -> int:
    """A descriptor that holds the lock of a directory until it is closed; waits for a server that is ending.

    Raises:
        FailedPrecondition: another process holds it; the message names the process, and its mount if known.
    """
    from cowfs.mounting.upper_state import record_places

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        holder = take(fd, record_places(directory), shared=shared, grace=GRACE)
    except BaseException:
        os.close(fd)
        raise
    if holder is None:
        return fd
    os.close(fd)
    how = (
        f"cowfs umount {holder.notice.mountpoint}"
        if holder.notice
        else "unmount that one first (cowfs mounts lists them)"
    )
    raise FailedPrecondition(
        f"{directory} is in use by {holder}", remedy=f"{how}, or use another --upper, or --ephemeral"
    )


def share(upper: str, *, mounts_only: bool) -> tuple[int, bool]:
    """For a read-only mount of an upper layer: a descriptor that shares its lock with other readers, or None beside a
    writer; and whether there is a writer.

    A writer is first asked to write back its dirty data. Its later writes may be visible or not, as under an overlay
    mount of the kernel over a changing layer.

    Args:
        mounts_only: the writer must be a mount, not a running verb.

    Raises:
        FailedPrecondition: the writer is no mount.
    """
    from cowfs.mounting.upper_state import record_places

    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        holder = take(fd, record_places(upper), shared=True, grace=GRACE if mounts_only else 0.0)
        if holder is not None:
            if mounts_only and holder.notice is None:
                raise FailedPrecondition(f"{upper} is in use by {holder}", remedy="wait for it, or end it")
            _have_synced(upper, holder)
            return fd, True
        entry = _kernel_mount_of(upper)
        if entry is not None:
            _sync_at(os.fsdecode(entry.target))
        return fd, entry is not None
    except BaseException:
        os.close(fd)
        raise


def _have_synced(upper: str, holder: Holder) -> None:
    from cowfs.mounting import protocol

    if holder.notice is not None:
        socket = holder.notice.socket
    else:  # it left no notice: an engine's layer has no place for one
        answers = protocol.ask_all(protocol.sockets(), "info")
        socket = next(
            (path for path, told in answers if not isinstance(told, OSError) and told.get("upper") == upper), ""
        )
    try:
        if socket:
            protocol.ask(socket, "sync")
    except CowfsError:  # an older server does not know the verb, or it is ending
        if holder.notice is not None:
            _sync_at(holder.notice.mountpoint)


def _sync_at(mountpoint: str) -> None:
    from cowfs.mounting.mountpoint import hand_over

    hand_over(mountpoint)


def refuse_kernel_mount(upper: str) -> None:
    """Refuse an upper that a kernel mount uses: the kernel lets any number of mounts share an upper, and each then
    corrupts the other's view.

    Raises:
        FailedPrecondition: an overlay mount of this namespace has it.
    """
    entry = _kernel_mount_of(upper)
    if entry is not None:
        raise FailedPrecondition(
            f"{upper} is in use by the kernel's overlay mount at {os.fsdecode(entry.target)}",
            remedy=f"umount {os.fsdecode(entry.target)}",
        )


def _kernel_mount_of(upper: str) -> MountInfo | None:
    from cowfs.sys.mounts import mountinfo

    identity = _identity(upper)
    for entry in mountinfo():
        if entry.fstype != "overlay":
            continue
        for option in entry.super_options.split(b","):
            path = option.removeprefix(b"upperdir=")
            if path != option and (os.fsdecode(path) == upper or _identity(os.fsdecode(path)) == identity):
                return entry
    return None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino)
