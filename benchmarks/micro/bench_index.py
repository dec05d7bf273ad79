"""The index: directory records made, read and compared."""

from __future__ import annotations

import stat
from typing import Any

from cowfs.index import directory
from cowfs.index.directory import Entry, Pair, Pending

NAMES = 10_000


def _entry(at: int) -> Entry:
    return Entry(
        mode=stat.S_IFREG | 0o644,
        size=at,
        mtime_ns=1_700_000_000_000_000_000 + at,
        ino=1000 + at,
        layer=1,
    )


def _tree(changed: int = 0) -> tuple[Pending, directory.Ref]:
    pending = Pending()
    pairs: dict[bytes, Pair] = {}
    for at in range(NAMES):
        name = b"file-%06d" % at
        pairs[name] = directory.encode(name, _entry(at + (1_000_000 if at < changed else 0)))
    return pending, directory.write(pending, pairs)


def test_encode(benchmark: Any) -> None:
    benchmark(directory.encode, b"libpython3.11.so", _entry(7))


def test_decode(benchmark: Any) -> None:
    pair = directory.encode(b"libpython3.11.so", _entry(7))
    assert benchmark(directory.decode, pair).size == 7


def test_record_of_ten_thousand_names(benchmark: Any) -> None:
    benchmark(_tree)


def test_find_one_of_ten_thousand(benchmark: Any) -> None:
    pending, ref = _tree()
    assert benchmark(directory.find, pending, ref.storage, b"file-004711") is not None


def test_diff_of_ten_changes_in_ten_thousand(benchmark: Any) -> None:
    old, before = _tree()
    new, after = _tree(10)
    old.new.update(new.new)
    assert len(benchmark(lambda: list(directory.differing(old, before, after)))) == 10
