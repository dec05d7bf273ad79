"""A hook of OCI runtimes (`cowfs-overlayfs --limit-hook`): the limit that a container's annotations ask for.

podman has no option for the size of one container that works over a mount program, but hands annotations on to the runtime, which runs hooks
for those that have them (oci-hooks(5)). At ``createRuntime`` the container's root is mounted and nothing of the container runs yet; the limit is set on the mount's server.
A hook that fails keeps the container from starting: none runs without the limit that was asked for.

Source: OCI runtime-spec 1.0, config.md "POSIX-platform Hooks" and runtime.md "State".
"""

from __future__ import annotations

import json
import os

from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, NotFound
from cowfs.sys.regular import read_small

__all__ = ["ANNOTATIONS", "run"]

ANNOTATIONS = {"cowfs.size": "size", "cowfs.inodes": "inodes"}
_MOST = 16 << 20


def run() -> int:
    """Read the state of a container from standard input, and set the limit that its annotations name. Returns the exit status.

    Raises:
        CowfsError: it cannot be set; the message is what the engine's user reads.
    """
    state = _object(_standard_input(), "standard input")
    bundle = state.get("bundle")
    if not isinstance(bundle, str) or not os.path.isabs(bundle):
        raise InvalidArgument("no state of a container on standard input", remedy="an OCI runtime calls this hook")
    path = os.path.join(bundle, "config.json")
    try:
        configuration = _object(read_small(path, limit=_MOST), path)
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}") from None
    wanted = _wanted(configuration.get("annotations"))
    root = configuration.get("root")
    place = root.get("path") if isinstance(root, dict) else None
    if not isinstance(place, str):
        raise InvalidArgument(f"{path} names no root")
    if wanted:
        _set(os.path.join(bundle, place), wanted)
    return 0


def _standard_input() -> bytes:
    parts, size = [], 0
    while part := os.read(0, 1 << 16):
        parts.append(part)
        size += len(part)
        if size > _MOST:
            raise InvalidArgument("no state of a container on standard input")
    return b"".join(parts)


def _object(text: bytes, where: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{where}: not a JSON object")
    return found


def _wanted(annotations: object) -> dict[str, str]:
    found = annotations if isinstance(annotations, dict) else {}
    return {name: str(found[key]) for key, name in ANNOTATIONS.items() if key in found}


def _set(root: str, wanted: dict[str, str]) -> None:
    from cowfs.mounting import client, mountpoint

    entry = mountpoint.find(root)
    if entry is None or entry.fstype not in mountpoint.TYPES:
        raise FailedPrecondition(
            f"the container's root {root} is no mount of cowfs, so its limit cannot hold",
            remedy="set mount_program in storage.conf: cowfs podman install tells how",
        )
    told: dict[str, str | None] = {name: None if text.lower() == "none" else text for name, text in wanted.items()}
    try:
        client.attach(root).limit(size=told.get("size", ...), inodes=told.get("inodes", ...))
    except CowfsError as error:
        asked = ", ".join(f"cowfs.{name}={text}" for name, text in wanted.items())
        raise type(error)(f"annotation {asked}: {error.message}", remedy=error.remedy) from None
