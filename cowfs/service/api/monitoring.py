"""``GET /metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cowfs.errors import NotFound
from cowfs.service import metrics
from cowfs.service.api.routing import Route
from cowfs.service.http import Exchange, Reply

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES"]


def _metrics(service: Service, exchange: Exchange) -> Reply:
    if not service.options.metrics:
        raise NotFound("metrics are off (--no-metrics)")
    return Reply(type=metrics.TYPE, body=metrics.exposition(service))


ROUTES = (Route("GET", "/metrics", _metrics),)
