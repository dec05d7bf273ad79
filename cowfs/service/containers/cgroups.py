"""The kernel's accounts of a container, from control groups of version 1 and 2.

Sources: Documentation/admin-guide/cgroup-v1/ and cgroup-v2.rst. Figures that a host does not have are None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from cowfs.sys import host

__all__ = ["PREFIX", "Figures", "Place", "directories", "oom_killed", "pids", "place", "read"]

ROOT = "/sys/fs/cgroup"
PREFIX = "/cowfs"
"""Where containers' groups are, below the root of each hierarchy."""


@dataclass(slots=True)
class Figures:
    """One sample of a group. Times are nanoseconds, sizes bytes.

    Attributes:
        cpu, cpu_user, cpu_system: time of all processes. throttled:  (periods, throttled periods, time).
        memory, memory_max, memory_limit: in use, the highest use, the bound. memory_stat: the kernel's own names.
        pids, pids_limit: processes and threads.
        blkio: (major, minor, operation, bytes).
    """

    cpu: int | None = None
    cpu_user: int = 0
    cpu_system: int = 0
    throttled: tuple[int, int, int] = (0, 0, 0)
    memory: int | None = None
    memory_max: int | None = None
    memory_limit: int | None = None
    memory_stat: Mapping[str, int] = field(default_factory=dict)
    pids: int | None = None
    pids_limit: int | None = None
    blkio: list[tuple[int, int, str, int]] = field(default_factory=list)
    blkio_count: list[tuple[int, int, str, int]] = field(default_factory=list)


_EVERY = frozenset({"cpu", "cpuset", "io", "memory", "pids"})
_LEAF = "cowfs-daemon"


@dataclass(frozen=True, slots=True)
class Place:
    """Where this daemon may make groups.

    Attributes:
        parent: the group above those of containers; "" where it may make none.
        controllers: those that limit them, by their names in version 2.
    """

    parent: str
    controllers: frozenset[str]


@host.remembered
def place() -> Place:
    """The place of this process's containers: anywhere as root; else the group of version 2 that was delegated to its user, if one was.

    The processes of a group below which controllers work must be in leaves ("no internal process", cgroup-v2.rst), so this process moves to one.
    """
    if host.init_userns() and os.geteuid() == 0:
        return Place(PREFIX, _EVERY)
    own = next((line[3:] for line in _text("/proc/self/cgroup").splitlines() if line.startswith("0::")), "").rstrip("/")
    own = own.removesuffix(f"/{_LEAF}")
    above = ROOT + own
    parent = own + PREFIX
    if not is_unified() or not os.access(f"{above}/cgroup.procs", os.W_OK) or not os.access(above, os.W_OK):
        return Place("", frozenset())
    try:
        os.makedirs(f"{above}/{_LEAF}", exist_ok=True)
        os.makedirs(ROOT + parent, exist_ok=True)
        with open(f"{above}/{_LEAF}/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except OSError:
        return Place("", frozenset())
    for controller in _text(f"{above}/cgroup.controllers").split():
        try:
            with open(f"{above}/cgroup.subtree_control", "w", encoding="ascii") as file:
                file.write(f"+{controller}")
        except OSError:
            continue  # another process is in the group itself
    return Place(parent, _EVERY & frozenset(_text(f"{ROOT}{parent}/cgroup.controllers").split()))


def is_unified() -> bool:
    """Whether this host has version 2 alone."""
    return os.path.exists(f"{ROOT}/cgroup.controllers")


def directories(path: str) -> dict[str, str]:
    """The directory of a group in each hierarchy, by controller; of version 2 all in one, ``""``."""
    if not path:
        return {}
    if is_unified():
        return {"": ROOT + path} if os.path.isdir(ROOT + path) else {}
    found = {}
    for controller in ("cpu", "cpuacct", "memory", "pids", "blkio", "freezer", "devices"):
        directory = f"{ROOT}/{controller}{path}"
        if os.path.isdir(directory):
            found[controller] = directory
    return found


def read(path: str) -> Figures:
    """Take a sample of a group."""
    where = directories(path)
    return _read_2(where[""]) if "" in where else _read_1(where)


def oom_killed(path: str) -> bool:
    """Whether the kernel killed a process of a group for want of memory."""
    where = directories(path)
    if "" in where:
        return _table(f"{where['']}/memory.events").get("oom_kill", 0) > 0
    return _table(f"{where.get('memory', '')}/memory.oom_control").get("oom_kill", 0) > 0


def pids(path: str) -> list[int]:
    """The processes of a group and of those below it."""
    for directory in directories(path).values():
        found = []
        for base, _, files in os.walk(directory):
            if "cgroup.procs" in files:
                found += [int(word) for word in _text(f"{base}/cgroup.procs").split()]
        return sorted(found)
    return []


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: str) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


_NO_LIMIT = 1 << 62
"""Version 1 writes "no limit" as the largest multiple of a page."""


def _read_1(where: Mapping[str, str]) -> Figures:
    made = Figures()
    accounting = where.get("cpuacct", "")
    made.cpu = _number(f"{accounting}/cpuacct.usage")
    ticks = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    table = _table(f"{accounting}/cpuacct.stat")
    made.cpu_user, made.cpu_system = table.get("user", 0) * ticks, table.get("system", 0) * ticks
    table = _table(f"{where.get('cpu', '')}/cpu.stat")
    made.throttled = (table.get("nr_periods", 0), table.get("nr_throttled", 0), table.get("throttled_time", 0))
    memory = where.get("memory", "")
    made.memory = _number(f"{memory}/memory.usage_in_bytes")
    made.memory_max = _number(f"{memory}/memory.max_usage_in_bytes")
    limit = _number(f"{memory}/memory.limit_in_bytes")
    made.memory_limit = limit if limit is not None and limit < _NO_LIMIT else None
    made.memory_stat = _table(f"{memory}/memory.stat")
    made.pids = _number(f"{where.get('pids', '')}/pids.current")
    made.pids_limit = _number(f"{where.get('pids', '')}/pids.max")
    blkio = where.get("blkio", "")
    made.blkio = _blkio(f"{blkio}/blkio.throttle.io_service_bytes_recursive") or _blkio(
        f"{blkio}/blkio.throttle.io_service_bytes"
    )
    made.blkio_count = _blkio(f"{blkio}/blkio.throttle.io_serviced_recursive") or _blkio(
        f"{blkio}/blkio.throttle.io_serviced"
    )
    return made


def _blkio(path: str) -> list[tuple[int, int, str, int]]:
    found = []
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) == 3 and words[2].isdecimal():
            major, _, minor = words[0].partition(":")
            found.append((int(major), int(minor), words[1].lower(), int(words[2])))
    return found


def _read_2(directory: str) -> Figures:
    made = Figures()
    table = _table(f"{directory}/cpu.stat")
    if table:
        made.cpu = table.get("usage_usec", 0) * 1000
        made.cpu_user, made.cpu_system = table.get("user_usec", 0) * 1000, table.get("system_usec", 0) * 1000
        made.throttled = (
            table.get("nr_periods", 0), table.get("nr_throttled", 0), table.get("throttled_usec", 0) * 1000,
        )  # fmt: skip
    made.memory = _number(f"{directory}/memory.current")
    made.memory_max = _number(f"{directory}/memory.peak")
    made.memory_limit = _number(f"{directory}/memory.max")
    made.memory_stat = _table(f"{directory}/memory.stat")
    made.pids = _number(f"{directory}/pids.current")
    made.pids_limit = _number(f"{directory}/pids.max")
    for line in _text(f"{directory}/io.stat").splitlines():
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        values = dict(pair.partition("=")[::2] for pair in pairs)
        for key, target in (("bytes", made.blkio), ("ios", made.blkio_count)):
            for name, operation in (("r", "read"), ("w", "write")):
                target.append((int(major), int(minor), operation, int(values.get(name + key, 0))))
    return made
