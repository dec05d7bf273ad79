"""Small images in memory: an OCI layout and a docker archive, whole or damaged on purpose."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from cowfs.archive import apply_layer
from cowfs.images import ImageSource, make_config
from support.archives import directory, member, tar

DATA = Path(__file__).parent.parent / "data"
OCI, DOCKER = DATA / "small-oci.tar", DATA / "small-docker.tar"
LAYER = tar(directory("./"), member("f", b"hello"))
TOP = tar(member(".wh.f"), member("g", b"top"))


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def apply_all(source: ImageSource, target: Path) -> None:
    target.mkdir()
    for layer in source.pick().layers:
        with layer.open() as stream:
            apply_layer(stream, str(target), form="plain", diff_id=layer.diff_id, blob_digest=layer.digest)


class Oci:
    """An OCI layout in memory: blobs by digest, to be written as a tar or a directory."""

    def __init__(self, layers: list[bytes], *, tag: str | None = "app:1", config: dict[str, Any] | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        wanted = {"rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]}}
        described = {"architecture": "amd64", "os": "linux", **wanted, **(config or {})}
        self.config = json.dumps(described).encode()
        self.manifest = {
            "schemaVersion": 2,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **self.put(self.config)},
            "layers": [
                {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **self.put(gzip.compress(layer, mtime=0))}
                for layer in layers
            ],
        }
        self.annotations = {"org.opencontainers.image.ref.name": tag} if tag else {}
        self.extra: dict[str, bytes] = {}
        self.manifests: list[dict[str, Any]] | None = None

    def put(self, data: bytes) -> dict[str, Any]:
        self.blobs[digest_of(data)] = data
        return {"digest": digest_of(data), "size": len(data)}

    def descriptor(self) -> dict[str, Any]:
        return {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            **self.put(json.dumps(self.manifest).encode()),
            "annotations": self.annotations,
        }

    def files(self) -> dict[str, bytes]:
        manifests = self.manifests if self.manifests is not None else [self.descriptor()]
        return {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": manifests}).encode(),
            **{"blobs/sha256/" + digest[7:]: data for digest, data in self.blobs.items()},
            **self.extra,
        }

    def tar(self) -> bytes:
        return tar(*(member(name, data) for name, data in self.files().items()))

    def write(self, target: Path) -> Path:
        for name, data in self.files().items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return target


def docker_archive(
    layers: list[tuple[str, bytes]], *extra: bytes, tags: list[str] | None = None, **changes: Any
) -> bytes:
    config = make_config([digest_of(data) for _, data in layers])
    name = hashlib.sha256(config).hexdigest() + ".json"
    entry = {"Config": name, "RepoTags": tags or ["app:1"], "Layers": [name for name, _ in layers], **changes}
    return tar(
        *(member(name, data) for name, data in layers if data is not None), *extra,
        member(name, config), member("manifest.json", json.dumps([entry]).encode()),
    )  # fmt: skip
