"""Digests, chain ids and image configurations: the arithmetic of images, no files.

Rule: a digest is checked against its one form before anything is built from it, a path above
all; only sha256 is known (OCI image-spec ``descriptor.md``, "Digests").
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence

from cowfs._typed import Any
from cowfs.archive.names import show
from cowfs.errors import InvalidArgument, Unsupported

__all__ = [
    "as_json", "chain_ids", "check_digest", "diff_ids_of", "digest_of", "make_config", "parse_any", "parse_json",
    "platform_here",
]  # fmt: skip

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_FORM = re.compile(r"[a-z0-9]+([+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+", re.ASCII)

# os.uname().machine to the names of GOARCH, which images use
_ARCHITECTURES = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386",
    "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64", "loongarch64": "loong64",
}  # fmt: skip


def check_digest(text: object, what: str = "digest") -> str:
    """``text`` if it is ``sha256:`` and 64 lower-case hexadecimal digits.

    Args:
        what: the name of the digest in messages.

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
    """The digest of ``data``: ``sha256:`` and 64 hexadecimal digits (OCI image-spec ``descriptor.md``, "Digests")."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain id of each layer, bottom first (OCI image-spec ``config.md``, "Layer ChainID").

    Args:
        diff_ids: of the layers, bottom first.

    Raises:
        InvalidArgument, Unsupported: as :func:`check_digest`.

    >>> chain_ids(["sha256:" + "0" * 64])
    ['sha256:0000000000000000000000000000000000000000000000000000000000000000']
    """
    chain: list[str] = []
    for diff_id in diff_ids:
        check_digest(diff_id, "diff id")
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:20]} is no number that JSON can say")


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def parse_any(data: bytes, what: str) -> Any:
    """A JSON value in UTF-8 (RFC 8259: no byte order mark, no numbers beyond a double). Raises InvalidArgument."""
    if data.startswith(codecs.BOM_UTF8):
        raise InvalidArgument(f"{what} is not JSON: it begins with a byte order mark")
    try:
        return json.loads(data.decode(), parse_float=_number, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise InvalidArgument(f"{what} is not JSON: it is not in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is not JSON: {error}") from None


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object; errors as :func:`parse_any`."""
    value = parse_any(data, what)
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is not a JSON object")
    return value


def as_json(value: Any) -> bytes:
    """A JSON document, the same for the same value. Characters that UTF-8 cannot hold (lone surrogates) stay escaped."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def diff_ids_of(config: bytes) -> list[str]:
    """The diff ids in ``config``, an image configuration (JSON), bottom first. Raises InvalidArgument for any other document."""
    rootfs = parse_json(config, "image configuration").get("rootfs")
    listed = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(listed, list):
        raise InvalidArgument("image configuration has no rootfs.diff_ids")
    return [check_digest(diff_id, "diff id") for diff_id in listed]


def platform_here() -> str:
    """The architecture of this machine as images name it."""
    machine = os.uname().machine
    return _ARCHITECTURES.get(machine, machine)


def make_config(diff_ids: Sequence[str], base: bytes | None = None, *, kept: int | None = None, **fields: Any) -> bytes:
    """An image configuration that lists ``diff_ids``.

    Args:
        base: a configuration whose other fields are kept. Its history, which is for people, gets a step for each
            further layer, and steps that lost their layer are marked as empty.
        kept: the number of layers that are those of ``base``; default: all that it lists, if they are the same.
        fields: set at the top level (``created="2026-...Z"``, ``config={...}``).

    Returns:
        JSON, the same for the same arguments.
    """
    value: dict[str, Any] = {"architecture": platform_here(), "os": "linux", "config": {}}
    if base is not None:
        value = parse_json(base, "image configuration")
        if "history" in value:
            if kept is None:
                listed = diff_ids_of(base)
                kept = len(listed) if list(diff_ids[: len(listed)]) == listed else len(diff_ids)
            value["history"] = _history(value["history"], kept, len(diff_ids))
    value.update(fields)
    value["rootfs"] = {"type": "layers", "diff_ids": [check_digest(diff_id, "diff id") for diff_id in diff_ids]}
    return as_json(value)


def _history(listed: object, kept: int, count: int) -> list[Any]:
    """A history with as many layers as the image has (OCI image-spec ``config.md``: "empty_layer")."""
    history = [dict(step) for step in listed if isinstance(step, Mapping)] if isinstance(listed, list) else []
    layers = [step for step in history if not step.get("empty_layer")]
    for step in layers[: max(0, len(layers) - kept)]:
        step["empty_layer"] = True  # its layer was merged into the next one
    return history + [{"created_by": "cowfs"} for _ in range(count - min(len(layers), kept))]
