"""``docker commit``: a container's changes become a layer over its image."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cowfs.errors import AlreadyExists
from cowfs.images.digests import as_json, chain_ids
from cowfs.service.containers.container import Container
from cowfs.service.images import changed, rfc3339
from cowfs.service.rootless import apply_options

if TYPE_CHECKING:
    from cowfs.service.containers.manager import Containers
    from cowfs.service.images import Images
    from cowfs.store import Store

__all__ = ["commit"]


def commit(
    store: Store,
    images: Images,
    containers: Containers,
    container: Container,
    *,
    name: str,
    message: str,
    author: str,
    changes: Iterable[str],
    pause: bool,
) -> str:
    """Make an image of a container, and return its id.

    The layer is written as an archive and applied over the image's own top: so the common part of containers (the mount
    points of the init snapshot) is not in it.

    Args:
        name: the image's, or "". pause: stop its processes meanwhile, where it has a control group.
    """
    is_frozen = pause and container.running and not container.paused and bool(container.cgroup)
    if is_frozen:
        containers.pause(container)
    try:
        containers.trees.synced(container)
        with tempfile.TemporaryFile(dir=store.root, prefix="cowfs-commit-") as spool:
            store.export(container.key, spool, format="layer")
            spool.seek(0)
            top = _apply(store, container.snapshot, spool)
    finally:
        if is_frozen:
            containers.unpause(container)
    document = _document(images.get(container.image).config, store.image(top).layers[-1].diff_id, container)
    document["author"] = author
    document["config"] = changed(document["config"], changes)
    document["history"][-1] |= {"comment": message, "author": author}
    id = images.keep(top, as_json(document).decode(), [name] if name else [], "commit")
    containers.tell(container, "commit", comment=message, imageID=id, imageRef=name)
    return id


def _apply(store: Store, parent: str, spool: Any) -> str:
    """The layer as a committed snapshot over the image, by its chain id; an existing one is used."""
    key = f"commit/{secrets.token_hex(8)}"
    store.prepare(key, parent)
    try:
        applied = store.apply(key, spool, options=apply_options())
        chain = store.resolve(parent).chain_id
        name = chain_ids([chain, applied.diff_id])[-1] if chain else f"commit/{secrets.token_hex(16)}"
        if store.exists(name):
            store.remove(key)
            return name
        try:
            return store.commit(key, name).name
        except AlreadyExists:
            store.remove(key)
            return name
    except BaseException:
        if store.exists(key):
            store.remove(key)
        raise


def _document(base: Mapping[str, Any], diff_id: str, container: Container) -> dict[str, Any]:
    now = rfc3339(time.time_ns())
    config = {
        key: container.config[key]
        for key in ("User", "Env", "Cmd", "Entrypoint", "WorkingDir", "Labels", "StopSignal", "ExposedPorts", "Volumes")
        if container.config.get(key)
    }
    rootfs = base.get("rootfs") or {}
    step = {"created": now, "created_by": " ".join(container.arguments)}
    return {
        **base,
        "created": now,
        "container": container.id,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [*(rootfs.get("diff_ids") or []), diff_id]},
        "history": [*(base.get("history") or []), step],
    }
