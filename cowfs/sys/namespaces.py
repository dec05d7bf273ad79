"""Namespaces of the calling process: unshare(2) and the id maps of a user namespace."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from cowfs.sys import host
from cowfs.sys._libc import check, libc, syscall
from cowfs.sys.mounts import MNT_DETACH, MS_MOVE, mount, umount

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x2000000, 0x4000000, 0x8000000, 0x40000000

_PIVOT_ROOT = {"x86_64": 155}.get(os.uname().machine, 41)  # pivot_root(2); 41 in the common table
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = struct.Struct("16sH22x")  # struct ifreq: name and flags


def unshare(flags: int) -> None:
    """unshare(2). The caller must have one thread for CLONE_NEWUSER."""
    check(libc.unshare(flags))


def join(pid: int, kind: str) -> None:
    """Move this process into a namespace of another one: ``mnt``, ``user``, ``net`` and so on (setns(2)).

    Raises:
        OSError: EPERM, or there is no such process.
    """
    fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        join_by(fd)
    finally:
        os.close(fd)


def join_by(fd: int) -> None:
    """The same by a descriptor of the namespace.

    Raises:
        OSError: EPERM; EINVAL, of the user namespace that this process is in.
    """
    check(libc.setns(fd, 0))


def join_all(pidfd: int, flags: int) -> None:
    """Move this process into those namespaces of another one that ``flags`` names, all or none (setns(2) with a pidfd, Linux 5.8).

    Raises:
        OSError: EPERM; ESRCH, the process has ended; EINVAL, an older kernel, or more than one thread with CLONE_NEWUSER.
    """
    check(libc.setns(pidfd, flags))


def become_root() -> None:
    """Enter a user namespace in which this user is root, with a mount namespace of its own.

    Raises:
        OSError: EPERM where the host does not allow user namespaces.
    """
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | CLONE_NEWNS)
    map_one(uid, gid)
    host.forget()


def map_one(uid: int, gid: int) -> None:
    """Make a user and a group of outside root in this process's new user namespace; a map that is written already stays.

    Raises:
        OSError: EPERM.
    """
    for name, text in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "r+", encoding="utf-8") as file:
            if name == "setgroups" or not file.read():
                file.write(text)


def has_ids(uid: int, gid: int, own: int) -> bool:
    """Whether a user and a group have a number in this process's user namespace.

    Args:
        own: descriptor of this process's directory in /proc, which may be out of sight.
    """
    return all(
        any(first <= number < first + count for first, count in _ranges(own, name))
        for name, number in (("uid_map", uid), ("gid_map", gid))
    )


def _ranges(own: int, name: str) -> list[tuple[int, int]]:
    rows = [line.split() for line in _read(own, name).splitlines()]
    return [(int(row[0]), int(row[2])) for row in rows]


def may_set_groups(own: int) -> bool:
    """Whether setgroups(2) is allowed in this process's user namespace; ``own`` as for :func:`has_ids`."""
    return _read(own, "setgroups").strip() != "deny"


def _read(own: int, name: str) -> str:
    with open(name, encoding="utf-8", opener=lambda path, flags: os.open(path, flags, dir_fd=own)) as file:
        return file.read()


def become(uid: int, gid: int, own: int) -> None:
    """Enter a user namespace below this one in which root of here is a user of another number, and nobody else is anybody.

    Args:
        uid, gid: the numbers there.
        own: as for :func:`has_ids`.

    Raises:
        OSError: EPERM; ENOSPC, there are too many below each other.
    """
    before = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {before[0]} 1"), ("gid_map", f"{gid} {before[1]} 1")):
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=own)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    host.forget()


def move_root(path: str) -> None:
    """Make ``path``, a mount point, the root of this mount namespace, and take every other mount off it.

    After this, unlike after chroot(2), a program with privilege finds nothing outside to climb to. Source: pivot_root(2),
    NOTES ("." as both arguments).

    Raises:
        OSError: EINVAL, it is no mount point, or its mounts are shared with another namespace.
    """
    os.chdir(path)
    try:
        syscall(_PIVOT_ROOT, b".", b".")
        umount(".", MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        mount(
            ".", "/", "", MS_MOVE
        )  # in a chroot the root is no mount point; a program that leaves this root is in that chroot
        os.chroot(".")
    os.chdir("/")


def loopback_up() -> None:
    """Bring up the one interface that a new network namespace has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        _, flags = _IFREQ.unpack(answer)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
