"""Decompression: a reader of bytes in, an iterator of chunks out, told apart by the first bytes.

Rule 1: no decoder may produce more than one chunk per step, whatever its input: a bomb costs time,
never memory. Rule 2: input that ends inside a compressed frame is an error. Rule 3: decompression
is always in this process; nothing is ever run.

Sources: RFC 1952 (gzip), RFC 8878 section 3.1 (zstd frames).
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator

from cowfs._typed import Any
from cowfs.errors import InvalidArgument, Unsupported

_inflater: Callable[..., Any]
try:  # faster than zlib at inflating; the result is the same
    from isal.isal_zlib import decompressobj as _isal_inflater

    _inflater = _isal_inflater
except ImportError:
    _inflater = zlib.decompressobj

__all__ = ["CHUNK", "SNIFF", "decoder_for", "gunzip", "have_zstd", "zstandard"]

CHUNK = 256 << 10
MAX_WINDOW = 64 << 20  # the most memory that a zstd or xz stream may ask for

Read = Callable[[int], bytes]


def _plain(read: Read) -> Iterator[bytes]:
    while data := read(CHUNK):
        yield data


def gunzip(read: Read) -> Iterator[bytes]:
    """Concatenated gzip members, as gzip(1) reads them."""
    data = read(CHUNK)
    while data:
        engine = _inflater(wbits=31)
        try:
            while not engine.eof:
                out = engine.decompress(data, CHUNK)
                if out:
                    yield out
                data = engine.unconsumed_tail
                if not engine.eof and not data and len(out) < CHUNK:
                    data = read(CHUNK)
                    if not data:
                        raise InvalidArgument("gzip stream is truncated")
        except (zlib.error, ValueError) as error:
            raise InvalidArgument(f"gzip stream is damaged: {error}") from None
        except Exception as error:
            if type(error).__name__ != "IsalError":
                raise
            raise InvalidArgument(f"gzip stream is damaged: {error}") from None
        data = engine.unused_data or read(CHUNK)
        if data[:1] == b"\0":  # zero padding after the last member, as gzip(1) allows
            while data:
                if data.strip(b"\0"):
                    raise InvalidArgument("gzip stream has something else behind it")
                data = read(CHUNK)


def _unpack(read: Read, make: Callable[[], Any], name: str) -> Iterator[bytes]:
    data = read(CHUNK)
    while data:
        engine: Any = make()
        try:
            while not engine.eof:
                out = engine.decompress(data, CHUNK)
                if out:
                    yield out
                data = b""
                if not engine.eof and engine.needs_input:
                    data = read(CHUNK)
                    if not data:
                        raise InvalidArgument(f"{name} stream is truncated")
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            raise InvalidArgument(f"{name} stream is damaged: {error}") from None
        data = engine.unused_data or read(CHUNK)
        if data[:1] == b"\0":
            data = data.lstrip(b"\0") or read(CHUNK)


def _unxz(read: Read) -> Iterator[bytes]:
    return _unpack(read, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW + (8 << 20)), "xz")


def _bunzip(read: Read) -> Iterator[bytes]:
    return _unpack(read, bz2.BZ2Decompressor, "bzip2")


class _FrameWalk:
    """Follows zstd frames by their block headers, to tell at the end of input whether one is open.

    The streaming reader of the zstandard package ends quietly there (Rule 2).
    """

    _SKIPPABLE = range(0x184D2A50, 0x184D2A60)

    def __init__(self) -> None:
        self._have = bytearray()
        self._skip = 0
        self._state = "magic"
        self._checksum = 0

    @property
    def between_frames(self) -> bool:
        return self._state == "magic" and not self._have and not self._skip

    def feed(self, data: bytes) -> None:
        have, position = self._have, 0
        while position < len(data):
            if self._skip:
                step = min(self._skip, len(data) - position)
                self._skip -= step
                position += step
                continue
            want = self._wanted() - len(have)
            have += data[position : position + want]
            position += want
            if len(have) == self._wanted():
                self._advance()

    def _wanted(self) -> int:
        if self._state == "block":
            return 3
        if self._state == "skippable":
            return 8
        if len(self._have) < 5:
            return 5
        flags = self._have[4]  # Frame_Header_Descriptor
        window = 0 if flags & 0x20 else 1
        content = (1 if flags & 0x20 else 0, 2, 4, 8)[flags >> 6]
        return 5 + window + (0, 1, 2, 4)[flags & 3] + content

    def _advance(self) -> None:
        have = self._have
        if self._state == "magic":
            magic = int.from_bytes(have[:4], "little")
            if magic in self._SKIPPABLE:
                self._state = "skippable"
                return
            if len(have) == 5 and self._wanted() > 5:
                return
            self._checksum = 4 if have[4] & 4 else 0
            self._state = "block"
        elif self._state == "skippable":
            self._skip = int.from_bytes(have[4:8], "little")
            self._state = "magic"
        else:
            header = int.from_bytes(have, "little")
            self._skip = 1 if header & 6 == 2 else header >> 3  # an RLE block is one byte long
            if header & 1:
                self._skip += self._checksum
                self._state = "magic"
        have.clear()


def zstandard() -> Any:
    """The zstandard package. Raises Unsupported where it is not installed."""
    try:
        import zstandard as package
    except ImportError:
        raise Unsupported("zstd needs the zstandard package", remedy="pip install zstandard") from None
    return package


def have_zstd() -> bool:
    """Whether zstd streams can be read and written here."""
    try:
        zstandard()
    except Unsupported:
        return False
    return True


def _unzstd(read: Read) -> Iterator[bytes]:
    package = zstandard()
    walk = _FrameWalk()

    class Feed:
        def read(self, count: int) -> bytes:
            data = read(count)
            walk.feed(data)
            return data

    engine = package.ZstdDecompressor(max_window_size=MAX_WINDOW)
    try:
        with engine.stream_reader(Feed(), read_across_frames=True) as reader:
            while data := reader.read(CHUNK):
                yield data
    except package.ZstdError as error:
        raise InvalidArgument(f"zstd stream is damaged or needs more memory than allowed: {error}") from None
    if not walk.between_frames:
        raise InvalidArgument("zstd stream is truncated")


# (magic, name, decoder); anything else is taken as an uncompressed tar.
_MAGICS: tuple[tuple[bytes, str, Callable[[Read], Iterator[bytes]]], ...] = (
    (b"\x1f\x8b\x08", "gzip", gunzip),
    (b"\x28\xb5\x2f\xfd", "zstd", _unzstd),
    (b"BZh", "bzip2", _bunzip),
    (b"\xfd7zXZ\0", "xz", _unxz),
    *((bytes([0x50 + n]) + b"\x2a\x4d\x18", "zstd", _unzstd) for n in range(16)),
)
SNIFF = 6


def decoder_for(head: bytes) -> tuple[str, Callable[[Read], Iterator[bytes]]]:
    """(name, decoder) for a stream that starts with ``head``."""
    for magic, name, decoder in _MAGICS:
        if head.startswith(magic):
            return name, decoder
    return "none", _plain
