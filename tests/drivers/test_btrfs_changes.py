"""The changes of a layer from the btrfs driver are those that a full scan finds, at the cost of the changes alone."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.histories import Draw
from support.hostfs import HostFs
from support.ops import Actor

from cowfs.index import scan
from cowfs.index.scan import Scanned, scan_full
from cowfs.store import Store
from cowfs.store.layers import Unchanged
from cowfs.sys import btrfs

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="subvolumes are deleted by root"),
    pytest.mark.parametrize("fs", ["btrfs"], indirect=True),
]


def both_ways(store: Store, key: str) -> tuple[Scanned, Scanned | None]:
    """A layer scanned whole, and where the stream says."""
    row = store.index.get(key)
    parent = store.index.by_num(row.parent) if row.parent is not None else None
    driver = store.driver
    with driver.open_tree(row.id) as fd:
        same = Unchanged(driver, store.index, row.id, fd)
        whole = scan_full(
            fd, num=row.num, form=driver.form, base=parent.root if parent else None, records=store.index, same=same
        )
        return whole, store.services.scanning.scan_changes(row.id, row.num, parent, fd, same, None)


def check_both(store: Store, key: str) -> None:
    whole, changed = both_ways(store, key)
    assert changed is not None
    assert changed.root == whole.root
    assert (changed.usage, changed.sums) == (whole.usage, whole.sums)


@pytest.mark.parametrize("seed", range(6))
def test_a_commit_that_reads_what_changed_records_what_a_whole_scan_does(
    seed: int, fs: HostFs, request: pytest.FixtureRequest
) -> None:
    """Random changes over chains of snapshots, directories renamed and files linked among them."""
    steps = max(300, request.config.getoption("--history") // 20)
    with Store.open(fs.fresh("model") / "store", driver="btrfs", fsync=False) as store:
        store.prepare("k")
        store.commit("k", "n0")
        rng = random.Random(seed)
        done, number = 0, 0
        while done < steps:
            store.prepare("k", f"n{number}")
            tree = store.driver.tree(store.index.get("k").id)
            actor = Actor(tree, 0)
            draw = Draw(rng.randrange(1 << 30), tree, True)
            history = []
            for _ in range(rng.choice([1, 2, 5, 40])):
                history.append(draw.operation())
                actor.do(history[-1])
                done += 1
            actor.close()
            try:
                check_both(store, "k")
            except AssertionError:
                print(history)
                raise
            number += 1
            store.commit("k", f"n{number}")
        assert store.check(content=True).problems == []
        for name in (f"n{number}", f"n{number // 2}"):
            id = store.index.get(name).id
            noted = store.driver.noted(id)
            assert noted is not None
            assert noted[0] == store.driver.usage(id)


@pytest.fixture
def work(fs: HostFs) -> Iterator[tuple[Store, Path]]:
    """A store with the key ``k`` over a small tree, and the tree of ``k``."""
    with Store.open(fs.fresh("changes") / "store", driver="btrfs", fsync=False) as store:
        store.prepare("k")
        tree = Path(store.driver.tree(store.index.get("k").id))
        for name in ("a/b/c", "d", "e"):
            (tree / name).mkdir(parents=True)
        for name in ("a/1", "a/b/2", "a/b/c/3", "d/4", "5"):
            (tree / name).write_text(name)
        os.link(tree / "a" / "b" / "2", tree / "d" / "link")
        store.commit("k", "base")
        store.prepare("k", "base")
        yield store, Path(store.driver.tree(store.index.get("k").id))


def _replace_directory(tree: Path) -> None:
    shutil.rmtree(tree / "a")
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "new").touch()


def _swap(tree: Path) -> None:
    os.rename(tree / "a", tree / "x")
    os.rename(tree / "d", tree / "a")
    os.rename(tree / "x", tree / "d")
    (tree / "d" / "b" / "2").write_text("through one name")


def _move_with_link(tree: Path) -> None:
    os.rename(tree / "a" / "b", tree / "e" / "b")


def _move_out_and_remove(tree: Path) -> None:
    os.rename(tree / "a" / "b", tree / "moved")
    os.rename(tree / "moved" / "c", tree / "e" / "c")
    os.unlink(tree / "moved" / "2")
    os.rename(tree / "a", tree / "moved" / "a")


def _hide_an_edit(tree: Path) -> None:
    before = os.stat(tree / "a" / "1")
    (tree / "a" / "1").write_text("A/1")
    os.utime(tree / "a" / "1", ns=(before.st_atime_ns, before.st_mtime_ns))


def _file_for_directory(tree: Path) -> None:
    shutil.rmtree(tree / "a")
    (tree / "a").write_text("a file now")
    os.unlink(tree / "5")
    (tree / "5").mkdir()
    os.link(tree / "d" / "4", tree / "5" / "4")


def _split_links(tree: Path) -> None:
    shutil.copy2(tree / "d" / "link", tree / "copy")
    os.rename(tree / "copy", tree / "d" / "link")


def _root_only(tree: Path) -> None:
    os.chmod(tree, 0o711)
    os.setxattr(tree, "user.note", b"root")


@pytest.mark.parametrize(
    "change",
    [
        _replace_directory, _swap, _move_with_link, _move_out_and_remove, _hide_an_edit, _file_for_directory, _split_links,
        _root_only, lambda tree: None,
    ],
)  # fmt: skip
def test_changes_come_out_as_a_whole_scan_has_them(change: Callable[[Path], None], work: tuple[Store, Path]) -> None:
    store, tree = work
    change(tree)
    check_both(store, "k")
    store.commit("k", "done")
    assert store.check(content=True).problems == []


def test_a_commit_reads_no_more_than_what_changed(work: tuple[Store, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store, tree = work
    (tree / "e" / "new").write_text("new")
    read: list[bytes] = []
    make = scan.Full.make

    def noted(self: scan.Full, frame: scan.Frame, name: bytes, *more: Any) -> Any:
        read.append(name)
        return make(self, frame, name, *more)

    monkeypatch.setattr(scan.Full, "make", noted)
    store.commit("k", "done")
    assert read == [b"new"]
    assert [(change.kind, change.path) for change in store.diff("done") if change.type != "dir"] == [
        ("added", b"e/new")
    ]


def test_subvolumes_that_users_made_are_read_though_no_stream_tells_of_them(work: tuple[Store, Path]) -> None:
    store, tree = work
    fd = os.open(tree / "d", os.O_RDONLY)
    btrfs.create(fd, b"inner")
    os.close(fd)
    (tree / "d" / "inner" / "file").write_text("x")
    store.commit("k", "done")
    assert (b"d/inner/file") in {change.path for change in store.diff("base", "done")}
    store.prepare("k", "done")  # a snapshot has an empty directory in that place
    assert both_ways(store, "k")[1] is None
    store.commit("k", "next")
    assert ("deleted", b"d/inner/file") in {(change.kind, change.path) for change in store.diff("done", "next")}


def test_a_snapshot_left_by_a_killed_commit_goes_with_the_next_and_with_the_layer(work: tuple[Store, Path]) -> None:
    store, tree = work
    directory = Path(store.driver.directory(store.index.get("k").id))

    def leave() -> None:
        with (
            store.driver.open_tree(store.index.get("k").id),
            Opened(directory) as at,
            Opened(directory / "vol") as volume,
        ):
            btrfs.snapshot(volume, at, b"sent", readonly=True)

    leave()
    (tree / "new").write_text("new")
    check_both(store, "k")
    assert sorted(path.name for path in directory.iterdir() if not path.name.startswith("cowfs")) == ["vol"]
    leave()
    store.remove("k")
    assert not directory.exists()


class Opened:
    """A directory, open for the length of a block."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)


def test_more_changes_than_are_kept_in_memory_have_the_layer_read_whole(
    work: tuple[Store, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tree = work
    for number in range(3000):
        (tree / f"new-{number}").touch()
    monkeypatch.setattr("cowfs_drivers.btrfs._MOST", 5)
    assert both_ways(store, "k")[1] is None
    assert "sent" not in os.listdir(Path(tree).parents[1])
    store.commit("k", "done")
    assert store.usage("done").inodes == 3000
