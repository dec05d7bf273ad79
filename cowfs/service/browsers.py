"""Requests of browsers: the page behind a request, and its rights.

A browser sends requests of any open page, so a foreign page could reach this service through it. Rules:

1. The page must be this service's: no foreign ``Origin``, no ``Sec-Fetch-Site`` that is another site's (Fetch standard, "Origin"
   header; W3C Fetch Metadata). There is no wildcard, and no preflight is answered. Only the document ``/ui/`` itself
   can be reached by a link.
2. The name in ``Host`` must be this service's, at a plain TCP door for every request: a page whose name was rebound to
   this machine (DNS rebinding) has an origin that agrees with its Host, and over plain HTTP a browser sends no other
   sign of it. With TLS the certificate proves the name; a browser cannot reach a unix socket.
3. A page can only look, unless ``--ui-actions``.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from typing import TYPE_CHECKING

from cowfs.service.errors import ApiError
from cowfs.service.http import Exchange

if TYPE_CHECKING:
    from cowfs.service.options import Options
    from cowfs.service.shared import Service

__all__ = ["check"]

_LOOKING = ("GET", "HEAD")


def check(service: Service, exchange: Exchange) -> None:
    """Apply the rules of this module.

    Raises:
        ApiError: 403.
    """
    headers, options = exchange.headers, service.options
    host = headers.get("host", "")
    origin = headers.get("origin")
    told = any(name.startswith("sec-fetch-") for name in headers)
    if origin is not None and origin.partition("://")[2] != host:
        raise ApiError(403, "a page of another origin may not ask this service")
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _is_link(exchange):
        raise ApiError(403, "a page of another origin may not ask this service")
    if (told or exchange.named) and not _is_own_name(host, options):
        raise ApiError(403, f"this service does not know that it is called {host!r}: use its address, or --allow-host")
    if (told or origin is not None) and exchange.method not in _LOOKING and not (options.ui and options.ui_actions):
        raise ApiError(403, "a browser may only look here (--ui-actions allows more)")


def _is_link(exchange: Exchange) -> bool:
    return exchange.path == "/ui/" and exchange.method == "GET" and exchange.headers.get("sec-fetch-dest") == "document"


def _is_own_name(host: str, options: Options) -> bool:
    name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
    name = name.strip("[]").lower().removesuffix(".")
    if name in ("localhost", socket.gethostname().lower()) or name.endswith(".localhost"):
        return True
    if name in [each.lower() for each in options.allow_host]:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == _full_name()
    return True


@functools.cache
def _full_name() -> str:
    """This host's name with its domain; resolved once, since a name server may be slow."""
    return socket.getfqdn().lower()
