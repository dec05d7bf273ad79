"""Images through the store: what other tools make is read, what the store writes other tools read, bytes are kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from cowfs.errors import AlreadyExists, Corrupt, FailedPrecondition, InvalidArgument, NotFound
from cowfs.store import Store
from cowfs.sys.mounts import mountinfo
from cowfs.testing import tree_of

from .conftest import tree_path


def member(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime, info.mode = kind, len(data), 1_600_000_000, 0o644
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def layers() -> list[bytes]:
    """Four layers: hard links, a FIFO, a setuid file, whiteouts, an opaque directory, a replaced directory."""
    made = []

    def add(fill: object) -> None:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            fill(tar)  # type: ignore[operator]
        made.append(out.getvalue())

    def first(tar: tarfile.TarFile) -> None:
        for name in ("etc", "usr", "usr/bin", "opq", "dir"):
            member(tar, name, kind=tarfile.DIRTYPE, mode=0o755)
        member(tar, "etc/passwd", b"root:x:0:0::/:/bin/sh\n")
        member(tar, "usr/bin/tool", b"#!/bin/sh\n" * 1000, mode=0o4755)
        member(tar, "usr/bin/tool2", kind=tarfile.LNKTYPE, linkname="usr/bin/tool")
        member(tar, "opq/lower", b"lower")
        member(tar, "dir/file", b"file")
        member(tar, "fifo", kind=tarfile.FIFOTYPE)
        member(tar, "link", kind=tarfile.SYMTYPE, linkname="etc/passwd")

    def second(tar: tarfile.TarFile) -> None:
        member(tar, "etc", kind=tarfile.DIRTYPE, mode=0o711)
        member(tar, "etc/.wh.passwd")
        member(tar, "opq", kind=tarfile.DIRTYPE, mode=0o755)
        member(tar, "opq/.wh..wh..opq")
        member(tar, "opq/upper", b"upper")

    def third(tar: tarfile.TarFile) -> None:
        member(tar, "dir", b"now a file")
        member(tar, "usr/bin/tool2", b"changed apart")

    def fourth(tar: tarfile.TarFile) -> None:
        member(tar, ".wh.dir")
        member(tar, "deep/er/than/listed", b"x", uid=1000, gid=1000)

    for fill in (first, second, third, fourth):
        add(fill)
    return made


@pytest.fixture
def layout(space: Path) -> Path:
    """An OCI layout made by umoci: tag ``one`` to ``four``, each a layer more."""
    if shutil.which("umoci") is None:
        pytest.skip("umoci is not installed")
    path = space / "layout"

    def umoci(*words: object) -> None:
        subprocess.run(["umoci", *map(str, words)], check=True, capture_output=True)

    umoci("init", "--layout", path)
    umoci("new", "--image", f"{path}:zero")
    before = "zero"
    for name, data in zip(("one", "two", "three", "four"), layers(), strict=True):
        (space / f"{name}.tar").write_bytes(data)
        umoci("raw", "add-layer", "--image", f"{path}:{before}", "--tag", name, space / f"{name}.tar")
        before = name
    return path


@pytest.fixture
def mounted(store: Store, space: Path) -> object:
    """A function that gives the tree of a snapshot, seen through a mount."""
    target = space / "mnt"
    target.mkdir()

    def look(name: str) -> dict[str, object]:
        store.view("look", name)
        try:
            with store.mount("look", target):
                return dict(tree_of(target))
        finally:
            store.remove("look")

    return look


def test_each_layer_of_an_image_is_what_umoci_makes_of_it(
    store: Store, layout: Path, space: Path, mounted: object
) -> None:
    for tag in ("one", "two", "three", "four"):
        store.import_image(layout, tag, tag=tag)
        bundle = space / f"bundle-{tag}"
        subprocess.run(["umoci", "unpack", "--image", f"{layout}:{tag}", bundle], check=True, capture_output=True)
        expected, found = tree_of(bundle / "rootfs"), mounted(tag)  # type: ignore[operator]
        for tree in (expected, found):
            tree.pop(".")  # umoci gives the root the time of unpacking
        implied = {path for path in expected if path.startswith("deep") and stat.S_ISDIR(expected[path].mode)}
        for path in sorted(expected.keys() | found.keys()):
            a, b = expected.get(path), found.get(path)
            if path in implied:  # not in the archive: everybody makes up a time
                a, b = a._replace(mtime_ns=0), b._replace(mtime_ns=0)  # type: ignore[union-attr]
            if path == "usr/bin/tool" and tag in ("three", "four"):
                # the layer replaces its other name: overlay layers cannot say so, and the kernel shows the old count
                a, b = a._replace(nlink=0, twin=""), b._replace(nlink=0, twin="")  # type: ignore[union-attr]
            assert a == b, path


def test_layers_that_are_there_are_not_unpacked_again(store: Store, layout: Path) -> None:
    store.import_image(layout, "base", tag="two")
    before = {row.name: row.id for row in store.index.rows()}
    assert len(before) == 2
    store.import_image(layout, "app", tag="four")
    after = {row.name: row.id for row in store.index.rows()}
    assert len(after) == 4
    assert before.items() <= after.items()
    assert store.import_image(layout, "again", tag="four") == store.stat("app").name
    assert len(list(store.walk())) == 4
    assert all(info.name.startswith("sha256:") for info in store.walk())


def test_layers_are_exported_byte_for_byte(store: Store, layout: Path) -> None:
    store.import_image(layout, "app", tag="four")
    chain = [info.name for info in store.chain("app")][::-1]
    for name, data in zip(chain, layers(), strict=True):
        out = io.BytesIO()
        assert store.export(name, out, format="layer") == "sha256:" + hashlib.sha256(data).hexdigest()
        assert out.getvalue() == data


def test_an_image_goes_round_through_docker_archive_and_skopeo(
    store: Store, layout: Path, space: Path, driver: str
) -> None:
    top = store.import_image(layout, "app:4", tag="four")
    store.export("app:4", space / "docker.tar", format="docker")
    with Store.open(space / "other", driver=driver, fsync=False) as other:
        assert other.import_image(space / "docker.tar") == top
        assert [tag.name for tag in other.tags()] == ["app:4"]
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    store.export("app:4", space / "image.tar", format="oci", compression="zstd")
    for source in (f"oci-archive:{space}/image.tar", f"docker-archive:{space}/docker.tar"):
        copy = space / f"copy-{source[:3]}"
        subprocess.run(["skopeo", "copy", "-q", source, f"oci:{copy}:x"], check=True, capture_output=True)
        with Store.open(space / f"store-{source[:3]}", driver=driver, fsync=False) as other:
            assert other.import_image(copy, "x") == top
            assert other.check(content=True).problems == []


def test_podman_loads_what_we_export(store: Store, layout: Path, space: Path) -> None:
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    if not any(mount.target == b"/" for mount in mountinfo()):
        pytest.skip("in a chroot: containers/storage must make / private")
    store.import_image(layout, "app:4", tag="four")
    store.prepare("work", "app:4")
    (tree_path(store, "work") / "made-here").write_text("here")
    store.commit("work", "mine")
    store.tag("mine:1", "mine")
    store.export("mine:1", space / "image.tar", format="docker")
    run = tempfile.mkdtemp(prefix="cowfs-podman-", dir="/tmp")  # podman wants at most 50 characters
    podman = ["podman", "--root", f"{run}/root", "--runroot", f"{run}/run", "--storage-driver", "vfs"]
    loaded = subprocess.run(
        [*podman, "load", "-q", "-i", space / "image.tar"], check=False, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    told = subprocess.run([*podman, "image", "inspect", "mine:1"], check=True, capture_output=True, text=True)
    shutil.rmtree(run)
    expected = [store.index.get(info.name).diff_id for info in store.chain("mine")][::-1]
    assert json.loads(told.stdout)[0]["RootFS"]["Layers"] == expected


def test_a_layer_made_here_is_exported_reproducibly(store: Store) -> None:
    store.prepare("k")
    tree = tree_path(store, "k")
    (tree / "d").mkdir()
    for name in ("b", "a", "d/c"):
        (tree / name).write_text(name)
    os.link(tree / "a", tree / "hard")
    store.commit("k", "made")
    outs = []
    for _ in range(2):
        out = io.BytesIO()
        store.export("made", out, format="layer")
        outs.append(out.getvalue())
    assert outs[0] == outs[1]
    with tarfile.open(fileobj=io.BytesIO(outs[0])) as tar:
        assert [one.name for one in tar if one.name != "."] == ["a", "b", "d", "d/c", "hard"]


def test_a_first_layers_root_keeps_its_attributes(store: Store) -> None:
    """A root that is not what every empty layer's is has an entry, although no comparison names it."""
    store.prepare("k")
    tree_path(store, "k").chmod(0o1700)
    store.commit("k", "made")
    out = io.BytesIO()
    store.export("made", out, format="layer")
    store.prepare("again")
    store.apply("again", io.BytesIO(out.getvalue()))
    assert stat.S_IMODE(tree_path(store, "again").stat().st_mode) == 0o1700


def test_a_diff_id_is_forgotten_when_the_layer_is_changed(store: Store) -> None:
    data = layers()[0]
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    store.prepare("pure")
    assert store.apply("pure", io.BytesIO(data)).diff_id == digest
    store.commit("pure", "PURE")
    assert store.index.get("PURE").diff_id == digest
    assert store.index.get("PURE").chain_id == digest
    for number, touch in enumerate(
        (
            lambda tree: (tree / "etc" / "passwd").write_text("changed"),
            lambda tree: os.utime(tree / "fifo", (1, 1)),
            lambda tree: (tree / "new").touch(),
            lambda tree: os.unlink(tree / "link"),
            lambda tree: os.chmod(tree / "usr" / "bin", 0o700),
        )
    ):
        store.prepare("mixed")
        store.apply("mixed", io.BytesIO(data))
        touch(tree_path(store, "mixed"))
        store.commit("mixed", f"MIXED-{number}")
        assert store.index.get(f"MIXED-{number}").diff_id is None
    store.prepare("twice")
    store.apply("twice", io.BytesIO(data))
    store.apply("twice", io.BytesIO(layers()[1]))
    store.commit("twice", "TWICE")
    assert store.index.get("TWICE").diff_id is None


def test_digests_from_an_archive_make_equal_trees_equal(store: Store) -> None:
    data = layers()[0]
    for key in ("a", "b"):
        store.prepare(key)
        store.apply(key, io.BytesIO(data))
        store.commit(key, key.upper())
    a, b = store.index.get("A").root, store.index.get("B").root
    assert a is not None
    assert b is not None
    assert a[0] == b[0]  # the content halves, and so the content digests
    assert a[1] != b[1]
    assert store.check(content=True).undigested == []


def test_a_damaged_or_hostile_layer_leaves_nothing_behind(store: Store, space: Path) -> None:
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w") as tar:
        member(tar, "../../escaped", b"x")
    for source in (evil.getvalue(), layers()[0][:3000], b"nothing like a tar" * 100):
        with pytest.raises(InvalidArgument):
            store.import_image(io.BytesIO(source), "evil")
    assert list(store.walk()) == []
    assert store.tags() == []
    assert os.listdir(f"{store.root}/layers") == []
    assert not [name for name in os.listdir(store.root) if name.startswith(("new-", "rm-"))]
    assert not (space / "escaped").exists()
    store.prepare("k")
    with pytest.raises(Corrupt):
        store.apply("k", io.BytesIO(layers()[0]), diff_id="sha256:" + "0" * 64)


def test_what_is_mounted_is_not_applied_to(store: Store) -> None:
    store.prepare("k")
    with store.paths("k"), pytest.raises(FailedPrecondition):
        store.apply("k", io.BytesIO(layers()[0]))


def test_active_snapshots_are_exported_as_trees_and_layers_only(store: Store) -> None:
    store.prepare("k")
    (tree_path(store, "k") / "f").write_text("f")
    out = io.BytesIO()
    store.export("k", out, format="layer")
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert "f" in tar.getnames()
    with pytest.raises(InvalidArgument):
        store.export("k", io.BytesIO(), format="oci")


def test_a_place_that_cannot_be_written_is_named(store: Store, space: Path) -> None:
    """Not the temporary file beside it; a device is written to, never replaced."""
    store.prepare("k")
    store.commit("k", "made")
    for form in ("oci", "docker", "tar", "layer"):
        with pytest.raises(NotFound, match=re.escape(f"no such directory: {space}/none (")):
            store.export("made", space / "none" / "x", format=form)
        with pytest.raises(InvalidArgument, match=re.escape(f"{space} is a directory (name a file")):
            store.export("made", space, format=form)
        os.mkfifo(space / form)
        reading = os.open(space / form, os.O_RDONLY | os.O_NONBLOCK)
        try:
            store.export("made", space / form, format=form)
            assert os.read(reading, 1 << 16)
        finally:
            os.close(reading)
        assert stat.S_ISFIFO((space / form).stat().st_mode)


def test_a_tag_is_hidden_by_no_snapshot(store: Store) -> None:
    """The name of a tag is taken, for keys and names alike."""
    store.prepare("k")
    store.commit("k", "made")
    store.tag("t", "made")
    store.prepare("k")
    with pytest.raises(AlreadyExists, match="'t' is a tag"):
        store.prepare("t")
    with pytest.raises(AlreadyExists, match="'t' is a tag"):
        store.commit("k", "t")
    assert store.tag("t", "made").target == "made"
