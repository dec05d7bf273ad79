"""The contents of the page at ``/ui/``: figures of containers over time, snapshots, layers of images; made while a page is open.

Strategy. Asking every container's server takes time, so no exchange does it: one thread asks all of them in rounds,
from the first request on until there was none for a minute, and an exchange gets the results of the last rounds. Each
round is followed by a longer rest, so that the rounds never take more than a quarter of one processor.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from cowfs.driver import registry
from cowfs.errors import CowfsError
from cowfs.service.containers.container import Container
from cowfs.service.containers.figures import figures_of
from cowfs.service.containers.stats import WORK, storage
from cowfs.service.logs import log

if TYPE_CHECKING:
    from cowfs.service.containers.manager import Containers
    from cowfs.service.images import Images
    from cowfs.service.options import Options
    from cowfs.store import Store

__all__ = ["Board"]

PAUSE = 2.0
"""Seconds between two rounds, at least."""

ALONE = 60.0
"""Seconds without a request after which no more rounds are made."""

ROUNDS = 150
PAGE = 200
"""Snapshots that are told at once."""


class Shown(Protocol):
    """The service, as far as the board shows it."""

    store: Store
    options: Options
    containers: Containers
    images: Images


class Board:
    """The maker of figures; see the module.

    Threads: any; :meth:`_rounds` in its own.
    """

    def __init__(self, service: Shown) -> None:
        self._service = service
        self._changed = threading.Condition()
        self._asked = 0.0  # guarded by _changed
        self._running = False  # guarded by _changed
        self._done = 0  # guarded by _changed: rounds so far
        self._history: deque[tuple[int, float, dict[str, int]]] = deque(maxlen=ROUNDS)  # guarded by _changed
        self._figures: dict[str, dict[str, Any]] = {}  # guarded by _changed: by container
        self._drivers: list[dict[str, Any]] | None = None

    # -- rounds -----------------------------------------------------------------------------------

    def _look(self) -> int:
        """Keep the rounds going, and return the number of the last one; wait a moment for the first one."""
        with self._changed:
            self._asked = time.monotonic()
            if not self._running:
                self._running = True
                before = self._done
                threading.Thread(target=self._rounds, name="cowfs-board", daemon=True).start()
                self._changed.wait_for(lambda: self._done > before, 2.0)
            return self._done

    def _rounds(self) -> None:
        cpu: dict[str, tuple[int, int]] = {}
        while True:
            began = time.monotonic()
            figures: dict[str, dict[str, Any]] = {}
            for each in self._service.containers.all():
                if each.running:
                    try:
                        figures[each.id] = self._figures_of(each, cpu)
                    except (CowfsError, OSError) as error:
                        log.debug("no figures of container %s: %s", each.name, error)
            for id in cpu.keys() - figures.keys():
                del cpu[id]
            with self._changed:
                self._done += 1
                self._figures = figures
                used = {id[:12]: found["bytes"] for id, found in figures.items() if found["bytes"] is not None}
                self._history.append((self._done, time.time(), used))
                self._changed.notify_all()
                rest = max(PAUSE, 3 * (time.monotonic() - began))
                if time.monotonic() - self._asked > ALONE:
                    self._running = False
                    return
            time.sleep(rest)

    def _figures_of(self, container: Container, cpu: dict[str, tuple[int, int]]) -> dict[str, Any]:
        figures = figures_of(container)
        found = storage(self._service.store, container)
        now, used = time.monotonic_ns(), figures.cpu or 0
        before = cpu.get(container.id)
        cpu[container.id] = now, used
        return {
            "cpu": round(100 * (used - before[1]) / (now - before[0]), 1) if before else None,
            "memory": figures.memory,
            "memory_limit": figures.memory_limit,
            "pids": figures.pids,
            "read": sum(value for _, _, name, value in figures.blkio if name == "read"),
            "written": sum(value for _, _, name, value in figures.blkio if name == "write"),
            "bytes": found["bytes"],
            "inodes": found["inodes"],
            "limit_bytes": found["limit_bytes"],
            "limit_inodes": found["limit_inodes"],
            "requests": sum(found["requests"].values()),
            **{name: found[name] for name in WORK if name in found},
        }

    # -- documents -------------------------------------------------------------------------------

    def overview(self, after: int) -> dict[str, Any]:
        """Host, store, drivers, containers; and the rounds behind ``after``."""
        done = self._look()
        service = self._service
        with self._changed:
            figures = dict(self._figures)
            rounds = [
                {"round": number, "time": at, "used": used} for number, at, used in self._history if number > after
            ]
        totals = service.store.totals()
        return {
            "round": done,
            "last_event": service.store.index.event_range()[1],
            "actions": service.options.ui_actions,
            "host": _host(),
            "store": {
                "root": service.store.root,
                "driver": service.store.driver.name,
                "row": service.store.driver.row,
                "host_bytes": totals.host_bytes,
                "host_free": totals.host_free,
                "committed_bytes": totals.committed.bytes,
                "reclaimable_bytes": totals.reclaimable.bytes,
                "snapshots": dict(totals.count),
            },
            "drivers": self._probed(),
            "containers": [self._container(each, figures.get(each.id)) for each in service.containers.all()],
            "rounds": rounds,
        }

    @staticmethod
    def _container(container: Container, figures: dict[str, Any] | None) -> dict[str, Any]:
        told = {
            "id": container.id[:12],
            "name": container.name,
            "image": container.image_name,
            "state": container.status,
            "status": container.describe(),
            "command": " ".join(container.arguments)[:200],
            "labels": container.labels,
            "snapshot": container.key,
        }
        return told | (figures or {})

    def _probed(self) -> list[dict[str, Any]]:
        """Each installed driver, whether it can run here and why; probed once."""
        if self._drivers is None:
            store, found = self._service.store, []
            for name in registry.names():
                try:
                    probe = registry.load(name).probe(store.root)
                    usable, reasons = probe.usable, list(probe.reasons)
                except CowfsError as error:
                    usable, reasons = False, [error.message]
                found.append({"name": name, "usable": usable, "reasons": reasons, "used": name == store.driver.name})
            self._drivers = found
        return self._drivers

    def snapshots(self, parent: str, skip: int) -> dict[str, Any]:
        """The children of a snapshot (for "", the snapshots without a parent), the newest first, a page of them.

        Raises:
            NotFound: no such snapshot.
        """
        layers = self._service.store.index.layers()
        children: dict[int, int] = {}
        for _, above, _, _, _ in layers:
            if above is not None:
                children[above] = children.get(above, 0) + 1
        of = self._service.store.resolve(parent).num if parent else None
        found = [each for each in reversed(layers) if each[1] == of]
        return {
            "total": len(found),
            "snapshots": [
                {"name": name, "kind": kind, "bytes": size, "children": children.get(num, 0)}
                for num, _, name, kind, size in found[skip : skip + PAGE]
            ],
        }

    def images(self) -> list[dict[str, Any]]:
        """Images with their layers, topmost first; with the number of images that use each layer."""
        service = self._service
        layers = {num: (parent, name, size or 0) for num, parent, name, _, size in service.store.index.layers()}
        numbers = {name: num for num, (_, name, _) in layers.items()}
        chains, uses = {}, dict.fromkeys(layers, 0)
        images = service.images.all()
        for image in images:
            chain, num = [], numbers.get(image.snapshot)
            while num is not None and num in layers:
                chain.append(num)
                uses[num] += 1
                num = layers[num][0]
            chains[image.id] = chain
        users = [image for image, _, _ in service.containers.users()]
        told = []
        for image in images:
            chain = chains[image.id]
            told.append(
                {
                    "id": image.id[7:19],
                    "names": list(image.tags),
                    "created": image.created // 10**9,
                    "containers": users.count(image.id),
                    "bytes": sum(layers[num][2] for num in chain),
                    "shared_bytes": sum(layers[num][2] for num in chain if uses[num] > 1),
                    "layers": [{"name": layers[num][1], "bytes": layers[num][2], "images": uses[num]} for num in chain],
                }
            )
        return told


def _host() -> dict[str, Any]:
    name = os.uname()
    memory: dict[str, int] = {}
    with open("/proc/meminfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key in ("MemTotal", "MemAvailable"):
                memory[key] = int(value.split()[0]) << 10
    return {
        "name": name.nodename,
        "kernel": name.release,
        "machine": name.machine,
        "processors": os.cpu_count() or 1,
        "load": [round(each, 2) for each in os.getloadavg()],
        "memory": memory.get("MemTotal", 0),
        "memory_available": memory.get("MemAvailable", 0),
    }
