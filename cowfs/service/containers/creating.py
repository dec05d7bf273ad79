"""The making of a container: a snapshot over its image's furnished one, and a record."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cowfs.errors import AlreadyExists
from cowfs.service.containers import bundle
from cowfs.service.containers.checking import storage_options
from cowfs.service.containers.container import OWNER, Container
from cowfs.service.containers.furnishing import furnish
from cowfs.service.containers.records import ContainerConfig
from cowfs.service.images import Image, init_name
from cowfs.service.records import encode

if TYPE_CHECKING:
    from cowfs.service.containers.host import Host

__all__ = ["LABEL", "Maker"]

LABEL = "cowfs.service.container"
"""Label of a container's snapshot: its id."""

INIT_LABEL = "cowfs.service.init"


class Maker:
    """Makes containers.

    Args:
        folder: of the records. run_dir: of the bundles.
    """

    def __init__(self, service: Host, folder: str, run_dir: str) -> None:
        self._service, self._store = service, service.store
        self._folder, self._run_dir = folder, run_dir

    def make(
        self, id: str, name: str, image: Image, config: ContainerConfig, merged: dict[str, Any], raw: Mapping[str, Any]
    ) -> Container:
        """Make the snapshot and the record of a container. Arguments are those of ``Containers.create``, with the id and the name.

        Raises:
            ApiError: 400: an unknown storage option. CowfsError, OSError: neither snapshot nor record is left.
        """
        host = encode(config.HostConfig)
        if not host["NetworkMode"]:
            host["NetworkMode"] = "none" if config.HostConfig.NetworkMode == "" else host["NetworkMode"]
        options = {**self._service.default_limit, **storage_options(config.HostConfig.StorageOpt or {})}
        host["StorageOpt"] = options or None
        made = Container(
            id=id,
            folder=os.path.join(self._folder, id),
            bundle=os.path.join(self._run_dir, id),
            name=name,
            created=time.time_ns(),
            image=image.id,
            image_name=config.Image,
            snapshot=image.snapshot,
            config=merged,
            host=host,
            durable=self._store.driver.fsync,
            volumes=self._volumes(id, merged, config),
        )
        parent = self._init_of(image)
        self._store.prepare(
            made.key, parent, size=options.get("size"), inodes=options.get("inodes"), labels={LABEL: id}
        )
        try:
            os.mkdir(made.folder, 0o700)
            made.save()
        except BaseException:
            shutil.rmtree(made.folder, ignore_errors=True)
            self._store.remove(made.key)
            raise
        return made

    def _volumes(self, id: str, merged: Mapping[str, Any], config: ContainerConfig) -> list[dict[str, Any]]:
        """The volumes of a new container, made if missing; a new one without a name has the container's label."""
        found = []
        for wanted in bundle.wanted_volumes(config.HostConfig, merged["Volumes"] or {}):
            labels = {**wanted.pop("labels"), **({} if wanted["name"] else {OWNER: id})}
            made = self._service.volumes.create(wanted["name"], labels=labels)
            found.append({**wanted, "name": made.name, "own": not wanted["name"]})
        return found

    def _init_of(self, image: Image) -> str:
        """The snapshot between an image and its containers: it has the common files of containers, so that no
        container's changes show them."""
        name = init_name(image.snapshot)
        if self._store.exists(name):
            return name
        key = f"{name}/{secrets.token_hex(4)}"
        self._store.prepare(key, image.snapshot, labels={INIT_LABEL: image.snapshot})
        try:
            with self._store.paths(key) as tree:
                furnish(tree)
            self._store.commit(key, name)
        except AlreadyExists:
            self._store.remove(key)  # another create was faster
        except BaseException:
            self._store.remove(key)
            raise
        return name
