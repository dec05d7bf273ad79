"""What a container's processes use: by its control group, or, where this daemon may make none, by its processes one by one.

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
    made = cgroups.Figures(cpu=0, memory=0, pids=0)
    tick, page = 1_000_000_000 // os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for pid in members(container):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = [int(word) for word in file.read().rpartition(b")")[2].split()[1:]]
        except OSError:
            continue  # it has ended meanwhile
        user, system = (fields[10] + fields[12]) * tick, (fields[11] + fields[13]) * tick
        made.cpu_user += user
        made.cpu_system += system
        made.cpu = (made.cpu or 0) + user + system
        made.memory = (made.memory or 0) + fields[20] * page
        made.pids = (made.pids or 0) + fields[16]
    return made


def _space(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
