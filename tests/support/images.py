"""Images for tests, by hand: layouts and docker-archives in which every document can be made wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .archives import member, tar

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"


def digest(data: bytes) -> str:
    """``sha256:...``"""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def config(layers: Sequence[bytes], **fields: Any) -> bytes:
    """A configuration of uncompressed layers; ``architecture``, ``config``, ``history`` and the rest as given."""
    value = {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]}, **fields,
    }  # fmt: skip
    return json.dumps(value).encode()


def platform(text: str) -> dict[str, str]:
    """``os/architecture[/variant]`` as a descriptor has it."""
    return dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False))


class Layout:
    """An OCI layout: blobs by digest, an index of manifests; written as a directory or as a tar."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: list[Any] = []

    def put(self, data: bytes, media: str, **more: Any) -> dict[str, Any]:
        """A blob, and its descriptor."""
        self.blobs[digest(data)] = data
        return {"mediaType": media, "digest": digest(data), "size": len(data), **more}

    def manifest(
        self, layers: Sequence[bytes], document: bytes | None = None, *, compressed: bool = False, media: str = LAYER,
        **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The descriptor of an image; ``more`` goes into it."""
        pack: Callable[[bytes], bytes] = (lambda data: gzip.compress(data, mtime=0)) if compressed else bytes
        listed = [self.put(pack(layer), media + ("+gzip" if compressed else "")) for layer in layers]
        value = {
            "schemaVersion": 2, "mediaType": MANIFEST, "layers": listed,
            "config": self.put(config(layers) if document is None else document, CONFIG),
        }  # fmt: skip
        return self.put(json.dumps(value).encode(), MANIFEST, **more)

    def index(self, manifests: Sequence[Any], **more: Any) -> dict[str, Any]:
        """The descriptor of a nested index."""
        return self.put(json.dumps({"schemaVersion": 2, "manifests": list(manifests)}).encode(), INDEX, **more)

    def add(
        self, layers: Sequence[bytes], tag: str | None = None, document: bytes | None = None, **more: Any
    ) -> Layout:
        """An image in the top index, with a ref name."""
        if tag is not None:
            more["annotations"] = {REF_NAME: tag, **more.get("annotations", {})}
        self.manifests.append(self.manifest(layers, document, **more))
        return self

    def files(self) -> dict[str, bytes]:
        """All of it by name."""
        return {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": self.manifests}).encode(),
            **{"blobs/sha256/" + name[7:]: data for name, data in self.blobs.items()},
        }

    def tar(self) -> bytes:
        """As an archive."""
        return archive(self.files())

    def write(self, target: Path) -> str:
        """As a directory; its path."""
        for name, data in self.files().items():
            path = target / name
            os.makedirs(path.parent, exist_ok=True)
            path.write_bytes(data)
        return str(target)


def archive(files: Mapping[str, bytes]) -> bytes:
    """A tar of files."""
    return tar(*(member(name, data) for name, data in files.items()))


def docker(*images: tuple[Sequence[bytes], Sequence[str], bytes | None]) -> bytes:
    """A docker-archive of (layers, tags, configuration), in the order of skopeo: layers first, manifest last."""
    files: dict[str, bytes] = {}
    entries = []
    for layers, tags, document in images:
        document = config(layers) if document is None else document
        for layer in layers:
            files[digest(layer)[7:] + ".tar"] = layer
        files[digest(document)[7:] + ".json"] = document
        entries.append(
            {
                "Config": digest(document)[7:] + ".json",
                "RepoTags": list(tags) or None,
                "Layers": [digest(layer)[7:] + ".tar" for layer in layers],
            }
        )
    files["manifest.json"] = json.dumps(entries).encode()
    return archive(files)
