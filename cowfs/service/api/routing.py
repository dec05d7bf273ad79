"""The routing of requests to handlers: one table over all modules of the API.

Rule: a handler takes (service, exchange, the path's arguments) and returns a :class:`~cowfs.service.http.Reply` or raises
a CowfsError; it does no more than translate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cowfs.service.errors import ApiError, not_offered
from cowfs.service.http import Exchange, Reply

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["MAX_VERSION", "MIN_VERSION", "Route", "Table", "filters_of", "version_of"]

MIN_VERSION, MAX_VERSION = "1.40", "1.50"

Handle = Callable[..., Reply]


@dataclass(frozen=True, slots=True)
class Route:
    """A line of the table.

    Attributes:
        methods: separated by spaces.
        pattern: a path; ``{name}`` is one part of it, ``{name:*}`` may hold slashes.
        handle: see the module's rule.
    """

    methods: str
    pattern: str
    handle: Handle


_VERSION = re.compile(r"/v([0-9]{1,9})\.([0-9]{1,9})(?=/)")


def _number(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def version_of(exchange: Exchange) -> tuple[int, int]:
    """The version of the API in a request; the newest if it has none."""
    match = _VERSION.match(exchange.path)
    return (int(match[1]), int(match[2])) if match else _number(MAX_VERSION)


class Table:
    """All routes, found by method and path."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(each.methods.split(), _compile(each.pattern), each) for each in routes]

    def dispatch(self, service: Service, exchange: Exchange) -> Reply:
        """Handle a request by its route.

        Raises:
            CowfsError: as the handler; ApiError: 400 for an unknown version, 405, 501.
        """
        path = exchange.path
        match = _VERSION.match(path)
        if match:
            self._check_version(f"{match[1]}.{match[2]}")
            path = path[match.end() :]
        allowed: set[str] = set()
        for methods, pattern, route in self._routes:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            if exchange.method in methods:
                reply: Reply = route.handle(service, exchange, **found.groupdict())
                return reply
            allowed.update(methods)
        if allowed:
            raise ApiError(405, f"{exchange.method} is not possible here, only {', '.join(sorted(allowed))}")
        for prefix, what in _NOT_OFFERED:
            if path == prefix or path.startswith(prefix + "/"):
                raise not_offered(what)
        raise ApiError(404, f"page not found: {path}")

    @staticmethod
    def _check_version(text: str) -> None:
        if _number(text) > _number(MAX_VERSION):
            raise ApiError(400, f"client version {text} is too new. Maximum supported API version is {MAX_VERSION}")
        if _number(text) < _number(MIN_VERSION):
            raise ApiError(
                400,
                f"client version {text} is too old. Minimum supported API version is {MIN_VERSION},"
                " please upgrade your client to a newer version",
            )


_NOT_OFFERED = (
    ("/networks", "networks other than none and host"),
    ("/volumes", "this verb of volumes"),
    ("/swarm", "swarm"),
    ("/nodes", "swarm"),
    ("/services", "swarm"),
    ("/tasks", "swarm"),
    ("/secrets", "swarm's secrets"),
    ("/configs", "swarm's configs"),
    ("/plugins", "plugins"),
    ("/build", "building images; buildah builds them over cowfs-overlayfs"),
    ("/session", "BuildKit sessions; buildah builds images over cowfs-overlayfs"),
    ("/grpc", "BuildKit sessions; buildah builds images over cowfs-overlayfs"),
    ("/distribution", "looking into a registry without pulling"),
    ("/images/search", "searching a registry"),
    ("/containers", "this verb of containers"),
    ("/images", "this verb of images"),
    ("/exec", "this verb of exec"),
)
"""Prefixes of Docker's API behind which nothing is offered, and the sentence that says so."""


def _compile(pattern: str) -> re.Pattern[str]:
    text = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(pattern))
    return re.compile(re.sub(r"\\\{(\w+):\\\*\\\}", r"(?P<\1>.+)", text), re.DOTALL)


def filters_of(exchange: Exchange, known: Iterable[str]) -> Mapping[str, list[str]]:
    """The ``filters`` of a query: a JSON object of lists, or (as older clients send it) of objects whose keys are the values.

    Raises:
        ApiError: 400: it is malformed, or has an unknown filter.
    """
    text = exchange.query.get("filters", "")
    if not text:
        return {}
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, "filters: no JSON document") from None
    if not isinstance(value, dict):
        raise ApiError(400, "filters: no JSON object")
    known = set(known)
    found = {}
    for name, values in value.items():
        if name not in known:
            raise ApiError(400, f"invalid filter '{name}'")
        if isinstance(values, dict):
            values = [item for item, on in values.items() if on]
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise ApiError(400, f"filters: {name} is no list of strings")
        found[name] = values
    return found
