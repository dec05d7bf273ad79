"""Statistics of a container in Docker's form, and the figures of cowfs: bytes and inodes used and left, requests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cowfs.errors import CowfsError, NotFound
from cowfs.model import Limit
from cowfs.service.containers import cgroups
from cowfs.service.containers.container import Container
from cowfs.service.containers.figures import figures_of
from cowfs.service.images import rfc3339

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["WORK", "one", "sample", "storage", "stream", "system_nanoseconds"]


def system_nanoseconds() -> int:
    """Processor time of the host, idle time among it (proc(5), stat)."""
    with open("/proc/stat", encoding="utf-8") as file:
        fields = file.readline().split()[1:9]
    return sum(map(int, fields)) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def storage(store: Store, container: Container) -> dict[str, Any]:
    """The counts of the mount's server: use, limit and requests by kind; only the limit of a container that does not run."""
    try:
        limit = store.limit(container.key)
    except NotFound:
        limit = Limit()  # the container is gone meanwhile
    told: dict[str, Any] = {
        "limit_bytes": limit.bytes, "limit_inodes": limit.inodes, "bytes": None, "inodes": None, "requests": {},
    }  # fmt: skip
    if container.running:
        try:
            found = store.handle(container.key).statistics()
            told |= {
                "bytes": found.usage.bytes if found.usage is not None else None,  # the count has not finished
                "inodes": found.usage.inodes if found.usage is not None else None,
                "limit_bytes": found.limit.bytes,
                "limit_inodes": found.limit.inodes,
                "requests": dict(found.requests),
                **{name: getattr(found, name) for name in WORK},
            }
        except CowfsError:
            pass  # it ended meanwhile, or is of an older cowfs
    return told


WORK = (
    "copied_files", "copied_bytes", "copied_attributes", "redirected_files", "redirected_blocks", "directories_read",
)  # fmt: skip
"""Counts of a mount's server about its own work; see :class:`cowfs.model.Statistics`."""


def _cpu(figures: cgroups.Figures, system: int) -> dict[str, Any]:
    periods, throttled, taken = figures.throttled
    return {
        "cpu_usage": {
            "total_usage": figures.cpu or 0,
            "usage_in_kernelmode": figures.cpu_system,
            "usage_in_usermode": figures.cpu_user,
        },
        "system_cpu_usage": system,
        "online_cpus": os.cpu_count() or 1,
        "throttling_data": {"periods": periods, "throttled_periods": throttled, "throttled_time": taken},
    }


def sample(store: Store, container: Container, before: dict[str, Any] | None) -> dict[str, Any]:
    """One document; ``before``: the document before it."""
    head: dict[str, Any] = {
        "id": container.id,
        "name": f"/{container.name}",
        "os_type": "linux",
        "read": rfc3339(time.time_ns()),
        "preread": before["read"] if before else "0001-01-01T00:00:00Z",
        "num_procs": 0,
        "storage_stats": {},
    }
    empty = {"cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0}, "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0}}  # fmt: skip
    if not container.running:
        return {**head, "pids_stats": {}, "blkio_stats": _blkio(cgroups.Figures()), "cpu_stats": empty, "precpu_stats": empty,
                "memory_stats": {}, "networks": {}, "cowfs": storage(store, container)}  # fmt: skip
    figures = figures_of(container)
    memory: dict[str, Any] = {
        "usage": figures.memory or 0,
        "limit": min(figures.memory_limit or _host_memory(), _host_memory()),
        "stats": dict(figures.memory_stat),
    }
    if figures.memory_max is not None:
        memory["max_usage"] = figures.memory_max
    pids = {"current": figures.pids or 0}
    if figures.pids_limit is not None:
        pids["limit"] = figures.pids_limit
    return {
        **head,
        "pids_stats": pids,
        "blkio_stats": _blkio(figures),
        "cpu_stats": _cpu(figures, system_nanoseconds()),
        "precpu_stats": before["cpu_stats"] if before else empty,
        "memory_stats": memory,
        "networks": _networks(container),
        "cowfs": storage(store, container),
    }


def _blkio(figures: cgroups.Figures) -> dict[str, Any]:
    def entries(found: list[tuple[int, int, str, int]]) -> list[dict[str, Any]]:
        return [{"major": major, "minor": minor, "op": op, "value": value} for major, minor, op, value in found]

    return {
        "io_service_bytes_recursive": entries(figures.blkio), "io_serviced_recursive": entries(figures.blkio_count),
        "io_queue_recursive": None, "io_service_time_recursive": None, "io_wait_time_recursive": None,
        "io_merged_recursive": None, "io_time_recursive": None, "sectors_recursive": None,
    }  # fmt: skip


def _networks(container: Container) -> dict[str, Any]:
    """Counters of the network devices of a container, the loopback left out (proc(5), net/dev)."""
    if container.host["NetworkMode"] == "host":
        return {}
    try:
        with open(f"/proc/{container.pid}/net/dev", encoding="utf-8") as file:
            rows = file.readlines()[2:]
    except OSError:
        return {}
    found = {}
    for row in rows:
        name, _, numbers = row.partition(":")
        fields = [int(word) for word in numbers.split()]
        if name.strip() != "lo":
            found[name.strip()] = {
                "rx_bytes": fields[0], "rx_packets": fields[1], "rx_errors": fields[2], "rx_dropped": fields[3],
                "tx_bytes": fields[8], "tx_packets": fields[9], "tx_errors": fields[10], "tx_dropped": fields[11],
            }  # fmt: skip
    return found


def one(store: Store, container: Container, *, two_looks: bool) -> dict[str, Any]:
    """One document; with ``two_looks`` a second after a first one, so that it has the processor's load."""
    first = sample(store, container, None)
    if not two_looks or not container.running:
        return first
    container.wait(lambda: not container.running, 1.0)
    return sample(store, container, first)


def stream(store: Store, container: Container) -> Iterator[dict[str, Any] | None]:
    """A document each second, until the container is gone; None as a sign of life."""
    before: dict[str, Any] | None = None
    while not container.removed:
        before = sample(store, container, before)
        yield before
        for _ in range(2):
            container.wait(lambda: container.removed, 0.5)
            yield None
