"""Images out: an OCI layout (directory or tar) or a docker-archive.

Strategy. Everything is written by digest: a layer goes to a nameless or temporary file first,
because its digest and size come before it in the archive, and only then to its place. The same
images give the same bytes. A target that is a path appears whole or not at all (rename).

Sources: OCI image-spec ``image-layout.md`` and ``manifest.md``; moby's image spec v1.2.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cowfs._typed import Any, BinaryIO
from cowfs.archive import header
from cowfs.archive.decode import CHUNK
from cowfs.errors import AlreadyExists, Corrupt, InvalidArgument
from cowfs.images.description import LAYER_TAR
from cowfs.images.digests import as_json, check_digest, diff_ids_of, digest_of, parse_json
from cowfs.sys.atomic import replacing, write_file

__all__ = ["OutImage", "OutLayer", "write_docker", "write_oci"]

_SUFFIX = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutLayer:
    """A layer to be written.

    Attributes:
        diff_id: the expected digest of its uncompressed tar.
        write: called with (stream, compression); writes the layer's tar to the stream, compressed
            that way (:func:`cowfs.archive.rebuild` and :func:`cowfs.archive.export_layer` do). May return the real diff
            id: one that differs from ``diff_id`` is refused; other results are ignored.
    """

    diff_id: str
    write: Callable[[BinaryIO, str], Any] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutImage:
    """An image to be written: ``config`` lists exactly the layers' diff ids. ``tags``: names such as ``app:1``."""

    config: bytes
    layers: Sequence[OutLayer]
    tags: Sequence[str] = ()

    def check(self) -> None:
        """Raises Corrupt when configuration and layers do not belong together."""
        if diff_ids_of(self.config) != [check_digest(layer.diff_id, "diff id") for layer in self.layers]:
            raise Corrupt("image configuration and layers do not list the same diff ids")


class _Hashing:
    """A file that is written once and knows its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


# Two places to put files: a directory, a tar ----------------------------------------------------


class _DirSink:
    """Files below a new directory; named blobs by way of a temporary name."""

    def __init__(self, root: str) -> None:
        self._root = root
        os.makedirs(os.path.join(root, "blobs", "sha256"), exist_ok=True)

    def add(self, name: str, data: bytes) -> None:
        write_file(os.path.join(self._root, name), data, mode=0o644, durable=False)

    def add_stream(self, fill: Callable[[BinaryIO], Any], name_of: Callable[[str], str]) -> tuple[str, int]:
        fd, temporary = tempfile.mkstemp(dir=os.path.join(self._root, "blobs"), prefix=".new-")
        try:
            with os.fdopen(fd, "wb") as file:
                hashing = _Hashing(file)
                fill(hashing)  # type: ignore[arg-type]
                os.fchmod(file.fileno(), 0o644)
            os.replace(temporary, os.path.join(self._root, name_of(hashing.digest)))
        except BaseException:
            os.unlink(temporary)
            raise
        return hashing.digest, hashing.size

    def finish(self) -> None: ...


class _TarSink:
    """Members of a tar, each known in full before its header is written."""

    def __init__(self, out: BinaryIO, spool_dir: str | None) -> None:
        self._out, self._spool_dir = out, spool_dir
        self._names: set[str] = set()

    def _head(self, name: str, size: int) -> bool:
        if name in self._names:
            return False
        self._names.add(name)
        self._out.write(header.encode(name.encode(), header.REGULAR, mode=0o644, uid=0, gid=0, size=size, mtime=0))
        return True

    def add(self, name: str, data: bytes) -> None:
        if self._head(name, len(data)):
            self._out.write(data + bytes(header.pad(len(data))))

    def add_stream(self, fill: Callable[[BinaryIO], Any], name_of: Callable[[str], str]) -> tuple[str, int]:
        with tempfile.TemporaryFile(dir=self._spool_dir, prefix="cowfs-") as spool:
            hashing = _Hashing(spool)
            fill(hashing)  # type: ignore[arg-type]
            if self._head(name_of(hashing.digest), hashing.size):
                spool.seek(0)
                while data := spool.read(CHUNK):
                    self._out.write(data)
                self._out.write(bytes(header.pad(hashing.size)))
        return hashing.digest, hashing.size

    def finish(self) -> None:
        self._out.write(bytes(2 * header.BLOCK))


Sink = _DirSink | _TarSink


def _write_layer(layer: OutLayer, compression: str) -> Callable[[BinaryIO], None]:
    def fill(out: BinaryIO) -> None:
        result = layer.write(out, compression)
        got = getattr(result, "diff_id", None)  # a writer of others may return anything
        if got is not None and got != layer.diff_id:
            raise Corrupt(f"layer has the diff id {got} instead of {layer.diff_id}")

    return fill


def _blob(digest: str) -> str:
    return "blobs/sha256/" + digest[7:]


def _fill_oci(sink: Sink, images: Sequence[OutImage], compression: str, index: list[Any]) -> None:
    if compression not in _SUFFIX:
        raise InvalidArgument(f"unknown compression {compression!r}", remedy="use " + ", ".join(_SUFFIX))
    sink.add("oci-layout", as_json({"imageLayoutVersion": "1.0.0"}))
    written: dict[str, tuple[str, int]] = {}
    for image in images:
        image.check()
        layers = []
        for layer in image.layers:
            if layer.diff_id not in written:
                written[layer.diff_id] = sink.add_stream(_write_layer(layer, compression), _blob)
            digest, size = written[layer.diff_id]
            layers.append({"mediaType": LAYER_TAR + _SUFFIX[compression], "digest": digest, "size": size})
        config = digest_of(image.config)
        sink.add(_blob(config), image.config)
        manifest = as_json(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": {"mediaType": _CONFIG, "digest": config, "size": len(image.config)},
                "layers": layers,
            }
        )
        sink.add(_blob(digest_of(manifest)), manifest)
        described = parse_json(image.config, "image configuration")
        descriptor: dict[str, Any] = {"mediaType": _MANIFEST, "digest": digest_of(manifest), "size": len(manifest)}
        if isinstance(described.get("architecture"), str) and isinstance(described.get("os"), str):
            descriptor["platform"] = {
                key: described[key]
                for key in ("architecture", "os", "os.version", "variant")
                if isinstance(described.get(key), str)
            }
        for tag in image.tags or (None,):
            named = dict(descriptor)
            if tag is not None:
                index[:] = [item for item in index if _name_in(item) != tag]
                named["annotations"] = {"org.opencontainers.image.ref.name": tag}
            index.append(named)
    sink.add(
        "index.json",
        as_json({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": index}),
    )
    sink.finish()


def _name_in(descriptor: Any) -> Any:
    annotations = descriptor.get("annotations") if isinstance(descriptor, dict) else None
    return annotations.get("org.opencontainers.image.ref.name") if isinstance(annotations, dict) else None


def _fill_docker(sink: Sink, images: Sequence[OutImage]) -> None:
    manifest = []
    repositories: dict[str, dict[str, str]] = {}
    written: set[str] = set()
    for image in images:
        image.check()
        names = []
        for layer in image.layers:
            name = layer.diff_id[7:] + ".tar"
            if layer.diff_id not in written:
                digest, _ = sink.add_stream(_write_layer(layer, "none"), lambda digest: digest[7:] + ".tar")
                if digest != layer.diff_id:
                    raise Corrupt(f"layer has the diff id {digest} instead of {layer.diff_id}")
                written.add(layer.diff_id)
            names.append(name)
        config = digest_of(image.config)[7:] + ".json"
        sink.add(config, image.config)
        tags = [_full(tag) for tag in image.tags]
        manifest.append({"Config": config, "RepoTags": tags or None, "Layers": names})
        for tag in tags:
            repository, _, version = tag.rpartition(":")
            if names:
                repositories.setdefault(repository, {})[version] = names[-1][:-4]
    sink.add("manifest.json", as_json(manifest))
    sink.add("repositories", as_json(repositories))
    sink.finish()


def _full(tag: str) -> str:
    """A docker-archive names images ``repository:tag``."""
    return tag if ":" in tag.rpartition("/")[2] else tag + ":latest"


def _into_file(target: str | BinaryIO, fill: Callable[[BinaryIO], None]) -> None:
    if not isinstance(target, str):
        fill(target)
        target.flush()
        return
    with replacing(target, mode=0o644, durable=False) as file:
        fill(file)


def write_oci(
    target: str | BinaryIO, images: Sequence[OutImage], *, directory: bool = False, compression: str = "gzip",
    spool_dir: str | None = None,
) -> None:  # fmt: skip
    """Write an OCI layout.

    Args:
        target: a path, or a stream for the tar form.
        directory: make a layout directory instead of a tar. An existing layout gets the images added (an existing name
            moves); any other existing target must be an empty directory.
        compression: of the layers: ``gzip``, ``zstd`` or ``none``.
        spool_dir: the directory for layers that wait for their digest when a tar is written.

    Raises:
        AlreadyExists: a directory with something else in it. Corrupt: a layer is not what its diff id says.
    """
    if not directory:
        _into_file(target, lambda out: _fill_oci(_TarSink(out, spool_dir), images, compression, []))
        return
    if not isinstance(target, str):
        raise InvalidArgument("an OCI layout directory needs a path")
    index: list[Any] = []
    if os.path.exists(os.path.join(target, "oci-layout")):
        with open(os.path.join(target, "index.json"), "rb") as file:
            listed = parse_json(file.read(), "index.json").get("manifests")
        index = listed if isinstance(listed, list) else []
    elif os.path.isdir(target) and os.listdir(target):
        raise AlreadyExists(f"{target} has something else than an OCI layout in it", remedy="name a new directory")
    _fill_oci(_DirSink(target), images, compression, index)


def write_docker(target: str | BinaryIO, images: Sequence[OutImage], *, spool_dir: str | None = None) -> None:
    """Write a docker-archive, as ``docker save`` does and ``docker load``, ``podman load`` and skopeo read.

    Args:
        target: a path or a stream.
        images: all of them go into one archive. Tags without a version get ``:latest``.
        spool_dir: the directory for layers that wait for their digest; default: the host's temporary one.

    Raises:
        Corrupt: a layer is not what its diff id says.
        OSError: of writing; a target that is a path then does not exist.
    """
    _into_file(target, lambda out: _fill_docker(_TarSink(out, spool_dir), images))
