"""Images in: an OCI layout, a docker-archive, a root filesystem's tar, a directory.

Strategy. All four become one neutral description: a configuration, and layers that can be opened
as streams. Small documents (index, manifest, configuration) are read and their digests verified here, when
the source is opened; a layer's digests are verified by whoever streams it
(:func:`cowfs.archive.apply_layer` takes both), since only that reads it whole.

What a source is, is told from the inside: a layout has ``oci-layout``, a docker-archive
``manifest.json``; a tar without either is a root filesystem, which the first name that no archive of
images has gives away.

Sources: OCI image-spec ``image-layout.md``, ``manifest.md``, ``image-index.md``; moby's image spec
v1.2 for ``manifest.json``.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, BinaryIO

from cowfs.archive.compress import Source
from cowfs.archive.decode import CHUNK, SNIFF, decoder_for
from cowfs.archive.export import export_layer
from cowfs.archive.names import canonical
from cowfs.archive.reader import Reader
from cowfs.errors import Corrupt, CowfsError, InvalidArgument, NotFound, Unsupported
from cowfs.images.digests import chain_ids, check_digest, diff_ids_of, digest_of, make_config, parse_json, platform_here
from cowfs.images.files import DirFiles, Files, TarFiles, Window

__all__ = ["Image", "ImageSource", "Layer", "open_image"]

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
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
_REF_NAME = ("org.opencontainers.image.ref.name", "io.containerd.image.name")

# What may be at the top of an OCI layout tar or of a docker-archive, whoever wrote it.
_IMAGE_NAME = re.compile(
    rb"oci-layout|repositories|blobs(/.*)?|[^/]+\.(json|tar|tar\.gz|tgz)|(sha256:)?[0-9a-f]{64}(/.*)?", re.DOTALL
)
_DECISIVE = re.compile(rb"oci-layout|index\.json|manifest\.json|blobs/sha256/.+|[0-9a-f]{64}/(layer\.tar|json|VERSION)", re.DOTALL)
_UNDECIDED = 8 << 20  # bytes without a name that decides: go on with the whole archive at hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of an image.

    Attributes:
        diff_id: digest of the uncompressed tar; None where the source does not say (a root filesystem).
        digest: of the stream that :meth:`open` gives; None where the source does not say.
        size: bytes of that stream, None where unknown. media_type: as the manifest has it.
    """

    diff_id: str | None
    digest: str | None
    size: int | None
    media_type: str
    opener: Callable[[], BinaryIO] = field(repr=False)

    def open(self) -> BinaryIO:
        """The layer's stream, compressed as it is stored. The caller closes it.

        A root filesystem that came through a pipe can be opened once only (FailedPrecondition).
        """
        return self.opener()


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image of a source.

    Attributes:
        config: the configuration document as it is stored. config_digest: of it, the image's id.
        layers: bottom first. tags: names the source gives it, maybe none.
        platform: ``os/architecture``.
    """

    config: bytes = field(repr=False)
    config_digest: str
    layers: tuple[Layer, ...]
    tags: tuple[str, ...]
    platform: str

    @property
    def chain(self) -> list[str]:
        """The chain id of each layer, bottom first; raises InvalidArgument where a diff id is not known yet."""
        return chain_ids([check_digest(layer.diff_id, "diff id") for layer in self.layers])


class ImageSource:
    """An opened source; close it (or use ``with``) when its layers have been read.

    Attributes:
        kind: ``oci``, ``docker``, ``rootfs`` or ``dir``. images: what is in it.
    """

    def __init__(self, kind: str, images: tuple[Image, ...], close: Callable[[], None]) -> None:
        self.kind, self.images, self._close = kind, images, close

    def pick(self, tag: str | None = None, *, platform: str | None = None) -> Image:
        """The one image meant by a tag and a platform.

        Args:
            tag: as in :attr:`Image.tags`, or its part behind the last ``:`` or ``/``. Without it there must be one image.
            platform: ``os/architecture``; this machine's decides among several where it is not given.

        Raises:
            NotFound: there is none; the message lists what there is. InvalidArgument: several fit.
        """
        fitting = [image for image in self.images if tag is None or tag in image.tags]
        if not fitting and tag is not None:
            fitting = [
                image for image in self.images
                if any(name.endswith((":" + tag, "/" + tag)) for name in image.tags)
            ]  # fmt: skip
        wanted = platform or f"linux/{platform_here()}"
        if platform is not None or len(fitting) > 1:
            fitting = [image for image in fitting if image.platform == wanted] or ([] if platform else fitting)
        there = ", ".join(sorted({name for image in self.images for name in image.tags})) or "no names"
        if not fitting:
            raise NotFound(f"no image {tag or ''} for {wanted} in the source".replace("  ", " "), remedy=f"it has {there}")
        if len({image.config_digest for image in fitting}) > 1:
            raise InvalidArgument(f"the source has {len(fitting)} images", remedy=f"name one of: {there}")
        return fitting[0]

    def close(self) -> None:
        """Release the files; idempotent."""
        self._close()

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_image(source: str | os.PathLike[str] | BinaryIO, *, spool_dir: str | None = None) -> ImageSource:
    """Open an image from a file, a directory or a stream.

    Args:
        source: a path, or a binary stream read from where it is (a pipe will do).
        spool_dir: where a compressed or piped archive of images is put while it is read
            (a temporary file without a name); the default is the system's.

    Raises:
        InvalidArgument: neither image nor tar, or a damaged one. Corrupt: a digest does not match.
        NotFound: no such path, or a document that the image refers to is missing.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _open_stream(source, spool_dir, owned=False)
    path = os.fspath(source)
    try:
        st = os.stat(path)
    except FileNotFoundError:
        raise NotFound(f"no such file or directory: {path}") from None
    if stat.S_ISDIR(st.st_mode):
        files = DirFiles(path)
        try:
            kind = _kind_of(files)
            if kind is not None:
                return _images(kind, files)
        except BaseException:
            files.close()
            raise
        files.close()
        return _directory(path)
    return _open_stream(open(path, "rb", buffering=0), spool_dir, owned=True)


def _kind_of(files: Files) -> str | None:
    if files.has("oci-layout") and files.has("index.json"):
        # a new docker save is both; its manifest.json has the full names of the images
        return "docker" if files.has("manifest.json") else "oci"
    return "docker" if files.has("manifest.json") else None


def _images(kind: str, files: Files) -> ImageSource:
    found = tuple((_oci if kind == "oci" else _docker)(files))
    if not found:
        raise InvalidArgument("there is no image in the source")
    return ImageSource(kind, found, files.close)


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
    import json

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


# Streams: what is inside? ---------------------------------------------------------------------


class _Head:
    """A stream that remembers what was read of it, until it is told not to."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seen = bytearray()
        self.keep = True

    def read(self, count: int = -1) -> bytes:
        data = self._stream.read(count if count >= 0 else CHUNK) or b""
        if self.keep:
            self.seen += data
        return data


class _Pulled(Source):
    """A source over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self._chunks = chunks

    def next_chunk(self) -> bytes:
        return next(self._chunks, b"")


def _open_stream(stream: BinaryIO, spool_dir: str | None, *, owned: bool) -> ImageSource:
    close = stream.close if owned else (lambda: None)
    try:
        head = _Head(stream)
        first = head.read(CHUNK)
        while len(first) < SNIFF and (more := head.read(CHUNK)):
            first += more
        if not first:
            raise InvalidArgument("the source is empty")
        compression, decoder = decoder_for(first)
        given = [first]
        chunks = decoder(lambda count: given.pop() if given else head.read(count))
        if not _looks_like_image(chunks, head):
            return _rootfs(stream, bytes(head.seen), owned)
        if compression == "none" and owned and stream.seekable():
            return _archive(stream)
        spool = _spool(stream, bytes(head.seen), spool_dir)
        close()
        try:
            return _archive(spool)
        except BaseException:
            spool.close()
            raise
    except BaseException:
        close()
        raise


def _archive(file: BinaryIO) -> ImageSource:
    """An uncompressed archive in a file of ours: of images, or a root filesystem after all."""
    files = TarFiles(file)
    kind = _kind_of(files)
    if kind is not None:
        return _images(kind, files)
    if files.holds("blobs/sha256/"):
        raise InvalidArgument(
            "archive has blobs but neither oci-layout with index.json nor manifest.json", remedy="it may be cut short"
        )
    return _rootfs(file, b"", True)


def _looks_like_image(chunks: Iterator[bytes], head: _Head) -> bool:
    """Read headers until a name decides; an archive of images has few kinds of names at its top."""
    for member in Reader(_Pulled(chunks)):
        path = canonical(member.name, max_path=4095, max_depth=512)
        if _DECISIVE.fullmatch(path) or len(head.seen) > _UNDECIDED:
            return True
        if path and not _IMAGE_NAME.fullmatch(path):
            return False
    return False


def _spool(stream: BinaryIO, seen: bytes, spool_dir: str | None) -> BinaryIO:
    """The whole archive, uncompressed, in a file without a name."""
    given = [seen]

    def read(count: int) -> bytes:
        return given.pop() if given else stream.read(count) or b""

    spool = tempfile.TemporaryFile(dir=spool_dir, prefix="cowfs-")  # noqa: SIM115  the source owns it
    try:
        _, decoder = decoder_for(seen)
        for chunk in decoder(read):
            spool.write(chunk)
        spool.flush()
    except BaseException:
        spool.close()
        raise
    return spool


def _rootfs(stream: BinaryIO, seen: bytes, owned: bool) -> ImageSource:
    """A tar of a root filesystem: one layer whose diff id is known once it was read."""
    seekable = owned and stream.seekable()
    opened = False

    def opener() -> BinaryIO:
        nonlocal opened
        if seekable:
            fd = stream.fileno()
            return Window(fd, 0, os.fstat(fd).st_size)  # type: ignore[return-value]
        if opened:
            raise InvalidArgument("a root filesystem from a pipe can be read once only")
        opened = True
        return _Joined(seen, stream)  # type: ignore[return-value]

    size = os.fstat(stream.fileno()).st_size if seekable else None
    return _single("rootfs", opener, size, stream.close if owned else lambda: None)


class _Joined(io.RawIOBase):
    """What was read already, then the rest."""

    def __init__(self, seen: bytes, stream: BinaryIO) -> None:
        super().__init__()
        self._seen, self._stream = seen, stream

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        count = CHUNK if size is None or size < 0 else size
        if self._seen:
            data, self._seen = self._seen[:count], self._seen[count:]
            return data
        return self._stream.read(count) or b""


def _single(kind: str, opener: Callable[[], BinaryIO], size: int | None, close: Callable[[], None]) -> ImageSource:
    config = make_config([])
    layer = Layer(diff_id=None, digest=None, size=size, media_type=LAYER_TAR, opener=opener)
    image = Image(
        config=config, config_digest=digest_of(config), layers=(layer,), tags=(), platform=f"linux/{platform_here()}"
    )
    return ImageSource(kind, (image,), close)


def _directory(path: str) -> ImageSource:
    """A plain directory: its reproducible layer tar, made while it is read."""
    return _single("dir", lambda: _Exporting(path), None, lambda: None)  # type: ignore[arg-type, return-value]


class _Exporting(io.RawIOBase):
    """A pipe out of an export that runs on its own thread; it ends when either side does."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._error: BaseException | None = None
        self._in, out = os.pipe()
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

        def run() -> None:
            try:
                with os.fdopen(out, "wb") as stream:
                    export_layer(root, stream, form="plain")
            except BrokenPipeError:
                pass
            except (CowfsError, OSError) as error:
                self._error = error
            finally:
                os.close(root)

        self._thread = threading.Thread(target=run, name="cowfs-export", daemon=True)
        self._thread.start()

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        data = os.read(self._in, CHUNK if size is None or size < 0 else size)
        if not data:
            self._thread.join()
            if self._error is not None:
                raise self._error
        return data

    def close(self) -> None:
        if not self.closed:
            os.close(self._in)
            self._thread.join()
        super().close()
