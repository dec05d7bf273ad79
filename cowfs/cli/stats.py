"""`cowfs stats`: the use of mounts and containers, and the work of their servers, without a daemon.

Strategy. A sample is a list of records. Rates are differences of two samples, so the first line waits for a second sample. A
container's processor, memory, processes and block I/O are of its control group, a mount's of its server process.
"""

from __future__ import annotations

import os
import sys
import time

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING, Any
from cowfs.cli.common import Command
from cowfs.cli.output import count_or, print_json, print_table, shown, size_or
from cowfs.cli.store.args import add_store
from cowfs.errors import CowfsError, InvalidArgument, NotFound
from cowfs.model import Statistics

if TYPE_CHECKING:
    import argparse

    from cowfs.mounting.client import MountStatus

PERIOD = 1.0


@record(frozen=True, slots=True, kw_only=True)
class Look:
    """One mount at one moment.

    Attributes:
        name: of a container, else the key, else the mount point. container: id, or "".
        cpu: seconds used. memory: bytes. pids: processes and threads. read, written: bytes of block devices. None if
            the host does not tell.
        at: seconds of the monotonic clock.
    """

    name: str
    mountpoint: str
    key: str
    container: str
    cpu: float | None
    memory: int | None
    pids: int | None
    read: int | None
    written: int | None
    statistics: Statistics
    at: float


# -- looking -----------------------------------------------------------------------------------------------------------


def looks(wanted: list[str]) -> list[Look]:
    """All mounts of this namespace, and those of containers in any; or the given ones.

    Raises:
        NotFound: a given one is not mounted.
    """
    from cowfs.mounting import client

    found: list[Look] = []
    missing = set(wanted)
    for status in client.mounts(everywhere=True):
        if not (status.alive and status.answers and status.socket and (status.here or _container_of(status)[0])):
            continue
        id, name = _container_of(status)
        names = {name, status.label, status.mountpoint, os.path.realpath(status.mountpoint)} - {""}
        fitting = [each for each in wanted if each in names or os.path.abspath(each) in names or _begins(id, each)]
        if wanted and not fitting:
            continue
        missing -= set(fitting)
        look = _look(status, id, name)
        if look is not None:
            found.append(look)
    if missing:
        raise NotFound(
            f"not mounted: {sorted(missing)[0]!r}",
            remedy="cowfs mounts lists what is; a container is mounted while it runs",
        )
    return found


def _begins(id: str, reference: str) -> bool:
    return len(reference) >= 4 and id.startswith(reference)


def _container_of(status: MountStatus) -> tuple[str, str]:
    """(id, name) of the container of a mount; ("", "") of others."""
    from cowfs.service.containers.known import name_of

    kind, slash, id = status.label.partition("/")
    if kind != "container" or not slash or not status.upper:
        return "", ""
    name = name_of(_root_of(status), id)
    return (id, name) if name is not None else ("", "")


def _root_of(status: MountStatus) -> str:
    """The store of a mounted snapshot."""
    return os.path.dirname(status.upper or "").rpartition("/layers/")[0]


def _look(status: MountStatus, id: str, name: str) -> Look | None:
    from cowfs.mounting.client import MountHandle
    from cowfs.service.containers import cgroups
    from cowfs.service.containers.known import cgroup_of

    try:
        counted = MountHandle(status.mountpoint, status.pid or 0, status.socket).statistics(timed=True)
    except CowfsError:
        counted = Statistics(usage=status.usage, limit=status.limit)  # an older server, or one that has just ended
    if id:
        figures = cgroups.read(cgroup_of(_root_of(status), id))
        cpu = None if figures.cpu is None else figures.cpu / 1e9
        memory, pids = figures.memory, figures.pids
        moved = {op: sum(value for _, _, each, value in figures.blkio if each == op) for op in ("read", "write")}
    else:
        cpu, memory, pids, moved = _process(status.pid)
    return Look(
        name=name or status.label or status.mountpoint,
        mountpoint=status.mountpoint,
        key=status.label,
        container=id,
        cpu=cpu,
        memory=memory,
        pids=pids,
        read=moved.get("read"),
        written=moved.get("write"),
        statistics=counted,
        at=time.monotonic(),
    )


def _process(pid: int | None) -> tuple[float | None, int | None, int | None, dict[str, int]]:
    """Processor seconds, resident bytes, threads and block I/O of a process (proc(5))."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        memory, threads = int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), int(fields[17])
    except (OSError, ValueError, IndexError):
        return None, None, None, {}
    try:
        with open(f"/proc/{pid}/io", encoding="utf-8") as file:
            table = dict(line.split(": ") for line in file.read().splitlines())
        moved = {"read": int(table["read_bytes"]), "write": int(table["write_bytes"])}
    except (OSError, ValueError, KeyError):
        moved = {}
    return cpu, memory, threads, moved


# -- telling -----------------------------------------------------------------------------------------------------------

HEAD = ("NAME", "CPU %", "MEMORY", "PIDS", "BLOCK I/O", "USED", "LEFT", "INODES", "LEFT", "REQUESTS/s", "TIME EACH", "HITS",
        "COPIED UP", "REDIRECTED")  # fmt: skip


def _rate(before: float | None, now: float | None, seconds: float) -> float | None:
    return None if before is None or now is None or seconds <= 0 else max(0.0, (now - before) / seconds)


def row(before: Look, now: Look) -> tuple[str, ...]:
    """A line of the table."""
    told, seconds = now.statistics, now.at - before.at
    cpu = _rate(before.cpu, now.cpu, seconds)
    requests = _rate(sum(before.statistics.requests.values()), sum(told.requests.values()), seconds)
    timed = sum(each.count for each in told.timed.values())
    each = sum(each.seconds for each in told.timed.values()) / timed if timed else None
    asked = told.hits + told.misses
    return (
        shown(now.name),
        "-" if cpu is None else f"{cpu * 100:.1f}%",
        size_or(now.memory, "-"),
        count_or(now.pids, "-"),
        f"{size_or(now.read, '-')} / {size_or(now.written, '-')}",
        size_or(told.usage.bytes) if told.usage is not None else "...",
        size_or(_left(told, "bytes"), "no limit"),
        count_or(told.usage.inodes) if told.usage is not None else "...",
        count_or(_left(told, "inodes"), "no limit"),
        "-" if requests is None else f"{requests:.0f}",
        "-" if each is None else f"{each * 1e6:.0f} us",
        f"{100 * told.hits / asked:.0f}%" if asked else "-",
        f"{told.copied_files} ({size_or(told.copied_bytes)})",
        f"{told.redirected_files} ({told.redirected_blocks} blocks)",
    )


def _left(told: Statistics, what: str) -> int | None:
    bound = getattr(told.limit, what)
    used = getattr(told.usage, what) if told.usage is not None else None
    return None if bound is None or used is None else max(0, bound - used)


def document(before: Look, now: Look) -> dict[str, Any]:
    """The same for programs: counts since the mount, times in seconds, ``cpu_percent`` of the last look."""
    from dataclasses import asdict

    made = asdict(now)
    told = made.pop("statistics")
    del made["at"]
    cpu = _rate(before.cpu, now.cpu, now.at - before.at)
    left = {"bytes": _left(now.statistics, "bytes"), "inodes": _left(now.statistics, "inodes")}
    return {**made, "cpu_percent": None if cpu is None else round(cpu * 100, 2), **told, "left": left}


def add_names(parser: argparse.ArgumentParser) -> None:
    """The mounts and containers to look at, as :func:`look` takes them."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="MNT|KEY|CONTAINER",
        help="which (default: all mounts here, and all containers that run)",
    )


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_names(parser)
    add("--no-stream", action="store_true", help="one look, and end")
    add_store(parser)


def _stats(args: argparse.Namespace) -> int:
    names = list(args.names)
    if any(not name for name in names):
        raise InvalidArgument("a name is empty")
    before = {look.mountpoint: look for look in looks(names)}
    terminal = sys.stdout.isatty() and not args.json
    while True:
        time.sleep(PERIOD)
        try:
            now = looks(names)
        except NotFound:
            if args.no_stream:
                raise
            return 0  # the mount is gone
        pairs = [(before.get(look.mountpoint, look), look) for look in now]
        if args.json:
            print_json([document(*pair) for pair in pairs], args.json)
        else:
            if terminal and not args.no_stream:
                sys.stdout.write("\x1b[H\x1b[J")
            print_table(HEAD, [row(*pair) for pair in pairs])
        sys.stdout.flush()
        if args.no_stream:
            return 0
        before = {look.mountpoint: look for look in now}


COMMANDS = {
    "stats": Command(
        _configure,
        _stats,
        "Show what mounts and containers use, again each second: processor, memory, processes and block I/O (of a container, or of the\n"
        "server of a mount), bytes and inodes used and left, requests of the kernel, how long each took, how many of those about names were\n"
        "answered from memory, files copied up, and files and blocks redirected. Requests are timed while somebody looks.",
        ("cowfs stats", "cowfs stats --no-stream", "cowfs stats --no-stream --json web"),
    ),
}
