"""Routes of containers: create, list, inspect, start, stop, remove."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.model import Limit, parse_count, parse_size
from cowfs.service.api.absent import endpoint_of
from cowfs.service.api.routing import Route, filters_of
from cowfs.service.containers import updating
from cowfs.service.containers.bundle import hidden_paths
from cowfs.service.containers.container import Container
from cowfs.service.containers.figures import members
from cowfs.service.containers.limits import discarded
from cowfs.service.containers.pruning import prune
from cowfs.service.containers.records import ContainerConfig, Update
from cowfs.service.errors import ApiError
from cowfs.service.events import moment
from cowfs.service.http import Exchange, Reply, empty, json_reply, lines
from cowfs.service.images import has_label, rfc3339
from cowfs.service.records import decode

if TYPE_CHECKING:
    from cowfs.service.shared import Service

__all__ = ["ROUTES", "summary"]

_FILTERS = ("id", "name", "label", "status", "ancestor", "exited", "before", "since", "network", "volume", "health", "is-task",
            "expose", "publish", "isolation")  # fmt: skip
_VALUES: Mapping[str, Callable[[str], object]] = {
    "status": ("created", "restarting", "running", "removing", "paused", "exited", "dead").__contains__,
    "health": ("starting", "healthy", "unhealthy", "none").__contains__,
    "exited": re.compile(r"[0-9]{1,9}", re.ASCII).fullmatch,
    "is-task": ("1", "true", "0", "false").__contains__,
}
"""A filter -> the values that it can have."""

_ONLY_SET = ("ArgsEscaped", "Healthcheck", "ExposedPorts", "Shell", "StopSignal", "StopTimeout", "NetworkDisabled", "MacAddress",
             "Annotations", "Init", "Mounts", "StorageOpt", "Sysctls", "Tmpfs")  # fmt: skip
"""Settings that Docker leaves out where they are not set."""

_NOT_HERE = {
    "Cgroup": "", "CpuCount": 0, "CpuPercent": 0, "CpuRealtimePeriod": 0, "CpuRealtimeRuntime": 0, "IOMaximumBandwidth": 0,
    "IOMaximumIOps": 0,
}  # fmt: skip
"""Settings of other hosts, which Docker always shows."""

_NEVER = "0001-01-01T00:00:00Z"


def summary(service: Service, container: Container, *, size: bool) -> dict[str, Any]:
    """A container as the list shows it."""
    image = service.images.name_of(container.image, container.image_name)
    told: dict[str, Any] = {
        "Id": container.id,
        "Names": [f"/{container.name}"],
        "Image": image,
        "ImageID": container.image,
        "Command": " ".join(_quoted(word) for word in container.arguments),
        "Created": container.created // 10**9,
        "Ports": [],
        "Labels": container.labels,
        "State": container.status,
        "Status": container.describe(),
        "HostConfig": {"NetworkMode": container.host["NetworkMode"]},
        "NetworkSettings": {"Networks": endpoint_of(container)},
        "Mounts": _mounts(service, container),
    }
    if size:
        own = service.containers.size(container)
        told |= {"SizeRw": own, "SizeRootFs": own + service.images.sizes()[0].get(container.image, 0)}
    return told


def _quoted(word: str) -> str:
    return f"'{word}'" if re.search(r"\s", word) else word


def _mounts(service: Service, container: Container) -> list[dict[str, Any]]:
    from cowfs.service.containers.bundle import bind_mounts

    volumes = [
        {
            "Type": "volume",
            "Name": each["name"],
            "Source": service.volumes.path_of(each["name"]),
            "Destination": each["target"],
            "Driver": "local",
            "Mode": "z",
            "RW": not each["readonly"],
            "Propagation": "",
        }
        for each in container.volumes
    ]
    return volumes + [
        {
            "Type": each["type"],
            "Source": each["source"] if each["type"] == "bind" else "",
            "Destination": each["destination"],
            "Mode": "",
            "RW": "ro" not in each["options"],
            "Propagation": each["options"][-1] if each["type"] == "bind" else "",
        }
        for each in bind_mounts(container.host_config)
    ]


def _create(service: Service, exchange: Exchange) -> Reply:
    raw = exchange.document()
    config = decode(ContainerConfig, raw)
    query = exchange.query
    made = service.containers.create(config, raw, query.get("name", ""), query.get("platform", ""))
    return json_reply({"Id": made.id, "Warnings": discarded(made.host)}, 201)


def _list(service: Service, exchange: Exchange) -> Reply:
    filters = filters_of(exchange, _FILTERS)
    for key, fits in _VALUES.items():
        for value in filters.get(key, []):
            if not fits(value):
                raise ApiError(400, f"invalid filter '{key}={value}'")
    limit = max(0, exchange.number("limit"))
    every = exchange.flag("all") or limit > 0 or "status" in filters or "exited" in filters
    wanted = _wanted(service, filters)
    found = [each for each in service.containers.all() if (every or each.running) and wanted(each)]
    size = exchange.flag("size")
    return json_reply([summary(service, each, size=size) for each in found[: limit or None]])


def _wanted(service: Service, filters: Mapping[str, list[str]]) -> Callable[[Container], bool]:
    before = [service.containers.get(name).created for name in filters.get("before", [])]
    since = [service.containers.get(name).created for name in filters.get("since", [])]
    ancestors = {name: service.images.get(name).id for name in filters.get("ancestor", []) if _exists(service, name)}

    def any_of(name: str, fits: Callable[[str], bool]) -> bool:
        return name not in filters or any(fits(value) for value in filters[name])

    def wanted(container: Container) -> bool:
        return (
            any_of("id", lambda value: container.id.startswith(value))
            and any_of("name", lambda value: _matches(value, container.name))
            and all(has_label(container.labels, value) for value in filters.get("label", []))
            and any_of("status", lambda value: container.status == value)
            and any_of("exited", lambda value: container.status == "exited" and str(container.code) == value)
            and any_of(
                "ancestor", lambda value: ancestors.get(value) == container.image or container.image_name == value
            )
            and any_of("network", lambda value: container.host["NetworkMode"] == value)
            and any_of("health", lambda value: value == _health(container))
            and any_of(
                "volume", lambda value: any(value in (each["name"], each["target"]) for each in container.volumes)
            )
            and not any(name in filters for name in ("expose", "publish", "isolation"))
            and all(container.created < each for each in before)
            and all(container.created > each for each in since)
        )

    return wanted


def _health(container: Container) -> str:
    return container.health.status if container.health is not None and container.running else "none"


def _exists(service: Service, image: str) -> bool:
    try:
        service.images.get(image)
    except (NotFound, ApiError):
        return False
    return True


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, f"/{name}") is not None or re.search(pattern, name) is not None
    except re.error:
        raise ApiError(400, f"invalid filter: {pattern!r} is no pattern") from None


def _inspect(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    run = container.run
    words = container.arguments
    told: dict[str, Any] = {
        "Id": container.id,
        "Created": rfc3339(container.created),
        "Path": words[0],
        "Args": words[1:],
        "State": {
            "Status": container.status,
            "Running": container.running,
            "Paused": container.paused,
            "Restarting": container.restarting,
            "OOMKilled": bool(run.get("oom")),
            "Dead": False,
            "Pid": container.pid,
            "ExitCode": container.code,
            "Error": container.error,
            "StartedAt": rfc3339(run["started"]) if run else _NEVER,
            "FinishedAt": rfc3339(run["finished"]) if "finished" in run else _NEVER,
        },
        "Image": container.image,
        "ResolvConfPath": os.path.join(container.folder, "resolv.conf"),
        "HostnamePath": os.path.join(container.folder, "hostname"),
        "HostsPath": os.path.join(container.folder, "hosts"),
        "LogPath": os.path.join(container.folder, "json.log"),
        "Name": f"/{container.name}",
        "RestartCount": container.restarts,
        "Driver": service.store.driver.name,
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": service.containers.execs.running_in(container),
        "HostConfig": _host(service, container),
        "GraphDriver": {"Name": service.store.driver.name, "Data": _where(container)},
        "Mounts": _mounts(service, container),
        "Config": {**_shown(container.config), "Hostname": container.hostname, "Image": container.image_name},
        "NetworkSettings": {
            "Bridge": "", "SandboxID": "", "SandboxKey": "", "Ports": {}, "Networks": endpoint_of(container), "IPAddress": "", "Gateway": "",
            "MacAddress": "", "EndpointID": "", "IPPrefixLen": 0, "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0,
            "IPv6Gateway": "", "HairpinMode": False, "LinkLocalIPv6Address": "", "LinkLocalIPv6PrefixLen": 0,
            "SecondaryIPAddresses": None, "SecondaryIPv6Addresses": None,
        },
    }  # fmt: skip
    if container.health is not None:
        told["State"]["Health"] = container.health.described()
    if exchange.flag("size"):
        own = service.containers.size(container)
        told |= {"SizeRw": own, "SizeRootFs": own + service.images.sizes()[0].get(container.image, 0)}
    return json_reply(told)


def _host(service: Service, container: Container) -> dict[str, Any]:
    host = dict(container.host)
    log = host.get("LogConfig") or {}
    host["LogConfig"] = {"Type": log.get("Type") or "json-file", "Config": log.get("Config") or {}}
    policy = host.get("RestartPolicy") or {}
    host["RestartPolicy"] = {
        "Name": policy.get("Name") or "no",
        "MaximumRetryCount": policy.get("MaximumRetryCount", 0),
    }
    limit = service.store.limit(container.key)
    host["StorageOpt"] = options_of(host.get("StorageOpt") or {}, limit) or None
    host["MaskedPaths"], host["ReadonlyPaths"] = hidden_paths(container.host_config)
    return {**_NOT_HERE, **_shown(host)}


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value or key not in _ONLY_SET}


def _where(container: Container) -> dict[str, str]:
    """The tree of a container: its key in the store, and while it runs its mount point."""
    return {"Snapshot": container.key, **({"MergedDir": container.rootfs} if container.running else {})}


def options_of(asked: Mapping[str, str], limit: Limit) -> dict[str, str]:
    """The limit in the form of ``--storage-opt``: as requested, unless it was changed since."""
    told = {}
    for key, now, parse in (("size", limit.bytes, parse_size), ("inodes", limit.inodes, parse_count)):
        if now is not None:
            told[key] = asked[key] if key in asked and parse(asked[key]) == now else str(now)
    return told


def _start(service: Service, exchange: Exchange, name: str) -> Reply:
    service.containers.start(service.containers.get(name))
    return empty()


def _seconds(exchange: Exchange) -> int | None:
    return exchange.number("t") if exchange.query.get("t") else None


def _stop(service: Service, exchange: Exchange, name: str) -> Reply:
    service.containers.stop(service.containers.get(name), _seconds(exchange), exchange.query.get("signal", ""))
    return empty()


def _restart(service: Service, exchange: Exchange, name: str) -> Reply:
    service.containers.restart(service.containers.get(name), _seconds(exchange), exchange.query.get("signal", ""))
    return empty()


def _kill(service: Service, exchange: Exchange, name: str) -> Reply:
    try:
        service.containers.kill(service.containers.get(name), exchange.query.get("signal", ""))
    except (FailedPrecondition, NotFound) as error:
        raise type(error)(f"cannot kill container: {name}: {error}") from None
    return empty()


def _pause(service: Service, exchange: Exchange, name: str) -> Reply:
    service.containers.pause(service.containers.get(name))
    return empty()


def _unpause(service: Service, exchange: Exchange, name: str) -> Reply:
    service.containers.unpause(service.containers.get(name))
    return empty()


def _rename(service: Service, exchange: Exchange, name: str) -> Reply:
    service.containers.rename(service.containers.get(name), exchange.query.get("name", ""))
    return empty()


def _update(service: Service, exchange: Exchange, name: str) -> Reply:
    wanted = exchange.document()
    updating.update(service.containers, service.containers.get(name), decode(Update, wanted))
    return json_reply({"Warnings": discarded(wanted) or None})


def _remove(service: Service, exchange: Exchange, name: str) -> Reply:
    if exchange.flag("link"):
        raise InvalidArgument("there are no links between containers")
    container = service.containers.get(name)
    service.containers.remove(container, force=exchange.flag("force"), volumes=exchange.flag("v"))
    return empty()


def _wait(service: Service, exchange: Exchange, name: str) -> Reply:
    """Send the headers at once: clients start the container only when they have them."""
    container = service.containers.get(name)
    condition = exchange.query.get("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise ApiError(400, f"invalid condition: {condition!r}")
    ends = container.ends

    def is_over() -> bool:
        if condition == "removed":
            return container.removed
        return container.ends > ends or (condition == "not-running" and not container.running) or container.removed

    def told() -> Iterator[dict[str, Any] | None]:
        while not container.wait(is_over, 0.4):
            yield None
        yield {"StatusCode": container.code}

    return Reply(body=lines(told()))


def _top(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    if not container.running:
        raise FailedPrecondition(f"container {container.id} is not running")
    words = (exchange.query.get("ps_args") or "-ef").split()
    try:
        done = subprocess.run(["ps", *words], capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError:
        raise ApiError(501, "this host has no ps (Debian: procps)") from None
    rows = done.stdout.splitlines()
    if done.returncode or not rows:
        raise ApiError(400, f"ps: {done.stderr.strip() or 'no output'}")
    titles = rows[0].split()
    if "PID" not in titles:
        raise ApiError(400, "couldn't find PID field in ps output")
    place = titles.index("PID")
    mine = {str(pid) for pid in members(container)}
    split = [row.split(None, len(titles) - 1) for row in rows[1:]]
    return json_reply(
        {"Titles": titles, "Processes": [row for row in split if len(row) > place and row[place] in mine]}
    )


def _changes(service: Service, exchange: Exchange, name: str) -> Reply:
    container = service.containers.get(name)
    found = [{"Path": path, "Kind": kind} for path, kind in service.containers.trees.changes(container)]
    return json_reply(found or None)


def _prune(service: Service, exchange: Exchange) -> Reply:
    filters = filters_of(exchange, ("until", "label", "label!"))
    until = [moment(text, "until") for text in filters.get("until", [])]

    def fits(container: Container) -> bool:
        return (
            all(has_label(container.labels, each) for each in filters.get("label", []))
            and not any(has_label(container.labels, each) for each in filters.get("label!", []))
            and all(container.created < each for each in until)
        )

    done, freed = prune(service.containers, fits)
    return json_reply({"ContainersDeleted": done or None, "SpaceReclaimed": freed})


ROUTES = (
    Route("POST", "/containers/create", _create),
    Route("GET", "/containers/json", _list),
    Route("POST", "/containers/prune", _prune),
    Route("GET", "/containers/{name}/json", _inspect),
    Route("POST", "/containers/{name}/start", _start),
    Route("POST", "/containers/{name}/stop", _stop),
    Route("POST", "/containers/{name}/restart", _restart),
    Route("POST", "/containers/{name}/kill", _kill),
    Route("POST", "/containers/{name}/pause", _pause),
    Route("POST", "/containers/{name}/unpause", _unpause),
    Route("POST", "/containers/{name}/rename", _rename),
    Route("POST", "/containers/{name}/update", _update),
    Route("POST", "/containers/{name}/wait", _wait),
    Route("GET", "/containers/{name}/top", _top),
    Route("GET", "/containers/{name}/changes", _changes),
    Route("DELETE", "/containers/{name}", _remove),
)
