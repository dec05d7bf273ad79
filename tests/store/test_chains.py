"""Chains of snapshots, each written over the one before: every one shows what a plain directory does.

Between a few random operations the active snapshot is committed and a new one prepared, or just opened again. Lower layers
are read through the index, which records what the layers before left (redirects, metacopies, hard links whose names and
data are in different layers), or by themselves.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support import mounts, stacks
from support.forgetting import InView, Pair

from cowfs.store import Store
from cowfs.sys import faults
from cowfs.union.paths import Paths

from .conftest import view_of


class Chain(Pair):
    """The key ``k`` of a store, over a random stack of layers committed one by one."""

    def __init__(self, base: Path, seed: int, driver: str) -> None:
        super().__init__(base / "plain", seed)
        lowers = stacks.random_stack(self.rng.randrange(1 << 20), self.rng.choice((3, 8, 15, 23)), base)
        for name in ("kernel", "plain"):
            (base / name).mkdir()
        with mounts.overlay(lowers, base / "kernel"):
            mounts.copy_tree(base / "kernel", base / "plain")
        self.store = Store.open(base / "store", driver=driver, fsync=False)
        self.number = 0
        self.opened = ExitStack()
        self.store.prepare("k")
        for layer in lowers:
            tree = self.store.driver.tree(self.store.index.get("k").id)
            subprocess.run(["cp", "-a", f"{os.fspath(layer)}/.", tree], check=True)
            self.commit()
        self.open()

    def open(self) -> None:
        """With the index, or as one who knows nothing of the store would mount the same layers."""
        if self.rng.random() < 0.7:
            self.ours = InView(self.opened.enter_context(self.store.paths("k")).view)
        else:
            self.ours = InView(view_of(self.store, "k"))
            self.opened.callback(self.ours.view.close)

    def shut(self) -> None:
        self.let_go()
        self.opened.close()

    def commit(self) -> None:
        self.number += 1
        self.store.commit("k", f"c{self.number}")
        self.store.prepare("k", f"c{self.number}")

    def again(self, commit: bool) -> None:
        self.log.append("commit" if commit else "open again")
        self.shut()
        if commit:
            self.commit()
        self.open()
        self.compare()


@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_each_snapshot_of_a_chain_equals_a_plain_directory(
    space: Path, driver: str, can_mount: None, request: pytest.FixtureRequest
) -> None:
    os.umask(0o022)
    for number in range(request.config.getoption("--steps") // 2500):
        base = space / f"{number}"
        base.mkdir()
        chain = Chain(base, request.config.getoption("--seed") + number, driver)
        for _ in range(180):
            chain.step()
            if (dice := chain.rng.random()) < 0.03:
                chain.again(commit=dice < 0.015)
        chain.again(commit=True)
        chain.shut()
        assert chain.store.check(content=True).problems == [], chain.story("check")
        chain.store.close()
        shutil.rmtree(base)


@pytest.fixture
def store(space: Path) -> Iterator[Store]:
    with Store.open(space / "store", driver="overlay", fsync=False) as opened:
        opened.prepare("k")
        yield opened


@contextmanager
def written(store: Store, name: str) -> Iterator[Paths]:
    """Change ``k``, commit it under a name, and prepare the next ``k`` on it."""
    with store.paths("k") as tree:
        yield tree
    store.commit("k", name)
    store.prepare("k", name)


def test_a_hard_link_to_a_file_whose_data_is_layers_below_is_written_under_all_its_names(store: Store) -> None:
    """Its names are in a layer with its attributes alone; where its data is, it had one name."""
    with written(store, "data") as tree:
        tree.write_bytes("one", b"old " * 5000)
    with written(store, "names") as tree:
        tree.link("one", "two")
    with store.paths("k") as tree:
        tree.write_at("two", 0, b"new ")
        assert tree.read_bytes("one", 0, 8) == b"new old "
        assert tree.stat("one").nlink == 2


def test_a_hard_link_that_was_copied_up_twice_has_one_number(store: Store) -> None:
    with written(store, "first") as tree:
        tree.symlink("x", "a")
    with written(store, "second") as tree:
        tree.rename("a", "b")
    with written(store, "third") as tree:
        tree.link("b", "c")
    with store.paths("k") as tree:
        assert stat.S_ISLNK(tree.stat("b").mode)
        assert tree.stat("b").ino == tree.stat("c").ino


def test_a_file_moved_to_a_directory_with_an_empty_lower_one_keeps_its_number(store: Store) -> None:
    with written(store, "first") as tree:
        tree.mkdir("empty")
        tree.write_bytes("file", b"x")
    with store.paths("k") as tree:
        before = tree.stat("file").ino
        tree.chmod("empty", 0o700)
        tree.rename("file", "empty/file")
    with store.paths("k") as tree:
        assert tree.stat("empty/file").ino == before


def test_a_metacopy_of_a_metacopy_is_renamed(store: Store) -> None:
    """The redirect says where the file is right beneath, not where the layers beneath say that its data is."""
    with written(store, "data") as tree:
        tree.write_bytes("a", b"data" * 5000)
    with written(store, "moved") as tree:
        tree.rename("a", "b")
        tree.mkdir("a")
    view = view_of(store, "k")
    tree = Paths(view)
    tree.chmod("b", 0o600)
    view.close()
    view = view_of(store, "k")
    tree = Paths(view)
    tree.rename("b", "c")
    view.close()
    with store.paths("k") as tree:
        assert tree.read_bytes("c", 0, 4) == b"data"


def test_a_redirect_file_that_was_renamed_keeps_its_number(space: Path) -> None:
    """Its data stays in the layer that wrote it, under the name that it had there."""
    with Store.open(space / "store", driver="row", fsync=False) as store:
        store.prepare("k")
        with written(store, "data") as tree:
            tree.write_bytes("f", b"x" * 50_000)
        with written(store, "blocks") as tree:
            tree.write_at("f", 5000, b"block")
        with written(store, "renamed") as tree:
            tree.rename("f", "g")
        with store.paths("k") as tree:
            before = tree.stat("g").ino
            tree.chmod("g", 0o600)
        with store.paths("k") as tree:
            assert tree.stat("g").ino == before
            assert tree.read_bytes("g", 4999, 7) == b"xblockx"


def test_files_that_changed_places_keep_numbers_of_their_own(store: Store) -> None:
    with written(store, "first") as tree:
        tree.mkdir("d")
        tree.write_bytes("one", b"1")
        tree.write_bytes("d/two", b"")
    before = {}
    with store.paths("k") as tree:
        before = {"d/two": tree.stat("one").ino, "three": tree.stat("d/two").ino}
        tree.chmod("d/two", 0o600)
        tree.chmod("one", 0o600)
        tree.rename("d/two", "three")
        tree.truncate("one", 0)
        tree.rename("one", "d/two")
    store.commit("k", "second")
    store.prepare("k", "second")
    with store.paths("k") as tree:
        assert {path: tree.stat(path).ino for path in before} == before


@pytest.mark.parametrize("driver", ["overlay", "row", "aufs"])
@pytest.mark.parametrize("last", ["nothing", "attributes", "emptied"])
def test_squash_keeps_the_root_of_a_tree_that_holds_nothing_else(space: Path, driver: str, last: str) -> None:
    """A comparison with nothing names no root: one without a name in it was left as the driver makes it."""
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        store.prepare("k")
        with store.paths("k") as paths:
            paths.chown("", 5, 6)
            paths.chmod("", 0o2711)
            paths.setxattr("", b"user.x", b"y")
            if last == "emptied":
                paths.write_bytes("f", b"x")
            paths.utime("", mtime_ns=1_234_567_891)
        store.commit("k", "first")
        store.prepare("k", "first")
        with store.paths("k") as paths:
            if last == "attributes":
                paths.chmod("", 0o750)
                paths.removexattr("", b"user.x")
            elif last == "emptied":
                paths.unlink("f")
                paths.utime("", mtime_ns=9_000_000_001)
        store.commit("k", "second")
        store.squash("first")
        store.prepare("k", "second")
        with store.paths("k") as paths:
            found = paths.stat("")
            assert (found.uid, found.gid) == (5, 6)
            assert stat.S_IMODE(found.mode) == (0o750 if last == "attributes" else 0o2711)
            assert found.mtime_ns == (9_000_000_001 if last == "emptied" else 1_234_567_891)
            assert paths.listxattr("") == ([] if last == "attributes" else [b"user.x"])
        assert not list(store.diff("k"))
        assert not store.check(content=True).problems


@pytest.mark.parametrize("driver", ["overlay", "row", "aufs"])
@pytest.mark.parametrize("other", ["child", "tag"])
def test_a_snapshot_that_got_a_user_while_its_child_took_it_over_stays(
    space: Path, driver: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record stayed, as it should, and its layer was deleted."""
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        store.prepare("k")
        with store.paths("k") as paths:
            paths.write_bytes("f", b"of the snapshot")
        store.commit("k", "snapshot")
        store.prepare("k", "snapshot")

        def at(name: str) -> None:
            if name == "squash.absorbed":
                store.prepare("second", "snapshot") if other == "child" else store.tag("name", "snapshot")

        monkeypatch.setattr(faults, "hook", at)
        store.squash("snapshot")
        monkeypatch.setattr(faults, "hook", None)
        if other == "tag":
            store.prepare("second", "name")
        for key in ("k", "second"):
            with store.paths(key) as paths:
                assert paths.read_bytes("f") == b"of the snapshot"
        assert not store.check(content=True).problems
