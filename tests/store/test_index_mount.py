"""A mount of a snapshot reads its lower tree from the index: no directory of a lower layer is ever listed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cowfs.store import Store
from cowfs.testing import differences, tree_of

from .conftest import tree_path
from .test_machine import plain_tree, view_tree


@pytest.fixture
def chain(space: Path) -> Iterator[Store]:
    """Three layers with a rename of a directory, a metadata copy, hard links, a deletion and a recreated directory."""
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.prepare("k")
        with store.paths("k") as tree:
            tree.makedirs("old/sub")
            tree.write_bytes("old/file", b"one")
            tree.write_bytes("old/sub/deep", b"deep")
            tree.write_bytes("big", b"b" * 100_000)
            tree.write_bytes("gone", b"gone")
            tree.link("big", "old/big-too")
            tree.symlink("old", "link")
            tree.makedirs("again/inner")
        store.commit("k", "one")
        store.prepare("k", "one")
        with store.paths("k") as tree:
            tree.rename("old", "new")
            tree.chmod("big", 0o600)
            tree.unlink("gone")
            tree.setxattr("new/file", "user.note", b"second")
            tree.rmtree("again")
            tree.mkdir("again")
        store.commit("k", "two")
        store.prepare("k", "two")
        with store.paths("k") as tree:
            tree.write_bytes("new/sub/own", b"own")
            tree.rename("new", "newer")
            tree.chmod("newer/file", 0o711)
        store.commit("k", "three")
        yield store


@contextmanager
def listings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The directories that this process lists within the block."""
    seen: list[str] = []
    real_scan, real_list = os.scandir, os.listdir

    def where(target: Any) -> str:
        return (
            os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.path.realpath(os.fsdecode(target))
        )

    def scandir(target: Any = ".") -> Any:
        seen.append(where(target))
        return real_scan(target)

    def listdir(target: Any = ".") -> Any:
        seen.append(where(target))
        return real_list(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        patch.setattr(os, "listdir", listdir)
        yield seen


def test_no_lower_directory_is_listed(chain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.prepare("work", "three")
    own = chain.driver.directory(chain.index.get("work").id)
    with listings(monkeypatch) as seen, chain.paths("work") as tree:
        found = view_tree(tree)
        tree.write_bytes("newer/sub/deep", b"changed")
        tree.rename("newer/sub", "sub")
        tree.unlink("link")
    assert found["newer/sub/own"][2] == b"own"
    lower = [path for path in seen if path.startswith(f"{chain.root}/layers/") and not path.startswith(own)]
    assert lower == []


def test_the_index_shows_what_the_layers_show(chain: Store, space: Path) -> None:
    target = space / "mnt"
    target.mkdir()
    for name in ("one", "two", "three"):
        chain.view("look", name)
        with chain.mount("look", target, mount_type="kernel" if name != "one" else None):
            expected, whole = plain_tree(target), tree_of(target)
        with chain.paths("look") as tree:
            assert view_tree(tree) == expected
        with chain.mount("look", target):
            assert differences(whole, tree_of(target)) == []
        chain.remove("look")


def test_inode_numbers_are_those_of_the_first_layer(chain: Store) -> None:
    def inodes(name: str) -> dict[bytes, int]:
        chain.view("look", name)
        with chain.paths("look") as tree:
            found = {path: attr.ino for path, attr in tree.walk() if path}
        chain.remove("look")
        return found

    one, two, three = inodes("one"), inodes("two"), inodes("three")
    assert one[b"big"] == one[b"old/big-too"] == two[b"big"] == three[b"newer/big-too"]
    assert one[b"old/file"] == two[b"new/file"] == three[b"newer/file"]
    assert one[b"old/sub/deep"] == three[b"newer/sub/deep"]
    assert one[b"old/sub"] == three[b"newer/sub"]


def test_a_store_that_was_moved_still_mounts(chain: Store, space: Path) -> None:
    chain.close()
    os.rename(space / "store", space / "moved")
    (space / "mnt").mkdir()
    with Store.open(space / "moved", fsync=False) as store:
        store.prepare("work", "three")
        with store.mount("work", space / "mnt"):
            assert (space / "mnt" / "newer" / "sub" / "own").read_text() == "own"
            (space / "mnt" / "x").write_text("x")
        store.commit("work", "four")
        assert store.check(content=True).problems == []


def test_a_layer_of_kernel_overlayfs_is_read_like_our_own(chain: Store, space: Path) -> None:
    """Layers of the kernel (redirects, metacopies, opaque directories) become the same records."""
    target = space / "mnt"
    target.mkdir()
    script = (
        "mv newer moved && chmod 755 big && rm -r again && mkdir again && touch again/x && ln moved/file hard"
        " && mkdir -p deep/er && mv moved/sub deep/er/sub && chown 7:8 deep/er/sub/deep"
    )
    chain.prepare("k", "three")
    with chain.mount("k", target, mount_type="kernel"):
        subprocess.run(["sh", "-ec", script], cwd=target, check=True)
        expected = tree_of(target)
    chain.commit("k", "four")
    chain.view("look", "four")
    with chain.mount("look", target):
        assert differences(expected, tree_of(target)) == []
    chain.remove("look")
    chain.prepare("k", "four")
    (tree_path(chain, "k") / "more").write_text("m")
    chain.commit("k", "five")
    assert [change.path for change in chain.diff("five") if change.kind == "added"] == [b"more"]
