"""Routes of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfs.service.api.routing import Route, filters_of, version_of
from cowfs.service.http import Exchange, Reply, empty, json_reply
from cowfs.service.images import has_label
from cowfs.service.records import decode

if TYPE_CHECKING:
    from cowfs.service.shared import Service
    from cowfs.service.volumes import Volume

__all__ = ["ROUTES"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeConfig:
    """The body of a create request."""

    Name: str = ""
    Driver: str = ""
    DriverOpts: dict[str, str] | None = None
    Labels: dict[str, str] | None = None


def _list(service: Service, exchange: Exchange) -> Reply:
    filters = filters_of(exchange, ("dangling", "driver", "label", "name"))
    used = {name for name, _ in service.containers.volume_users()}

    def wanted(volume: Volume) -> bool:
        dangling = [text.lower() in ("true", "1") for text in filters.get("dangling", [])]
        return (
            all(each == (volume.name not in used) for each in dangling)
            and ("driver" not in filters or "local" in filters["driver"])
            and all(has_label(volume.labels, each) for each in filters.get("label", []))
            and ("name" not in filters or any(each in volume.name for each in filters["name"]))
        )

    found = [volume.described() for volume in service.volumes.all() if wanted(volume)]
    return json_reply({"Volumes": found, "Warnings": None})


def _create(service: Service, exchange: Exchange) -> Reply:
    config = decode(VolumeConfig, exchange.document())
    made = service.volumes.create(config.Name, driver=config.Driver, options=config.DriverOpts, labels=config.Labels)
    return json_reply(made.described(), 201)


def _inspect(service: Service, exchange: Exchange, name: str) -> Reply:
    return json_reply(service.volumes.get(name).described())


def _remove(service: Service, exchange: Exchange, name: str) -> Reply:
    service.volumes.remove(name, force=exchange.flag("force"))
    return empty()


def _prune(service: Service, exchange: Exchange) -> Reply:
    filters: Mapping[str, list[str]] = filters_of(exchange, ("all", "label", "label!"))
    every = version_of(exchange) < (1, 42) or any(text.lower() in ("true", "1") for text in filters.get("all", []))

    def fits(volume: Volume) -> bool:
        return (
            (every or volume.anonymous)
            and all(has_label(volume.labels, each) for each in filters.get("label", []))
            and not any(has_label(volume.labels, each) for each in filters.get("label!", []))
        )

    done, freed = service.volumes.prune(fits)
    return json_reply({"VolumesDeleted": done or None, "SpaceReclaimed": freed})


ROUTES = (
    Route("GET", "/volumes", _list),
    Route("POST", "/volumes/create", _create),
    Route("POST", "/volumes/prune", _prune),
    Route("GET", "/volumes/{name}", _inspect),
    Route("DELETE", "/volumes/{name}", _remove),
)
