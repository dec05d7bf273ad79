"""Digests, chain ids and image configurations: the arithmetic of images, no files.

Rule: a digest is checked against its one form before anything is built from it, a path above
all; only sha256 is known (OCI image-spec ``descriptor.md``, "Digests").
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cowfs.archive.names import show
from cowfs.errors import Corrupt, InvalidArgument, Unsupported

__all__ = ["chain_ids", "check_digest", "diff_ids_of", "digest_of", "make_config", "parse_json", "platform_here"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_FORM = re.compile(r"[a-z0-9]+([+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+", re.ASCII)

# os.uname().machine to the names of GOARCH, which images use
_ARCHITECTURES = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386",
    "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64", "loongarch64": "loong64",
}  # fmt: skip


def check_digest(text: object, what: str = "digest") -> str:
    """``text`` if it is ``sha256:`` and 64 lower-case hexadecimal digits.

    Raises:
        Unsupported: a well-formed digest of another algorithm. InvalidArgument: anything else.
    """
    if isinstance(text, str):
        if _DIGEST.fullmatch(text):
            return text
        if _FORM.fullmatch(text) and not text.startswith("sha256:"):
            raise Unsupported(f"{what} {text[:80]!r} is not a sha256 digest")
    raise InvalidArgument(
        f"{what} {show(str(text).encode('utf-8', 'replace'))} is not of the form sha256:<64 hex digits>"
    )


def digest_of(data: bytes) -> str:
    """``sha256:...`` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain id of each layer, bottom first (OCI image-spec ``config.md``, "Layer ChainID").

    >>> chain_ids(["sha256:" + "0" * 64])
    ['sha256:0000000000000000000000000000000000000000000000000000000000000000']
    """
    chain: list[str] = []
    for diff_id in diff_ids:
        check_digest(diff_id, "diff id")
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises InvalidArgument."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is not a JSON object")
    return value


def diff_ids_of(config: bytes) -> list[str]:
    """The diff ids that an image configuration lists, bottom first. Raises InvalidArgument."""
    rootfs = parse_json(config, "image configuration").get("rootfs")
    listed = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(listed, list):
        raise InvalidArgument("image configuration has no rootfs.diff_ids")
    return [check_digest(diff_id, "diff id") for diff_id in listed]


def platform_here() -> str:
    """The architecture of this machine as images name it."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def make_config(diff_ids: Sequence[str], base: bytes | None = None, **fields: Any) -> bytes:
    """An image configuration that lists ``diff_ids``.

    Args:
        base: a configuration whose other fields are kept; its history goes as far as its layers went.
        fields: set at the top level (``created="2026-...Z"``, ``config={...}``).

    Returns:
        JSON, the same for the same arguments.
    """
    value: dict[str, Any] = {"architecture": platform_here(), "os": "linux", "config": {}}
    if base is not None:
        value = parse_json(base, "image configuration")
        history = value.get("history")
        if isinstance(history, list):
            layers = sum(1 for item in history if isinstance(item, Mapping) and not item.get("empty_layer"))
            if layers > len(diff_ids):
                raise Corrupt(f"image configuration has a history of {layers} layers, the image {len(diff_ids)}")
            value["history"] = history + [{"created_by": "cowfs"} for _ in range(len(diff_ids) - layers)]
    value.update(fields)
    value["rootfs"] = {"type": "layers", "diff_ids": [check_digest(diff_id, "diff id") for diff_id in diff_ids]}
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
