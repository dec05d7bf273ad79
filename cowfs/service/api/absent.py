"""Routes about what there is little or nothing of: networks (host and none), plugins, a build cache. Clients list, inspect and prune them unasked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowfs.errors import NotFound
from cowfs.service.api.routing import Route, filters_of
from cowfs.service.errors import ApiError, not_offered
from cowfs.service.http import Exchange, Reply, json_reply

if TYPE_CHECKING:
    from cowfs.service.containers.container import Container
    from cowfs.service.shared import Service

__all__ = ["ROUTES", "endpoint_of"]

NETWORKS = {"host": "host", "none": "null"}
"""Name -> driver. A container of another mode (Docker's default is ``bridge``) has a loopback interface only, as with ``none``."""

_FILTERS = ("name", "id", "driver", "scope", "type", "label", "dangling")


def id_of(network: str) -> str:
    """A network's id: the same on every host."""
    return network.encode().hex().ljust(64, "0")


def network_of(container: Container) -> str:
    """The network that a container is really in."""
    return "host" if container.host["NetworkMode"] == "host" else "none"


def endpoint_of(container: Container) -> dict[str, Any]:
    """``NetworkSettings.Networks`` of a container."""
    name = network_of(container)
    return {
        name: {
            "IPAMConfig": None, "Links": None, "Aliases": None, "MacAddress": "", "DriverOpts": None, "NetworkID": id_of(name),
            "EndpointID": "", "Gateway": "", "IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "", "GlobalIPv6Address": "",
            "GlobalIPv6PrefixLen": 0, "DNSNames": None,
        }
    }  # fmt: skip


def _described(name: str) -> dict[str, Any]:
    return {
        "Name": name, "Id": id_of(name), "Created": "1970-01-01T00:00:00Z", "Scope": "local", "Driver": NETWORKS[name],
        "EnableIPv4": True, "EnableIPv6": False, "IPAM": {"Driver": "default", "Options": None, "Config": None},
        "Internal": False, "Attachable": False, "Ingress": False, "ConfigFrom": {"Network": ""}, "ConfigOnly": False,
        "Containers": {}, "Options": {}, "Labels": {},
    }  # fmt: skip


def _networks(service: Service, exchange: Exchange) -> Reply:
    filters = filters_of(exchange, _FILTERS)

    def fits(name: str) -> bool:
        about = {"name": name, "id": id_of(name), "driver": NETWORKS[name], "scope": "local", "type": "builtin"}
        return all(
            any(
                value in about[key]
                if key == "name"
                else about[key].startswith(value)
                if key == "id"
                else value == about[key]
                for value in values
            )
            if key in about
            else False
            for key, values in filters.items()
        )

    return json_reply([_described(name) for name in NETWORKS if fits(name)])


def _network(service: Service, exchange: Exchange, name: str) -> Reply:
    found = next((each for each in NETWORKS if each == name or id_of(each).startswith(name)), None)
    if found is None:
        raise NotFound(f"network {name} not found")
    told = _described(found)
    told["Containers"] = {
        each.id: {"Name": each.name, "EndpointID": "", "MacAddress": "", "IPv4Address": "", "IPv6Address": ""}
        for each in service.containers.all()
        if each.running and network_of(each) == found
    }
    return json_reply(told)


def _network_creation(service: Service, exchange: Exchange) -> Reply:
    raise not_offered("networks other than none and host")


def _network_removal(service: Service, exchange: Exchange, name: str) -> Reply:
    if name in NETWORKS:
        raise ApiError(403, f"{name} is a pre-defined network and cannot be removed")
    raise NotFound(f"network {name} not found")


def _plugins(service: Service, exchange: Exchange) -> Reply:
    return json_reply([])


def _plugin(service: Service, exchange: Exchange, name: str) -> Reply:
    raise NotFound(f"plugin {name!r} not found")


def _prune_nothing(service: Service, exchange: Exchange) -> Reply:
    return json_reply({"NetworksDeleted": [], "CachesDeleted": [], "SpaceReclaimed": 0})


ROUTES = (
    Route("GET", "/networks", _networks),
    Route("GET", "/networks/{name}", _network),
    Route("DELETE", "/networks/{name}", _network_removal),
    Route("POST", "/networks/create", _network_creation),
    Route("POST", "/networks/prune", _prune_nothing),
    Route("GET", "/plugins", _plugins),
    Route("GET", "/plugins/{name:*}/json", _plugin),
    Route("POST", "/build/prune", _prune_nothing),
)
