"""The driver aufs: frozen layers say by names what is deleted, show what was mounted, and are the archives that they export."""

from __future__ import annotations

import io
import os
import random
import stat
import tarfile
from pathlib import Path

import pytest
from support import trees

from cowfs.format import whiteout
from cowfs.format.aufs import keep_by_names
from cowfs.store import Store

from .test_kernel_image import step

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="devices and owners: needs root")


def marks_in(layer: Path) -> tuple[set[str], list[str]]:
    """(names that begin with .wh., whiteouts and marks of overlayfs) of a layer's tree."""
    names, others = set(), []
    for path in (layer, *layer.rglob("*")):
        st = path.lstat()
        if path.name.startswith(".wh."):
            names.add(str(path.relative_to(layer)))
            assert stat.S_ISREG(st.st_mode)
            assert st.st_size == 0
        if whiteout.is_whiteout(st):
            others.append(str(path))
        if path.is_dir() and not path.is_symlink() and "user.overlay.opaque" in os.listxattr(path):
            others.append(str(path))
    return names, others


def seen(store: Store, name: str, at: Path) -> trees.Tree:
    store.view("look", name)
    try:
        with store.mount("look", at):
            return trees.snapshot(str(at))
    finally:
        store.remove("look")


@pytest.mark.parametrize("seed", range(4))
def test_a_frozen_layer_shows_what_was_mounted(tmp_path: Path, can_mount: None, seed: int) -> None:
    """Random changes in a chain: the same tree before and after the commit, in the exported archives, and after a squash."""
    rng = random.Random(seed)
    at = tmp_path / "at"
    at.mkdir()
    with (
        Store.open(tmp_path / "aufs", driver="aufs", fsync=False) as store,
        Store.open(tmp_path / "other", driver="overlay", fsync=False) as other,
    ):
        parent = None
        for number in range(6):
            store.prepare("key", parent)
            with store.mount("key", at):
                for _ in range(50):
                    step(rng, at)
                before = trees.snapshot(str(at))
            other.prepare("key", parent)
            parent = f"c{number}"
            store.commit("key", parent)
            layer = Path(store.driver.tree(store.index.get(parent).id))
            names, others = marks_in(layer)
            assert others == []
            assert trees.differences(before, seen(store, parent, at)) == []
            archive = io.BytesIO()
            store.export(parent, archive, format="layer")
            with tarfile.open(fileobj=io.BytesIO(archive.getvalue())) as members:
                listed = {member.name for member in members if ".wh." in member.name}
            assert listed <= names  # an export says what differs; a directory that is new needs no mark there
            archive.seek(0)
            other.apply("key", archive)
            other.commit("key", parent)
            found = trees.differences(before, seen(other, parent, at))
            # An archive has no attribute that overlayfs would take for its own, none of the root's times, and does not say that a
            # file beneath has one name less.
            silent = ("/: mtime", ": xattrs", ": nlink")
            assert [line for line in found if not any(word in line for word in silent)] == []
        assert store.check(content=True).damage == []
        for name in ("c1", "c3"):
            store.squash(name)
        assert store.check(content=True).damage == []
        assert trees.differences(before, seen(store, "c5", at)) == []
        for info in store.walk():
            assert marks_in(Path(store.driver.tree(store.index.get(info.name).id)))[1] == []


def test_an_archive_is_unpacked_as_it_is(tmp_path: Path) -> None:
    """A deletion in it has the same name in the layer, and an object beside its own whiteout stays."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as out:
        for name in ("a/", "a/.wh..wh..opq", "a/new", ".wh.gone", ".wh.both", "both"):
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.mode = 0o755
            out.addfile(info)
    with Store.open(tmp_path / "store", driver="aufs", fsync=False) as store:
        store.prepare("key")
        with store.paths("key") as paths:
            paths.mkdir(b"a")
            for inner in (b"a/old", b"gone", b"both", b"kept"):
                paths.write_bytes(inner, b"old")
        store.commit("key", "base")
        store.prepare("key", "base")
        made.seek(0)
        store.apply("key", made)
        store.commit("key", "next")
        names, others = marks_in(Path(store.driver.tree(store.index.get("next").id)))
        assert names >= {"a/.wh..wh..opq", ".wh.gone"}
        assert others == []
        store.view("look", "next")
        with store.paths("look") as paths:
            assert sorted(path for path, _ in paths.walk() if path) == [b"a", b"a/new", b"both", b"kept"]
            assert paths.read_bytes(b"both") == b""


def test_a_conversion_can_be_killed_and_repeated(tmp_path: Path) -> None:
    """Half done, both say the same; times stay; a name too long for ``.wh.`` keeps its whiteout."""
    (tmp_path / "d").mkdir()
    long = "n" * 252
    for name in ("one", "two", long):
        os.mknod(tmp_path / "d" / name, 0o020000, 0)
    os.setxattr(tmp_path / "d", "user.overlay.opaque", b"y")
    os.utime(tmp_path / "d", ns=(1, 2))
    (tmp_path / "d" / ".wh.one").touch()
    os.utime(tmp_path / "d", ns=(1, 2))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert keep_by_names(fd, whiteout.AUFS) == 3
        assert sorted(os.listdir(tmp_path / "d")) == sorted([".wh..wh..opq", ".wh.one", ".wh.two", long])
        assert os.listxattr(tmp_path / "d") == []
        assert (tmp_path / "d").stat().st_mtime_ns == 2
        assert keep_by_names(fd, whiteout.AUFS) == 0
    finally:
        os.close(fd)


def test_records_say_the_form(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", driver="aufs", fsync=False) as store:
        (record,) = store.prepare("key")
        assert record.type == "fuse.cowfs-overlayfs"
        assert "form=aufs" in record.options
        assert "dotwh=0" not in record.options
