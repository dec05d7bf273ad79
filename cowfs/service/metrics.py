"""``/metrics`` for Prometheus: figures of the store, of containers and of the daemon, made on request.

Names and units follow Prometheus's conventions (base units, ``_total`` for counters), as checked by ``promtool check metrics``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cowfs import __version__
from cowfs.errors import Unsupported
from cowfs.service.containers import cgroups
from cowfs.service.containers.figures import figures_of
from cowfs.service.containers.stats import storage

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["exposition"]

TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Collector:
    """Make all metric families of one scrape."""

    def __init__(self, service: Service) -> None:
        from prometheus_client import core

        self._service = service
        self._gauge: Any = core.GaugeMetricFamily
        self._counter: Any = core.CounterMetricFamily

    def collect(self) -> Iterable[Any]:
        yield from self._store()
        yield from self._daemon()
        yield from self._containers()

    def _store(self) -> Iterable[Any]:
        store = self._service.store
        totals = store.totals()
        about = self._gauge("cowfs_info", "Version and driver.", labels=["version", "driver"])
        about.add_metric([__version__, store.driver.name], 1)
        snapshots = self._gauge("cowfs_snapshots", "Snapshots in the store.", labels=["kind"])
        for kind in ("active", "view", "committed"):
            snapshots.add_metric([kind], totals.count.get(kind, 0))
        yield about
        yield snapshots
        for name, text, value in (
            ("cowfs_committed_bytes", "Bytes that committed layers hold.", totals.committed.bytes),
            ("cowfs_committed_inodes", "Inodes that committed layers hold.", totals.committed.inodes),
            (
                "cowfs_reclaimable_bytes",
                "Bytes of committed layers that have neither tag nor child.",
                totals.reclaimable.bytes,
            ),
            ("cowfs_host_size_bytes", "Size of the host's file system.", totals.host_bytes),
            ("cowfs_host_free_bytes", "Bytes that the host's file system has free.", totals.host_free),
            ("cowfs_images", "Images.", len(self._service.images.ids())),
        ):
            yield self._gauge(name, text, value=value)
        yield self._counter("cowfs_events", "Events in the store's log so far.", value=store.index.event_range()[1])

    def _daemon(self) -> Iterable[Any]:
        service = self._service
        requests = self._counter("cowfs_api_requests", "Requests answered.", labels=["method", "status"])
        for (method, status), count in sorted(service.requests.items()):
            requests.add_metric([method if method in _METHODS else "other", str(status)], count)
        yield requests
        yield self._counter("cowfs_api_handling_seconds", "Time spent in handlers.", value=service.seconds)
        yield self._gauge(
            "cowfs_api_connections", "Open connections.", value=service.loop.connections if service.loop else 0
        )
        yield self._gauge(
            "cowfs_start_time_seconds", "When the daemon began, seconds since 1970.", value=service.started
        )

    def _containers(self) -> Iterable[Any]:
        states = self._gauge("cowfs_containers", "Containers.", labels=["state"])
        for state, count in sorted(self._service.containers.states().items()):
            states.add_metric([state], count)
        yield states
        labels = ["id", "name", "image"]
        made = {
            name: (self._counter if name.endswith("_total") else self._gauge)(
                name.removesuffix("_total"), text, labels=labels
            )
            for name, text in _FAMILIES.items()
        }
        requests = self._counter(
            "cowfs_container_fuse_requests", "Requests of the kernel to the mount.", labels=[*labels, "kind"]
        )
        for container in self._service.containers.all():
            if not container.running:
                continue
            named = [container.id[:12], container.name, container.image_name]
            figures, held = figures_of(container), storage(self._service.store, container)
            for name, value in (
                ("cowfs_container_cpu_seconds_total", None if figures.cpu is None else figures.cpu / 1e9),
                ("cowfs_container_memory_usage_bytes", figures.memory),
                ("cowfs_container_memory_limit_bytes", figures.memory_limit),
                ("cowfs_container_processes", figures.pids),
                ("cowfs_container_used_bytes", held["bytes"]),
                ("cowfs_container_limit_bytes", held["limit_bytes"]),
                ("cowfs_container_used_inodes", held["inodes"]),
                ("cowfs_container_limit_inodes", held["limit_inodes"]),
                ("cowfs_container_copied_files_total", held.get("copied_files")),
                ("cowfs_container_copied_bytes_total", held.get("copied_bytes")),
                ("cowfs_container_redirected_files_total", held.get("redirected_files")),
                ("cowfs_container_redirected_blocks_total", held.get("redirected_blocks")),
                ("cowfs_container_read_bytes_total", _moved(figures, "read")),
                ("cowfs_container_written_bytes_total", _moved(figures, "write")),
            ):
                if value is not None:
                    made[name].add_metric(named, value)
            for kind, count in sorted(held["requests"].items()):
                requests.add_metric([*named, kind], count)
        yield from made.values()
        yield requests


_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")

_FAMILIES = {
    "cowfs_container_cpu_seconds_total": "Processor time used.",
    "cowfs_container_memory_usage_bytes": "Memory in use.",
    "cowfs_container_memory_limit_bytes": "Bound on memory; missing where there is none.",
    "cowfs_container_processes": "Processes and threads.",
    "cowfs_container_used_bytes": "Bytes that the writable layer holds.",
    "cowfs_container_limit_bytes": "Bound on them; missing where there is none.",
    "cowfs_container_used_inodes": "Inodes that the writable layer holds.",
    "cowfs_container_limit_inodes": "Bound on them; missing where there is none.",
    "cowfs_container_copied_files_total": "Files whose data was copied up from a layer beneath since the container was started.",
    "cowfs_container_copied_bytes_total": "Bytes of them.",
    "cowfs_container_redirected_files_total": "Files of layers beneath whose changes are redirected, made since the start.",
    "cowfs_container_redirected_blocks_total": "Blocks that were redirected.",
    "cowfs_container_read_bytes_total": "Bytes read from block devices.",
    "cowfs_container_written_bytes_total": "Bytes written to block devices.",
}


def _moved(figures: cgroups.Figures, operation: str) -> int:
    return sum(value for _, _, name, value in figures.blkio if name == operation)


def exposition(service: Service) -> bytes:
    """The answer of ``/metrics``.

    Raises:
        Unsupported: the package ``prometheus_client`` is missing.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError:
        raise Unsupported(
            "metrics need the package prometheus_client", remedy="pip install 'cowfs-storage[daemon]'"
        ) from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service))
    return bytes(generate_latest(registry))
