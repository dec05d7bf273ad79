"""Become what another process of the same user is: its namespaces, root, working directory, limits; or be refused by the kernel.

Rule: **equal or not at all.** The server of a mount that the mount service starts for a client (:mod:`cowfs.mounting.standby`) must have
exactly the rights that it would have had as the client's own child: a right more would be the client's to use, through the mount.
So nothing that a client says is believed. Every fact about it comes from the kernel, by the client's entry in /proc; what differs is joined, with the
kernel judging whether this process may (setns(2), chroot(2)); and then all facts are read again of both, with the client alive, and must be the
same. Where one is not, :class:`Unequal` is raised, this process ends, and the client mounts by itself.

Facts that must be equal in the end, and how they get so:

- user ids and groups, capabilities (all five sets), ``no_new_privs``, the label of a security module: never changed here, except by joining a user
  namespace, which gives all capabilities in it. So a client that gave some up is refused.
- seccomp: neither may have a filter; filters cannot be compared.
- namespaces: joined, all at once, so that the kernel judges them together; pid and time namespaces cannot be.
- the root directory: by chroot(2), to a descriptor of the client's.

Resource limits are the client's, never more than ours. Control group, niceness, processors and what the out-of-memory killer thinks are the
client's as far as this process may change them; they are no rights over files.
"""

from __future__ import annotations

import os
import resource
import select
from collections.abc import Callable

from cowfs.sys import host, namespaces, process

__all__ = ["Client", "Unequal"]

_STATUS = (b"Uid", b"Gid", b"Groups", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb", b"NoNewPrivs", b"Seccomp")
_JOINED = {
    "user": namespaces.CLONE_NEWUSER,
    "mnt": namespaces.CLONE_NEWNS,
    "cgroup": namespaces.CLONE_NEWCGROUP,
    "ipc": namespaces.CLONE_NEWIPC,
    "net": namespaces.CLONE_NEWNET,
    "uts": namespaces.CLONE_NEWUTS,
}
_KEPT = ("pid", "time")
_LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Unequal(Exception):
    """This process cannot become what the client is; the client has to help itself. Not an error: nobody is told."""


class Client:
    """A process that asked for something, by the kernel's word.

    Args:
        pid: its process id here.

    Raises:
        Unequal: it is gone, or not to be looked at.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._alive = os.pidfd_open(pid)
            self._theirs = os.open(f"/proc/{pid}", _DIRECTORY)
            self._ours = os.open(f"/proc/{os.getpid()}", _DIRECTORY)
        except OSError as error:
            raise Unequal(f"process {pid}: {error.strerror}") from None

    def become(self) -> None:
        """Make this process, which has one thread, equal to the client.

        Raises:
            Unequal: it cannot be. This process is then good for nothing but its end.
        """
        try:
            self._check_before()
            root = os.open("root", _DIRECTORY, dir_fd=self._theirs)
            here = os.open("cwd", _DIRECTORY, dir_fd=self._theirs)
            self._take_limits()
            self._join()
            if self._place(root) != self._root_of(self._ours):
                os.fchdir(root)
                os.chroot(".")
            os.fchdir(here)
            process.make_dumpable()  # as the client is: joining a user namespace had made /proc/self another's
            for fact in (_status, _namespaces, _label, self._root_of):
                theirs, ours = fact(self._theirs), fact(self._ours)
                if theirs != ours:
                    raise Unequal(f"{fact.__name__}: {theirs!r} is not {ours!r}")
        except OSError as error:
            raise Unequal(str(error)) from None
        host.forget()
        if not self.is_alive():
            raise Unequal("the client is gone")
        for fd in (self._theirs, self._ours, self._alive, root, here):
            os.close(fd)

    def is_alive(self) -> bool:
        """Whether it has not ended; its number was not given to another process then."""
        return not select.select([self._alive], [], [], 0)[0]

    def _check_before(self) -> None:
        """Facts that joining does not change are compared first, so that nothing is done for a client that they exclude."""
        theirs, ours = _status(self._theirs), _status(self._ours)
        for name in (b"Uid", b"Gid", b"Groups", b"NoNewPrivs", b"Seccomp"):
            if theirs.get(name) != ours.get(name):
                raise Unequal(f"{name.decode()}: {theirs.get(name)!r} is not {ours.get(name)!r}")
        if theirs.get(b"Seccomp", b"0") != b"0":
            raise Unequal("seccomp filters cannot be compared")

    def _join(self) -> None:
        theirs, ours = _namespaces(self._theirs), _namespaces(self._ours)
        for name in _KEPT:
            if theirs[name] != ours[name]:
                raise Unequal(f"another {name} namespace")
        flags = sum(flag for name, flag in _JOINED.items() if theirs[name] != ours[name])
        if flags:
            namespaces.join_all(self._alive, flags)

    def _root_of(self, process: int) -> tuple[int, int, bytes]:
        fd = os.open("root", _DIRECTORY, dir_fd=process)
        try:
            return self._place(fd)
        finally:
            os.close(fd)

    def _place(self, fd: int) -> tuple[int, int, bytes]:
        """Identity of a directory and of the mount where it was reached (proc(5), fdinfo, mnt_id)."""
        status = os.fstat(fd)
        mount = next(line for line in _read(f"fdinfo/{fd}", self._ours).splitlines() if line.startswith(b"mnt_id:"))
        return status.st_dev, status.st_ino, mount

    def _take_limits(self) -> None:
        for number in _LIMITS:
            theirs, ours = resource.prlimit(self.pid, number), resource.getrlimit(number)
            if theirs != ours:
                hard = _least(theirs[1], ours[1])
                resource.setrlimit(number, (_least(theirs[0], hard), hard))
        for take in (self._take_group, self._take_priority, self._take_processors, self._take_badness):
            _as_far_as_possible(take)

    def _take_priority(self) -> None:
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, self.pid))

    def _take_processors(self) -> None:
        os.sched_setaffinity(0, os.sched_getaffinity(self.pid))

    def _take_badness(self) -> None:
        _write("oom_score_adj", _read("oom_score_adj", self._theirs), self._ours)

    def _take_group(self) -> None:
        """Source: cgroups(7), /proc/PID/cgroup; the usual mount points of both versions."""
        ours = set(_read("cgroup", self._ours).splitlines())
        for line in _read("cgroup", self._theirs).splitlines():
            if line not in ours:
                _, controllers, path = os.fsdecode(line).split(":", 2)
                for place in [controllers.removeprefix("name=")] if controllers else ["unified", "."]:
                    try:
                        _write(f"/sys/fs/cgroup/{place}/{path}/cgroup.procs", b"%d" % os.getpid())
                    except OSError:
                        continue
                    break


def _as_far_as_possible(take: Callable[[], None]) -> None:
    try:
        take()
    except OSError:
        pass  # not this user's to change; it is no right over files


def _least(one: int, other: int) -> int:
    if resource.RLIM_INFINITY in (one, other):
        return other if one == resource.RLIM_INFINITY else one
    return min(one, other)


def _read(name: str, process: int) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _write(name: str, data: bytes, process: int | None = None) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=process)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _status(process: int) -> dict[bytes, bytes]:
    """Credentials, as this process's user namespace numbers them (proc(5))."""
    pairs = (line.partition(b":") for line in _read("status", process).splitlines())
    return {name: value.strip() for name, _, value in pairs if name in _STATUS}


def _namespaces(process: int) -> dict[str, str]:
    found = {name: os.readlink(f"ns/{name}", dir_fd=process) for name in _JOINED}
    for name in _KEPT:
        try:
            found[name] = os.readlink(f"ns/{name}", dir_fd=process)
        except FileNotFoundError:
            found[name] = ""  # a kernel without them
    return found


def _label(process: int) -> bytes:
    """The label that a Linux security module gave, b"" where there is none."""
    try:
        return _read("attr/current", process)
    except OSError:
        return b""
