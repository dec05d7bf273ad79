"""Routes to registries: login and push (pull is a form of ``POST /images/create``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowfs.service.api.routing import Route
from cowfs.service.errors import ApiError
from cowfs.service.http import Exchange, Reply, json_reply, lines
from cowfs.service.registry import Transfers, credentials_from, credentials_of

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES", "pull", "transfers"]

AUTH = "x-registry-auth"


def transfers(service: Service) -> Transfers:
    """The transfers to and from registries, by the present options."""
    options = service.options
    return Transfers(service.store, service.images, mirrors=options.registry_mirror, insecure=options.insecure_registry)


def pull(service: Service, exchange: Exchange) -> Reply:
    """Pull an image."""
    query = exchange.query
    name, tag = query.get("fromImage", ""), query.get("tag", "")
    if tag:
        name += f"@{tag}" if tag.startswith("sha256:") else f":{tag}"
    told = transfers(service).pull(
        name, platform=query.get("platform") or None, credentials=credentials_of(exchange.headers.get(AUTH, ""))
    )
    return Reply(body=lines(told))


def _push(service: Service, exchange: Exchange, name: str) -> Reply:
    tag = exchange.query.get("tag", "")
    told = transfers(service).push(
        f"{name}:{tag}" if tag else name, credentials=credentials_of(exchange.headers.get(AUTH, ""))
    )
    return Reply(body=lines(told))


def _login(service: Service, exchange: Exchange) -> Reply:
    document = exchange.document()
    found = credentials_from(document)
    address = document.get("serveraddress")
    if found is None or not isinstance(address, str):
        raise ApiError(400, "username, password and serveraddress are needed")
    host = address.partition("://")[2] or address
    host = host.partition("/")[0]
    transfers(service).login("docker.io" if host == "index.docker.io" else host, found)
    return json_reply({"IdentityToken": "", "Status": "Login Succeeded"})


ROUTES = (
    Route("POST", "/images/{name:*}/push", _push),
    Route("POST", "/auth", _login),
)
