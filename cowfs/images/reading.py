"""Images in: an OCI layout, a docker-archive, a root filesystem's tar, a directory.

Strategy. All four become one neutral description: a configuration, and layers that can be opened
as streams. The list of a source is read when it is opened; the small documents (manifest, configuration) only of the
picked image, with verified digests. The reader of a layer's stream verifies its digests
(:func:`cowfs.archive.apply_layer` takes both), since only it reads the whole layer.

The content of a source decides about its kind (:func:`cowfs.images.layouts.kind_of`): a layout has ``oci-layout`` and
``index.json``, a docker-archive a ``manifest.json`` that lists images. A tar in a file is examined by its headers. A
piped or compressed tar is a root filesystem as soon as it has a name that no archive of images has; otherwise it is
written to a file without a name first, and examined there, so that memory holds none of it.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from cowfs._typed import BinaryIO, Literal
from cowfs.archive import header
from cowfs.archive.compress import Source
from cowfs.archive.decode import CHUNK, SNIFF, decoder_for
from cowfs.archive.export import export_layer
from cowfs.archive.names import canonical
from cowfs.archive.reader import Reader
from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded, NotFound
from cowfs.images.description import LAYER_TAR, Image, Layer
from cowfs.images.digests import digest_of, make_config, platform_here
from cowfs.images.files import DirFiles, TarFiles, Window
from cowfs.images.layouts import Listed, kind_of, listed_in
from cowfs.images.platforms import Platform, here, parse_platform, ranking

__all__ = ["Form", "ImageSource", "exporting", "open_image"]

Form = Literal["image", "rootfs", "layer"]

# The names at the top of an OCI layout tar or of a docker-archive, by any writer.
_IMAGE_NAME = re.compile(
    rb"oci-layout|repositories|blobs(/.*)?|[^/]+\.(json|tar|tar\.gz|tgz)|(sha256:)?[0-9a-f]{64}(/.*)?", re.DOTALL
)
_DECISIVE = re.compile(
    rb"oci-layout|blobs/sha256/[0-9a-f]{64}|[0-9a-f]{64}(/(layer\.tar|json|VERSION)|\.tar)", re.DOTALL
)
_FILES = frozenset({header.REGULAR, header.LINK, header.SYMLINK})
_UNDECIDED = 64  # names that an archive of images does not usually have
_AT_HAND = 1 << 20  # bytes of a pipe in memory


class ImageSource:
    """An opened source; close it (or use ``with``) when its layers have been read.

    Attributes:
        kind: ``oci``, ``docker``, ``rootfs``, ``layer`` or ``dir``.
    """

    def __init__(self, kind: str, lists: Sequence[Sequence[Listed]], close: Callable[[], None]) -> None:
        self.kind, self._lists, self._close = kind, lists, close

    @property
    def images(self) -> tuple[Image, ...]:
        """All images that the source lists, each with all its names. Raises the errors of reading one."""
        return _merged(each.read() for each in _leaves(self._lists[0], None))

    def pick(self, tag: str | None = None, *, platform: str | None = None) -> Image:
        """The one image of a tag and a platform; no other is read.

        Args:
            tag: a name that the source has, or its part behind the last ``:`` or ``/``. Without it there must be one image.
            platform: ``os/architecture`` or ``os/architecture/variant``. Without it, the best one of several for this machine.

        Raises:
            NotFound: there is none (the message lists the images), or a part of it is missing. InvalidArgument:
                several fit, or it is damaged.
        """
        wanted = parse_platform(platform) if platform is not None else None
        failures: list[CowfsError] = []
        for listed in self._lists:
            fitting = _fitting(_asked(listed, tag), wanted, failures)
            if len(fitting) == 1:
                image = fitting[0].read()
                if image is not None:
                    return image
            elif fitting:
                return self._one_of(fitting)
        if failures:
            raise failures[0]
        names = sorted({name for listed in self._lists for each in listed for name in each.tags})
        there = {
            str(each.platform) for listed in self._lists for each in _leaves(_asked(listed, tag), []) if each.platform
        }
        raise NotFound(
            f"no image {tag or ''} for {wanted or here()} in the source".replace("  ", " "),
            remedy=f"it has {_shown(names) or 'no names'}" + (f", for {_shown(sorted(there))}" if there else ""),
        )

    def look(self) -> None:
        """Read the image that is the only one. Raises its faults."""
        if len(self._lists) == 1 and len(self._lists[0]) == 1:
            failures: list[CowfsError] = []
            leaves = _leaves(self._lists[0], failures)
            if failures and not leaves:
                raise failures[0]
            if len(leaves) == 1 and not failures:
                leaves[0].read()

    def _one_of(self, fitting: list[Listed]) -> Image:
        """The one image of several that fit, which may be one with several names."""
        try:
            images = _merged(each.read() for each in fitting)
        except CowfsError:
            images = ()
        if len(images) == 1:
            return images[0]
        names = sorted({name for each in fitting for name in each.tags})
        platforms = sorted({str(each.platform) for each in fitting if each.platform})
        raise InvalidArgument(
            f"the source has {len(images) or len(fitting)} images",
            remedy=f"name one of: {_shown(names)}" if len(names) > 1 or not platforms
            else f"choose a platform: {_shown(platforms)}",
        )  # fmt: skip

    def close(self) -> None:
        """Release the files; idempotent."""
        self._close()

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shown(words: Sequence[str]) -> str:
    """A list for a message."""
    return ", ".join(words[:20]) + (f" and {len(words) - 20} more" if len(words) > 20 else "")


def _asked(listed: Sequence[Listed], tag: str | None) -> list[Listed]:
    """The images of a tag: by the whole name, else by its last part."""
    if tag is None:
        return list(listed)
    for means in (lambda name: name == tag, lambda name: name.endswith((":" + tag, "/" + tag))):
        found = [each for each in listed if any(map(means, (*each.tags, *each.aliases)))]
        if found:
            return found
    return []


def _leaves(listed: Sequence[Listed], failures: list[CowfsError] | None) -> list[Listed]:
    """The images, with indexes replaced by their images, each once. An unreadable index becomes a failure, or is raised."""
    found: list[Listed] = []
    for each in listed:
        if each.inside is None:
            found.append(each)
            continue
        try:
            found += _leaves(each.inside(), failures)
        except CowfsError as error:
            if failures is None:
                raise
            failures.append(error)
    return found


def _fitting(listed: Sequence[Listed], wanted: Platform | None, failures: list[CowfsError]) -> list[Listed]:
    """The images that suit a platform, the best of each name, each once."""
    groups: dict[tuple[str, ...], list[Listed]] = {}
    for each in listed:
        groups.setdefault(each.tags, []).append(each)
    found: list[Listed] = []
    for group in groups.values():
        leaves = list({each.key: each for each in _leaves(group, failures)}.values())
        found += leaves if wanted is None and len(leaves) == 1 else _best(leaves, wanted, failures)
    return found


def _best(listed: Sequence[Listed], wanted: Platform | None, failures: list[CowfsError]) -> list[Listed]:
    known: dict[Platform, list[Listed]] = {}
    for each in listed:
        try:
            platform = each.platform or each.describe()
        except CowfsError as error:
            failures.append(error)
            continue
        if platform is not None and platform.os != "unknown":
            known.setdefault(platform, []).append(each)
    for platform in ranking(wanted or here(), asked=wanted is not None):
        if platform in known:
            return known[platform]
    return [each for some in known.values() for each in some] if wanted is None else []


def _merged(images: Iterable[Image | None]) -> tuple[Image, ...]:
    """Each image once, with all its names."""
    found: dict[str, Image] = {}
    for image in images:
        if image is not None:
            known = found.setdefault(image.config_digest, image)
            found[image.config_digest] = replace(known, tags=tuple(dict.fromkeys((*known.tags, *image.tags))))
    return tuple(found.values())


def open_image(
    source: str | os.PathLike[str] | BinaryIO, *, form: Form | None = None, spool_dir: str | None = None,
    max_bytes: int = 64 << 30,
) -> ImageSource:  # fmt: skip
    """Open an image from a file, a directory or a stream.

    Args:
        source: a path, or a binary stream read from where it is (a pipe will do).
        form: the kind of the source, instead of the one found by its content: ``image``; ``rootfs``, a whole tree;
            ``layer``, the tar of one, in which names that begin with ``.wh.`` delete.
        spool_dir: the directory for a compressed or piped archive of images while it is read
            (a temporary file without a name); the default is the system's.
        max_bytes: the most bytes to put there.

    Raises:
        InvalidArgument: neither image nor tar, or a damaged one. Corrupt: a digest does not match.
        NotFound: no such path, or a document that the image refers to is missing.
        LimitExceeded: past ``max_bytes``.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _open_stream(source, form, _Spooling(spool_dir, max_bytes), owned=False)
    path = os.fspath(source)
    try:
        st = os.stat(path)
    except FileNotFoundError:
        raise NotFound(f"no such file or directory: {path}") from None
    if not stat.S_ISDIR(st.st_mode):
        return _open_stream(open(path, "rb", buffering=0), form, _Spooling(spool_dir, max_bytes), owned=True)
    if form == "layer":
        raise InvalidArgument(f"{path} is a directory, a layer is a tar", remedy="--as rootfs takes it as a tree")
    files = DirFiles(path)
    found: ImageSource | None = None
    try:
        if form != "rootfs":
            found = _source_of(files, form)
    finally:
        if found is None:
            files.close()
    return found or _directory(path, whole=form == "rootfs")


def _source_of(files: DirFiles | TarFiles, form: Form | None) -> ImageSource | None:
    """An opened source, None for other data. A single image is read at once, so that its faults are raised now."""
    kind = kind_of(files, files.signs())
    if kind is None:
        if form == "image":
            raise InvalidArgument("this is no image: neither an OCI layout nor a docker-archive")
        return None
    opened = ImageSource("docker" if kind == "both" else kind, listed_in(kind, files), files.close)
    opened.look()
    return opened


# Streams: finding their kind -------------------------------------------------------------------


class _Spooling:
    """The directory for an archive while it is examined, and the most bytes of it."""

    def __init__(self, folder: str | None, max_bytes: int) -> None:
        self.folder, self._left = folder, max_bytes

    def count(self, data: bytes) -> bytes:
        """The data. Raises LimitExceeded."""
        self._left -= len(data)
        if self._left < 0:
            raise LimitExceeded("the archive of images is larger than allowed", remedy="raise --max-size")
        return data

    def whole(self, read: Callable[[int], bytes]) -> BinaryIO:
        """An archive, uncompressed, in a file without a name."""
        spool = tempfile.TemporaryFile(dir=self.folder, prefix="cowfs-")  # noqa: SIM115  the source owns it
        try:
            first, read = _sniffed(read)
            for chunk in decoder_for(first)[1](read):
                spool.write(self.count(chunk))
            spool.flush()
        except BaseException:
            spool.close()
            raise
        return spool


class _Head:
    """A stream that keeps the bytes read, to be read again: a little in memory, the rest in a file without a name."""

    def __init__(self, stream: BinaryIO, spooling: _Spooling) -> None:
        self._stream, self._spooling = stream, spooling
        self._seen = tempfile.SpooledTemporaryFile(_AT_HAND, dir=spooling.folder, prefix="cowfs-")  # noqa: SIM115

    def read(self, count: int) -> bytes:
        data = self._stream.read(count) or b""
        self._seen.write(self._spooling.count(data))
        return data

    def again(self) -> BinaryIO:
        """The stream from its beginning, once."""
        self._seen.seek(0)
        return _Joined(self._seen, self._stream)  # type: ignore[return-value, arg-type]

    def close(self) -> None:
        self._seen.close()


def _sniffed(read: Callable[[int], bytes]) -> tuple[bytes, Callable[[int], bytes]]:
    """The first bytes, and the stream with them."""
    first = read(CHUNK)
    while len(first) < SNIFF and (more := read(CHUNK)):
        first += more
    given = [first]
    return first, lambda count: given.pop() if given else read(count)


def _open_stream(stream: BinaryIO, form: Form | None, spooling: _Spooling, *, owned: bool) -> ImageSource:
    head: _Head | None = None

    def close() -> None:
        if head is not None:
            head.close()
        if owned:
            stream.close()

    try:
        if owned and stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return _open_file(stream, form, spooling)
        head = _Head(stream, spooling)
        first, read = _sniffed(head.read)
        if not first:
            raise InvalidArgument("the source is empty")
        if form == "image" or (form is None and _may_be_image(decoder_for(first)[1](read))):
            return _spooled(spooling.whole(head.again().read), form, close)
        return _rootfs(head.again, None, form, close)
    except BaseException:
        close()
        raise


def _open_file(file: BinaryIO, form: Form | None, spooling: _Spooling) -> ImageSource:
    """A regular file: it can be read any number of times."""
    size = os.fstat(file.fileno()).st_size

    def opener() -> BinaryIO:
        return Window(file.fileno(), 0, size)  # type: ignore[return-value]

    if not size:
        raise InvalidArgument("the source is empty")
    if form in (None, "image"):
        first, read = _sniffed(opener().read)
        compression, decoder = decoder_for(first)
        if compression == "none":
            found = _archive(file, form)
            if found is not None:
                return found
        elif form == "image" or _may_be_image(decoder(read)):
            return _spooled(spooling.whole(opener().read), form, file.close)
    return _rootfs(opener, size, form, file.close)


def _archive(file: BinaryIO, form: Form | None) -> ImageSource | None:
    """The images of an uncompressed archive in a file, or None. The source owns the file in the first case."""
    sign = 0

    def stop(member: header.Member, path: bytes) -> bool:
        nonlocal sign
        if form is None and path and not _IMAGE_NAME.fullmatch(path):
            sign += 1
        return sign > _UNDECIDED

    files = TarFiles(file, stop)
    return _source_of(files, form) if files.whole else None


def _spooled(spool: BinaryIO, form: Form | None, close: Callable[[], None]) -> ImageSource:
    """The source of a temporary file, which may be an archive of images."""
    close()
    try:
        found = _archive(spool, form)
        if found is not None:
            return found
        size = os.fstat(spool.fileno()).st_size
        return _rootfs(lambda: Window(spool.fileno(), 0, size), size, form, spool.close)  # type: ignore[arg-type, return-value]
    except BaseException:
        spool.close()
        raise


def _may_be_image(chunks: Iterator[bytes]) -> bool:
    """Read headers until a name decides: an archive of images has few kinds of names, and mostly plain files."""
    undecided = 0
    reader = Reader(_Pulled(chunks), trailer=False)
    for member in reader:
        path = canonical(member.name, max_path=4095, max_depth=512)
        if _DECISIVE.fullmatch(path):
            return True
        if path and not _IMAGE_NAME.fullmatch(path):
            undecided += 1
            if member.type not in _FILES or undecided > _UNDECIDED:
                return False
    return reader.entries > 0


class _Pulled(Source):
    """A source over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self._chunks = chunks

    def next_chunk(self) -> bytes:
        return next(self._chunks, b"")


def _rootfs(
    opener: Callable[[], BinaryIO], size: int | None, form: Form | None, close: Callable[[], None]
) -> ImageSource:
    """A tar of a root filesystem: one layer whose diff id is known once it was read; without ``size`` it is read once only."""
    opened = False

    def once() -> BinaryIO:
        nonlocal opened
        if opened:
            raise InvalidArgument("a root filesystem from a pipe can be read once only")
        opened = True
        return opener()

    return _single(
        "layer" if form == "layer" else "rootfs", once if size is None else opener, size, close, whole=form == "rootfs"
    )


class _Joined(io.RawIOBase):
    """The bytes that were read already, then the rest."""

    def __init__(self, seen: BinaryIO, stream: BinaryIO) -> None:
        super().__init__()
        self._seen, self._stream = seen, stream

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        count = CHUNK if size is None or size < 0 else size
        return self._seen.read(count) or self._stream.read(count) or b""


def _single(
    kind: str, opener: Callable[[], BinaryIO], size: int | None, close: Callable[[], None], *, whole: bool
) -> ImageSource:
    config = make_config([])
    layer = Layer(diff_id=None, digest=None, size=size, media_type=LAYER_TAR, opener=opener, whole=whole)
    image = Image(
        config=config, config_digest=digest_of(config), layers=(layer,), tags=(), platform=f"linux/{platform_here()}"
    )
    listed = Listed(key="", describe=lambda: None, read=lambda: image)
    return ImageSource(kind, [[listed]], close)


def _directory(path: str, *, whole: bool) -> ImageSource:
    """A plain directory: its reproducible layer tar, made while it is read."""
    return _single("dir", lambda: _Exporting(path, reserved=not whole), None, lambda: None, whole=whole)  # type: ignore[arg-type, return-value]


def exporting(path: str, *, form: str) -> BinaryIO:
    """The layer tar of a directory in a form (:func:`cowfs.archive.export.export_layer`), made while it is read."""
    return _Exporting(path, reserved=True, form=form)  # type: ignore[return-value]


class _Exporting(io.RawIOBase):
    """A pipe out of an export that runs on its own thread; it ends with either side."""

    def __init__(self, path: str, *, reserved: bool, form: str = "plain") -> None:
        super().__init__()
        self._error: BaseException | None = None
        self._in, out = os.pipe()
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

        def run() -> None:
            try:
                with os.fdopen(out, "wb") as stream:
                    export_layer(root, stream, form=form, reserved=reserved)
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
