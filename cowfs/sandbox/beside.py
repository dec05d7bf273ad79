"""The way into a sandbox that runs already, for one more command in it.

Strategy: the keeper of a sandbox says in a note, a file beside the snapshot's layer, which process it is and on which descriptors it has the
namespaces of process 1, which itself nobody can look into. A note is believed while that very process lives (number, start and boot).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from cowfs.errors import FailedPrecondition
from cowfs.sandbox import users
from cowfs.sandbox.request import Request
from cowfs.sys import capabilities, cgroups, mounts, namespaces, process
from cowfs.sys.atomic import write_file
from cowfs.sys.regular import read_small

__all__ = ["Running", "enter", "found", "join", "own_place", "told", "user"]

_KINDS = ("user", "ipc", "uts", "net", "cgroup", "pid_for_children")
"""Namespaces that the keeper itself is in, the one that owns the others first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A sandbox with a command in it.

    Attributes:
        pid: of its keeper, and ``start``, when that began (:func:`cowfs.sys.process.start_time`); ``boot``, of the host.
        mnt: the keeper's descriptor of the sandbox's mount namespace.
        own: likewise of the user namespace of its first process.
        user: who the command runs as, as it was asked for.
        network: ``host`` or ``none``.
        doors: the keeper's descriptors of its control group (:mod:`cowfs.sys.cgroups`).
    """

    pid: int
    start: int
    boot: str
    mnt: int
    own: int
    user: str
    network: str
    doors: tuple[int, ...] = ()


@contextmanager
def told(note: str, pid: int, request: Request, doors: Sequence[int] = ()) -> Iterator[None]:
    """Tell how the sandbox of a process 1 is entered, until the end of the block. A host that has no room for that is no error."""
    opened: list[int] = []
    try:
        if note:
            with suppress(OSError):
                opened += [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("mnt", "user")]
                text = {
                    "pid": os.getpid(), "start": process.start_time(os.getpid()), "boot": process.boot_id(),
                    "mnt": opened[0], "own": opened[1], "user": request.user, "network": request.network,
                    "doors": list(doors),
                }  # fmt: skip
                write_file(note, json.dumps(text).encode(), durable=False)
        yield
    finally:
        if note:
            with suppress(OSError):
                os.unlink(note)
        for fd in opened:
            os.close(fd)


def found(note: str) -> Running | None:
    """The sandbox that a note tells of; None where there is none, or it has ended."""
    try:
        data = json.loads(read_small(note))
        made = Running(
            **{name: kind(data[name]) for name, kind in _FIELDS.items()}, doors=tuple(map(int, data.get("doors", ())))
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    lives = made.boot == process.boot_id() and process.start_time(made.pid) == made.start
    return made if lives and not process.is_ending(made.pid) else None


_FIELDS = {"pid": int, "start": int, "boot": str, "mnt": int, "own": int, "user": str, "network": str}


def enter(running: Running) -> None:
    """Move this process into a sandbox and its control group; what it starts is in its pid namespace as well.

    Raises:
        FailedPrecondition: it has just ended, or is another user's.
    """
    here = f"/proc/{running.pid}"
    try:
        fds = [os.open(f"{here}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _KINDS if _differs(here, kind)]
        last = [os.open(f"{here}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in (running.mnt, running.own)]
        doors = [os.open(f"{here}/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC) for fd in running.doors]
        cgroups.join(doors)
        capabilities.undumpable()  # before anybody there can see us
        for fd in (*fds, last[0]):
            namespaces.join_by(fd)
        with suppress(OSError):  # EINVAL: we are in it
            namespaces.join_by(last[1])
        for fd in (*fds, *last, *doors):
            os.close(fd)
    except OSError as error:
        raise FailedPrecondition(
            f"the sandbox of process {running.pid} cannot be entered: {error.strerror}",
            remedy="it may have ended: try again",
        ) from None
    os.chdir("/")


def join(pid: int) -> None:
    """Move into the mount namespace of a process, and into the user namespace that it belongs to.

    Raises:
        OSError: EPERM, or there is no such process.
    """
    if _differs(f"/proc/{pid}", "user"):
        namespaces.join(pid, "user")
    namespaces.join(pid, "mnt")


def _differs(here: str, kind: str) -> bool:
    try:
        ours = os.stat(f"/proc/self/ns/{kind}").st_ino
        return os.stat(f"{here}/ns/{kind}").st_ino != ours
    except FileNotFoundError:  # the kernel has no such kind
        return False


def user(running: Running, asked: str) -> users.User:
    """The user of a command in a sandbox that this process has entered.

    Raises:
        InvalidArgument: there is no such user.
    """
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        made = users.find(root, asked or running.user, [])
    finally:
        os.close(root)
    try:
        with open("/proc/self/setgroups", encoding="utf-8") as file:
            may_set_groups = file.read().strip() != "deny"
    except OSError:  # a tree without /proc
        may_set_groups = False
    return made if may_set_groups else replace(made, groups=tuple(os.getgroups()))


def own_place(directory: str) -> str:
    """A mount point in a directory that others have in common, seen by this mount namespace only: nothing is left of it."""
    mounts.mount("tmpfs", directory, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "mode=700,size=64k")
    made = f"{directory}/{os.getpid()}"
    os.mkdir(made, 0o700)
    return made
