"""Images in: an OCI layout, a docker-archive, a root filesystem's tar, a directory.

Strategy. All four become one neutral description: a configuration, and layers that can be opened
as streams. Small documents (index, manifest, configuration) are read and their digests verified here, when
the source is opened; a layer's digests are verified by whoever streams it
(:func:`cowfs.archive.apply_layer` takes both), since only that reads it whole.

What a source is, is told from the inside: a layout has ``oci-layout``, a docker-archive
``manifest.json``; a tar without either is a root filesystem, which the first name that no archive of
images has gives away.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO

from cowfs.archive.compress import Source
from cowfs.archive.decode import CHUNK, SNIFF, decoder_for
from cowfs.archive.export import export_layer
from cowfs.archive.names import canonical
from cowfs.archive.reader import Reader
from cowfs.errors import CowfsError, InvalidArgument, NotFound
from cowfs.images.description import LAYER_TAR, Image, Layer
from cowfs.images.digests import digest_of, make_config, platform_here
from cowfs.images.files import DirFiles, TarFiles, Window
from cowfs.images.layouts import images_in, kind_of

__all__ = ["ImageSource", "open_image"]


# What may be at the top of an OCI layout tar or of a docker-archive, whoever wrote it.
_IMAGE_NAME = re.compile(
    rb"oci-layout|repositories|blobs(/.*)?|[^/]+\.(json|tar|tar\.gz|tgz)|(sha256:)?[0-9a-f]{64}(/.*)?", re.DOTALL
)
_DECISIVE = re.compile(
    rb"oci-layout|index\.json|manifest\.json|blobs/sha256/.+|[0-9a-f]{64}/(layer\.tar|json|VERSION)", re.DOTALL
)
_UNDECIDED = 8 << 20  # bytes without a name that decides: go on with the whole archive at hand


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
            raise NotFound(
                f"no image {tag or ''} for {wanted} in the source".replace("  ", " "), remedy=f"it has {there}"
            )
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
            kind = kind_of(files)
            if kind is not None:
                return ImageSource(kind, images_in(kind, files), files.close)
        except BaseException:
            files.close()
            raise
        files.close()
        return _directory(path)
    return _open_stream(open(path, "rb", buffering=0), spool_dir, owned=True)


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
    kind = kind_of(files)
    if kind is not None:
        return ImageSource(kind, images_in(kind, files), files.close)
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
