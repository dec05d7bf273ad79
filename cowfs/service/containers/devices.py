"""Devices of the host in a container: ``--device``, ``--device-cgroup-rule`` and ``--privileged``, in the runtime's form."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from cowfs.service.containers.records import HostConfig
from cowfs.service.errors import ApiError

__all__ = ["check_devices", "nodes_and_rules"]

_RULE = re.compile(r"([acb]) ([0-9]+|\*):([0-9]+|\*) ([rwm]{1,3})")
_OWN = ("pts", "shm", "fd", "mqueue", "console", ".lxc", ".lxd-mounts", ".udev")
"""Below /dev what every container has of its own."""


def check_devices(host: HostConfig) -> None:
    """Refuse what cannot be read.

    Raises:
        ApiError: 400.
    """
    for text in host.DeviceCgroupRules or ():
        if _RULE.fullmatch(text) is None:
            raise ApiError(400, f"invalid device cgroup rule format: '{text}'")
    for each in host.Devices or ():
        if not os.path.isabs(each.PathOnHost) or not os.path.isabs(each.PathInContainer or each.PathOnHost):
            raise ApiError(400, f"invalid device: {each.PathOnHost!r} is no absolute path")
        if set(each.CgroupPermissions) - set("rwm"):
            raise ApiError(400, f"invalid device permissions: {each.CgroupPermissions!r}")


def nodes_and_rules(host: HostConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The devices that a container gets, and what it may do with which: ``linux.devices`` and ``linux.resources.devices`` (OCI runtime-spec).

    Raises:
        ApiError: 400: a device is not there, or is none.
    """
    nodes: list[dict[str, Any]] = []
    rules: list[dict[str, Any]] = [{"allow": host.Privileged, "access": "rwm"}]
    if host.Privileged:
        nodes += [_node(path, os.stat(path)) for path in _devices("/dev")]
    for each in host.Devices or ():
        target = each.PathInContainer or each.PathOnHost
        for path, found in _found(each.PathOnHost):
            node = _node(target + path[len(each.PathOnHost) :], found)
            nodes.append(node)
            rule = {"allow": True, "access": each.CgroupPermissions or "rwm"}
            rules.append(rule | {key: node[key] for key in ("type", "major", "minor")})
    for text in host.DeviceCgroupRules or ():
        match = _RULE.fullmatch(text)
        assert match is not None  # check_devices
        made: dict[str, Any] = {"allow": True, "type": match[1], "access": match[4]}
        for key, number in (("major", match[2]), ("minor", match[3])):
            if number != "*":
                made[key] = int(number)
        rules.append(made)
    return list({node["path"]: node for node in nodes}.values()), rules


def _found(path: str) -> list[tuple[str, os.stat_result]]:
    """The devices that a path means: itself, or all below it."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise ApiError(
            400, f"error gathering device information while adding device {path!r}: {error.strerror}"
        ) from None
    if stat.S_ISDIR(found.st_mode):
        return [(each, os.stat(each)) for each in _devices(path)]
    if not stat.S_ISCHR(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise ApiError(400, f"error gathering device information while adding device {path!r}: not a device node")
    return [(path, found)]


def _devices(directory: str) -> Iterator[str]:
    """The device nodes below a directory, without links."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name in _OWN or entry.is_symlink():
                continue
            if entry.is_dir():
                yield from _devices(entry.path)
            elif stat.S_IFMT(entry.stat().st_mode) in (stat.S_IFCHR, stat.S_IFBLK):
                yield entry.path


def _node(path: str, found: os.stat_result) -> dict[str, Any]:
    return {
        "path": path,
        "type": "b" if stat.S_ISBLK(found.st_mode) else "c",
        "major": os.major(found.st_rdev),
        "minor": os.minor(found.st_rdev),
        "fileMode": stat.S_IMODE(found.st_mode),
        "uid": found.st_uid,
        "gid": found.st_gid,
    }
