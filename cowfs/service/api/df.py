"""``GET /system/df``: the space of images and containers, and the reclaimable part of it, from records; only volumes
are walked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowfs.service.api.containers import summary
from cowfs.service.api.images import summaries
from cowfs.service.api.routing import Route, version_of
from cowfs.service.errors import ApiError
from cowfs.service.http import Exchange, Reply, json_reply

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES"]

_TYPES = ("container", "image", "volume", "build-cache")


def _df(service: Service, exchange: Exchange) -> Reply:
    wanted = exchange.all("type") or list(_TYPES)
    for each in wanted:
        if each not in _TYPES:
            raise ApiError(400, f"no type {each!r}: {', '.join(_TYPES)}")
    told: dict[str, Any] = {"LayersSize": 0, "Images": None, "Containers": None, "Volumes": None, "BuildCache": None}
    if "image" in wanted:
        told["LayersSize"] = service.images.sizes()[2]
        told["Images"] = summaries(service, version=version_of(exchange), shared=True)
    if "container" in wanted:
        told["Containers"] = [summary(service, each, size=True) for each in service.containers.all()]
    if "volume" in wanted:
        used = [name for name, _ in service.containers.volume_users()]
        told["Volumes"] = [
            {**each.described(), "UsageData": {"Size": service.volumes.size(each), "RefCount": used.count(each.name)}}
            for each in service.volumes.all()
        ]
    if "build-cache" in wanted:
        told["BuildCache"] = []
    return json_reply(told)


ROUTES = (Route("GET", "/system/df", _df),)
