"""The directory that a mount goes over: examining it safely, clearing a dead mount from it, unmounting it.

Rule: a mount whose server is gone or hangs must never be entered. Decisions come from mountinfo; stat(2) of a mount
point happens only where the answer may be an error, and never waits for a server that this process starts.
"""

from __future__ import annotations

import errno
import os
import stat

from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.mounting import protocol
from cowfs.sys.files import syncfs
from cowfs.sys.mounts import MNT_DETACH, MNT_FORCE, UMOUNT_NOFOLLOW, MountInfo, mountinfo, umount
from cowfs.sys.threads import Thread

__all__ = ["busy_processes", "cowfs_mounts", "detach", "find", "hand_over", "is_dead", "listens", "prepare", "resolve"]

_LOOK = 5.0  # seconds for a stat of a mount point

TYPES = ("fuse.cowfs", "fuse.cowfs-overlayfs")


def cowfs_mounts() -> list[MountInfo]:
    """Mounts of cowfs in this mount namespace, oldest first."""
    return [entry for entry in mountinfo() if entry.fstype in TYPES]


def kernel_mounts() -> list[MountInfo]:
    """Mounts in this mount namespace that the kernel serves for a store of cowfs: overlays with a store in their source."""
    return [entry for entry in mountinfo() if is_kernel_mount(entry)]


def is_kernel_mount(entry: MountInfo) -> bool:
    """Whether the kernel serves this mount for a store of cowfs."""
    return entry.fstype == "overlay" and entry.source.startswith(b"cowfs:")


def resolve(path: str) -> str:
    """Absolute, symbolic links of the parents followed, the last component left alone: it may be a dead mount."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def find(path: str) -> MountInfo | None:
    """The topmost mount of any type at exactly this path, or None."""
    wanted = {os.fsencode(os.path.abspath(path)), os.fsencode(resolve(path))}
    entries = mountinfo()
    found = [entry for entry in entries if entry.target in wanted]
    if not found:
        target = os.fsencode(os.path.realpath(path))
        found = [entry for entry in entries if entry.target == target]
    return found[-1] if found else None


def is_dead(path: str, entry: MountInfo | None = None) -> bool:
    """Whether the FUSE server of what is mounted here is gone (ENOTCONN; ECONNABORTED while it ends).

    A server of cowfs that listens at its socket is not dead; that check comes first, since it cannot hang. Otherwise
    statfs(2) decides, since stat(2) may answer from the kernel's cache. A hanging server is not dead.
    """
    if entry is not None and listens(entry):
        return False
    dead = False

    def look() -> None:
        nonlocal dead
        try:
            os.statvfs(path)
        except OSError as error:
            dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)

    thread = Thread(look, "cowfs-statfs")  # a stopped server would block this process
    if thread.start():
        thread.join(_LOOK)
    else:
        look()
    return dead


def listens(entry: MountInfo) -> bool:
    """Whether a server, answering or not, has the control socket of a mount."""
    socket = protocol.socket_of(entry.dev)
    if socket is None:
        return False
    try:
        protocol.connect(socket, timeout=1.0).close()
    except (BlockingIOError, TimeoutError):
        return True  # the queue is full
    except OSError:
        return False
    return True


def prepare(path: str) -> str:
    """Check a mount point and clear dead mounts of cowfs from it; returns its real path.

    Raises:
        NotFound: no such directory.
        InvalidArgument: not a directory.
        FailedPrecondition: a live mount of cowfs, or another program's dead one, is there.
    """
    for _ in range(64):
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise NotFound(f"the mount point does not exist: {path}", remedy=f"mkdir {path}") from None
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise InvalidArgument(f"the mount point cannot be used: {path}: {error.strerror}") from None
            entry = find(path)
            if entry is None or entry.fstype not in TYPES:
                kind = entry.fstype if entry else "FUSE"
                raise FailedPrecondition(
                    f"a dead {kind} mount is in the way at {path}", remedy=f"fusermount3 -u {path}, or umount {path}"
                ) from None
            detach(os.fsdecode(entry.target), force=True)
            continue
        if not stat.S_ISDIR(status.st_mode):
            raise InvalidArgument(f"the mount point is not a directory: {path}")
        entry = find(path)
        if entry is not None and entry.fstype in TYPES:
            if is_dead(path, entry):
                detach(os.fsdecode(entry.target), force=True)
                continue
            raise FailedPrecondition(f"{path} is busy: cowfs is mounted there already", remedy=f"cowfs umount {path}")
        return os.path.realpath(path)
    raise FailedPrecondition(f"dead mounts at {path} cannot be cleared")


def detach(target: str, *, lazy: bool = False, force: bool = False) -> None:
    """Take the topmost mount off ``target``: umount2(2) where this process may, else fusermount3.

    Args:
        lazy: off the tree at once, ended with its last user (MNT_DETACH).
        force: cut the connection to a server that hangs or is gone, then as lazy.

    Raises:
        FailedPrecondition: busy; the message names processes that are in there.
        NotFound: nothing is mounted there.
        CowfsError: another error of the system.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy or force else 0)
    try:
        if force and _abort(target):
            return
        umount(target, flags)
        return
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise busy(target) from None
        if error.errno in (errno.EINVAL, errno.ENOENT):
            raise NotFound(f"nothing is mounted at {target}") from None
        if error.errno != errno.EPERM:
            raise CowfsError(f"cannot unmount {target}: {error.strerror}") from None
    _fusermount(target, lazy=lazy or force)


def _abort(target: str) -> bool:
    """End the connection, so that requests which wait forever get ECONNABORTED; True when that unmounted it too.

    Source: Documentation/filesystems/fuse.rst, "Aborting a filesystem connection".
    """
    entry = find(target)
    if entry is not None and entry.fstype.startswith("fuse"):
        minor = entry.dev.partition(":")[2]
        try:
            with open(f"/sys/fs/fuse/connections/{minor}/abort", "w", encoding="utf-8") as file:
                file.write("1")
            return False
        except OSError:
            pass
    try:
        umount(target, MNT_FORCE | UMOUNT_NOFOLLOW)  # FUSE aborts on MNT_FORCE, then goes on as an ordinary umount
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EPERM):
            return False
        raise
    return True


def _fusermount(target: str, *, lazy: bool) -> None:
    import shutil
    import subprocess

    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if program is None:
        raise Unsupported(f"cannot unmount {target} without fusermount3", remedy="apt-get install fuse3")
    done = subprocess.run(
        [program, "-u", *(["-z"] if lazy else []), "--", target],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        text = os.fsdecode(done.stderr).strip().removeprefix("fusermount3: ").replace("\n", "; ")
        if "busy" in text.lower():
            raise busy(target)
        if "not found" in text.lower():
            raise NotFound(f"nothing is mounted at {target}")
        remedy = "as root: ln -s /proc/self/mounts /etc/mtab" if "/etc/mtab" in text else ""
        raise CowfsError(text or f"cannot unmount {target}", remedy=remedy)


def busy(target: str) -> FailedPrecondition:
    """The error for a mount in use, with its users."""
    who = busy_processes(target)
    by = f" (in use by {', '.join(who)})" if who else ""
    return FailedPrecondition(f"{target} is busy{by}", remedy="end those, or: cowfs umount --lazy")


def busy_processes(target: str, at_most: int = 5) -> list[str]:
    """Up to ``at_most`` processes with a directory, program or file inside a mount, as "pid (name)".

    Only processes that this user may inspect; the paths come from /proc, without touching the mount.
    """
    found: list[str] = []
    inside = target.rstrip("/") + "/"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if pid == str(os.getpid()):
            continue
        links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
        try:
            links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            pass
        for link in links:
            try:
                path = os.readlink(link)
            except OSError:
                continue
            if path == target or path.startswith(inside):
                found.append(f"{pid} ({_command(pid)})")
                break
        if len(found) == at_most:
            break
    return found


def hand_over(mountpoint: str) -> None:
    """Have the kernel hand a mount's dirty pages to its server, so that the upper has them, if this process can."""
    try:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # mounted in another namespace, or closed to this user; completed writes are in the upper already
    try:
        syncfs(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
