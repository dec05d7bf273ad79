"""Which names are one file is a part of a snapshot: diff, export, squash and check know it.

Long random histories are in test_history.py.
"""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from pathlib import Path

import pytest
from support import archives

from cowfs.errors import InvalidArgument
from cowfs.store import Store
from cowfs.union.paths import Paths

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (trusted.overlay.*)")

ALL = ["overlay", "row", "vfs"]


@pytest.fixture(params=ALL)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def store(store: Store) -> Store:
    """base: a/f and b/g are one file, alone is another."""
    store.prepare("k")
    with store.paths("k") as paths:
        paths.makedirs("a")
        paths.makedirs("b")
        paths.write_bytes("a/f", b"one" * 3000)
        paths.link("a/f", "b/g")
        paths.write_bytes("alone", b"two" * 3000)
    store.commit("k", "base")
    store.prepare("k", "base")
    return store


def changed(store: Store, a: str, b: str) -> dict[str, tuple[str, set[str]]]:
    return {
        change.path.decode(): (change.kind, set(change.what) - {"mtime"})
        for change in store.diff(a, b)
        if change.type != "dir"
    }


def members(store: Store, name: str, format: str) -> list[tuple[str, str]]:
    """(name, target of its hard link or "") of an archive's members that are no directories."""
    out = io.BytesIO()
    store.export(name, out, format=format)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return [(member.name, member.linkname if member.islnk() else "") for member in tar if not member.isdir()]


def test_a_new_name_is_an_addition_and_nothing_else(store: Store) -> None:
    with store.paths("k") as paths:
        paths.link("alone", "a/again")
    assert changed(store, "base", "k") == {"a/again": ("added", set())}


def test_names_that_are_no_longer_one_file_have_changed(store: Store) -> None:
    """The same bytes and attributes, and yet another tree."""
    with store.paths("k") as paths:
        times = paths.stat("a/f").mtime_ns
        paths.unlink("b/g")
        paths.write_bytes("b/g", b"one" * 3000)
        node = paths.node("b/g")
        paths.view.setattr(node, mtime=times)
    assert changed(store, "base", "k") == {"a/f": ("changed", {"links"}), "b/g": ("changed", {"links"})}


def test_names_that_become_one_file_have_changed(store: Store) -> None:
    with store.paths("k") as paths:
        paths.unlink("alone")
        paths.link("a/f", "alone")
    found = changed(store, "base", "k")
    assert found.keys() == {"alone", "a/f", "b/g"}
    assert all("links" in what for _, what in found.values())


def test_a_renamed_directory_with_one_of_the_names_is_no_change_of_the_other(store: Store) -> None:
    with store.paths("k") as paths:
        paths.rename("b", "n")
    assert {path: kind for path, (kind, _) in changed(store, "base", "k").items()} == {"n/g": "added"}


def test_a_layer_holds_every_name_of_a_file_that_it_links(store: Store) -> None:
    """No link leads out of the archive: overlay storage unpacks a layer apart from those beneath."""
    with store.paths("k") as paths:
        paths.link("alone", "a/again")
        paths.rename("b", "n")
    store.commit("k", "top")
    found = dict(members(store, "top", "layer"))
    assert found.items() >= {"a/again": "", "alone": "a/again", "a/f": "", "n/g": "a/f"}.items()
    whole = dict(members(store, "top", "tar"))
    assert (whole["alone"], whole["n/g"]) == ("a/again", "a/f")


@pytest.mark.parametrize("format", ["oci", "docker"])
def test_links_into_lower_layers_are_in_exported_images(store: Store, space: Path, format: str) -> None:
    with store.paths("k") as paths:
        paths.link("a/f", "third")
    store.commit("k", "top")
    store.export("top", space / "image.tar", format=format, compression="none" if format == "oci" else None)
    layers = []
    with tarfile.open(space / "image.tar") as image:
        if format == "docker":
            manifest = json.load(image.extractfile("manifest.json"))  # type: ignore[arg-type]
            names = manifest[0]["Layers"]
        else:
            index = json.load(image.extractfile("index.json"))  # type: ignore[arg-type]
            digest = index["manifests"][0]["digest"].partition(":")[2]
            manifest = json.load(image.extractfile(f"blobs/sha256/{digest}"))  # type: ignore[arg-type]
            names = ["blobs/sha256/" + layer["digest"].partition(":")[2] for layer in manifest["layers"]]
        for name in names:
            with tarfile.open(fileobj=io.BytesIO(image.extractfile(name).read())) as layer:  # type: ignore[union-attr]
                layers.append({member.name: member.linkname if member.islnk() else "" for member in layer})
    assert {name: layers[-1][name] for name in ("a/f", "b/g", "third")} == {"a/f": "", "b/g": "a/f", "third": "a/f"}


def inode(paths: Paths, path: str) -> int:
    return paths.stat(path).ino


@pytest.mark.parametrize("driver", ["overlay", "row"], indirect=True)
def test_squash_removes_the_name_that_was_removed_and_no_other(store: Store) -> None:
    with store.paths("k") as paths:
        paths.link("a/f", "c")
        paths.write_bytes("c", b"changed")
    store.snapshot("k", "s1")
    with store.paths("k") as paths:
        paths.unlink("b/g")
    store.snapshot("k", "s2")
    store.squash("s1")
    with store.paths("k") as paths:
        assert not paths.exists("b/g")
        assert inode(paths, "c") == inode(paths, "a/f")
        assert paths.stat("c").nlink == 2
    assert "b/g" not in {path for path, (kind, _) in changed(store, "base", "s2").items() if kind != "deleted"}


@pytest.mark.parametrize("driver", ["overlay", "row"], indirect=True)
def test_squash_keeps_a_link_through_a_renamed_directory(store: Store) -> None:
    with store.paths("k") as paths:
        paths.rename("b", "n")
    store.snapshot("k", "s1")
    with store.paths("k") as paths:
        paths.write_bytes("other", b"x")
    store.snapshot("k", "s2")
    store.squash("s1")
    with store.paths("k") as paths:
        assert inode(paths, "n/g") == inode(paths, "a/f")
        paths.write_bytes("a/f", b"through one name")
        assert paths.read_bytes("n/g") == b"through one name"


def test_block_differences_carry_links(store: Store) -> None:
    with store.paths("k") as paths:
        paths.link("alone", "a/again")
        paths.unlink("b/g")
        paths.write_bytes("b/g", b"one" * 3000)
    store.commit("k", "top")
    stream = io.BytesIO()
    store.export_blocks("top", stream)
    stream.seek(0)
    store.prepare("copy", "base")
    store.apply_blocks("copy", stream)
    store.commit("copy", "same")
    assert changed(store, "top", "same") == {}
    store.view("look", "same")
    with store.paths("look") as paths:
        assert inode(paths, "alone") == inode(paths, "a/again")
        assert inode(paths, "a/f") != inode(paths, "b/g")


def test_what_a_socket_took_the_place_of_does_not_come_back_in_an_export(store: Store) -> None:
    """An archive has no sockets; files, links and directories that one replaced are deleted in it."""
    with store.paths("k") as paths:
        for path in ("alone", "b/g"):
            paths.unlink(path)
            paths.mknod(path, stat.S_IFSOCK | 0o644)
        paths.rmtree("a")
        for path in ("a", "new"):
            paths.mknod(path, stat.S_IFSOCK | 0o644)
    store.commit("k", "top")
    out = io.BytesIO()
    store.export_diff("base", "top", out)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        diff = [member.name for member in tar if not member.isdir()]
    wanted = [".wh.a", ".wh.alone", "b/.wh.g"]
    assert [name for name, _ in members(store, "top", "layer")] == diff == wanted
    store.prepare("again", "base")
    out = io.BytesIO()
    store.export("top", out, format="layer")
    out.seek(0)
    store.apply("again", out)
    with store.paths("again") as paths:
        assert [path for path, _ in paths.walk()] == [b"b"]


@pytest.mark.parametrize("length", [251, 252, 255])
def test_long_names_that_a_layer_deletes(store: Store, length: int) -> None:
    """A whiteout is four bytes longer than the name that it hides, and no name on any disk: the name may have all 255."""
    name = "x" * length
    with store.paths("k") as paths:
        for path in (name, f"b/{name}"):
            paths.write_bytes(path, b"data")
        paths.makedirs(f"a/{name}/in")
    store.commit("k", "long")
    store.prepare("k", "long")
    with store.paths("k") as paths:
        paths.unlink(name)
        paths.unlink(f"b/{name}")
        paths.rmtree(f"a/{name}")
    store.commit("k", "top")
    for format in ("layer", "docker"):
        out = io.BytesIO()
        store.export("top", out, format=format)
        out.seek(0)
        if format == "layer":
            store.prepare("again", "long")
            store.apply("again", out)
            store.commit("again", "applied")
        else:
            image = Path(store.root).parent / "image.tar"
            image.write_bytes(out.getvalue())
            store.import_image(image, "imported:1")
    assert not list(store.diff("top", "applied"))
    assert not [change for change in store.diff("top", "imported:1") if change.kind != "changed"]
    assert not store.check(content=True).problems
    store.prepare("bad", "long")
    with pytest.raises(InvalidArgument, match="255"):
        store.apply("bad", io.BytesIO(archives.tar(archives.member(".wh." + "x" * 256))))
