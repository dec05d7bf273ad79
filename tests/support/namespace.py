"""The private mount namespace that the pytest process lives in.

Rule: a test never mounts anything that the machine can see. ``enter()`` runs once, when the
root conftest is imported, before any thread exists; from then on every mount of every test,
and of every server a test starts, vanishes with the last process that lives here. Where the
host does not let us (no CAP_SYS_ADMIN), ``why_not`` says so and tests that mount are skipped.
"""

from __future__ import annotations

import ctypes
import errno
import os

from cowfs.sys.namespaces import move_root

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

RUN = "/run/cowfs"
"""Where servers that root starts have their sockets."""

_libc = ctypes.CDLL(None, use_errno=True)

why_not: str | None = "the private mount namespace was not entered"
"""Why this process cannot mount, or None when it can."""


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: str, fstype: str | None = None, flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode() if fstype else None,
            ctypes.c_ulong(flags),
            data.encode() if data else None,
        ),
        f"mount {source} on {target}",
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2). Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def bind(source: str, target: str) -> None:
    """Bind ``source`` over ``target``."""
    mount(source, target, None, MS_BIND)


def _make_private() -> None:
    """Nothing propagates from or to this namespace, and its root is ours.

    In a chroot it is not: "/" is no mount point, and whoever enters the namespace by its number (``runc exec``) comes out at
    the root of the machine. So the chroot's tree becomes the root of the namespace.
    """
    try:
        mount("none", "/", None, MS_REC | MS_PRIVATE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        return
    here, root = os.getcwd(), os.open("/", os.O_PATH | os.O_DIRECTORY)
    own = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    _check(_libc.setns(own, CLONE_NEWNS), "setns")  # to the namespace's root, setns(2)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    path = os.readlink(f"/proc/self/fd/{root}")
    mount(path, path, None, MS_BIND | MS_REC)
    move_root(path)
    os.chdir(here)
    os.close(own)
    os.close(root)


def enter() -> None:
    """Move the process to a mount namespace of its own with nothing propagated either way."""
    global why_not
    if os.environ.get("COWFS_TEST_NAMESPACE") == "host":
        why_not = None
        return
    if os.geteuid() != 0:
        why_not = "needs root (mounts, loop devices, other users)"
        return
    if _libc.unshare(CLONE_NEWNS) != 0:
        why_not = f"unshare(CLONE_NEWNS): {os.strerror(ctypes.get_errno())}"
        return
    try:
        _make_private()
        os.makedirs(RUN, mode=0o755, exist_ok=True)
        mount("tmpfs", RUN, "tmpfs", 0, "mode=755,size=16m")  # control sockets of our servers only
    except OSError as error:
        why_not = str(error)
        return
    why_not = None


def mount_points() -> list[str]:
    """Mount points of this namespace, oldest first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as info:
        return [line.split(" ")[4].encode().decode("unicode_escape") for line in info]


def fstype_of(target: str) -> str:
    """Type of the topmost mount at ``target`` ('' when nothing is mounted there)."""
    found = ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as info:
        for line in info:
            fields = line.rstrip("\n").split(" ")
            if fields[4] == target:
                found = fields[fields.index("-") + 1]
    return found
