"""One packed entry of a directory record (:mod:`cowfs.index.directory`): its fields, and their bytes."""

from __future__ import annotations

import stat
import struct

from cowfs._typed import NamedTuple

__all__ = ["ANY_LINK", "DIGEST", "NAME_AT", "Entry", "Pair", "Ref", "decode", "encode", "ref_of", "root_digest"]

DIGEST = 32

_HEAD = struct.Struct("<BHIIQqIH")  # flags, mode, uid, gid, size, mtime s, mtime ns, name length
NAME_AT = _HEAD.size
"""Where the name begins in a first half."""
_STORE = struct.Struct("<BIQQ")  # driver flags, layer, ino, blocks
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_XATTR = struct.Struct("<HI")  # length of the name, of the value
_TOKEN = struct.Struct("<IQ")  # layer, ino

_NLINK, _RDEV, _TARGET, _XATTRS, _DIGEST, _UNKNOWN = 1, 2, 4, 8, 16, 32
_LINK, _LINKS = 0x80, 0x40  # of the second half: a file's Entry.link follows; a directory's Ref.links
ANY_LINK = _LINK | _LINKS
"""In the first byte of a second half: the entry is a name of a file with several, or a directory with such names below it."""

Pair = tuple[bytes, bytes]
"""One packed entry: (content half, storage half)."""


class Ref(NamedTuple):
    """A directory: the digest that names its record, and the digest of its content.

    Attributes:
        links: whether files with several names are below it, except in records of before 2026-12, which do not tell.
    """

    storage: bytes
    content: bytes
    links: bool = False

    def shows(self, other: Ref) -> bool:
        """Whether both certainly hold the same tree."""
        return self.content == other.content and (self.storage == other.storage or not (self.links or other.links))


class Entry(NamedTuple):
    """One entry, unpacked.

    Attributes:
        mode: type and permission bits as in ``st_mode``.
        size: bytes; of a symbolic link, of its target.
        blocks: units of 512 bytes.
        nlink: names of the file within the tree; 0 for a directory.
        layer: number of the layer that holds the data.
        path: its path in that layer, if not the implied path (see the module).
        base: of a directory: the place of its files, if not the implied path.
        link: of a file with several names, its identity: (layer, inode number there). None in records of before
            2026-12: see :attr:`file`.
        digest: SHA-256 of a regular file's data, if known.
        ref: a directory's record.
        flags: belongs to the driver that wrote the layer, six bits.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    ino: int = 0
    blocks: int = 0
    rdev: int = 0
    nlink: int = 1
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    layer: int = 0
    path: bytes | None = None
    digest: bytes | None = None
    ref: Ref | None = None
    flags: int = 0
    base: bytes | None = None
    link: tuple[int, int] | None = None

    @property
    def file(self) -> tuple[int, int]:
        """The file's identity: names of one tree with several links are one file if they agree in this."""
        return self.link or (self.layer, self.ino)

    @property
    def type(self) -> int:
        """The ``S_IFMT`` part of the mode."""
        return self.mode & 0o170000

    @property
    def is_dir(self) -> bool:
        return self.mode & 0o170000 == 0o040000


def encode(name: bytes, entry: Entry) -> Pair:
    """Pack one entry."""
    mode = entry.mode
    kind = mode & 0o170000
    flags, own = 0, entry.flags
    tail: list[bytes] = []
    if kind == stat.S_IFDIR:
        assert entry.ref is not None
        tail.append(entry.ref.content)
        if entry.ref.links:
            own |= _LINKS
    elif entry.nlink != 1:
        flags |= _NLINK
        own |= _LINK if entry.link is not None else 0
        tail.append(_U32.pack(entry.nlink))
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        flags |= _RDEV
        tail.append(_U64.pack(entry.rdev))
    elif kind == stat.S_IFLNK:
        flags |= _TARGET
        tail += (_U32.pack(len(entry.target)), entry.target)
    elif kind == stat.S_IFREG:
        if entry.digest is not None:
            flags |= _DIGEST
            tail.append(entry.digest)
        elif entry.size:
            flags |= _UNKNOWN
            tail.append(_TOKEN.pack(entry.layer, entry.ino))
    if entry.xattrs:
        flags |= _XATTRS
        tail.append(_U32.pack(len(entry.xattrs)))
        for key, value in entry.xattrs:
            tail += (_XATTR.pack(len(key), len(value)), key, value)
    rest = b"".join(tail)
    seconds, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
    content = (
        _HEAD.pack(
            flags,
            mode,
            entry.uid,
            entry.gid,
            entry.size if kind != stat.S_IFDIR else 0,
            seconds,
            nanoseconds,
            len(name),
        )
        + name
        + rest
    )
    where = b"" if entry.path is None else entry.path
    if entry.ref is not None:
        base = b"" if entry.base is None else entry.base
        where = entry.ref.storage + (_U16.pack(len(base)) + base + where if base or where else b"")
    elif own & _LINK and entry.link is not None:
        where = _TOKEN.pack(*entry.link) + where
    return content, _STORE.pack(own, entry.layer, entry.ino, entry.blocks) + where


def decode(pair: Pair) -> Entry:
    """Unpack one entry; the reverse of :func:`encode` but for the name."""
    content, storage = pair
    flags, mode, uid, gid, size, seconds, nanoseconds, name_length = _HEAD.unpack_from(content)
    at = _HEAD.size + name_length
    driver_flags, layer, ino, blocks = _STORE.unpack_from(storage)
    where = _STORE.size
    ref, base, nlink, rdev, target, digest, link = None, None, 1, 0, b"", None, None
    if mode & 0o170000 == 0o040000:
        ref = Ref(storage[where : where + DIGEST], content[at : at + DIGEST], driver_flags & _LINKS != 0)
        at += DIGEST
        where += DIGEST
        if where < len(storage):
            length = _U16.unpack_from(storage, where)[0]
            where += 2 + length
            base = storage[where - length : where] or None
        nlink = 0
    elif driver_flags & _LINK:
        link = _TOKEN.unpack_from(storage, where)
        where += _TOKEN.size
    if flags & _NLINK:
        nlink = _U32.unpack_from(content, at)[0]
        at += 4
    if flags & _RDEV:
        rdev = _U64.unpack_from(content, at)[0]
        at += 8
    if flags & _TARGET:
        length = _U32.unpack_from(content, at)[0]
        target = content[at + 4 : at + 4 + length]
        at += 4 + length
    if flags & _DIGEST:
        digest = content[at : at + DIGEST]
        at += DIGEST
    if flags & _UNKNOWN:
        at += _TOKEN.size
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    if flags & _XATTRS:
        found = []
        count = _U32.unpack_from(content, at)[0]
        at += 4
        for _ in range(count):
            key_length, value_length = _XATTR.unpack_from(content, at)
            at += _XATTR.size
            middle = at + key_length
            found.append((content[at:middle], content[middle : middle + value_length]))
            at = middle + value_length
        xattrs = tuple(found)
    return Entry(
        mode, uid, gid, size, seconds * 1_000_000_000 + nanoseconds, ino, blocks, rdev, nlink, target, xattrs,
        layer, storage[where:] or None, digest, ref, driver_flags & ~ANY_LINK, base, link,
    )  # fmt: skip


def ref_of(pair: Pair) -> Ref | None:
    """The directory record an entry points at, or None; cheaper than :func:`decode`."""
    content, storage = pair
    if content[2] & 0xF0 != 0x40:  # the high byte of the mode
        return None
    at = _HEAD.size + int.from_bytes(content[_HEAD.size - 2 : _HEAD.size], "little")
    return Ref(storage[_STORE.size : _STORE.size + DIGEST], content[at : at + DIGEST], storage[0] & _LINKS != 0)


def root_digest(storage: bytes, at: int = 0) -> bytes:
    """The record digest in a directory entry's storage half, which begins at ``at``."""
    return storage[at + _STORE.size : at + _STORE.size + DIGEST]
