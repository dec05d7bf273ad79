"""OCI layouts and docker-archives: documents into descriptions.

Rule 1: every document is verified against the digest and size that named it before it is read.
Rule 2: a digest becomes a file name, and a name from a document one beneath the source, only through
:func:`~cowfs.images.digests.check_digest` and :func:`~cowfs.archive.names.canonical`.

Sources: OCI image-spec ``image-layout.md``, ``manifest.md``, ``image-index.md``; moby's image spec
v1.2 for ``manifest.json``.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from cowfs.archive.names import canonical
from cowfs.errors import Corrupt, InvalidArgument, NotFound, Unsupported
from cowfs.images.description import LAYER_TAR, Image, Layer
from cowfs.images.digests import check_digest, diff_ids_of, digest_of, parse_json, platform_here
from cowfs.images.files import Files

__all__ = ["images_in", "kind_of"]

_INDEX_TYPES = frozenset(
    {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}
)
_MANIFEST_TYPES = frozenset(
    {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
)
_CONFIG_TYPES = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)
_MAX_LAYERS = 1000
_MAX_IMAGES = 1000
_REF_NAME = ("org.opencontainers.image.ref.name", "io.containerd.image.name")


def kind_of(files: Files) -> str | None:
    """``oci``, ``docker``, or None for neither."""
    if files.has("oci-layout") and files.has("index.json"):
        # a new docker save is both; its manifest.json has the full names of the images
        return "docker" if files.has("manifest.json") else "oci"
    return "docker" if files.has("manifest.json") else None


def images_in(kind: str, files: Files) -> tuple[Image, ...]:
    """Everything of :func:`kind_of`'s kind. Raises InvalidArgument where there is no image."""
    found = tuple((_oci if kind == "oci" else _docker)(files))
    if not found:
        raise InvalidArgument("there is no image in the source")
    return found


# OCI layout -----------------------------------------------------------------------------------


def _blob_name(digest: str) -> str:
    return "blobs/sha256/" + check_digest(digest)[7:]


def _document(files: Files, descriptor: Any, what: str) -> bytes:
    """A blob named by a descriptor, its size and digest verified."""
    if not isinstance(descriptor, dict):
        raise InvalidArgument(f"{what} has no descriptor")
    digest = check_digest(descriptor.get("digest"), f"digest of the {what}")
    data = files.read(_blob_name(digest))
    if descriptor.get("size") != len(data):
        raise Corrupt(f"{what} {digest} has {len(data)} bytes instead of {descriptor.get('size')}")
    if digest_of(data) != digest:
        raise Corrupt(f"{what} {digest} has the digest {digest_of(data)}")
    return data


def _oci(files: Files) -> list[Image]:
    layout = parse_json(files.read("oci-layout"), "oci-layout")
    if layout.get("imageLayoutVersion") != "1.0.0":
        raise Unsupported(f"OCI layout version {layout.get('imageLayoutVersion')!r} is not known")
    images: list[Image] = []
    todo: list[tuple[dict[str, Any], tuple[str, ...], int]] = [
        (parse_json(files.read("index.json"), "index.json"), (), 0)
    ]
    while todo:
        index, names, depth = todo.pop(0)
        manifests = index.get("manifests")
        if not isinstance(manifests, list):
            raise InvalidArgument("image index has no manifests")
        for descriptor in manifests:
            if not isinstance(descriptor, dict):
                raise InvalidArgument("image index has something else than descriptors")
            media = descriptor.get("mediaType")
            tags = names or _tags(descriptor)
            if media in _INDEX_TYPES:
                if depth >= 4:
                    raise InvalidArgument("image indexes are nested too deeply")
                todo.append((parse_json(_document(files, descriptor, "image index"), "image index"), tags, depth + 1))
            elif media in _MANIFEST_TYPES:
                image = _manifest(files, _document(files, descriptor, "manifest"), tags)
                if image is not None:
                    images.append(image)
            if len(images) + len(todo) > _MAX_IMAGES:
                raise InvalidArgument(f"more than {_MAX_IMAGES} images in one source")
    return _merge_tags(images)


def _tags(descriptor: dict[str, Any]) -> tuple[str, ...]:
    annotations = descriptor.get("annotations")
    if isinstance(annotations, dict):
        for key in _REF_NAME:
            if isinstance(annotations.get(key), str) and annotations[key]:
                return (annotations[key],)
    return ()


def _merge_tags(images: list[Image]) -> list[Image]:
    """An image listed under several names is one image."""
    merged: dict[str, Image] = {}
    for image in images:
        known = merged.get(image.config_digest)
        if known is not None:
            tags = known.tags + tuple(tag for tag in image.tags if tag not in known.tags)
            image = Image(
                config=known.config, config_digest=known.config_digest, layers=known.layers, tags=tags,
                platform=known.platform,
            )  # fmt: skip
        merged[image.config_digest] = image
    return list(merged.values())


def _manifest(files: Files, data: bytes, tags: tuple[str, ...]) -> Image | None:
    """An image from its manifest; None for what is no image (attestations and other artifacts)."""
    manifest = parse_json(data, "manifest")
    descriptor = manifest.get("config")
    if not isinstance(descriptor, dict) or descriptor.get("mediaType") not in _CONFIG_TYPES:
        return None
    listed = manifest.get("layers")
    if not isinstance(listed, list) or len(listed) > _MAX_LAYERS:
        raise InvalidArgument(f"manifest has no list of at most {_MAX_LAYERS} layers")
    if any(isinstance(layer, dict) and "in-toto" in str(layer.get("mediaType")) for layer in listed):
        return None
    config = _document(files, descriptor, "image configuration")
    diff_ids = diff_ids_of(config)
    if len(diff_ids) != len(listed):
        raise Corrupt(f"manifest has {len(listed)} layers, its configuration {len(diff_ids)}")
    layers = [_oci_layer(files, layer, diff_id) for layer, diff_id in zip(listed, diff_ids, strict=True)]
    return Image(
        config=config, config_digest=descriptor["digest"], layers=tuple(layers), tags=tags, platform=_platform(config)
    )


def _oci_layer(files: Files, descriptor: Any, diff_id: str) -> Layer:
    if not isinstance(descriptor, dict):
        raise InvalidArgument("manifest has something else than descriptors among its layers")
    digest = check_digest(descriptor.get("digest"), "digest of a layer")
    media = str(descriptor.get("mediaType"))
    if media.endswith("+encrypted"):
        raise Unsupported(f"layer {digest} is encrypted")
    name = _blob_name(digest)
    if not files.has(name):
        raise NotFound(f"layer {digest} is not in the source", remedy="it holds a part of the image only")
    size = files.size(name)
    if descriptor.get("size") != size:
        raise Corrupt(f"layer {digest} has {size} bytes instead of {descriptor.get('size')}")
    return Layer(diff_id=diff_id, digest=digest, size=size, media_type=media, opener=lambda: files.open(name))


def _platform(config: bytes) -> str:
    value = parse_json(config, "image configuration")
    return f"{value.get('os', 'linux')}/{value.get('architecture', platform_here())}"


# docker-archive -------------------------------------------------------------------------------


def _docker(files: Files) -> list[Image]:
    try:
        entries = json.loads(files.read("manifest.json"))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"manifest.json is not JSON: {error}") from None
    if not isinstance(entries, list) or len(entries) > _MAX_IMAGES:
        raise InvalidArgument(f"manifest.json is not a list of at most {_MAX_IMAGES} images")
    return _merge_tags([_docker_image(files, entry) for entry in entries])


def _docker_image(files: Files, entry: Any) -> Image:
    if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
        raise InvalidArgument("manifest.json has an image without configuration")
    name: str = entry["Config"]
    config = files.read(_inside(name))
    digest = digest_of(config)
    stem = name.rpartition("/")[2].removesuffix(".json")
    if re.fullmatch(r"[0-9a-f]{64}", stem) and "sha256:" + stem != digest:
        raise Corrupt(f"image configuration {name!r} has the digest {digest}")
    diff_ids = diff_ids_of(config)
    listed = entry.get("Layers") or []
    if not isinstance(listed, list) or not all(isinstance(layer, str) for layer in listed):
        raise InvalidArgument("manifest.json has something else than names among its layers")
    if len(diff_ids) != len(listed) or len(listed) > _MAX_LAYERS:
        raise Corrupt(f"manifest.json has {len(listed)} layers, the image's configuration {len(diff_ids)}")
    tags = entry.get("RepoTags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise InvalidArgument("manifest.json has something else than names among its RepoTags")
    layers = [_docker_layer(files, _inside(layer), diff_id) for layer, diff_id in zip(listed, diff_ids, strict=True)]
    return Image(
        config=config, config_digest=digest, layers=tuple(layers), tags=tuple(tags), platform=_platform(config)
    )


def _inside(name: str) -> str:
    return os.fsdecode(canonical(os.fsencode(name), max_path=4095, max_depth=64))


def _docker_layer(files: Files, name: str, diff_id: str) -> Layer:
    size = files.size(name)
    hexes = name.rpartition("/")[2]
    digest = "sha256:" + hexes if name == f"blobs/sha256/{hexes}" else None
    if digest is not None:
        check_digest(digest, "digest of a layer")
    return Layer(diff_id=diff_id, digest=digest, size=size, media_type=LAYER_TAR, opener=lambda: files.open(name))
