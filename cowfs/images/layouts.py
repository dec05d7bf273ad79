"""OCI layouts and docker-archives: documents into descriptions.

Strategy. The list of a source is its first document; every other document is read on demand, so that an image of
another platform may be absent, damaged or of an unknown kind.

Rule 1: every document is verified against the digest and size that named it before it is read.
Rule 2: a digest becomes a file name, and a name from a document one beneath the source, only through
:func:`~cowfs.images.digests.check_digest` and :func:`~cowfs.archive.names.canonical`.

Sources: OCI image-spec ``image-layout.md``, ``manifest.md``, ``image-index.md``; moby's image spec
v1.2 for ``manifest.json``; containerd's annotation ``io.containerd.image.name``.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cowfs._typed import Any
from cowfs.archive.names import canonical
from cowfs.errors import Corrupt, CowfsError, InvalidArgument, NotFound, Unsupported
from cowfs.images.description import LAYER_TAR, Image, Layer
from cowfs.images.digests import check_digest, diff_ids_of, digest_of, parse_any, parse_json, platform_here
from cowfs.images.files import Files
from cowfs.images.platforms import Platform

__all__ = ["Listed", "kind_of", "listed_in"]

_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
)  # fmt: skip
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
)  # fmt: skip
_CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_MAX_LAYERS = 1000
_MAX_IMAGES = 1000
_MAX_DEPTH = 4
_FULL_NAME, _REF_NAME = "io.containerd.image.name", "org.opencontainers.image.ref.name"
_AS_TREE = "--as rootfs takes it as a tree"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An image, or an index of several, as a source lists it, not read yet.

    Attributes:
        key: equal for two names of the same image. tags: its names in the source. aliases: other names for it.
        platform: if the list has it.
        inside: of an index: its entries. describe: the platform, read from the configuration.
        read: reads the image; None for a document of another kind.
    """

    key: str
    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    platform: Platform | None = None
    inside: Callable[[], list[Listed]] | None = None
    describe: Callable[[], Platform | None]
    read: Callable[[], Image | None]

    def platforms_known(self) -> Platform | None:
        """The platform from the list, or else from the configuration."""
        return self.platform or self.describe()


def kind_of(files: Files, signs: bool) -> str | None:
    """``oci``, ``docker``, ``both`` (a new ``docker save``), or None for neither.

    Args:
        signs: whether some names occur only in images; the source then is an image, even with bad documents.

    Raises:
        InvalidArgument: the source looks like an image, but cannot be read.
    """
    docker = _is_docker(files) if files.has("manifest.json") else False
    if files.has("oci-layout") and (signs or _is_layout(files)):
        if files.has("index.json"):
            return "both" if docker else "oci"
        if not docker:
            raise InvalidArgument("this is an OCI layout without index.json", remedy=f"it may be cut short; {_AS_TREE}")
    if docker or (docker is None and signs):
        return "docker"
    if signs:
        raise InvalidArgument(
            "this looks like an image, but neither index.json nor manifest.json lists one: a 'docker save' of before"
            " 1.10, or cut short", remedy=f"load it and save it anew with a newer engine; {_AS_TREE}",
        )  # fmt: skip
    return None


def _is_layout(files: Files) -> bool:
    try:
        return "imageLayoutVersion" in parse_json(files.read("oci-layout"), "oci-layout")
    except CowfsError:
        return False


def _is_docker(files: Files) -> bool | None:
    """Whether ``manifest.json`` is a docker-archive's: a list of objects with ``Config``; many trees have such a file.
    None if unreadable."""
    try:
        entries = parse_any(files.read("manifest.json"), "manifest.json")
    except CowfsError:
        return None
    return isinstance(entries, list) and any(
        isinstance(entry, dict) and ("Config" in entry or "Layers" in entry) for entry in entries
    )


def listed_in(kind: str, files: Files) -> list[list[Listed]]:
    """The lists of a source of :func:`kind_of`'s kind; the first list with the wanted image counts.

    Raises:
        InvalidArgument: there is no image in the source.
    """
    lists = []
    if kind != "oci":
        lists.append(_docker(files))
    if kind != "docker":
        lists.append(_oci(files))
    if not any(lists):
        raise InvalidArgument("there is no image in the source")
    return lists


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
        raise Corrupt(f"{what} {digest} has {len(data)} bytes instead of {str(descriptor.get('size'))[:40]}")
    if digest_of(data) != digest:
        raise Corrupt(f"{what} {digest} has the digest {digest_of(data)}")
    return data


def _oci(files: Files) -> list[Listed]:
    version = parse_json(files.read("oci-layout"), "oci-layout").get("imageLayoutVersion")
    if version != "1.0.0":
        raise Unsupported(f"OCI layout version {str(version)[:40]!r} is not known")
    return _index(files, files.read("index.json"), "index.json", (), (), 0)


def _index(
    files: Files, data: bytes, what: str, tags: tuple[str, ...], aliases: tuple[str, ...], depth: int
) -> list[Listed]:
    manifests = parse_json(data, what).get("manifests")
    if not isinstance(manifests, list):
        raise InvalidArgument(f"{what} has no manifests")
    if depth > _MAX_DEPTH:
        raise InvalidArgument("image indexes are nested too deeply")
    found: dict[tuple[str, tuple[str, ...]], Listed] = {}
    for descriptor in manifests:
        if not isinstance(descriptor, dict):
            raise InvalidArgument(f"{what} has something else than descriptors")
        listed = _listed(files, descriptor, tags, aliases, depth)
        if listed is not None:
            found.setdefault((listed.key, listed.tags), listed)
        if len(found) > _MAX_IMAGES:
            raise InvalidArgument(f"more than {_MAX_IMAGES} images in one source")
    return list(found.values())


def _listed(
    files: Files, descriptor: dict[str, Any], tags: tuple[str, ...], aliases: tuple[str, ...], depth: int
) -> Listed | None:
    """The image that a descriptor of an index names; None for other artifacts."""
    media = descriptor.get("mediaType")
    annotations = descriptor.get("annotations")
    annotations = annotations if isinstance(annotations, dict) else {}
    own = [name for key in (_FULL_NAME, _REF_NAME) if isinstance(name := annotations.get(key), str) and name]
    tags, aliases = tags or tuple(own[:1]), aliases or tuple(own[1:])
    key = descriptor.get("digest")
    key = key if isinstance(key, str) else ""
    if media in _INDEX_TYPES:

        def inside() -> list[Listed]:
            document = _document(files, descriptor, "image index")
            return _index(files, document, "image index", tags, aliases, depth + 1)

        return Listed(
            key=key, tags=tags, aliases=aliases, inside=inside, describe=lambda: None, read=lambda: None
        )  # fmt: skip
    platform = Platform.of(descriptor.get("platform"))
    if media not in _MANIFEST_TYPES or "vnd.docker.reference.type" in annotations or platform == _NO_PLATFORM:
        return None
    return Listed(
        key=key, tags=tags, aliases=aliases, platform=platform,
        describe=partial(_oci_platform, files, descriptor), read=partial(_oci_image, files, descriptor, tags),
    )  # fmt: skip


_NO_PLATFORM = Platform("unknown", "unknown")


def _oci_config(files: Files, descriptor: dict[str, Any]) -> tuple[dict[str, Any], bytes] | None:
    """Manifest and configuration; None for attestations and other artifacts."""
    manifest = parse_json(_document(files, descriptor, "manifest"), "manifest")
    config = manifest.get("config")
    if not isinstance(config, dict) or config.get("mediaType") not in _CONFIG_TYPES:
        return None
    listed = manifest.get("layers")
    if isinstance(listed, list) and any(
        isinstance(layer, dict) and "in-toto" in str(layer.get("mediaType")) for layer in listed
    ):
        return None
    return manifest, _document(files, config, "image configuration")


def _oci_platform(files: Files, descriptor: dict[str, Any]) -> Platform | None:
    found = _oci_config(files, descriptor)
    return _NO_PLATFORM if found is None else _platform(found[1])


def _oci_image(files: Files, descriptor: dict[str, Any], tags: tuple[str, ...]) -> Image | None:
    found = _oci_config(files, descriptor)
    if found is None:
        return None
    manifest, config = found
    listed = manifest.get("layers")
    if not isinstance(listed, list) or len(listed) > _MAX_LAYERS:
        raise InvalidArgument(f"manifest has no list of at most {_MAX_LAYERS} layers")
    diff_ids = diff_ids_of(config)
    if len(diff_ids) != len(listed):
        raise Corrupt(f"manifest has {len(listed)} layers, its configuration {len(diff_ids)}")
    layers = [_oci_layer(files, layer, diff_id) for layer, diff_id in zip(listed, diff_ids, strict=True)]
    return _image(config, layers, tags)


def _image(config: bytes, layers: Sequence[Layer], tags: tuple[str, ...]) -> Image:
    """Give an image without layers one empty layer: an archive of no bytes."""
    nothing = digest_of(b"")
    return Image(
        config=config,
        config_digest=digest_of(config),
        layers=tuple(layers)
        or (Layer(diff_id=nothing, digest=nothing, size=0, media_type=LAYER_TAR, opener=lambda: io.BytesIO()),),
        tags=tags,
        platform=str(_platform(config)),
    )


def _oci_layer(files: Files, descriptor: Any, diff_id: str) -> Layer:
    if not isinstance(descriptor, dict):
        raise InvalidArgument("manifest has something else than descriptors among its layers")
    digest = check_digest(descriptor.get("digest"), "digest of a layer")
    media = str(descriptor.get("mediaType"))[:200]
    if media.endswith("+encrypted"):
        raise Unsupported(f"layer {digest} is encrypted")
    name = _blob_name(digest)
    if not files.has(name):
        foreign = "foreign" in media or "nondistributable" in media
        raise NotFound(
            f"layer {digest} is not in the source",
            remedy="it is a foreign layer, which is to be fetched elsewhere"
            if foreign
            else "it holds a part of the image only",
        )
    size = files.size(name)
    if descriptor.get("size") != size:
        raise Corrupt(f"layer {digest} has {size} bytes instead of {str(descriptor.get('size'))[:40]}")
    return Layer(diff_id=diff_id, digest=digest, size=size, media_type=media, opener=lambda: files.open(name))


def _platform(config: bytes) -> Platform:
    value = parse_json(config, "image configuration")
    return Platform.of(value) or Platform("linux", platform_here())


# docker-archive -------------------------------------------------------------------------------


def _docker(files: Files) -> list[Listed]:
    entries = parse_any(files.read("manifest.json"), "manifest.json")
    if not isinstance(entries, list) or len(entries) > _MAX_IMAGES:
        raise InvalidArgument(f"manifest.json is not a list of at most {_MAX_IMAGES} images")
    return [_docker_listed(files, entry) for entry in entries]


def _docker_listed(files: Files, entry: Any) -> Listed:
    if not isinstance(entry, dict) or not isinstance(entry.get("Config"), str):
        raise InvalidArgument("manifest.json has an image without configuration")
    tags = entry.get("RepoTags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise InvalidArgument("manifest.json has something else than names among its RepoTags")
    layers = entry.get("Layers") or []
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise InvalidArgument("manifest.json has something else than names among its layers")
    name: str = entry["Config"]
    return Listed(
        key=name, tags=tuple(tags), describe=lambda: _platform(_docker_config(files, name)),
        read=partial(_docker_image, files, name, layers, tuple(tags)),
    )  # fmt: skip


def _docker_config(files: Files, name: str) -> bytes:
    config = files.read(_inside(name))
    digest = digest_of(config)
    stem = name.rpartition("/")[2].removesuffix(".json").removeprefix("sha256:")
    if re.fullmatch(r"[0-9a-f]{64}", stem) and "sha256:" + stem != digest:
        raise Corrupt(f"image configuration {name!r} has the digest {digest}")
    return config


def _docker_image(files: Files, name: str, listed: list[str], tags: tuple[str, ...]) -> Image:
    config = _docker_config(files, name)
    diff_ids = diff_ids_of(config)
    if len(diff_ids) != len(listed) or len(listed) > _MAX_LAYERS:
        raise Corrupt(f"manifest.json has {len(listed)} layers, the image's configuration {len(diff_ids)}")
    layers = [_docker_layer(files, _inside(layer), diff_id) for layer, diff_id in zip(listed, diff_ids, strict=True)]
    return _image(config, layers, tags)


def _inside(name: str) -> str:
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        raise InvalidArgument(f"{name[:80]!r} cannot be the name of a file") from None
    return os.fsdecode(canonical(encoded, max_path=4095, max_depth=64))


def _docker_layer(files: Files, name: str, diff_id: str) -> Layer:
    size = files.size(name)
    hexes = name.rpartition("/")[2]
    digest = "sha256:" + hexes if name == f"blobs/sha256/{hexes}" else None
    if digest is not None:
        check_digest(digest, "digest of a layer")
    return Layer(diff_id=diff_id, digest=digest, size=size, media_type=LAYER_TAR, opener=lambda: files.open(name))
