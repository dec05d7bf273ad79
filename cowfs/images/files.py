"""The files of an image, in a directory or inside a tar, opened by name either way.

Strategy. A tar is indexed once by its headers (data is sought over, not read); a member is then a
window on the archive's own file, so layers are streamed, and streamed again, without unpacking.
A name is looked up in the index or beneath the directory's descriptor; it never becomes a path
of this host.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import stat
from collections.abc import Callable, Collection

from cowfs._typed import BinaryIO, Protocol
from cowfs.archive import header
from cowfs.archive.compress import Source
from cowfs.archive.decode import CHUNK
from cowfs.archive.names import canonical
from cowfs.archive.reader import Reader, blame
from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded, NotFound
from cowfs.sys.files import open_beneath

__all__ = ["DirFiles", "Files", "TarFiles", "Window"]

MAX_JSON = 4 << 20
"""Bytes of a document, as other tools bound them; as objects of this language it takes some twenty times as much."""
_MAX_NAMES = 200_000
_MAX_NAME_BYTES = 32 << 20  # of all names together
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
_LINKED = ("blobs/", "index.json", "oci-layout")


class Files(Protocol):
    """Named files."""

    def has(self, name: str) -> bool: ...

    def open(self, name: str) -> BinaryIO:
        """A seekable stream of one file. Raises NotFound."""

    def size(self, name: str) -> int: ...

    def read(self, name: str) -> bytes:
        """A small file. Raises NotFound, LimitExceeded past 4 MiB."""

    def signs(self) -> bool:
        """Whether some names occur only in images: layers by digest, layers of an old ``docker save``."""

    def close(self) -> None: ...


_LAYER_NAME = re.compile(r"blobs/sha256/[0-9a-f]{64}|[0-9a-f]{64}/layer\.tar", re.ASCII)
_DIGEST_NAME = re.compile(r"[0-9a-f]{64}\.(tar|json)", re.ASCII)


def has_signs(names: Collection[str]) -> bool:
    """Whether some of the names are an image's: blobs or layers by digest."""
    listed = "manifest.json" in names or "repositories" in names
    return any(_LAYER_NAME.fullmatch(name) or (listed and _DIGEST_NAME.fullmatch(name)) for name in names)


class Window(io.RawIOBase):
    """Part of a file as a stream of its own; independent of other windows on the same descriptor."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        super().__init__()
        self._fd, self._start, self._length, self._position = fd, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._position, 0)
        count = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._fd, count, self._start + self._position) if count else b""
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(CHUNK), b""))

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _read_small(files: Files, name: str) -> bytes:
    size = files.size(name)
    if size > MAX_JSON:
        raise LimitExceeded(f"{name!r} is {size} bytes long, at most {MAX_JSON} are expected")
    with files.open(name) as stream:
        return b"".join(iter(lambda: stream.read(CHUNK), b""))


class DirFiles:
    """Files below a directory. Symbolic links are followed only within a layout (Bazel makes layouts of links), since a
    blob is verified by its digest."""

    def __init__(self, path: str | bytes) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _find(self, name: str, flags: int) -> int:
        try:
            return open_beneath(self._fd, os.fsencode(name), flags)
        except OSError as error:
            if error.errno != errno.ELOOP or not name.startswith(_LINKED):
                raise
            return os.open(name, flags & ~os.O_NOFOLLOW, dir_fd=self._fd)

    def has(self, name: str) -> bool:
        try:
            fd = self._find(name, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError):
            return False
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode)
        finally:
            os.close(fd)

    def open(self, name: str) -> BinaryIO:
        if not self.has(name):  # a FIFO or a device is not even opened
            raise NotFound(f"image has no file {name!r}")
        try:
            fd = self._find(name, _FILE)
        except OSError as error:
            raise NotFound(f"image has no file {name!r}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotFound(f"image has no file {name!r}: it was replaced meanwhile")
        return os.fdopen(fd, "rb", buffering=0)

    def size(self, name: str) -> int:
        with self.open(name) as stream:
            return os.fstat(stream.fileno()).st_size

    def read(self, name: str) -> bytes:
        return _read_small(self, name)

    def signs(self) -> bool:
        top = self._names(".")
        found = [name for name in top if len(name) == 64 and self.has(f"{name}/layer.tar")]
        return has_signs(
            [*top, *(f"{name}/layer.tar" for name in found), *self._names("blobs/sha256", "blobs/sha256/")]
        )

    def _names(self, folder: str, prefix: str = "") -> list[str]:
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError:
            return []
        try:
            with os.scandir(fd) as entries:
                return [prefix + entry.name for entry in itertools.islice(entries, _MAX_NAMES)]
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Seeking(Source):
    """A file read in small pieces: an index needs its headers only."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd, self._at = fd, 0
        self._length = os.fstat(fd).st_size

    def next_chunk(self) -> bytes:
        data = os.pread(self._fd, 4096, self._at)
        self._at += len(data)
        return data

    def jump(self, count: int) -> None:
        """Go forward without reading. Raises InvalidArgument past the end."""
        inside = self._end - self._pos
        if count <= inside:
            self._pos += count
            return
        target = self.offset + count
        if target > self._length:
            raise InvalidArgument("archive is truncated")
        self._start = self._at = target
        self._chunk, self._pos, self._end = b"", 0, 0


class _Indexer(Reader):
    """A reader that seeks over data instead of reading it."""

    def __init__(self, source: _Seeking) -> None:
        super().__init__(source, max_entries=_MAX_NAMES, trailer=False)
        self._seeking = source

    def here(self) -> int:
        return self._seeking.offset

    def pass_over(self) -> None:
        self._seeking.jump(self._left)
        self._left = 0


class TarFiles:
    """Files inside an uncompressed tar.

    Args:
        file: an open, seekable file; owned and closed here.
        stop: called with each name; True ends the index there and makes :attr:`whole` False.

    Attributes:
        whole: every member is known.

    Raises:
        InvalidArgument: no tar archive, or a truncated one. LimitExceeded: more than 200,000 members, or 32 MiB of names.
    """

    def __init__(self, file: BinaryIO, stop: Callable[[header.Member, bytes], bool] | None = None) -> None:
        self._file = file
        self._fd = file.fileno()
        self._where: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self.whole = True
        left = _MAX_NAME_BYTES
        reader = _Indexer(_Seeking(self._fd))
        for member in reader:
            try:
                path = canonical(member.name, max_path=4095, max_depth=512)
            except CowfsError as error:
                raise blame(error, member.ordinal, member.name) from None
            if stop is not None and stop(member, path):
                self.whole = False
                return
            left -= len(path) + len(member.linkname)
            if left < 0:
                raise LimitExceeded(f"archive of images has more than {_MAX_NAME_BYTES} bytes of names")
            name = os.fsdecode(path)
            if member.type == header.REGULAR and member.segments is None:
                self._where[name] = (reader.here(), member.stored)
            elif member.type in (header.SYMLINK, header.LINK):
                self._link(name, member)
            reader.pass_over()

    def _link(self, name: str, member: header.Member) -> None:
        """Follow a link: old ``docker save`` writes a layer that it has already as a link."""
        target = member.linkname
        if member.type == header.SYMLINK:
            parts = os.fsencode(name).split(b"/")[:-1]
            for part in target.split(b"/"):
                if part == b"..":
                    if not parts:
                        return  # a link out of the archive leads to nothing
                    parts.pop()
                elif part not in (b"", b"."):
                    parts.append(part)
            target = b"/".join(parts)
        else:
            target = canonical(target, max_path=4095, max_depth=512)
        self._links[name] = os.fsdecode(target)

    def _find(self, name: str) -> tuple[int, int]:
        at = name
        for _ in range(8):
            if at in self._where:
                return self._where[at]
            if at not in self._links:
                break
            at = self._links[at]
        raise NotFound(f"image has no file {name!r}")

    def has(self, name: str) -> bool:
        try:
            self._find(name)
        except NotFound:
            return False
        return True

    def signs(self) -> bool:
        return has_signs(self._where)

    def open(self, name: str) -> BinaryIO:
        return Window(self._fd, *self._find(name))  # type: ignore[return-value]

    def size(self, name: str) -> int:
        return self._find(name)[1]

    def read(self, name: str) -> bytes:
        return _read_small(self, name)

    def close(self) -> None:
        self._file.close()
