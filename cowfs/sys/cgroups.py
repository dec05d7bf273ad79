"""A control group for one command: what it and all that it starts may take of memory, processor time and process numbers.

Strategy: of each controller that is needed, the hierarchy is found in which this host has it (version 1 or 2, both at once on some), and a group
is made below the caller's own, so that the caller's own bounds hold as well. In version 2 a group with processes cannot hand
controllers on ("no internal processes"), so there it is made below the nearest group above the caller's in which this user may, and which has the controllers.

The maker locks each directory. A group whose maker was killed is empty and unlocked, and the next maker there removes it.

Sources: Documentation/admin-guide/cgroup-v1/, cgroup-v2.rst ("Delegation", "No Internal Process Constraint"), cgroups(7).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

__all__ = ["Group", "Limits", "NoGroup", "join", "make", "why_not"]

_PREFIX = "cowfs-run-"
_PERIOD = 100_000  # microseconds


class NoGroup(Exception):
    """No group can be made; the text says why."""


class Limits(NamedTuple):
    """The most that a group may take.

    Attributes:
        memory: bytes, swap included.
        cpus: processors: 0.5 is half of one.
        pids: processes and threads.
    """

    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None


class _Part(NamedTuple):
    """A group's directory in one hierarchy: the path, and descriptors of the one above and of itself."""

    path: str
    above: int
    fd: int


class Group:
    """A group that was made. Owner of descriptors, until :meth:`remove`; works in every mount namespace."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self.doors: list[int] = []
        """Descriptors for :func:`join`, also in a process that may not open them itself."""

    def add(self, place: str, name: str, files: Mapping[str, str]) -> None:
        """Make its directory below ``place``, and write its bounds.

        Raises:
            NoGroup: this user may not, or the kernel refuses.
        """
        where = f"{place}/{name}"
        try:
            above = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _clear(above)
                os.mkdir(name, 0o755, dir_fd=above)
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
            except OSError:
                os.close(above)
                raise
            self._parts.append(_Part(where, above, fd))
            fcntl.flock(fd, fcntl.LOCK_SH)
            for file, text in files.items():
                _write(where, file, text)
            self.doors.append(os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=fd))
        except OSError as error:
            path = error.filename if str(error.filename).startswith("/") else where
            raise NoGroup(f"{path}: {error.strerror}") from None

    def oom_kills(self) -> int:
        """How many processes the kernel has killed since they came to the bound of memory."""
        for part in self._parts:
            for name in ("memory.events", "memory.oom_control"):
                for line in _text(name, part.fd).splitlines():
                    word, _, number = line.partition(" ")
                    if word == "oom_kill":
                        return int(number)
        return 0

    def remove(self) -> None:
        """Remove it. One that still has a process in it stays until somebody makes the next."""
        for part in self._parts:
            for wait in (0.0, 0.001, 0.01, 0.1, 0.3):  # the last process leaves it a little after it was waited for
                time.sleep(wait)
                try:
                    os.rmdir(os.path.basename(part.path), dir_fd=part.above)
                except FileNotFoundError:
                    break
                except OSError:
                    continue
                break
        for fd in (*self.doors, *(fd for part in self._parts for fd in (part.above, part.fd))):
            os.close(fd)
        self.doors, self._parts = [], []


def join(doors: Sequence[int]) -> None:
    """Move this process into a group.

    Raises:
        OSError: the group is gone, or its bound on processes is reached.
    """
    for fd in doors:
        os.write(fd, b"0")


def make(limits: Limits) -> Group:
    """Make a group of this process's, with no process in it yet.

    Raises:
        NoGroup: this host has no such controller, or lets this user make none.
    """
    made = Group()
    name = _PREFIX + secrets.token_hex(6)
    try:
        for place, files in _planned(limits).items():
            made.add(place, name, files)
    except BaseException:
        made.remove()
        raise
    return made


def why_not() -> str:
    """Why no group with all three bounds can be made here; "" where it can: it is tried."""
    try:
        make(Limits(64 << 20, 1.0, 64)).remove()
    except NoGroup as error:
        return str(error)
    return ""


#: written where the host has it: without accounting of swap the bound is that of memory alone
_OPTIONAL = ("memory.memsw.limit_in_bytes", "memory.swap.max")


def _write(where: str, file: str, text: str) -> None:
    path = f"{where}/{file}"
    if file in _OPTIONAL and not os.path.exists(path):
        return
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)


def _clear(above: int) -> None:
    """Remove what killed makers have left in a directory."""
    for name in os.listdir(above):
        if name.startswith(_PREFIX):
            with suppress(OSError):  # in use, or another's
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.rmdir(name, dir_fd=above)
                finally:
                    os.close(fd)


def _planned(limits: Limits) -> dict[str, dict[str, str]]:
    """The files to write, by the directory below which the group is made."""
    quota = None if limits.cpus is None else max(1000, round(limits.cpus * _PERIOD))
    wanted: dict[str, tuple[dict[str, str], dict[str, str]]] = {}  # controller: files of version 1, and of version 2
    if limits.memory is not None:
        memory = str(limits.memory)
        wanted["memory"] = (
            {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory},
            {"memory.max": memory, "memory.swap.max": "0"},
        )
    if quota is not None:
        wanted["cpu"] = (
            {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": str(quota)},
            {"cpu.max": f"{quota} {_PERIOD}"},
        )
    if limits.pids is not None:
        wanted["pids"] = ({"pids.max": str(limits.pids)}, {"pids.max": str(limits.pids)})
    own = _own()
    planned: dict[str, dict[str, str]] = {}
    of_2 = []
    for controller, (files, _) in wanted.items():
        if controller in own:
            planned.setdefault(own[controller].path, {}).update(files)
        else:
            of_2.append(controller)
    if of_2:
        place = _place_2(own.get(""), of_2)
        for controller in of_2:
            planned.setdefault(place, {}).update(wanted[controller][1])
    return planned


class _Own(NamedTuple):
    """The group that this process is in: its directory, and how many groups above it can be seen."""

    path: str
    top: str


def _own() -> dict[str, _Own]:
    """The groups of this process by controller; of version 2 by ""."""
    tops: dict[str, tuple[str, str]] = {}  # controller: mount point, and the group that is its root
    for line in _text("/proc/self/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        fields, kinds = head.split(" "), tail.split(" ")
        if kinds[0] in ("cgroup", "cgroup2"):
            for controller in [""] if kinds[0] == "cgroup2" else kinds[-1].split(","):
                tops.setdefault(controller, (_unescaped(fields[4]), _unescaped(fields[3])))
    found = {}
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in tops:
                top, root = tops[controller]
                if path == root or path.startswith(root.rstrip("/") + "/"):
                    below = path[len(root.rstrip("/")) :].strip("/")
                    found[controller] = _Own(f"{top}/{below}".rstrip("/"), top)
    return found


def _place_2(own: _Own | None, controllers: Sequence[str]) -> str:
    """The nearest group of version 2, from the own one on upwards, below which a group with these controllers can be made."""
    if own is None:
        raise NoGroup(f"there is no control group of {' and '.join(controllers)} in sight")
    why = ""
    for place in _upwards(own):
        has = _text(f"{place}/cgroup.controllers").split()
        missing = [each for each in controllers if each not in has]
        if missing:
            why = why or f"{place} does not have {' and '.join(missing)}"
            continue
        if not (os.access(place, os.W_OK) and os.access(f"{place}/cgroup.procs", os.W_OK)):
            why = why or f"this user may make none in {place}"
            continue
        hands_on = _text(f"{place}/cgroup.subtree_control").split()
        try:
            for each in controllers:
                if each not in hands_on:
                    _write(place, "cgroup.subtree_control", f"+{each}")
        except OSError as error:  # EBUSY: it has processes
            why = why or f"{place} hands no {' and '.join(controllers)} on: {error.strerror}"
            continue
        return place
    raise NoGroup(why or "there is no group to make one in")


def _upwards(own: _Own) -> Iterator[str]:
    place = own.path
    while len(place) > len(own.top):
        yield place
        place = os.path.dirname(place)
    yield own.top


def _unescaped(word: str) -> str:
    return word.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _text(path: str, at: int | None = None) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=at)
        with open(fd, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
