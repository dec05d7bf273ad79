"""Directory records: the tree of a committed snapshot in the index.

Strategy. A record is one directory's entries, packed, and named by the SHA-256 of its bytes,
as git names trees; a sub-directory is the digest of its record. So a directory that did not
change is the same record in every snapshot, a commit writes the directories along the changed
paths only, and two snapshots are compared by comparing digests and going down where they
differ.

Each entry is a pair of packed strings, sorted by name within the record:

``content``   the visible part: name, type, mode, owner, size, mtime, device, link target,
              xattrs, the file's digest, a sub-directory's *content* digest.
``storage``   the place: the layer with the data, the path there when it is another one, the
              inode number and blocks shown, a sub-directory's *storage* digest.

The content digest of a directory is taken over the first halves only, so equal trees have equal digests, whatever their
origin; the storage digest names the record. A file without a known digest has its (layer, inode number) in the first
half instead: equal content digests then still mean equal trees, and a comparison that finds different ones reads the
files themselves.

Links. Every name of a file with several has, in its second half, the layer and real inode number of that file
(:attr:`Entry.link`): two names of a tree are one file exactly when these agree. A directory's entry records whether
there are such names below it (:attr:`Ref.links`): two directories of equal content hold the same tree at once if one of
them has none.

Paths. The *implied* path of an entry is its directory's base and its name. A file's data, and a
directory itself, are at the implied path of their layer unless the entry gives a path; a
directory's base is its implied path unless the entry gives a base. A renamed directory of a
lower layer is therefore one entry with a base, over the old record.

Big directories. Past ``CHUNK_ABOVE`` entries a record is a list of chunks, cut where
``crc32(name)`` is a multiple of ``CHUNK_SIZE``: boundaries depend on the names alone, so equal directories have equal
chunks, and one change rewrites one chunk.

On disk a leaf is: ``E``, the number of entries n, the bytes of all content halves; n lengths of
content halves, n of names, n of storage halves; the content halves; the storage halves. With the lengths in front a
reader only slices. A list is: ``L``, the number of chunks, the chunks. Integers are little-endian. Mtime is seconds and
nanoseconds apart, so no time wraps.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from cowfs._typed import NamedTuple, Protocol
from cowfs.errors import Corrupt
from cowfs.index.entry import ANY_LINK, DIGEST, NAME_AT, Entry, Pair, Ref, decode, encode, ref_of, root_digest
from cowfs.index.spool import Spill

__all__ = [
    "CHUNK_ABOVE",
    "CHUNK_SIZE",
    "DIGEST",
    "EMPTY",
    "Entry",
    "Pair",
    "Pending",
    "Records",
    "Ref",
    "Writer",
    "children_of",
    "decode",
    "differing",
    "edit",
    "encode",
    "entries",
    "find",
    "join",
    "lookup",
    "ref_of",
    "root_digest",
    "write",
]

CHUNK_ABOVE = 1024
CHUNK_SIZE = 256

_LEAF = struct.Struct("<cII")  # b"E", entries, bytes of the content half
_LIST = struct.Struct("<cI")  # b"L", chunks
_CHUNK = struct.Struct("<I32s32sH")  # entries, storage digest, content digest, length of the first name
_MANY = 1 << 31  # of a chunk's number of entries: Ref.links


class Records(Protocol):
    """A source of records: the index, or a set of records not yet stored."""

    def record(self, digest: bytes) -> bytes:
        """The bytes named by a storage digest.

        Raises:
            Corrupt: the index does not have the record.
        """

    @property
    def spool(self) -> str | None:
        """The directory for files without a name; ``None`` for the host's own."""


class Pending:
    """Records that are not stored yet, over the stored ones.

    Threads: one verb, in one thread, owns it.
    """

    __slots__ = ("_below", "new", "spool")

    def __init__(self, below: Records | None = None) -> None:
        self._below = below
        self.spool: str | None = (
            below.spool if below is not None else None
        )  # the directory for a file, when they are many
        self.new: Spill = Spill(self.spool)  # digest -> (digests it points at, data)

    def record(self, digest: bytes) -> bytes:
        made = self.new.get(digest)
        if made is not None:
            return made[1]
        if digest == EMPTY.storage:
            return _EMPTY_RECORD
        if self._below is None:
            raise Corrupt(f"the index has no record {digest.hex()}", remedy="run 'cowfs check'")
        return self._below.record(digest)

    def empty(self) -> Ref:
        """The directory without entries."""
        return EMPTY

    def add(self, data: bytes, children: bytes) -> bytes:
        """Keep a new record; ``children`` are the concatenated digests of the records below it."""
        digest = _sha256(data)
        self.new[digest] = (children, data)
        return digest


# ------------------------------------------------------------ one directory


_KIND_AT = 2  # in a first half: the byte with the file type
_WITHOUT_LINKS = bytes(flags for flags in range(256) if not flags & ANY_LINK)


class _Chunk(NamedTuple):
    first: bytes
    size: int
    ref: Ref


def _split(data: bytes) -> dict[bytes, Pair]:
    names, contents, storages = _parts(data)
    return dict(zip(names, zip(contents, storages, strict=True), strict=True))


def _parts(data: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """(names, content halves, storage halves) of a leaf, in name order."""
    _, count, content_length = _LEAF.unpack_from(data)
    lengths = struct.unpack_from(f"<{count}I{2 * count}H", data, _LEAF.size)
    start = _LEAF.size + 8 * count
    ends = list(accumulate(lengths[:count], initial=start))
    contents = [data[a:b] for a, b in pairwise(ends)]
    head = NAME_AT
    names = [half[head : head + n] for half, n in zip(contents, lengths[count : 2 * count], strict=True)]
    stops = list(accumulate(lengths[2 * count :], initial=start + content_length))
    return names, contents, [data[a:b] for a, b in pairwise(stops)]


def _chunks(data: bytes) -> list[_Chunk]:
    _, count = _LIST.unpack_from(data)
    at = _LIST.size
    found = []
    for _ in range(count):
        entries_, storage, content, length = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        ref = Ref(storage, content, entries_ & _MANY != 0)
        found.append(_Chunk(data[at : at + length], entries_ & ~_MANY, ref))
        at += length
    return found


def _leaf(pending: Pending, names: Sequence[bytes], pairs: Mapping[bytes, Pair]) -> tuple[Ref, int]:
    contents, storages = zip(*map(pairs.__getitem__, names), strict=True) if names else ((), ())
    columns = [list(map(len, each)) for each in (contents, names, storages)]
    return _pack(pending, b"".join(contents), b"".join(storages), *columns)


def _splice(pending: Pending, data: bytes, edits: Mapping[bytes, Pair | None]) -> tuple[Ref, int]:
    """A leaf with some entries put in place or taken away, as :func:`_leaf` makes it; the others are copied in runs, unopened."""
    _, count, content_length = _LEAF.unpack_from(data)
    lengths = struct.unpack_from(f"<{count}I{2 * count}H", data, _LEAF.size)
    start = _LEAF.size + 8 * count
    ends = list(accumulate(lengths[:count], initial=start))
    stops = list(accumulate(lengths[2 * count :], initial=start + content_length))

    def name_of(at: int) -> bytes:
        begin = ends[at] + NAME_AT
        return data[begin : begin + lengths[count + at]]

    contents: list[bytes] = []
    storages: list[bytes] = []
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])  # lengths of content halves, names, storage halves
    after = 0

    def keep(end: int) -> None:
        contents.append(data[ends[after] : ends[end]])
        storages.append(data[stops[after] : stops[end]])
        for at, column in enumerate(columns):
            column += lengths[at * count + after : at * count + end]

    for name in sorted(edits):
        at = bisect_left(range(count), name, lo=after, key=name_of)
        keep(at)
        after = at + (at < count and name_of(at) == name)
        pair = edits[name]
        if pair is not None:
            contents.append(pair[0])
            storages.append(pair[1])
            for column, length in zip(columns, (len(pair[0]), len(name), len(pair[1])), strict=True):
                column.append(length)
    keep(count)
    return _pack(pending, b"".join(contents), b"".join(storages), *columns)


def _pack(
    pending: Pending, content: bytes, storage: bytes, halves: list[int], names: list[int], storages: list[int]
) -> tuple[Ref, int]:
    """A leaf from all content halves, all storage halves, and the lengths of content halves, names and storage halves."""
    count = len(halves)
    head = _LEAF.pack(b"E", count, len(content)) + struct.pack(f"<{count}I", *halves)
    where = struct.pack(f"<{2 * count}H", *names, *storages)
    digest = _sha256(head + content)
    starts = list(accumulate(storages[:-1], initial=0))[:count]
    kinds = map(content.__getitem__, accumulate(halves[:-1], initial=_KIND_AT))
    children = b"".join(
        [root_digest(storage, at) for at, kind in zip(starts, kinds, strict=False) if kind & 0xF0 == 0x40]
    )
    flags = bytes(map(storage.__getitem__, starts))
    links = flags.translate(None, _WITHOUT_LINKS) != b""
    return Ref(pending.add(b"".join([head, where, content, storage]), children), digest, links), count


def _list(pending: Pending, chunks: list[_Chunk]) -> Ref:
    parts = [_LIST.pack(b"L", len(chunks))]
    for chunk in chunks:
        size = chunk.size | _MANY if chunk.ref.links else chunk.size
        parts += (_CHUNK.pack(size, chunk.ref.storage, chunk.ref.content, len(chunk.first)), chunk.first)
    content = _sha256(b"L" + b"".join([chunk.ref.content for chunk in chunks]))
    links = any(chunk.ref.links for chunk in chunks)
    return Ref(pending.add(b"".join(parts), b"".join([chunk.ref.storage for chunk in chunks])), content, links)


def _is_boundary(name: bytes) -> bool:
    return zlib.crc32(name) % CHUNK_SIZE == 0


def _cut(pending: Pending, pairs: Mapping[bytes, Pair]) -> list[_Chunk]:
    """Chunks of some consecutive entries; only the first may begin with no boundary."""
    runs: list[list[bytes]] = []
    for name in sorted(pairs):
        if not runs or _is_boundary(name):
            runs.append([])
        runs[-1].append(name)
    made = []
    for run in runs:
        ref, count = _leaf(pending, run, pairs)
        made.append(_Chunk(run[0], count, ref))
    return made


class Writer:
    """Records a directory from its entries in the order of their names, keeping a chunk or two of them.

    The result is that of :func:`write` for the same entries.
    """

    __slots__ = ("_chunks", "_pairs", "_pending")

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._pairs: dict[bytes, Pair] = {}
        self._chunks: list[_Chunk] = []

    def add(self, name: bytes, pair: Pair) -> None:
        """The next entry."""
        self._pairs[name] = pair
        if len(self._pairs) > 2 * CHUNK_ABOVE and _is_boundary(name):
            del self._pairs[name]
            self._chunks += _cut(self._pending, self._pairs)
            self._pairs = {name: pair}

    def done(self) -> Ref:
        """Finish: all entries were added."""
        if not self._chunks:
            return write(self._pending, self._pairs)
        return _list(self._pending, self._chunks + _cut(self._pending, self._pairs))


def write(pending: Pending, pairs: Mapping[bytes, Pair]) -> Ref:
    """Record a directory with some entries."""
    if len(pairs) <= CHUNK_ABOVE:
        return _leaf(pending, sorted(pairs), pairs)[0]
    return _list(pending, _cut(pending, pairs))


def entries(records: Records, storage: bytes) -> dict[bytes, Pair]:
    """All entries of a directory, packed, in name order."""
    data = records.record(storage)
    if data[:1] == b"E":
        return _split(data)
    found: dict[bytes, Pair] = {}
    for chunk in _chunks(data):
        found.update(_split(records.record(chunk.ref.storage)))
    return found


def find(records: Records, storage: bytes, name: bytes) -> Pair | None:
    """One entry of a directory; reads one chunk of a big one."""
    data = records.record(storage)
    if data[:1] == b"L":
        chunks = _chunks(data)
        at = max(0, bisect_right(chunks, name, key=lambda chunk: chunk.first) - 1)
        data = records.record(chunks[at].ref.storage)
    return _split(data).get(name)


def edit(pending: Pending, storage: bytes, edits: Mapping[bytes, Pair | None]) -> Ref:
    """The directory with some entries put in place (a pair) or taken away (None).

    The result is that of :func:`write` for the same entries, at the cost of the chunks touched.
    """
    data = pending.record(storage)
    if data[:1] == b"E":
        ref, count = _splice(pending, data, edits)
        if count <= CHUNK_ABOVE:
            return ref
        pairs = _split(data)
        _apply(pairs, edits)
        return write(pending, pairs)
    chunks = _chunks(data)
    touched: dict[int, dict[bytes, Pair | None]] = {}
    firsts = [chunk.first for chunk in chunks]
    for name, pair in edits.items():
        touched.setdefault(max(0, bisect_right(firsts, name) - 1), {})[name] = pair
    done: list[_Chunk] = []
    for at, chunk in enumerate(chunks):
        mine = touched.get(at)
        if mine is None:
            done.append(chunk)
            continue
        if all(name > chunk.first and not _is_boundary(name) for name in mine):  # the cuts stay where they are
            ref, count = _splice(pending, pending.record(chunk.ref.storage), mine)
            done.append(_Chunk(chunk.first, count, ref))
            continue
        pairs = _split(pending.record(chunk.ref.storage))
        _apply(pairs, mine)
        if pairs and done and not _is_boundary(min(pairs)):
            before = done.pop()
            pairs.update(_split(pending.record(before.ref.storage)))
        done += _cut(pending, pairs)
    if sum(chunk.size for chunk in done) > CHUNK_ABOVE:
        return _list(pending, done)
    everything: dict[bytes, Pair] = {}
    for chunk in done:
        everything.update(_split(pending.record(chunk.ref.storage)))
    return write(pending, everything)


def _apply(pairs: dict[bytes, Pair], edits: Mapping[bytes, Pair | None]) -> None:
    for name, pair in edits.items():
        if pair is None:
            pairs.pop(name, None)
        else:
            pairs[name] = pair


def differing(records: Records, old: Ref | None, new: Ref) -> Iterator[tuple[bytes, Pair | None, Pair | None]]:
    """Names whose content halves, or files with several names, differ, in name order, reading only chunks that differ."""
    new_data = records.record(new.storage)
    old_data = records.record(old.storage) if old is not None else _EMPTY_RECORD
    linked = new.links or (old is not None and old.links)
    if new_data[:1] == b"L" and old_data[:1] == b"L":
        old_chunks, new_chunks = _chunks(old_data), _chunks(new_data)
        a = _load(records, _without(old_chunks, new_chunks))
        b = _load(records, _without(new_chunks, old_chunks))
    else:
        if new_data[:1] == b"E" and old_data[:1] == b"E" and not linked:
            yield from _differing_leaves(old_data, new_data)
            return
        a = entries(records, old.storage) if old is not None else {}
        b = entries(records, new.storage)
    names = [name for name, pair in b.items() if name not in a or _differ(a[name], pair)]
    names += [name for name in a if name not in b]
    for name in sorted(names):
        yield name, a.get(name), b.get(name)


def _differ(one: Pair, other: Pair) -> bool:
    return one[0] != other[0] or bool((one[1][0] | other[1][0]) & ANY_LINK and one[1] != other[1])


def _without(chunks: list[_Chunk], others: list[_Chunk]) -> list[_Chunk]:
    """Chunks with an entry that no chunk of the other directory has."""
    same = {chunk.ref.content: chunk.ref for chunk in others}
    return [chunk for chunk in chunks if (ref := same.get(chunk.ref.content)) is None or not chunk.ref.shows(ref)]


def _differing_leaves(old: bytes, new: bytes) -> Iterator[tuple[bytes, Pair | None, Pair | None]]:
    """As :func:`differing`, of two small directories without links: only differing entries are compared one by one."""
    old_names, old_contents, old_storages = _parts(old)
    new_names, new_contents, new_storages = _parts(new)
    before, after = set(old_contents), set(new_contents)
    found: dict[bytes, list[Pair | None]] = {}
    if not before <= after:
        for name, content, storage in zip(old_names, old_contents, old_storages, strict=True):
            if content not in after:
                found[name] = [(content, storage), None]
    if not after <= before:
        for name, content, storage in zip(new_names, new_contents, new_storages, strict=True):
            if content not in before:
                found.setdefault(name, [None, None])[1] = (content, storage)
    for name in sorted(found):
        yield name, found[name][0], found[name][1]


def _load(records: Records, chunks: list[_Chunk]) -> dict[bytes, Pair]:
    found: dict[bytes, Pair] = {}
    for chunk in chunks:
        found.update(_split(records.record(chunk.ref.storage)))
    return found


def children_of(data: bytes) -> list[bytes]:
    """The storage digests a record points at: chunks, or sub-directories."""
    if data[:1] == b"L":
        return [chunk.ref.storage for chunk in _chunks(data)]
    return [ref.storage for pair in _split(data).values() if (ref := ref_of(pair)) is not None]


def lookup(records: Records, root: Pair, path: bytes) -> Pair | None:
    """The entry at a path below a root entry (no symbolic link is followed)."""
    pair: Pair | None = root
    for name in path.split(b"/"):
        if not name:
            continue
        ref = ref_of(pair) if pair is not None else None
        if ref is None:
            return None
        pair = find(records, ref.storage, name)
    return pair


_EMPTY_RECORD = _LEAF.pack(b"E", 0, 0)
_EMPTY_DIGEST = bytes.fromhex("8185c15ba07bf5d0ae79070fd6d79ce3c354f52f04e6c735a151ae5a9cfb86c5")
EMPTY = Ref(_EMPTY_DIGEST, _EMPTY_DIGEST)
"""The directory without entries; every index has it without storing it."""


def _sha256(data: bytes) -> bytes:
    from hashlib import sha256  # imported late: it loads a library, and most verbs only read records

    return sha256(data).digest()


def join(base: bytes, name: bytes) -> bytes:
    """A path from a directory's path (b"" is the root) and a name."""
    return base + b"/" + name if base else name
