"""The use of processor and memory by a container: of its control group, or, where this daemon may make none, of its processes one by one.

Strategy of the second: the first process is root of a process namespace, so its members are the container's (pid_namespaces(7)). Time of
ended processes is their parent's, and of orphans the first one's (proc(5), cutime), so the sum never falls.
"""

from __future__ import annotations

import os

from cowfs.service.containers import cgroups
from cowfs.service.containers.container import Container

__all__ = ["figures_of", "members"]


def members(container: Container) -> list[int]:
    """The processes of a running container."""
    if container.cgroup:
        return cgroups.pids(container.cgroup)
    first = container.pid
    space = _space(first)
    if not first or not space or space == _space(os.getpid()):  # --pid host: which are its own is not known
        return [first] if first else []
    return sorted(pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _space(pid) == space)


def figures_of(container: Container) -> cgroups.Figures:
    """One sample of a running container."""
    if container.cgroup:
        return cgroups.read(container.cgroup)
    tick, page = 1_000_000_000 // os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    user = system = memory = threads = 0
    for pid in members(container):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = [int(word) for word in file.read().rpartition(b")")[2].split()[1:]]
        except OSError:
            continue  # it has ended meanwhile
        user += (fields[10] + fields[12]) * tick
        system += (fields[11] + fields[13]) * tick
        memory += fields[20] * page
        threads += fields[16]
    return cgroups.Figures(cpu=user + system, cpu_user=user, cpu_system=system, memory=memory, pids=threads)


def _space(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
