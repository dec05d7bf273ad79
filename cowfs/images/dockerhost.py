"""The images of an old Docker host, read from its directory: storage drivers ``aufs`` and ``overlay2``.

Strategy. Docker keeps an image's configuration and, by chain id, for each layer the name of its directory and a *tar-split*: the layer's archive without
the data of its files, which are in the directory. So the very archive can be put together again, and everything derived
from it (diff ids, digests, exports) stays the same. A layer whose directory no longer holds those files is read from
the directory as it is, under a digest of its own.

Layout (moby ``layer/filestore.go``, ``image/fs.go``, ``reference/store.go``; ``vbatts/tar-split``, ``tar/storage``):

==============================================  =======================================================================
``image/DRIVER/repositories.json``              names -> image ids
``image/DRIVER/imagedb/content/sha256/ID``      configurations
``image/DRIVER/layerdb/sha256/CHAIN/``          ``cache-id``, ``diff``, ``parent``, ``tar-split.json.gz``
``aufs/diff/CACHE``, ``aufs/layers/CACHE``      a layer; its ancestors' cache ids, nearest first
``overlay2/CACHE/diff``, ``overlay2/CACHE/lower``  a layer; its ancestors as ``l/SHORT``, links to ``../CACHE/diff``,
nearest first
==============================================  =======================================================================

Damaged parts are reported, one line each, and left out; the rest is read.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from functools import partial

from cowfs._typed import Any, BinaryIO
from cowfs.archive.decode import CHUNK
from cowfs.errors import Corrupt, CowfsError, InvalidArgument, NotFound
from cowfs.images.description import LAYER_TAR, Image, Layer
from cowfs.images.digests import chain_ids, diff_ids_of, digest_of, parse_json, platform_here
from cowfs.images.reading import exporting
from cowfs.sys import files, host
from cowfs.sys.regular import read_small

__all__ = ["DRIVERS", "DockerHost"]

DRIVERS = ("aufs", "overlay2")
Tell = Callable[[str], object]

_ID = re.compile(r"[0-9a-f]{64}")
_CACHE = re.compile(r"[0-9A-Za-z_.-]{1,100}")
_DOCUMENT = 8 << 20  # bytes of a configuration, or of repositories.json
_LINE = 64 << 20  # bytes of one entry of a tar-split
_FILE, _SEGMENT = 1, 2
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class DockerHost:
    """The images below a Docker data directory (``/var/lib/docker``).

    Args:
        root: the directory.
        driver: one of :data:`DRIVERS`.
        tell: called with one line for each damaged or missing part.

    Raises:
        NotFound: it has no images of that driver.
    """

    def __init__(self, root: str, driver: str, tell: Tell) -> None:
        if driver not in DRIVERS:
            raise InvalidArgument(f"no driver {driver!r} of Docker's", remedy=" or ".join(DRIVERS))
        self._root, self._driver, self._tell = root, driver, tell
        self._where: dict[
            Callable[[], BinaryIO], str
        ] = {}  # of the layers returned: the function that opens one -> its directory
        self._db = os.path.join(root, "image", driver)
        if not os.path.isdir(os.path.join(self._db, "imagedb", "content", "sha256")):
            there = [name for name in DRIVERS if os.path.isdir(os.path.join(root, "image", name))]
            raise NotFound(
                f"{root} has no images of Docker's driver {driver}",
                remedy=f"it has some of {', '.join(there)}"
                if there
                else "name Docker's data directory, as /var/lib/docker",
            )

    def images(self) -> Iterator[Image]:
        """All whole images, with their names on this host."""
        names = self._names()
        folder = os.path.join(self._db, "imagedb", "content", "sha256")
        for id in sorted(os.listdir(folder)):
            if not _ID.fullmatch(id):
                self._tell(f"{folder}/{id}: no configuration of an image")
                continue
            tags = names.pop(f"sha256:{id}", ())
            try:
                yield self._image(os.path.join(folder, id), id, tags)
            except (CowfsError, OSError) as error:
                self._tell(f"image {', '.join(tags) or id[:12]} is left out: {_said(error)}")
        for id, tags in sorted(names.items()):
            self._tell(f"{', '.join(tags)}: its image {id[:19]} is not there")

    def _names(self) -> dict[str, tuple[str, ...]]:
        path = os.path.join(self._db, "repositories.json")
        found: dict[str, list[str]] = {}
        try:
            listed = parse_json(read_small(path, limit=_DOCUMENT), path).get("Repositories")
        except (CowfsError, OSError) as error:
            self._tell(f"images come without names: {_said(error)}")
            return {}
        for names in listed.values() if isinstance(listed, dict) else ():
            for name, id in names.items() if isinstance(names, dict) else ():
                if isinstance(id, str) and "@" not in name:
                    found.setdefault(id, []).append(name)
        return {id: tuple(sorted(tags)) for id, tags in found.items()}

    def _image(self, path: str, id: str, tags: tuple[str, ...]) -> Image:
        config = read_small(path, limit=_DOCUMENT)
        if digest_of(config) != f"sha256:{id}":
            raise Corrupt("its configuration has another digest")
        told = parse_json(config, "its configuration")
        diff_ids = diff_ids_of(config)
        if not diff_ids:
            raise InvalidArgument("it has no layers")
        places = self._places(chain_ids(diff_ids))
        layers = tuple([self._layer(*each) for each in zip(diff_ids, places, strict=True)])
        platform = f"{told.get('os') or 'linux'}/{told.get('architecture') or platform_here()}"
        return Image(config=config, config_digest=f"sha256:{id}", layers=layers, tags=tags, platform=platform)

    # -- layers -----------------------------------------------------------------------------------

    def _places(self, chain: list[str]) -> list[tuple[str, str]]:
        """(directory of the records, of the files) of each layer, bottom first.

        Raises:
            NotFound: a layer has no directory.
        """
        caches = [self._cache_id(chain_id) for chain_id in chain]
        for at in range(len(chain) - 1, 0, -1):  # a layer's own record is lost: a layer above it has the id
            cache = caches[at]
            if cache is not None and caches[at - 1] is None:
                above = self._ancestors(cache)
                if above:
                    caches[at - 1] = above[0]
        found = []
        for number, (chain_id, cache) in enumerate(zip(chain, caches, strict=True)):
            where = self._files(cache) if cache is not None else None
            if where is None or not os.path.isdir(where):
                raise NotFound(
                    f"layer {number + 1} of {len(chain)} ({chain_id[:19]}) is not there: {where or 'no cache-id'}"
                )
            found.append((self._records(chain_id), where))
        return found

    def _records(self, chain_id: str) -> str:
        return os.path.join(self._db, "layerdb", "sha256", chain_id.partition(":")[2])

    def _cache_id(self, chain_id: str) -> str | None:
        try:
            text = read_small(os.path.join(self._records(chain_id), "cache-id"), limit=1000).decode("ascii", "replace")
        except OSError:
            return None
        return text.strip() if _CACHE.fullmatch(text.strip()) and text.strip() not in (".", "..") else None

    def _files(self, cache: str) -> str:
        parts = ("aufs", "diff", cache) if self._driver == "aufs" else ("overlay2", cache, "diff")
        return os.path.join(self._root, *parts)

    def _ancestors(self, cache: str) -> list[str]:
        """Cache ids of the layers beneath a layer, nearest first; none if unknown."""
        top = os.path.join(self._root, self._driver)
        try:
            if self._driver == "aufs":
                text = read_small(os.path.join(top, "layers", cache), limit=1 << 20).decode("ascii", "replace")
                names = text.split()
            else:
                text = read_small(os.path.join(top, cache, "lower"), limit=1 << 20).decode("ascii", "replace")
                links = [os.path.basename(name) for name in text.strip().split(":")]
                names = [os.readlink(os.path.join(top, "l", name)).split("/")[-2] for name in links]
        except (OSError, IndexError):
            return []
        return [name for name in names if _CACHE.fullmatch(name)]

    def _layer(self, diff_id: str, place: tuple[str, str]) -> Layer:
        records, where = place
        split = os.path.join(records, "tar-split.json.gz")
        if not os.path.isfile(split):
            self._tell(f"layer {diff_id[:19]}: has no tar-split; it comes as its directory is")
            return self._directory(where)

        def opener() -> BinaryIO:
            return _Together(split, where)  # type: ignore[return-value]

        self._where[opener] = where
        return Layer(diff_id=diff_id, digest=diff_id, size=None, media_type=LAYER_TAR, opener=opener)

    def as_it_is(self, layer: Layer) -> Layer:
        """A layer read from its directory as it is now, instead of its archive."""
        return self._directory(self._where[layer.opener])

    def _directory(self, where: str) -> Layer:
        form = "aufs" if self._driver == "aufs" else "trusted" if host.can_trusted_xattr() else "user"
        opener = partial(exporting, where, form=form)
        self._where[opener] = where
        return Layer(diff_id=None, digest=None, size=None, media_type=LAYER_TAR, opener=opener)

    def faults(self, layer: Layer) -> list[str]:
        """The damage of a layer's files, one line each; none if its archive can be put together again."""
        if layer.diff_id is None:
            return []
        try:
            stream = layer.open()
        except (CowfsError, OSError) as error:
            return [_said(error)]
        assert isinstance(stream, _Together)
        digest = hashlib.sha256()
        with stream:
            stream.patient = True
            try:
                while data := stream.read(CHUNK):
                    digest.update(data)
            except (CowfsError, OSError) as error:
                return [*stream.faults, _said(error)]
        if not stream.faults and f"sha256:{digest.hexdigest()}" != layer.diff_id:
            return ["files have other contents than in its archive"]
        return stream.faults


class _Together(io.RawIOBase):
    """A layer's archive, put together from its tar-split and the files in its directory.

    Attributes:
        where: the directory.
        patient: replace a missing or changed file by zeros and go on; ``faults`` lists them.
    """

    def __init__(self, split: str, where: str) -> None:
        super().__init__()
        self.where = where
        self.patient = False
        self.faults: list[str] = []
        self._fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._split = split
        self._pieces = self._run()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        count = len(self._rest) if size is None or size < 0 else min(size, len(self._rest))
        data, self._rest = bytes(self._rest[:count]), self._rest[count:]
        return data

    def close(self) -> None:
        if not self.closed:
            self._pieces.close()
            os.close(self._fd)
        super().close()

    def _run(self) -> Any:
        try:
            with gzip.open(self._split, "rb") as lines:
                while line := lines.readline(_LINE):
                    yield from self._entry(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Corrupt(f"{self._split} is damaged: {error}") from None

    def _entry(self, line: bytes) -> Iterator[bytes]:
        try:
            entry = json.loads(line)
            kind, size = entry["type"], entry.get("size", 0)
            if kind == _SEGMENT:
                yield base64.b64decode(entry["payload"] or b"", validate=True)
                return
            name = base64.b64decode(entry["name_raw"]) if entry.get("name_raw") else os.fsencode(entry.get("name", ""))
            if kind != _FILE or not isinstance(size, int) or size < 0:
                raise ValueError("an entry of another kind")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            raise Corrupt(f"{self._split} is damaged: {error}") from None
        if size:
            yield from self._file(name, size)

    def _file(self, name: bytes, size: int) -> Iterator[bytes]:
        done = 0
        try:
            fd = files.open_in_root(self._fd, name, _OPEN)
            try:
                st = os.fstat(fd)
                if not stat.S_ISREG(st.st_mode) or st.st_size != size:
                    raise Corrupt(f"{os.fsdecode(name)}: has {st.st_size} bytes, its archive says {size}")
                while done < size and (data := os.read(fd, min(CHUNK, size - done))):
                    done += len(data)
                    yield data
            finally:
                os.close(fd)
        except OSError as error:
            self._fault(Corrupt(f"{os.fsdecode(name)}: {error.strerror}"))
        except Corrupt as error:
            self._fault(error)
        while done < size:
            piece = min(CHUNK, size - done)
            done += piece
            yield bytes(piece)

    def _fault(self, error: Corrupt) -> None:
        if not self.patient:
            raise error
        self.faults.append(error.message)


def _said(error: Exception) -> str:
    if isinstance(error, CowfsError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return str(error)
