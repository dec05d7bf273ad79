"""Block-level differences: small, exact, and nothing in them is trusted."""

from __future__ import annotations

import io
import os
import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cowfs.diff import blocks
from cowfs.errors import Corrupt, CowfsError, FailedPrecondition, InvalidArgument
from cowfs.store import Store
from cowfs.testing import differences, tree_of

DRIVERS = ("row", "overlay", "vfs")


@pytest.fixture
def stores(space: Path) -> Iterator[dict[str, Store]]:
    """A store of each driver, with the same base."""
    (space / "mnt").mkdir()
    with ExitStack() as stack:
        made = {}
        for driver in DRIVERS:
            store = stack.enter_context(Store.open(space / driver, driver=driver, fsync=False))
            store.prepare("make")
            with store.mount("make", space / "mnt", mount_type="fuse"):
                fill(space / "mnt")
            store.commit("make", "base")
            made[driver] = store
        yield made


def fill(tree: Path) -> None:
    (tree / "dir" / "sub").mkdir(parents=True)
    (tree / "dir" / "sub" / "deep").write_text("deep")
    (tree / "big").write_bytes(random.Random(1).randbytes(1 << 20))
    (tree / "short").write_bytes(random.Random(2).randbytes(100_000))
    (tree / "gone").write_text("gone")
    (tree / "kind").write_text("a file")
    os.symlink("big", tree / "link")
    for path in (*tree.rglob("*"), tree):
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)


def change(tree: Path) -> None:
    with (tree / "big").open("r+b") as file:
        os.pwrite(file.fileno(), b"x" * 4096, 40 * 4096)
        os.pwrite(file.fileno(), b"y" * 10, 700_000)
        os.pwrite(file.fileno(), bytes(8192), 800 * 1024)
        os.ftruncate(file.fileno(), (1 << 20) + 5000)
    with (tree / "short").open("r+b") as file:
        os.ftruncate(file.fileno(), 50_001)
    (tree / "gone").unlink()
    (tree / "kind").unlink()
    (tree / "kind").mkdir()
    (tree / "kind" / "inner").write_bytes(b"inner" * 1000)
    os.link(tree / "kind" / "inner", tree / "kind" / "twin")
    (tree / "dir" / "sub" / "deep").chmod(0o600)
    os.setxattr(tree / "dir", "user.note", b"kept")
    (tree / "link").unlink()
    os.symlink("other", tree / "link")
    os.mkfifo(tree / "fifo")


@pytest.mark.parametrize("source", DRIVERS)
@pytest.mark.parametrize("target", DRIVERS)
def test_applied_elsewhere_it_gives_the_same_tree(
    stores: dict[str, Store], space: Path, source: str, target: str
) -> None:
    one, other, mnt = stores[source], stores[target], space / "mnt"
    one.prepare("work", "base")
    with one.mount("work", mnt, mount_type="fuse"):
        change(mnt)
        wanted = tree_of(mnt)
    one.commit("work", "new")
    stream = io.BytesIO()
    counts = one.export_blocks("new", stream)
    assert counts.size == len(stream.getvalue()) < 30_000
    stream.seek(0)
    other.prepare("got", "base")
    assert other.apply_blocks("got", stream).paths == counts.paths
    with other.mount("got", mnt, mount_type="fuse"):
        assert differences(wanted, tree_of(mnt)) == []


def test_a_changed_block_of_a_huge_file_travels_as_one_block(space: Path) -> None:
    mnt = space / "mnt"
    mnt.mkdir()
    with Store.open(space / "row", driver="row", fsync=False) as store:
        store.prepare("make")
        with store.mount("make", mnt), (mnt / "huge").open("wb") as file:
            file.truncate(10 << 30)
        store.commit("make", "base")
        store.prepare("work", "base")
        with store.mount("work", mnt), (mnt / "huge").open("r+b") as file:
            os.pwrite(file.fileno(), b"b" * 4096, 5 << 30)
        store.commit("work", "new")
        stream = io.BytesIO()
        counts = store.export_blocks("new", stream)
        assert counts.data == 4096
        assert counts.size < 5000
        stream.seek(0)
        store.prepare("again", "base")
        store.apply_blocks("again", stream)
        assert store.usage("again").bytes == 4096


def made(stores: dict[str, Store], space: Path) -> bytes:
    store = stores["row"]
    store.prepare("work", "base")
    with store.mount("work", space / "mnt"):
        change(space / "mnt")
    store.commit("work", "new")
    stream = io.BytesIO()
    store.export_blocks("new", stream)
    return stream.getvalue()


def test_it_is_refused_where_it_does_not_belong(stores: dict[str, Store], space: Path) -> None:
    data = made(stores, space)
    store = stores["row"]
    store.prepare("other", "new")
    with pytest.raises(FailedPrecondition):
        store.apply_blocks("other", io.BytesIO(data))
    assert list(store.diff("other")) == []


def test_damage_is_found(stores: dict[str, Store], space: Path) -> None:
    data = made(stores, space)
    store, rnd = stores["row"], random.Random(4)
    store.prepare("got", "base")
    for cut in (0, 10, 48, 60, len(data) // 2, len(data) - 1):
        with pytest.raises((Corrupt, InvalidArgument)):
            store.apply_blocks("got", io.BytesIO(data[:cut]))
    for _ in range(60):
        at = rnd.randrange(16, len(data))
        broken = data[:at] + bytes([data[at] ^ 1 << rnd.randrange(8)]) + data[at + 1 :]
        with pytest.raises(CowfsError):
            store.apply_blocks("got", io.BytesIO(broken))


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out", "", "dir//x", "link/x"])
def test_no_path_leads_out(stores: dict[str, Store], space: Path, path: str) -> None:
    store = stores["row"]
    store.prepare("got", "base")
    base = store.services.blocks.identity(store.resolve("base"))
    meta = blocks._json({"path": path, "kind": "added", "mode": 0o100644, "uid": 0, "gid": 0, "mtime": 0, "size": 3})
    stream = struct.pack("<8sHHI32s", b"COWFSBLK", 1, 0, 4096, base) + struct.pack("<cI", b"M", len(meta)) + meta
    with pytest.raises(CowfsError):
        store.apply_blocks("got", io.BytesIO(stream))
    assert not list(space.rglob("out"))
