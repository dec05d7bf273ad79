"""Members of a tar stream, one after the other, with all extensions merged in.

Strategy. The reader takes blocks from a :class:`~cowfs.archive.compress.Source` and shows every
byte that is not file data to ``raw`` in order; the bytes in ``raw`` are the archive without its data. Reading *that*
back with ``stripped=True`` gives the same members again, which is how :mod:`cowfs.archive.headerlog` reproduces an
archive byte for byte without a format of its own.

The dialects: ustar, PAX (POSIX.1-2018), GNU (long names ``L``/``K``, base-256 numbers, sparse in
the old form and PAX forms 0.0, 0.1, 1.0), star's and version 7's headers.

The end: two zero blocks; or one and then the end of the stream; or the end of the stream between
two members (umoci writes no end blocks; the last padding may be missing too). Anything shorter
is a truncated archive.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from cowfs.archive import header
from cowfs.archive.compress import Source
from cowfs.archive.header import BLOCK, ZERO_BLOCK, Member, pad
from cowfs.archive.names import show
from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded

__all__ = ["Reader", "blame"]

_MAX_SEGMENTS = 1 << 20
_MAX_TRAILER = 1 << 30
_PLAIN_PAX = frozenset({b"mtime", b"atime", b"uid", b"gid"})  # the keys that a global header may set


def blame(error: CowfsError, ordinal: int, name: bytes) -> CowfsError:
    """The same error with the name of its archive entry."""
    return type(error)(f"archive entry {ordinal} {show(name)}: {error.message}", remedy=error.remedy)


class Reader:
    """Iterate for members; call :meth:`data` in between for the current one's data.

    Args:
        source: the uncompressed stream.
        raw: called with every byte of the stream that is not member data, in order.
        stripped: the stream holds no member data (see above).
        max_header: bytes one PAX header or long name may have.
        max_entries: members, more raise LimitExceeded.
        trailer: read on behind the zero block that ends the archive, up to 1 GiB.
        locate: called with the stream offset of each member's data.

    Raises:
        InvalidArgument: not a tar archive, a damaged or truncated one; the message names the entry.
        LimitExceeded: past ``max_header`` or ``max_entries``.
    """

    def __init__(
        self,
        source: Source,
        *,
        raw: Callable[[bytes], object] | None = None,
        stripped: bool = False,
        max_header: int = 1 << 20,
        max_entries: int = 1_000_000,
        trailer: bool = True,
    ) -> None:
        self._trailing = trailer
        self._source = source
        self._raw = raw or (lambda data: None)
        self._stripped = stripped
        self._max_header, self._max_entries = max_header, max_entries
        self._left = 0
        self._globals: dict[bytes, bytes] = {}
        self.entries = self._implied = 0

    def __iter__(self) -> Iterator[Member]:
        source, raw = self._source, self._raw
        while True:
            member = self._next()
            if member is None:
                return
            self.entries += 1
            if self.entries + self._implied > self._max_entries:
                self._too_many()
            member.ordinal = self.entries
            stored = member.stored
            self._left = 0 if self._stripped else stored
            yield member
            if self._left:
                for _ in self.data():
                    pass
            if stored % BLOCK:
                raw(source.take(-stored % BLOCK))

    @property
    def offset(self) -> int:
        """Bytes of the uncompressed stream that were taken."""
        return self._source.offset

    def count(self) -> None:
        """Count an object that the archive needs and does not list. Raises LimitExceeded."""
        self._implied += 1
        if self.entries + self._implied > self._max_entries:
            self._too_many()

    def _too_many(self) -> None:
        raise LimitExceeded(
            f"archive has more than {self._max_entries} entries",
            remedy="raise --max-entries if you trust it",
        )

    def whole(self) -> memoryview | None:
        """All of the current member's stored bytes at once, if they are at hand; else None, and the stream does not advance."""
        piece = self._source.at_hand(self._left)
        if piece is not None:
            self._left = 0
        return piece

    def data(self) -> Iterator[memoryview]:
        """The current member's stored bytes, in pieces that are valid until the next one."""
        for piece in self._source.pieces(self._left):
            self._left -= len(piece)
            yield piece
        if self._left:
            raise InvalidArgument("archive is truncated", remedy=f"{self._left} bytes of this entry are missing")

    # ---------------------------------------------------------------------------------------

    def _next(self) -> Member | None:
        source, raw = self._source, self._raw
        pax: list[tuple[bytes, bytes]] | None = None
        long_name: bytes | None = None
        long_link: bytes | None = None
        while True:
            block = source.take(BLOCK)
            if len(block) < BLOCK:
                self._refuse_cut(block, pax is not None or long_name is not None or long_link is not None)
                raw(block)
                return None
            raw(block)
            if block == ZERO_BLOCK:
                self._trailer()
                return None
            try:
                member = header.parse_block(block)
            except header.NoHeader as error:
                if not self.entries:
                    raise InvalidArgument(
                        "this is no tar archive: its first header has no valid checksum",
                        remedy="an image, a layer or a tree is a tar, plain or as gzip, zstd, bzip2 or xz; or a directory",
                    ) from None
                raise InvalidArgument(
                    f"archive entry {self.entries + 1}: {error.message}", remedy=error.remedy
                ) from None
            except CowfsError as error:
                raise blame(error, self.entries + 1, block[:100].split(b"\0")[0]) from None
            kind = member.type
            if kind in b"xXgLK":
                body = self._extension(member)
                twice = f"archive entry {self.entries + 1} has two extension headers of one kind"
                if kind == b"L":
                    if long_name is not None:
                        raise InvalidArgument(twice)
                    long_name = body.split(b"\0", 1)[0]
                elif kind == b"K":
                    if long_link is not None:
                        raise InvalidArgument(twice)
                    long_link = body.split(b"\0", 1)[0]
                elif kind == b"g":
                    self._global(body)
                else:
                    if pax is not None:
                        raise InvalidArgument(twice)
                    pax = self._records(body)
                continue
            if kind == b"V":  # a volume label: nothing to unpack
                continue
            break
        usual = pax is None and long_name is None and long_link is None and not self._globals
        if usual and not member.extended and kind in _EXTRACTED:
            return member
        try:
            if long_name is not None:
                member.name = long_name
            if long_link is not None:
                member.linkname = long_link
            sparse = kind == b"S"
            if sparse:
                self._old_sparse(member, block)
            if self._globals:
                self._merge(member, list(self._globals.items()))
            if pax is not None:
                sparse = self._merge(member, pax) or sparse
            if member.type not in _EXTRACTED:
                raise InvalidArgument(f"unknown type {kind!r}")
            header.check_ranges(member)
            if member.segments is not None:
                header.check_segments(member.segments, member.size, member.stored)
        except CowfsError as error:
            raise blame(error, self.entries + 1, member.name) from None
        return member

    def _refuse_cut(self, block: bytes | bytearray | memoryview, extended: bool) -> None:
        """Raise InvalidArgument if the archive ends in a header, or behind an extension without an entry."""
        if bytes(block).strip(b"\0"):
            raise InvalidArgument(
                f"archive is truncated in the header after entry {self.entries}",
                remedy="" if self.entries else "it may not be a tar archive at all",
            )
        if extended:
            raise InvalidArgument(f"archive is truncated after the extension of entry {self.entries + 1}")

    def _trailer(self) -> None:
        """Read on after a zero block: another one, then any bytes (kept in the log), or the end."""
        if not self._trailing:
            return
        block = self._source.take(BLOCK)
        self._raw(block)
        if block.strip(b"\0"):
            raise InvalidArgument(f"archive is damaged: a lone zero block after entry {self.entries}")
        left = _MAX_TRAILER
        while len(block):
            block = self._source.take(1 << 16)
            self._raw(block)
            left -= len(block)
            if left < 0:
                raise LimitExceeded(f"there are more than {_MAX_TRAILER} bytes behind the end of the archive")

    def _extension(self, member: Member) -> bytes:
        if not 0 <= member.size <= self._max_header:
            raise LimitExceeded(
                f"archive entry {self.entries + 1} has an extension header of {member.size} bytes, "
                f"at most {self._max_header} are allowed"
            )
        whole = member.size + pad(member.size)
        body = self._source.take(whole)
        if len(body) < whole:
            raise InvalidArgument(f"archive is truncated in the extension header of entry {self.entries + 1}")
        self._raw(body)
        return body[: member.size]

    def _records(self, body: bytes) -> list[tuple[bytes, bytes]]:
        try:
            return header.parse_pax(body)
        except CowfsError as error:
            raise InvalidArgument(f"archive entry {self.entries + 1}: {error.message}") from None

    def _global(self, body: bytes) -> None:
        for key, value in self._records(body):
            if key in _PLAIN_PAX:
                self._globals[key] = value
            elif key in (b"path", b"linkpath", b"size") or key.startswith((b"GNU.sparse.", b"SCHILY.xattr.")):
                raise InvalidArgument(f"global PAX header sets {show(key)} for every entry")

    def _merge(self, member: Member, records: list[tuple[bytes, bytes]]) -> bool:
        """Apply PAX records, ignoring those without effect here; True when they describe a sparse file."""
        sparse: list[tuple[bytes, bytes]] = []
        for key, value in records:
            if key == b"path":
                if value:
                    member.name = value
            elif key == b"linkpath":
                if value:
                    member.linkname = value
            elif key == b"mtime":
                member.mtime = header.parse_time(value)
            elif key == b"atime":
                member.atime = header.parse_time(value)
            elif key == b"size":
                size = header.parse_decimal(value, "size")
                if member.type not in header.NO_DATA:
                    member.stored = size
                    if member.segments is None:
                        member.size = size
            elif key == b"uid":
                member.uid = header.parse_decimal(value, "uid")
            elif key == b"gid":
                member.gid = header.parse_decimal(value, "gid")
            elif (name := header.pax_xattr(key)) is not None:
                if not name or b"\0" in name or len(name) > 255:
                    raise InvalidArgument(f"not a valid extended attribute name: {show(name)}")
                if member.xattrs is None:
                    member.xattrs = {}
                member.xattrs[name] = value
            elif key.startswith(b"GNU.sparse."):
                sparse.append((key[11:], value))
        if not sparse:
            return False
        if member.type not in (header.REGULAR, b"S"):
            raise InvalidArgument("a sparse map on something that is no regular file")
        self._pax_sparse(member, sparse)
        return True

    # Sparse files (GNU tar manual, "Storing Sparse Files") ------------------------------------

    def _old_sparse(self, member: Member, block: bytes) -> None:
        if block[257:263] != header.GNU_MAGIC:
            raise InvalidArgument("a GNU sparse entry in an archive that is not GNU's")
        segments: array[int] = array("q")
        real = header.number(block[483:495], "sparse size")
        self._old_entries(segments, block, 386, 4)
        more = block[482]
        while more:
            block = self._source.take(BLOCK)
            if len(block) < BLOCK:
                raise InvalidArgument("archive is truncated in a sparse map")
            self._raw(block)
            self._old_entries(segments, block, 0, 21)
            more = block[504]
        member.type = header.REGULAR
        member.size = real
        member.segments = segments

    @staticmethod
    def _old_entries(segments: array[int], block: bytes, start: int, count: int) -> None:
        for position in range(start, start + 24 * count, 24):
            if not block[position]:
                return
            _segment(
                segments,
                header.number(block[position : position + 12], "sparse offset"),
                header.number(block[position + 12 : position + 24], "sparse length"),
            )

    def _pax_sparse(self, member: Member, records: list[tuple[bytes, bytes]]) -> None:
        segments: array[int] = array("q")
        fields = dict(records)
        if fields.get(b"name"):
            member.name = fields[b"name"]
        real = fields.get(b"realsize", fields.get(b"size"))
        if real is None:
            raise InvalidArgument("a sparse entry without its real size")
        member.size = header.parse_decimal(real, "sparse size")
        version = fields.get(b"major"), fields.get(b"minor")
        if version == (b"1", b"0"):
            self._map_in_data(member, segments)
        elif b"map" in fields:
            numbers = fields[b"map"].split(b",") if fields[b"map"] else []
            if len(numbers) % 2:
                raise InvalidArgument("malformed sparse map")
            for position in range(0, len(numbers), 2):
                _segment(
                    segments,
                    header.parse_decimal(numbers[position], "sparse offset"),
                    header.parse_decimal(numbers[position + 1], "sparse length"),
                )
        elif version in ((None, None), (b"0", b"0"), (b"0", b"1")):
            offset: int | None = None
            for key, value in records:
                if key == b"offset":
                    offset = header.parse_decimal(value, "sparse offset")
                elif key == b"numbytes":
                    if offset is None:
                        raise InvalidArgument("malformed sparse map")
                    _segment(segments, offset, header.parse_decimal(value, "sparse length"))
                    offset = None
        else:
            raise InvalidArgument(f"unknown version of a sparse map: {version}")
        member.segments = segments

    def _map_in_data(self, member: Member, segments: array[int]) -> None:
        """Version 1.0: decimal numbers, one a line, in whole blocks before the data."""
        text = b""
        wanted = -1
        offset: int | None = None
        while wanted:
            if member.stored < BLOCK:
                raise InvalidArgument("sparse map is longer than the entry")
            block = self._source.take(BLOCK)
            if len(block) < BLOCK:
                raise InvalidArgument("archive is truncated in a sparse map")
            self._raw(block)
            member.stored -= BLOCK
            *lines, text = (text + block).split(b"\n")
            for line in lines:
                number = header.parse_decimal(line, "sparse map")
                if wanted < 0:
                    if number > _MAX_SEGMENTS:
                        raise LimitExceeded(f"sparse map of {number} segments")
                    wanted = 2 * number
                else:
                    if offset is None:
                        offset = number
                    else:
                        _segment(segments, offset, number)
                        offset = None
                    wanted -= 1
                if not wanted:
                    break
            if wanted and len(text) > 20:
                raise InvalidArgument("malformed sparse map")


_EXTRACTED = header.NO_DATA | {header.REGULAR}


def _segment(segments: array[int], offset: int, length: int) -> None:
    if len(segments) >= 2 * _MAX_SEGMENTS:
        raise LimitExceeded(f"sparse map of more than {_MAX_SEGMENTS} segments")
    if not (0 <= offset < 1 << 63 and 0 <= length < 1 << 63):
        raise InvalidArgument("sparse map does not fit the file")
    segments.append(offset)
    segments.append(length)
