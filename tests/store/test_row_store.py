"""Redirect files in a store, through real mounts: live snapshots, rollback, squash, compaction."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.errors import Unsupported
from cowfs.store import Store

SIZE = 2 << 20


@pytest.fixture
def store(space: Path) -> Iterator[Store]:
    (space / "mnt").mkdir()
    with Store.open(space / "store", driver="row", fsync=False) as opened:
        opened.prepare("make")
        with opened.mount("make", space / "mnt"):
            (space / "mnt" / "big").write_bytes(random.Random(1).randbytes(SIZE))
            (space / "mnt" / "other").write_bytes(random.Random(2).randbytes(SIZE))
        opened.commit("make", "base")
        yield opened


def poke(path: Path, model: bytearray, rnd: random.Random, times: int = 20) -> None:
    with path.open("r+b", buffering=0) as file:
        for _ in range(times):
            offset, data = rnd.randrange(SIZE - 9000), rnd.randbytes(rnd.randrange(1, 9000))
            os.pwrite(file.fileno(), data, offset)
            model[offset : offset + len(data)] = data


def test_live_snapshots_rollback_and_squash_of_a_redirect_file(store: Store, space: Path) -> None:
    mnt, rnd = space / "mnt", random.Random(3)
    model = bytearray((random.Random(1)).randbytes(SIZE))
    states: dict[str, bytes] = {}
    store.prepare("work", "base")
    with store.mount("work", mnt):
        with (mnt / "big").open("r+b", buffering=0) as held:
            for name in ("one", "two", "three"):
                poke(mnt / "big", model, rnd)
                store.snapshot("work", name)
                states[name] = bytes(model)
                os.pwrite(held.fileno(), b"between", 100)
                model[100:107] = b"between"
                os.fsync(held.fileno())
                assert (mnt / "big").read_bytes() == bytes(model)
        store.rollback("work", "two")
        assert (mnt / "big").read_bytes() == states["two"]
    store.remove("three")
    store.squash("one")
    assert store.check().problems == []
    store.view("look", "two")
    with store.mount("look", mnt):
        assert (mnt / "big").read_bytes() == states["two"]
    with store.mount("work", mnt):
        assert (mnt / "big").read_bytes() == states["two"]


def test_usage_is_what_was_written(store: Store, space: Path) -> None:
    store.prepare("work", "base", size="64k")
    with store.mount("work", space / "mnt") as mount:
        with (space / "mnt" / "big").open("r+b", buffering=0) as file:
            for block in (3, 77, 200):
                os.pwrite(file.fileno(), bytes(4096), block * 4096)
            os.fsync(file.fileno())
        assert mount.usage().bytes == 3 * 4096
    assert store.usage("work").bytes == 3 * 4096


def test_commit_compacts_when_asked(store: Store, space: Path) -> None:
    mnt = space / "mnt"
    store.prepare("work", "base")
    with store.mount("work", mnt):
        with (mnt / "big").open("r+b", buffering=0) as file:
            for at in range(0, SIZE * 9 // 10, 1 << 16):
                os.pwrite(file.fileno(), b"n" * (1 << 16), at)
        wanted = (mnt / "big").read_bytes()
        assert store.compact("work").files == 1
        assert (mnt / "big").read_bytes() == wanted
    store.commit("work", "done", compact=True)
    tree = Path(store.driver.tree(store.index.get("done").id))
    assert (tree / "big").read_bytes() == wanted
    assert store.check().problems == []


def test_other_drivers_have_nothing_to_compact(space: Path) -> None:
    with Store.open(space / "plain", driver="overlay", fsync=False) as other:
        other.prepare("work")
        with pytest.raises(Unsupported):
            other.compact("work")
