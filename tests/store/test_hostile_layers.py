"""Hostile layers, applied to a store of each driver: refused in one line or contained; nothing outside changes, and the store stays whole."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.archives import canaries, directory, hardlink, member, symlink, tar
from support.drivers import ALL
from support.hostile import CONTAINED, OUT, REFUSED, SMUGGLED

from cowfs.errors import CowfsError
from cowfs.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="subvolumes, datasets and images are root's")


@pytest.fixture(params=ALL)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(home: Path, driver: str, can_mount: None) -> Iterator[Store]:
    with Store.open(home / "store", driver=driver, fsync=False) as store:
        store.prepare("k")
        yield store


@contextlib.contextmanager
def guarded(store: Store, key: str) -> Iterator[str]:
    """An active key's tree, there for all archives of a test, with canaries where ``../outside`` leads from it; yields their path."""
    id = store.index.get(key).id
    with store.driver.open_tree(id):
        beside = Path(store.driver.tree(id)).parent
        with canaries(beside):
            yield str(beside / "outside")
        shutil.rmtree(beside / "outside")


def test_each_is_refused_in_one_line_and_nothing_outside_changes(store: Store) -> None:
    with guarded(store, "k") as outside:
        for case, (build, message) in REFUSED.items():
            with pytest.raises((CowfsError, OSError)) as caught:
                store.apply("k", io.BytesIO(build(outside)))
            assert "\n" not in str(caught.value), case
            if store.driver.capabilities.xattrs:
                caught.match(message)
    assert store.check(content=True).damage == []


def test_links_planted_by_a_layer_beneath_are_never_followed(store: Store) -> None:
    """With a driver of deltas they are in another layer, with one of whole trees in the copy of it."""
    names = ("a", "b", "d", "l", "h", "x", "dir", "gone", "opq", "implied")
    store.apply("k", io.BytesIO(tar(*(symlink(name, OUT) for name in names), symlink("file", f"{OUT}/file"))))
    store.commit("k", "planted")
    store.prepare("again", "planted")
    with guarded(store, "again") as outside:
        for build, _ in REFUSED.values():
            with contextlib.suppress(CowfsError, OSError):
                store.apply("again", io.BytesIO(build(outside)))
        layer = [
            directory("dir", mode=0o777, uid=5), member("dir/file", b"evil"), member("file", b"evil"),
            member(".wh.gone"), member("opq/.wh..wh..opq"), member("implied/file", b"evil"),
            member("hard", b"x"), hardlink("hard2", "hard"),
        ]  # fmt: skip
        store.apply("again", io.BytesIO(tar(*layer)))
    store.commit("again", "top")
    assert (b"gone", "deleted") in {(change.path, change.kind) for change in store.diff("planted", "top")}
    store.view("look", "top")
    with store.paths("look") as paths:
        assert paths.read_bytes(b"file") == paths.read_bytes(b"implied/file") == b"evil"
        assert not paths.exists(b"gone")
    assert store.check(content=True).problems == []


def test_the_others_are_contained(store: Store) -> None:
    with guarded(store, "k"):
        for archive in CONTAINED.values():
            store.apply("k", io.BytesIO(archive))
    store.commit("k", "done")
    assert store.check(content=True).problems == []


def test_no_attribute_of_an_overlay_is_smuggled_in(store: Store) -> None:
    pax = {f"SCHILY.xattr.{name}": "y" for name in SMUGGLED} | {"SCHILY.xattr.user.fine": "kept"}
    layer = tar(directory("d", pax=pax), member("d/f", b"x", pax=pax))
    if not store.driver.capabilities.xattrs:
        with pytest.raises(CowfsError, match="xattr"):
            store.apply("k", io.BytesIO(layer))
        return
    store.apply("k", io.BytesIO(layer))
    store.commit("k", "done")
    store.view("look", "done")
    with store.paths("look") as paths:
        assert {path: [bytes(name) for name in paths.listxattr(path)] for path in (b"d", b"d/f")} == {
            b"d": [b"user.fine"],
            b"d/f": [b"user.fine"],
        }
