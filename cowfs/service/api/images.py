"""Routes of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from cowfs.errors import CowfsError
from cowfs.service import references
from cowfs.service.api.registry import pull
from cowfs.service.api.routing import Route, filters_of, version_of
from cowfs.service.errors import ApiError, not_offered
from cowfs.service.events import moment
from cowfs.service.http import Exchange, Reply, empty, json_reply, lines
from cowfs.service.images import Image, Images, has_label, rfc3339
from cowfs.service.streaming import written

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES", "summaries"]

_FILTERS = ("dangling", "label", "before", "since", "reference", "until")


def summaries(service: Service, *, version: tuple[int, int], shared: bool) -> list[dict[str, Any]]:
    """All images as the list shows them."""
    whole, together, _ = service.images.sizes()
    users = [image for image, _, _ in service.containers.users()]
    return [_summary(image, whole, together if shared else {}, users, version) for image in service.images.all()]


def _summary(
    image: Image, whole: Mapping[str, int], shared: Mapping[str, int], users: list[str], version: tuple[int, int]
) -> dict[str, Any]:
    none = version < (1, 43)  # older clients want the marks of a dangling image spelt out
    told: dict[str, Any] = {
        "Containers": users.count(image.id) if shared else -1,
        "Created": image.created // 10**9,
        "Id": image.id,
        "Labels": dict(image.labels) or None,
        "ParentId": "",
        "RepoDigests": list(image.digests) or (["<none>@<none>"] if none and not image.tags else []),
        "RepoTags": list(image.tags) or (["<none>:<none>"] if none else []),
        "SharedSize": shared.get(image.id, -1),
        "Size": whole.get(image.id, 0),
    }
    if version < (1, 44):
        told["VirtualSize"] = told["Size"]
    return told


def _list(service: Service, exchange: Exchange) -> Reply:
    filters = filters_of(exchange, _FILTERS)
    wanted = _wanted(service.images, filters)
    keep = {image.id for image in service.images.all() if wanted(image)}
    found = summaries(service, version=version_of(exchange), shared=exchange.flag("shared-size"))
    return json_reply([each for each in found if each["Id"] in keep])


def _wanted(images: Images, filters: Mapping[str, list[str]]) -> Any:
    before = [images.get(name).created for name in filters.get("before", [])]
    since = [images.get(name).created for name in filters.get("since", [])]
    until = [moment(text, "until") for text in filters.get("until", [])]
    patterns = filters.get("reference", [])
    dangling = [text.lower() in ("1", "true") for text in filters.get("dangling", [])]

    def wanted(image: Image) -> bool:
        return (
            all(image.created < each for each in before)
            and all(image.created > each for each in since)
            and all(image.created < each for each in until)
            and all(has_label(image.labels, each) for each in filters.get("label", []))
            and (not patterns or any(_fits(tag, pattern) for tag in image.tags for pattern in patterns))
            and all((not image.tags) == each for each in dangling)
        )

    return wanted


def _fits(tag: str, pattern: str) -> bool:
    name = tag.rpartition(":")[0]
    return fnmatchcase(tag, pattern) or fnmatchcase(name, pattern)


def _inspect(service: Service, exchange: Exchange, name: str) -> Reply:
    image = service.images.get(name)
    whole, _, _ = service.images.sizes()
    config = image.config
    told = {
        "Id": image.id,
        "RepoTags": list(image.tags),
        "RepoDigests": list(image.digests),
        "Parent": "",
        "Comment": _comment(config),
        "Created": config.get("created") or "0001-01-01T00:00:00Z",
        "DockerVersion": config.get("docker_version") or "",
        "Author": config.get("author") or "",
        "Config": {**_NO_CONFIG, **image.run_config},
        "Architecture": config.get("architecture") or "",
        "Variant": config.get("variant") or "",
        "Os": config.get("os") or "linux",
        "Size": whole[image.id],
        "GraphDriver": {"Name": service.store.driver.name, "Data": {"Snapshot": image.snapshot}},
        "RootFS": {"Type": "layers", "Layers": image.diff_ids},
        "Metadata": {"LastTagTime": rfc3339(image.tagged)},
    }
    if version_of(exchange) < (1, 44):
        told["VirtualSize"] = told["Size"]
    return json_reply({key: value for key, value in told.items() if key != "Variant" or value})


_NO_CONFIG: dict[str, Any] = {
    "Hostname": "", "Domainname": "", "User": "", "AttachStdin": False, "AttachStdout": False, "AttachStderr": False,
    "Tty": False, "OpenStdin": False, "StdinOnce": False, "Env": None, "Cmd": None, "Image": "", "Volumes": None,
    "WorkingDir": "", "Entrypoint": None, "OnBuild": None, "Labels": None,
}  # fmt: skip


def _comment(config: Mapping[str, Any]) -> str:
    steps = config.get("history")
    last = steps[-1] if isinstance(steps, list) and steps and isinstance(steps[-1], dict) else {}
    return str(last.get("comment") or "")


def _history(service: Service, exchange: Exchange, name: str) -> Reply:
    return json_reply(service.images.history(service.images.get(name)))


def _load(service: Service, exchange: Exchange) -> Reply:
    if exchange.query.get("platform"):
        raise not_offered("loading one platform of several")
    first: list[dict[str, str]] = []
    source = service.images.load(cast("BinaryIO", exchange.body))
    try:
        first.append({"stream": next(source)})  # an archive that cannot be read is an error of the request
    except StopIteration:
        raise ApiError(400, "there is no image in the archive") from None
    return Reply(body=lines(_told(first, ({"stream": line} for line in source))))


def _told(first: list[dict[str, str]], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines of a stream whose status is sent already: an error becomes its last line."""
    yield from first
    try:
        yield from rest
    except CowfsError as error:
        yield {"errorDetail": {"message": str(error)}, "error": str(error)}


def _create(service: Service, exchange: Exchange) -> Reply:
    """Pull, or import."""
    query = exchange.query
    if query.get("fromSrc"):
        return _import(service, exchange)
    if not query.get("fromImage"):
        raise ApiError(400, "neither fromImage nor fromSrc is given")
    return pull(service, exchange)


def _import(service: Service, exchange: Exchange) -> Reply:
    query = exchange.query
    if query["fromSrc"] != "-":
        raise not_offered("fetching an archive from an address; give it to the client: docker import FILE")
    name = ""
    if query.get("repo"):
        name = references.parse(query["repo"] + (f":{query['tag']}" if query.get("tag") else "")).familiar
    changes = [line for text in exchange.all("changes") for line in text.split("\n") if line.strip()]
    id = service.images.import_tree(cast("BinaryIO", exchange.body), name, changes, query.get("message", ""))
    return Reply(body=lines(iter([{"status": id}])))


def _tag(service: Service, exchange: Exchange, name: str) -> Reply:
    repository, tag = exchange.query.get("repo", ""), exchange.query.get("tag", "")
    service.images.tag(name, f"{repository}:{tag}" if tag else repository)
    return empty(201)


def _remove(service: Service, exchange: Exchange, name: str) -> Reply:
    return json_reply(service.images.remove(name, force=exchange.flag("force"), prune=not exchange.flag("noprune")))


def _save(service: Service, exchange: Exchange, name: str = "") -> Reply:
    names = [name] if name else [each for each in exchange.all("names") if each]
    if not names:
        raise ApiError(400, "no image is named")
    for each in names:
        service.images.get(each)
    return Reply(type="application/x-tar", body=written(lambda out: service.images.save(names, out)))


def _prune(service: Service, exchange: Exchange) -> Reply:
    filters = filters_of(exchange, ("dangling", "until", "label", "label!"))
    dangling = all(text.lower() in ("1", "true") for text in filters.get("dangling", ["true"]))
    until = [moment(text, "until") for text in filters.get("until", [])]
    told, freed = service.images.prune(
        dangling=dangling, until=min(until) if until else None, labels=filters.get("label", [])
    )
    return json_reply({"ImagesDeleted": told or None, "SpaceReclaimed": freed})


def _search(service: Service, exchange: Exchange) -> Reply:
    raise not_offered("searching a registry")


ROUTES = (
    Route("GET", "/images/json", _list),
    Route("GET", "/images/search", _search),
    Route("GET", "/images/get", _save),
    Route("POST", "/images/load", _load),
    Route("POST", "/images/create", _create),
    Route("POST", "/images/prune", _prune),
    Route("GET", "/images/{name:*}/json", _inspect),
    Route("GET", "/images/{name:*}/history", _history),
    Route("GET", "/images/{name:*}/get", _save),
    Route("POST", "/images/{name:*}/tag", _tag),
    Route("DELETE", "/images/{name:*}", _remove),
)
