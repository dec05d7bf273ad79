"""The files that every container has, whatever its image: mount points in the tree, and hosts, hostname and resolv.conf over it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cowfs.errors import Unsupported
from cowfs.service.containers import bundle
from cowfs.service.containers.container import Container
from cowfs.service.containers.records import HostConfig
from cowfs.service.containers.users import find_user
from cowfs.service.errors import ApiError
from cowfs.sys.atomic import write_file
from cowfs.union.paths import Paths

__all__ = ["furnish", "network_files", "write_bundle"]

_FOLDERS = ("dev", "dev/pts", "dev/shm", "dev/mqueue", "proc", "sys", "etc")
_FILES = {
    "dev/console": 0o644, "etc/hosts": 0o644, "etc/hostname": 0o644, "etc/resolv.conf": 0o644, ".dockerenv": 0o755,
}  # fmt: skip
_LINKS = {"etc/mtab": "/proc/mounts"}


def furnish(tree: Paths) -> None:
    """Make the mount points that an image lacks, so that no container's changes show them; and what Docker makes beside them."""
    for path in (*_FOLDERS, *_FILES, *_LINKS):
        try:
            if tree.exists(path):
                continue
            if path in _FOLDERS:
                tree.mkdir(path)
            elif path in _FILES:
                tree.write_bytes(path, b"", mode=_FILES[path])
            else:
                tree.symlink(_LINKS[path], path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # the image has no directory above it: the runtime will report that


def network_files(container: Container, host: HostConfig) -> dict[str, str]:
    """The contents of the files for a container's name and name servers, by their path in it."""
    hostname = container.hostname
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", f"127.0.1.1\t{hostname}"]
    if host.NetworkMode == "host":
        lines = _read("/etc/hosts").splitlines() or lines
    for each in host.ExtraHosts or ():
        name, colon, address = each.partition(":")
        if not colon or not name:
            raise Unsupported(f"--add-host {each}: not NAME:ADDRESS")
        lines.append(f"{'127.0.0.1' if address == 'host-gateway' else address.strip('[]')}\t{name}")
    return {
        "/etc/hosts": "\n".join(lines) + "\n",
        "/etc/hostname": hostname + "\n",
        "/etc/resolv.conf": _resolv(host),
    }


def _resolv(host: HostConfig) -> str:
    text = _read("/etc/resolv.conf")
    for key, values in (("nameserver", host.Dns), ("search", host.DnsSearch), ("options", host.DnsOptions)):
        if values:
            text = re.sub(rf"(?m)^{key}\b.*\n?", "", text)
            text += (
                "".join(f"{key} {value}\n" for value in values)
                if key == "nameserver"
                else f"{key} {' '.join(values)}\n"
            )
    return text


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""


def write_bundle(container: Container, volumes: Iterable[Mapping[str, Any]]) -> None:
    """Write the runtime's files of a container whose tree is mounted; missing sources of ``-v`` are made.

    Args:
        volumes: mounts of volumes, in the runtime's form.

    Raises:
        InvalidArgument: no such user in it. ApiError: a source of ``--mount`` is missing.
    """
    host = container.host_config
    root = os.open(container.rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        user = find_user(root, container.config.get("User") or "", host.GroupAdd or [])
    finally:
        os.close(root)
    given = network_files(container, host)
    placed = {}
    for target, text in given.items():
        path = os.path.join(container.folder, os.path.basename(target))
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, 0o644)
        placed[target] = path
    for each in bundle.bind_mounts(host):
        if each["type"] == "bind":
            if not os.path.exists(each["source"]) and each["make"]:
                os.makedirs(each["source"])
            elif not os.path.exists(each["source"]):
                raise ApiError(
                    400, f'invalid mount config for type "bind": bind source path does not exist: {each["source"]}'
                )
    spec = bundle.specification(
        rootfs=container.rootfs,
        config=container.config,
        host=host,
        raw_host=container.host,
        user=user,
        files=placed,
        volumes=volumes,
        hostname=container.hostname,
        cgroup=container.next_cgroup,
    )
    write_file(os.path.join(container.bundle, "config.json"), json.dumps(spec).encode(), durable=False)
