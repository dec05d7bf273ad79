"""Routes about the content of a container: copying in and out, commit, export, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, cast

from cowfs.errors import NotFound
from cowfs.service import references
from cowfs.service.api.routing import Route
from cowfs.service.containers import copying, stats
from cowfs.service.containers.committing import commit
from cowfs.service.errors import ApiError
from cowfs.service.http import Exchange, Reply, empty, json_reply, lines
from cowfs.service.streaming import written

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES"]

_STAT = "x-docker-container-path-stat"


def _path(exchange: Exchange) -> str:
    path = exchange.query.get("path", "")
    if not path or "\0" in path:
        raise ApiError(400, "path is missing")
    return path


@contextmanager
def _tree(service: Service, name: str) -> Iterator[int]:
    """The root directory of a container; a path that is not there is told with the container's name as requested."""
    with service.containers.trees.mounted(service.containers.get(name)) as root:
        try:
            yield root
        except NotFound as error:
            raise NotFound(f"{error} in container {name}") from None


def _stat(service: Service, exchange: Exchange, name: str) -> Reply:
    with _tree(service, name) as root:
        told = copying.path_stat(root, _path(exchange))
    return Reply(headers={_STAT: told}, type="")


def _get(service: Service, exchange: Exchange, name: str) -> Reply:
    path = _path(exchange)
    with _tree(service, name) as root:
        told = copying.path_stat(root, path)

    def write(out: BinaryIO) -> None:
        with _tree(service, name) as root:
            copying.pack(root, path, out)

    return Reply(headers={_STAT: told}, type="application/x-tar", body=written(write))


def _put(service: Service, exchange: Exchange, name: str) -> Reply:
    container, path = service.containers.get(name), _path(exchange)
    keep_kind = exchange.flag("noOverwriteDirNonDir")
    with _tree(service, name) as root:
        copying.unpack(root, path, cast("BinaryIO", exchange.body), keep_kind=keep_kind)
    service.containers.tell(container, "extract-to-dir")
    return empty(200)


def _export(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    service.containers.trees.synced(container)
    service.containers.tell(container, "export")
    return Reply(
        type="application/x-tar",
        body=written(lambda out: service.store.export(container.key, out, format="tar")),
    )


def _commit(service: Service, exchange: Exchange) -> Reply:
    query = exchange.query
    container = service.containers.get(query.get("container", ""))
    name = ""
    if query.get("repo"):
        name = references.parse(query["repo"] + (f":{query['tag']}" if query.get("tag") else "")).familiar
    id = commit(
        service.store,
        service.images,
        service.containers,
        container,
        name=name,
        message=query.get("comment", ""),
        author=query.get("author", ""),
        changes=[line for text in exchange.all("changes") for line in text.split("\n") if line.strip()],
        pause=exchange.flag("pause", True),
    )
    return json_reply({"Id": id}, 201)


def _stats(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    if exchange.flag("stream", True):
        return Reply(body=lines(stats.stream(service.store, container)))
    return json_reply(stats.one(service.store, container, two_looks=not exchange.flag("one-shot")))


ROUTES = (
    Route("HEAD", "/containers/{name}/archive", _stat),
    Route("GET", "/containers/{name}/archive", _get),
    Route("PUT", "/containers/{name}/archive", _put),
    Route("GET", "/containers/{name}/export", _export),
    Route("GET", "/containers/{name}/stats", _stats),
    Route("POST", "/commit", _commit),
)
