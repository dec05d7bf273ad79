"""Requests that no container here can have are refused at its creation, with a sentence; nothing is left out silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from cowfs.errors import NotFound
from cowfs.service.containers import seccomp
from cowfs.service.containers.bundle import bind_mounts, init_program, signal_number, wanted_volumes
from cowfs.service.containers.capabilities import granted
from cowfs.service.containers.devices import check_devices
from cowfs.service.containers.healthcheck import check_of
from cowfs.service.containers.limits import check_limits
from cowfs.service.containers.records import ContainerConfig, HostConfig, ImageConfig
from cowfs.service.containers.restarting import check_policy
from cowfs.service.errors import ApiError, not_offered
from cowfs.service.images import Image
from cowfs.service.records import decode, encode

__all__ = ["check", "check_image", "check_platform", "check_working_directory", "storage_options"]

RLIMITS = {
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime",
    "sigpending", "stack",
}  # fmt: skip
SECURITY = (
    "no-new-privileges", "no-new-privileges=true", "no-new-privileges=false", "apparmor=unconfined", "label=disable",
)  # fmt: skip
"""Security options beside ``seccomp=``."""

_HOST = frozenset(each.name for each in fields(HostConfig))
_CONFIG = frozenset(each.name for each in fields(ContainerConfig))


def check(config: ContainerConfig, raw: Mapping[str, Any], runtime: str) -> None:
    """Refuse what no container here can have.

    Args:
        config: the request. raw: the same as it was sent. runtime: the name of the daemon's OCI runtime.

    Raises:
        ApiError: 501 with a sentence, or 400.
    """
    host = config.HostConfig
    for is_asked, what in (*_refused(host), *_unknown(raw), *_addresses(config)):
        if is_asked:
            raise not_offered(what)
    if host.Runtime not in ("", runtime, "io.containerd.runc.v2"):
        raise ApiError(
            400, f"unknown or invalid runtime name: {host.Runtime} (this daemon's is {runtime or 'missing'})"
        )
    if host.CgroupnsMode not in ("", "host", "private"):
        raise ApiError(400, f"invalid cgroup namespace mode: {host.CgroupnsMode}")
    for option in host.SecurityOpt or ():
        if option.replace(":", "=", 1) not in SECURITY and not option.startswith(("seccomp=", "seccomp:")):
            raise not_offered(f"the security option {option[:100]}")
    seccomp.filter_of(host.SecurityOpt or (), granted(host))
    for each in host.Ulimits or ():
        if each.Name not in RLIMITS:
            raise ApiError(400, f"invalid ulimit type: {each.Name}")
        if each.Hard >= 0 and (each.Soft < 0 or each.Soft > each.Hard):
            raise ApiError(
                400, f"ulimit soft limit must be less than or equal to hard limit: {each.Soft} > {each.Hard}"
            )
    check_devices(host)
    check_limits(encode(host))
    check_policy(host)
    check_of({"Healthcheck": config.Healthcheck})
    bind_mounts(host)
    wanted_volumes(host, config.Volumes or {})
    if config.StopSignal:
        signal_number(config.StopSignal)
    check_working_directory(config.WorkingDir)
    if len(config.Hostname.encode()) > 64 or any(each.isspace() for each in config.Hostname):
        raise ApiError(400, f"invalid hostname: {config.Hostname[:100]!r}")  # sethostname(2): 64 bytes


def check_working_directory(path: str) -> None:
    """Raises ApiError, 400: it is relative."""
    if path and not path.startswith("/"):
        raise ApiError(400, f"the working directory {path[:200]!r} is invalid, it needs to be an absolute path")


def check_image(image: Image) -> None:
    """Raises ApiError, 400: the part of an image's configuration that its containers take over has a wrong type."""
    decode(ImageConfig, image.run_config, "the image's configuration")


def _refused(host: HostConfig) -> Iterator[tuple[bool, str]]:
    yield bool(host.PortBindings) or host.PublishAllPorts, "published ports; use --network host"
    yield bool(host.Links), "links between containers"
    yield bool(host.VolumesFrom), "volumes of other containers"
    yield bool(host.VolumeDriver), "volume drivers"
    yield bool(host.DeviceRequests), "devices by a driver (--gpus); --device gives one of the host"
    yield host.NetworkMode not in ("", "default", "bridge", "none", "host"), "networks other than none and host"
    yield host.PidMode not in ("", "host", "private"), "another container's process namespace"
    yield host.IpcMode not in ("", "host", "private", "shareable", "none"), "another container's IPC namespace"
    yield host.UTSMode not in ("", "host"), "another container's UTS namespace"
    yield host.UsernsMode not in ("", "host"), "user namespaces of containers"
    no_init = "an init process of its own (--init): this host has no static docker-init or tini"
    yield bool(host.Init) and not init_program(), no_init
    yield host.LogConfig.Type not in ("", "json-file", "none"), f"the log driver {host.LogConfig.Type}"
    yield bool(host.CgroupParent), "another parent of control groups"
    yield host.Isolation not in ("", "default"), f"the isolation {host.Isolation}"


def _unknown(raw: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Members that no record here has, and that ask for something."""
    for key, value in raw.items():
        yield bool(value) and key not in _CONFIG, f"{key} of a container"
    for key, value in (raw.get("HostConfig") or {}).items():
        yield bool(value) and key not in _HOST, f"{key} of a container's host configuration"


def _addresses(config: ContainerConfig) -> Iterator[tuple[bool, str]]:
    yield bool(config.MacAddress), "addresses of a container (--mac-address)"
    networks = (config.NetworkingConfig or {}).get("EndpointsConfig") or {}
    if not isinstance(networks, dict) or not all(isinstance(each or {}, dict) for each in networks.values()):
        raise ApiError(400, "NetworkingConfig.EndpointsConfig is no object of objects")
    for name, endpoint in networks.items():
        yield name not in ("default", "bridge", "none", "host"), "networks other than none and host"
        for key, value in (endpoint or {}).items():
            yield bool(value), f"{key} of a container in a network"


def check_platform(name: str, image: Image, wanted: str) -> None:
    """Raises NotFound: an image is not of the platform (``os/architecture/variant``) that is asked for; "" is any."""
    if not wanted:
        return
    has = [str(image.config.get(key) or "") for key in ("os", "architecture", "variant")]
    words = wanted.split("/")
    asked = ["linux", *words] if len(words) == 1 and words[0] != "linux" else words
    if asked != has[: len(asked)]:
        raise NotFound(
            f"image with reference {name} was found but does not match the specified platform:"
            f" wanted {wanted}, actual: {'/'.join(filter(None, has))}"
        )


def storage_options(options: Mapping[str, str]) -> dict[str, str]:
    """``size`` and ``inodes`` of ``--storage-opt``, given one by one or as ``size=10G,inodes=100k``.

    Raises:
        ApiError: 400: there is another one.
    """
    found: dict[str, str] = {}
    for pair in (word for key, value in options.items() for word in f"{key}={value}".split(",")):
        key, equals, value = pair.partition("=")
        if key not in ("size", "inodes") or not equals:
            raise ApiError(400, f"invalid storage option: {key} (size and inodes are possible)")
        found[key] = value
    return found
