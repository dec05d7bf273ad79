"""Changes of a container that is there: limits of its control groups, its restart policy, the limit of its tree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from cowfs.service.containers.container import Container
from cowfs.service.containers.limits import check_limits, possible_resources
from cowfs.service.containers.records import Update
from cowfs.service.containers.restarting import check_policy
from cowfs.service.errors import ApiError
from cowfs.service.records import encode

if TYPE_CHECKING:
    from cowfs.service.containers.manager import Containers
    from cowfs.store import Store

__all__ = ["set_limit", "update"]


def update(containers: Containers, container: Container, wanted: Update) -> None:
    """Change limits of control groups, also while it runs."""
    changes = {key: value for key, value in encode(wanted).items() if value and key != "RestartPolicy"}
    if wanted.RestartPolicy is not None and wanted.RestartPolicy.Name:
        host = replace(container.host_config, RestartPolicy=wanted.RestartPolicy)
        check_policy(host)
        with container.lock:
            container.host["RestartPolicy"] = encode(wanted.RestartPolicy)
            container.save()
    if not changes:
        return
    check_limits(changes, changing=True)
    if (
        container.running
        and changes.get("Memory")
        and "MemorySwap" not in changes
        and container.host.get("MemorySwap", 0) > 0
    ):
        raise ApiError(
            409,
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time",
        )
    with container.lock:
        before = container.host
        container.host = before | changes
        try:
            container.save()
            possible = possible_resources(changes)
            if container.running and possible:
                containers.runtime("update", "--resources", "-", container.id, input=json.dumps(possible))
        except BaseException:
            container.host = before
            container.save_if_room()
            raise
    containers.tell(container, "update")


def set_limit(store: Store, containers: Containers, container: Container, changes: Mapping[str, str | None]) -> None:
    """Change the limit of its tree, running or not.

    Args:
        changes: ``size`` and ``inodes``; None for no limit.

    Raises:
        InvalidArgument: not a size or count.
    """
    with container.lock:
        store.limit(container.key, **changes)
        options = {**(container.host.get("StorageOpt") or {}), **changes}
        container.host["StorageOpt"] = {key: text for key, text in options.items() if text is not None} or None
        container.save()
    containers.tell(container, "update")
