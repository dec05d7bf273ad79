"""Directory records: what goes in comes out, history leaves no trace, and comparison finds exactly the differences."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from cowfs.errors import Corrupt
from cowfs.index import directory
from cowfs.index.compare import compare
from cowfs.index.directory import (
    EMPTY,
    Entry,
    Pair,
    Pending,
    Ref,
    children_of,
    decode,
    edit,
    encode,
    entries,
    find,
    ref_of,
    write,
)
from cowfs.index.mounted import IndexTree
from cowfs.index.spool import Spill
from cowfs.model import TYPE_NAMES
from cowfs.store.digest_table import ByInode

NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
DIGEST = st.binary(min_size=32, max_size=32)
TIME = st.integers(-(1 << 63) * 10**9, ((1 << 63) - 1) * 10**9)
XATTRS = st.lists(st.tuples(st.binary(min_size=1, max_size=255), st.binary(max_size=300)), max_size=4).map(tuple)
PATH = st.none() | st.binary(min_size=1, max_size=4095)


@st.composite
def some_entry(draw: st.DrawFn) -> Entry:
    kind = draw(st.sampled_from(list(TYPE_NAMES)))
    entry = Entry(
        kind | draw(st.integers(0, 0o7777)),
        draw(U32),
        draw(U32),
        draw(U64),
        draw(TIME),
        draw(U64),
        draw(U64),
        nlink=draw(st.integers(1, (1 << 32) - 1)),
        xattrs=draw(XATTRS),
        layer=draw(U32),
        path=draw(PATH),
        flags=draw(st.integers(0, 63)),
    )
    if kind == stat.S_IFDIR:
        return entry._replace(
            size=0, nlink=0, ref=Ref(draw(DIGEST), draw(DIGEST), draw(st.booleans())), base=draw(PATH)
        )
    entry = entry._replace(link=draw(st.none() | st.tuples(U32, U64)) if entry.nlink > 1 else None)
    if kind == stat.S_IFLNK:
        return entry._replace(target=draw(st.binary(max_size=4095)))
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        return entry._replace(rdev=draw(U64))
    if kind == stat.S_IFREG:
        return entry._replace(digest=draw(st.none() | DIGEST))
    return entry


@given(NAMES, some_entry())
@settings(max_examples=300, deadline=None)
def test_an_entry_survives_packing(name: bytes, entry: Entry) -> None:
    pair = encode(name, entry)
    assert decode(pair) == entry
    assert ref_of(pair) == entry.ref


def _file(name: bytes, size: int = 1, **more: object) -> Pair:
    return encode(name, Entry(0o100644, size=size, layer=1, ino=7, **more))  # type: ignore[arg-type]


def _directory(name: bytes, ref: Ref, **more: object) -> Pair:
    return encode(name, Entry(0o40755, ref=ref, nlink=0, **more))  # type: ignore[arg-type]


def _any(number: int, size: int) -> Pair:
    """A file, a name of a file with several, or a directory with or without such names below it."""
    name = b"%d" % number
    if number % 7 == 0:
        return _directory(name, Ref(bytes([number % 251, size]) * 16, bytes([size]) * 32, number % 3 == 0))
    return _file(name, size, link=(1, 7), nlink=2) if number % 11 == 0 else _file(name, size)


@given(st.data(), st.sampled_from([0, 3, 1000, directory.CHUNK_ABOVE, directory.CHUNK_ABOVE + 1, 4000]))
@settings(max_examples=60, deadline=None)
def test_edits_give_what_writing_from_nothing_gives(data: st.DataObject, count: int) -> None:
    pending = Pending()
    pairs = {b"%d" % number: _any(number, 1) for number in range(count)}
    ref = write(pending, pairs)
    for _ in range(4):
        edits: dict[bytes, Pair | None] = {}
        start, length = data.draw(st.integers(0, 4200)), data.draw(st.sampled_from([1, 3, 700, 4200]))
        put = data.draw(st.booleans())
        for number in range(start, start + length):
            name = b"%d" % number
            edits[name] = _any(number, data.draw(st.integers(1, 3)) if length < 9 else 2) if put else None
        for name, pair in edits.items():
            if pair is None:
                pairs.pop(name, None)
            else:
                pairs[name] = pair
        ref = edit(pending, ref.storage, edits)
        assert ref == write(pending, pairs)
        assert entries(pending, ref.storage) == dict(sorted(pairs.items()))
    for name in list(pairs)[:50]:
        assert find(pending, ref.storage, name) == pairs[name]
    assert find(pending, ref.storage, b"not there") is None


def test_a_big_directory_is_cut_and_one_change_rewrites_one_chunk() -> None:
    pending = Pending()
    ref = write(pending, {name: _file(name) for name in (b"f%05d" % number for number in range(20_000))})
    assert len(pending.new) > 40
    again = Pending(pending)
    edit(again, ref.storage, {b"f12345": _file(b"f12345", 9)})
    assert len(again.new) == 2  # the chunk, and the list of chunks


def test_content_digests_are_equal_wherever_the_data_is() -> None:
    pending = Pending()
    known: dict[str, Any] = {"digest": b"d" * 32}
    one = write(pending, {b"f": encode(b"f", Entry(0o100644, size=1, layer=1, ino=5, **known))})
    other = write(
        pending, {b"f": encode(b"f", Entry(0o100644, size=1, layer=2, ino=9, path=b"else", blocks=8, **known))}
    )
    assert one.content == other.content
    assert one.storage != other.storage
    unknown = [write(pending, {b"f": encode(b"f", Entry(0o100644, size=1, layer=1, ino=ino))}) for ino in (5, 6)]
    assert unknown[0].content != unknown[1].content  # nobody knows whether these are equal


def _linked(pending: Pending, layer: int, groups: str) -> Ref:
    """sub/a to sub/d, files of one content, and one more directory without links; the letters say which are one file."""
    known: dict[str, Any] = {"digest": b"d" * 32, "nlink": 2}
    inner = write(
        pending,
        {
            name.encode(): encode(
                name.encode(), Entry(0o100644, size=1, layer=layer, ino=ord(group), link=(layer, ord(group)), **known)
            )
            for name, group in zip("abcd", groups, strict=True)
        },
    )
    return write(pending, {b"sub": _directory(b"sub", inner, layer=layer), b"plain": _directory(b"plain", EMPTY)})


def test_trees_that_differ_only_in_what_is_linked_differ() -> None:
    pending = Pending()
    one, same, other = (_linked(pending, *which) for which in ((1, "xxyy"), (2, "ppqq"), (2, "pqpq")))
    assert one.content == same.content == other.content  # the records differ, and a directory says that links are below
    roots = [_directory(b"", ref) for ref in (one, same, other)]
    assert list(compare(pending, roots[0], roots[1])) == []
    found = {change.path: change.what for change in compare(pending, roots[0], roots[2])}
    assert found == {b"sub/" + name: frozenset({"links"}) for name in (b"a", b"b", b"c", b"d")}


def test_big_directories_that_differ_only_in_what_is_linked_differ() -> None:
    pending = Pending()
    names = [b"%05d" % n for n in range(3000)]
    trees = []
    groupings: list[Callable[[int], int]] = [lambda n: n // 2, lambda n: 3000 + n // 4 * 2 + n % 2]
    for pairs in groupings:
        known: dict[str, Any] = {"digest": b"d" * 32, "nlink": 2}
        entries = {
            name: encode(name, Entry(0o100644, size=1, layer=1, ino=1, link=(1, pairs(n)), **known))
            for n, name in enumerate(names)
        }
        trees.append(_directory(b"", write(pending, entries)))
    assert len(list(compare(pending, trees[0], trees[1]))) == 3000
    assert list(compare(pending, trees[0], trees[0])) == []


def test_the_empty_directory_needs_no_record() -> None:
    assert write(Pending(), {}) == EMPTY
    assert hashlib.sha256(Pending().record(EMPTY.storage)).digest() == EMPTY.storage
    assert entries(Pending(), EMPTY.storage) == {}


def test_children_are_the_records_that_a_record_needs() -> None:
    pending = Pending()
    inner = write(pending, {b"f": _file(b"f")})
    outer = write(pending, {b"d": _directory(b"d", inner), b"g": _file(b"g")})
    assert children_of(pending.record(outer.storage)) == [inner.storage]
    assert pending.new[outer.storage][0] == inner.storage
    with pytest.raises(Corrupt):
        pending.record(b"n" * 32)


def test_a_comparison_reads_only_what_differs() -> None:
    pending = Pending()
    same = write(pending, {b"f": _file(b"f")})
    before = write(pending, {b"d": _directory(b"d", same), b"x": _file(b"x")})
    after = write(pending, {b"d": _directory(b"d", same), b"x": _file(b"x", 2), b"y": _file(b"y")})
    del pending.new[same.storage]  # reading it would be an error
    found = [(change.path, change.kind) for change in compare(pending, _directory(b"", before), _directory(b"", after))]
    assert found == [(b"x", "changed"), (b"y", "added")]


def test_files_that_only_the_reader_can_tell_apart_are_put_to_it() -> None:
    pending = Pending()
    one = write(pending, {b"f": encode(b"f", Entry(0o100644, size=4, layer=1, ino=5))})
    other = write(pending, {b"f": encode(b"f", Entry(0o100644, size=4, layer=2, ino=6))})
    asked = []

    def same(a_path: bytes, a: Entry, b_path: bytes, b: Entry) -> bool:
        asked.append((a_path, a.layer, b_path, b.layer))
        return False

    (change,) = compare(pending, _directory(b"", one), _directory(b"", other), same)
    assert change.what == {"content"}
    assert asked == [(b"f", 1, b"f", 2)]
    assert list(compare(pending, _directory(b"", one), _directory(b"", other))) == []


def test_a_renamed_directory_is_one_entry_over_the_old_record() -> None:
    pending = Pending()
    inner = write(pending, {b"f": _file(b"f"), b"own": _file(b"own", path=b"new/own")})
    root = write(pending, {b"new": _directory(b"new", inner, base=b"old", layer=2)})
    seen = IndexTree(pending, _directory(b"", root), {0: 0, 1: 0, 2: 1})
    new = seen.entries(seen.root())[b"new"]
    assert (new.path, new.layer, new.type) == (None, 1, 4)
    assert new.record is not None
    below = seen.entries(new.record)
    assert below[b"f"].path == b"old/f"
    assert below[b"own"].path == b"new/own"
    with pytest.raises(Corrupt):
        IndexTree(pending, _directory(b"", root), {0: 0, 1: 0}).entries(seen.root())[b"new"]


@pytest.mark.parametrize("count", [0, 1, 1024, 1025, 2049, 2500, 6000])
def test_entries_given_one_by_one_make_the_same_record(count: int) -> None:
    """Writer and write agree, below and above the size at which a directory is cut."""
    names = sorted(b"file-%d" % (number * 7919) for number in range(count))
    pairs = {name: encode(name, Entry(0o100644, size=len(name), layer=1)) for name in names}
    made = Pending()
    writer = directory.Writer(made)
    for name in names:
        writer.add(name, pairs[name])
    ref = writer.done()
    assert ref == write(Pending(), pairs)
    assert entries(made, ref.storage) == pairs


def test_records_beyond_the_budget_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found as before, and no name is left behind."""
    monkeypatch.setattr("cowfs.index.spool.BUDGET", 100)
    spill = Spill(str(tmp_path))
    wanted = {bytes([number]): (b"a" * number, b"b" * (255 - number)) for number in range(256)}
    spill.update(wanted)
    assert dict(spill.items()) == wanted
    assert spill.get(b"none") is None
    assert os.listdir(tmp_path) == []


@given(st.lists(st.tuples(st.integers(0, 1 << 64 - 1), st.binary(min_size=3, max_size=3)), max_size=200))
def test_values_by_inode_number(pairs: list[tuple[int, bytes]]) -> None:
    """The last of a number counts; bytes that look like a number inside another record are none."""
    kept = ByInode(3)
    for inode, value in pairs:
        kept[inode & 0xFF00000000000003] = value
    wanted = {inode & 0xFF00000000000003: value for inode, value in pairs}
    assert {inode: kept.get(inode) for inode in wanted} == wanted
    assert kept.get(5) is None
