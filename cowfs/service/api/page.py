"""The page at ``/ui/``: its files, and the documents that it reads. The page reads events, and acts, by Docker's own routes."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import TYPE_CHECKING

from cowfs.errors import NotFound
from cowfs.service.api.routing import Route
from cowfs.service.containers import updating
from cowfs.service.errors import ApiError
from cowfs.service.http import Exchange, Reply, empty, json_reply

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES"]

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

_HEADERS = {
    # Content Security Policy 3: no resources of other origins, no inline scripts or styles, no frame around the page.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}


def _must_be_on(service: Service) -> None:
    if not service.options.ui:
        raise NotFound("the page is off (--no-ui)")


@functools.cache
def _content(name: str) -> bytes:
    return (files("cowfs.service") / "page" / name).read_bytes()


def _start(service: Service, exchange: Exchange) -> Reply:
    _must_be_on(service)
    return Reply(status=302, headers={"location": "/ui/"}, type="")


def _index(service: Service, exchange: Exchange) -> Reply:
    return _file(service, exchange, "index.html")


def _file(service: Service, exchange: Exchange, name: str) -> Reply:
    _must_be_on(service)
    if name not in _TYPES:
        raise NotFound(f"page not found: /ui/{name}")
    return Reply(headers=_HEADERS, type=_TYPES[name], body=_content(name))


def _overview(service: Service, exchange: Exchange) -> Reply:
    _must_be_on(service)
    return json_reply(service.board.overview(exchange.number("after")))


def _snapshots(service: Service, exchange: Exchange) -> Reply:
    _must_be_on(service)
    return json_reply(service.board.snapshots(exchange.query.get("of", ""), exchange.number("skip")))


def _images(service: Service, exchange: Exchange) -> Reply:
    _must_be_on(service)
    return json_reply(service.board.images())


def _limit(service: Service, exchange: Exchange, name: str) -> Reply:
    """Change the limit of a container, running or not: ``size`` and ``inodes`` of the query, "none" for no limit."""
    container = service.containers.get(name)
    asked = {key: exchange.query[key] for key in ("size", "inodes") if exchange.query.get(key)}
    if not asked:
        raise ApiError(400, "neither size nor inodes are given")
    updating.set_limit(
        service.store,
        service.containers,
        container,
        {key: None if text == "none" else text for key, text in asked.items()},
    )
    return empty()


ROUTES = (
    Route("GET HEAD", "/", _start),
    Route("GET HEAD", "/ui", _start),
    Route("GET HEAD", "/ui/", _index),
    Route("GET", "/ui/data/overview", _overview),
    Route("GET", "/ui/data/snapshots", _snapshots),
    Route("GET", "/ui/data/images", _images),
    Route("GET HEAD", "/ui/{name}", _file),
    Route("POST", "/containers/{name}/limit", _limit),
)
