"""The tar header codec: bytes in, records out, and back. No I/O.

Strategy. One 512-byte block is unpacked by one ``struct`` call; the fields that repeat from
member to member (mode, owner) are looked up in a small cache of already converted ones; the
checksum is compared through Adler-32, whose low half is a byte sum taken in C. PAX records and GNU long names, in the
blocks before it, extend a plain block; the reader merges them. Numbers are strict: a field that is neither octal nor
base-256 is an error, never zero.

Sources: POSIX.1-2018 ``pax`` (ustar and pax interchange formats); GNU tar manual, "Basic Tar
Format" and "Storing Sparse Files"; OCI image-spec ``layer.md``.
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping

from cowfs.errors import InvalidArgument

__all__ = [
    "BLOCK",
    "NO_DATA",
    "ZERO_BLOCK",
    "Member",
    "Segments",
    "encode",
    "number",
    "pad",
    "parse_block",
    "parse_decimal",
    "parse_pax",
    "parse_time",
]

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
NANO = 1_000_000_000

# name mode uid gid size mtime chksum typeflag linkname magic version uname gname devmajor devminor prefix
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
# the same for reading: mode, uid and gid in one piece, which repeats; fields that most members leave empty stay in the block
_PARTS = struct.Struct("100s24s12s12s8sc100s8s80x155s12x")
assert _FIELDS.size == _PARTS.size == BLOCK

USTAR_MAGIC = b"ustar\0"
GNU_MAGIC = b"ustar "

# Types that carry no data blocks whatever their size field says (as Go's archive/tar and GNU tar read them).
LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO = b"1", b"2", b"3", b"4", b"5", b"6"
NO_DATA = frozenset({LINK, SYMLINK, CHAR, BLOCKDEV, DIRECTORY, FIFO})
REGULAR = b"0"
REGULAR_ALIASES = frozenset({b"0", b"\0", b"7"})

MAX_ID = 0xFFFF_FFFE  # 0xFFFFFFFF means "leave it" to chown(2)
_MAX_MAJOR, _MAX_MINOR = 0xFFF, 0xF_FFFF  # the bound of the kernel's device numbers

Segments = array  # of "q": offset, length, offset, length ... in file order


class NoHeader(InvalidArgument):
    """A block that is no header at all: no field of it has a meaning."""


class Member:
    """One archive member after PAX records and GNU long names were merged in.

    Attributes:
        name: as the archive spells it (bytes, not yet checked: :mod:`cowfs.archive.names`).
        type: the typeflag, aliases of a regular file folded to ``b"0"``.
        mode: permission bits (07777). uid, gid: numeric, uname and gname are not used.
        size: the file's length in bytes as a reader of the file sees it (sparse: with holes).
        stored: bytes of data that follow in the archive (without padding).
        mtime, atime: nanoseconds since the epoch, any sign; atime is None where not given.
        linkname: target of a link. device: (major, minor).
        xattrs: from ``SCHILY.xattr.`` records. segments: the data map of a sparse file, else None.
        ordinal: position in the archive, from 1: error messages name it.
    """

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    mtime: int
    linkname: bytes = b""
    atime: int | None = None
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] | None = None
    segments: array[int] | None = None
    ordinal: int = 0
    extended: bool = False  # a value did not come from plain octal fields: check ranges


_ENDS = (0, 32)
_owners: dict[bytes, tuple[int, int, int]] = {}  # mode, uid and gid fields as they stand -> their values


def number(field: bytes, what: str) -> int:
    """An octal or base-256 field as an integer."""
    lead = field[0]
    if lead & 0x80:
        value = int.from_bytes(field, "big", signed=True)
        if lead & 0x40 == 0:  # 0x80: positive, the marker bit is not part of the number
            value += 1 << (8 * len(field) - 1)
        return value
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not text:
        return 0
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise InvalidArgument(f"{what} is not a number: {field!r}")
    return int(text, 8)


def _owner(fields: bytes) -> tuple[int, int, int]:
    """(mode, uid, gid) of the 24 bytes that hold them."""
    found = (
        number(fields[:8], "mode") & 0o7777,
        number(fields[8:16], "uid"),
        number(fields[16:], "gid"),
    )
    if len(_owners) >= 4096:
        _owners.clear()
    _owners[fields] = found
    return found


def _text(field: bytes) -> bytes:
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


def _checksum_ok(block: bytes, field: bytes) -> bool:
    """Check the checksum in all its historical spellings."""
    try:
        stated = int(field.split(b"\0", 1)[0], 8)
    except ValueError:
        return False
    unsigned = sum(block) - sum(field) + 256
    # some old writers summed signed characters
    signed = unsigned - 256 * sum(1 for byte in block if byte > 127) + 256 * sum(1 for byte in field if byte > 127)
    return stated in (unsigned, signed)


def parse_block(block: bytes) -> Member:
    """One header block, checked, as a :class:`Member` (aliases folded, extensions not merged).

    Raises:
        InvalidArgument: wrong checksum, or a field that is no number.
    """
    name, owner, size, mtime, checksum, kind, linkname, magic, prefix = _PARTS.unpack(block)
    # Adler-32's low half is one more than the byte sum modulo 65521; the checksum counts itself as spaces
    try:
        whole = int(checksum[:6], 8) - 255 + sum(checksum)
    except ValueError:
        whole = -1
    if whole % 65521 != zlib.adler32(block) & 0xFFFF and not _checksum_ok(block, checksum):
        raise NoHeader("header checksum does not match", remedy="the archive is damaged or not a tar archive")
    member = Member()
    name = name[: name.find(0)] if name[99] == 0 else _text(name)
    if magic[:6] == USTAR_MAGIC and prefix[0]:
        if block[508:512] == b"tar\0":  # star's variant keeps times behind a shorter prefix
            prefix = prefix[:131]
        name = _text(prefix) + b"/" + name
    member.name = name
    member.mode, member.uid, member.gid = _owners.get(owner) or _owner(owner)
    # the usual spelling, eleven digits and an end, at once; every other one with care
    plain = size[11] in _ENDS and mtime[11] in _ENDS and size[:11].isdigit() and mtime[:11].isdigit()
    if plain:
        try:
            length, seconds = int(size[:11], 8), int(mtime[:11], 8)
        except ValueError:
            plain = False
    if not plain:
        length, seconds = number(size, "size"), number(mtime, "mtime")
    member.mtime = seconds * NANO
    member.extended = not plain or owner[8] > 127 or owner[16] > 127
    if linkname[0]:
        member.linkname = _text(linkname)
    if kind == b"0":
        member.type = kind
    elif kind in NO_DATA:
        length = 0
        member.type = kind
        if kind in (CHAR, BLOCKDEV):
            member.device = (number(block[329:337], "device major"), number(block[337:345], "device minor"))
            member.extended = True
    elif kind == b"\0" and name.endswith(b"/"):  # how version 7 archives spell a directory
        member.type = DIRECTORY
        length = 0
    else:
        member.type = REGULAR if kind in REGULAR_ALIASES else kind
    member.size = member.stored = length
    return member


def check_ranges(member: Member) -> None:
    """Refuse numbers that no file can have, after every extension was merged.

    Raises:
        InvalidArgument: a size, owner or device number out of range.
    """
    if member.size < 0 or member.size >= 1 << 63 or member.stored < 0:
        raise InvalidArgument(f"size {member.size} is out of range")
    if not (0 <= member.uid <= MAX_ID and 0 <= member.gid <= MAX_ID):
        raise InvalidArgument(f"owner {member.uid}:{member.gid} is out of range")
    major, minor = member.device
    if not (0 <= major <= _MAX_MAJOR and 0 <= minor <= _MAX_MINOR):
        raise InvalidArgument(f"device number {major}:{minor} is out of range")


# PAX ------------------------------------------------------------------------------------------


def parse_pax(data: bytes) -> list[tuple[bytes, bytes]]:
    """The ``LENGTH KEY=VALUE\\n`` records of a PAX header, in order (GNU.sparse 0.0 repeats keys).

    Raises:
        InvalidArgument: a length that is no number or does not fit, a record without ``=`` or end of line.
    """
    records: list[tuple[bytes, bytes]] = []
    position, end = 0, len(data)
    while position < end:
        space = data.find(b" ", position, position + 20)
        digits = data[position:space] if space > 0 else b""
        if not digits.isdigit():
            if data[position:].strip(b"\0") == b"":  # NUL padding up to the size, as some writers make
                break
            raise InvalidArgument("malformed PAX record: no length")
        stop = position + int(digits)
        if stop > end or stop <= space + 1 or data[stop - 1] != 0x0A:
            raise InvalidArgument("malformed PAX record: the length does not fit")
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not equals or not key:
            raise InvalidArgument("malformed PAX record: no key")
        records.append((key, value))
        position = stop
    return records


def parse_decimal(value: bytes, what: str) -> int:
    """A non-negative decimal PAX number. Raises InvalidArgument."""
    if not value.isdigit() or len(value) > 20:
        raise InvalidArgument(f"PAX {what} is not a number: {value[:40]!r}")
    return int(value)


def parse_time(value: bytes) -> int:
    """``[-]SECONDS[.FRACTION]`` as nanoseconds, without going through a float; finer digits are cut off
    towards the past, as a clock would. Raises InvalidArgument."""
    negative = value.startswith(b"-")
    seconds, _, fraction = value[negative:].partition(b".")
    if not seconds.isdigit() or len(seconds) > 20 or (fraction and not fraction.isdigit()):
        raise InvalidArgument(f"PAX time is not a number: {value[:40]!r}")
    nanos = int(seconds) * NANO + int((fraction[:9] + b"000000000")[:9])
    if negative:
        nanos = -nanos
        if fraction[9:].strip(b"0"):
            nanos -= 1
    return nanos


_XATTR = b"SCHILY.xattr."  # star, GNU tar, Go, libarchive


def pax_xattr(key: bytes) -> bytes | None:
    """The attribute name in a ``SCHILY.xattr.`` key, else None.

    A key ends at the first ``=``: GNU tar writes ``%3D`` for one in a name and ``%25`` for ``%``, and reads these two so;
    anything else behind a ``%`` is as it is (other writers escape nothing).
    """
    if not key.startswith(_XATTR):
        return None
    name = key[len(_XATTR) :]
    return name if b"%" not in name else re.sub(rb"%(3D|25)", lambda found: _ESCAPED[found[1]], name)


def xattr_pax(name: bytes) -> bytes:
    """The PAX key of an extended attribute; :func:`pax_xattr` is the way back."""
    if b"%" in name or b"=" in name:
        name = name.replace(b"%", b"%25").replace(b"=", b"%3D")
    return _XATTR + name


_ESCAPED = {b"3D": b"=", b"25": b"%"}


# Writing --------------------------------------------------------------------------------------


def pad(size: int) -> int:
    """Bytes from ``size`` to the next block boundary."""
    return -size % BLOCK


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """(prefix, name) of a ustar name, or None when it does not fit."""
    if len(name) <= 100:
        return b"", name
    if len(name) > 256:
        return None
    cut = name.rfind(b"/", 0, 156)
    # a directory's trailing slash is no place to cut
    if cut <= 0 or cut == len(name) - 1 or len(name) - cut - 1 > 100:
        return None
    return name[:cut], name[cut + 1 :]


def _pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


def format_time(nanos: int) -> bytes:
    """Nanoseconds as the shortest PAX decimal."""
    sign = b"-" if nanos < 0 else b""
    seconds, fraction = divmod(abs(nanos), NANO)
    tail = (b".%09d" % fraction).rstrip(b"0") if fraction else b""
    return sign + b"%d" % seconds + tail


def _block(
    name: bytes, prefix: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int,
    linkname: bytes, device: tuple[int, int] | None,
) -> bytes:  # fmt: skip
    major, minor = (_octal(device[0], 8), _octal(device[1], 8)) if device else (b"", b"")
    block = _FIELDS.pack(
        name, _octal(mode, 8), _octal(uid, 8), _octal(gid, 8), _octal(size, 12), _octal(mtime, 12), b"        ",
        kind, linkname, USTAR_MAGIC, b"00", b"", b"", major, minor, prefix,
    )  # fmt: skip
    # Adler-32's low half is one more than the byte sum modulo 65521: the sum itself while few bytes are set.
    total = (zlib.adler32(block) & 0xFFFF) - 1 if block.count(0) > 256 else sum(block)
    return block[:148] + b"%06o\0 " % total + block[156:]


_tails: dict[bytes, tuple[bytes, int]] = {}  # typeflag -> the block from it on, and its byte sum
_heads: dict[tuple[int, int, int], bytes] = {}  # (mode, uid, gid) -> the fields


def _plain_block(name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, seconds: int) -> bytes:
    """The result of :func:`_block` for a member without link, device and prefix, built from repeating parts."""
    owner = _heads.get((mode, uid, gid))
    if owner is None:
        if len(_heads) > 4096:
            _heads.clear()
        owner = _heads[mode, uid, gid] = _octal(mode, 8) + _octal(uid, 8) + _octal(gid, 8)
    tail = _tails.get(kind)
    if tail is None:
        rest = _block(b"", b"", kind, 0, 0, 0, 0, 0, b"", None)[156:]
        tail = _tails[kind] = rest, sum(rest) + 8 * 32
    head = name.ljust(100, b"\0") + owner + b"%011o\0%011o\0" % (size, seconds)
    return head + b"%06o\0 " % ((zlib.adler32(head) & 0xFFFF) - 1 + tail[1]) + tail[0]


def encode(
    name: bytes, kind: bytes, *, mode: int, uid: int, gid: int, size: int, mtime: int, linkname: bytes = b"",
    device: tuple[int, int] | None = None, xattrs: Mapping[bytes, bytes] | None = None,
    extra: Iterable[tuple[bytes, bytes]] = (),
) -> bytes:  # fmt: skip
    """The header of one member: a ustar block, with a PAX header before it only for values beyond ustar.

    Args:
        name: the member's path; a directory's ends with ``/``.
        mtime: nanoseconds. size: bytes of data that follow. extra: further PAX records.

    Returns:
        whole blocks, the same for the same arguments on any machine.
    """
    seconds, fraction = divmod(mtime, NANO)
    if (
        len(name) <= 100 and not (linkname or device or xattrs or extra or fraction) and 0 <= seconds < 1 << 33
        and size < 1 << 33 and uid < 1 << 21 and gid < 1 << 21 and name.isascii()
    ):  # fmt: skip
        return _plain_block(name, kind, mode, uid, gid, size, seconds)
    pax: list[tuple[bytes, bytes]] = list(extra)
    split = _split(name) if name.isascii() else None
    if split is None:
        pax.append((b"path", name))
        split = b"", name[:100]
    link = linkname
    if linkname and (len(linkname) > 100 or not linkname.isascii()):
        pax.append((b"linkpath", linkname))
        link = linkname[:100]
    if fraction or not 0 <= seconds < 1 << 33:
        pax.append((b"mtime", format_time(mtime)))
        seconds = min(max(seconds, 0), (1 << 33) - 1)
    short_size = size
    if size >= 1 << 33:
        pax.append((b"size", b"%d" % size))
        short_size = 0
    short_uid, short_gid = uid, gid
    if uid >= 1 << 21:
        pax.append((b"uid", b"%d" % uid))
        short_uid = 0
    if gid >= 1 << 21:
        pax.append((b"gid", b"%d" % gid))
        short_gid = 0
    if xattrs:
        pax += ((xattr_pax(key), value) for key, value in xattrs.items())
    block = _block(split[1], split[0], kind, mode, short_uid, short_gid, short_size, seconds, link, device)
    if not pax:
        return block
    pax.sort()
    body = b"".join(_pax_record(key, value) for key, value in pax)
    label = (b"PaxHeaders/" + name.rstrip(b"/").rsplit(b"/", 1)[-1])[:100]
    head = _block(label, b"", b"x", 0o644, 0, 0, len(body), 0, b"", None)
    return head + body + bytes(pad(len(body))) + block


def sparse_map(segments: Iterable[tuple[int, int]]) -> bytes:
    """The map that opens the data of a PAX 1.0 sparse member, padded to whole blocks."""
    pairs = list(segments)
    text = b"%d\n" % len(pairs) + b"".join(b"%d\n%d\n" % pair for pair in pairs)
    return text + bytes(pad(len(text)))


def iter_segments(segments: array[int]) -> Iterator[tuple[int, int]]:
    """(offset, length) pairs of a packed segment map."""
    items = iter(segments)
    return zip(items, items, strict=True)


def check_segments(segments: array[int], size: int, stored: int) -> None:
    """Check that a sparse map ascends, stays inside the file and adds up to the data that follows.

    Raises:
        InvalidArgument: the map does not.
    """
    end = total = 0
    for offset, length in iter_segments(segments):
        if length < 0 or offset < end or offset + length > size:
            raise InvalidArgument("sparse map does not fit the file")
        end = offset + length
        total += length
    if total != stored:
        raise InvalidArgument(f"sparse map names {total} bytes of data, the archive has {stored}")
