"""The images of an old Docker host come over as they were; of what is damaged there the rest comes, and each fault is one line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.dockerd import PlainDockerd, needs_dockerd
from support.dockerhost import OldHost, tar

from cowfs.cli import main
from cowfs.errors import NotFound
from cowfs.store import Store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and whiteouts: needs root")

BASE = tar(
    ("./", "dir", None), ("./etc/", "dir", None), ("./etc/passwd", "file", b"root\n" * 900), ("./dir/", "dir", None),
    ("./dir/a", "file", b"a"), ("./dir/empty", "file", b""), ("./gone", "file", b"gone"), ("./bin", "symlink", "usr/bin"),
    ("./usr/bin/", "dir", None), ("./usr/bin/prog", "file", os.urandom(100_000)), ("./usr/bin/again", "link", "./usr/bin/prog"),
    ("./away", "symlink", "/etc"),
)  # fmt: skip
NEXT = tar(
    ("etc/", "dir", None), ("etc/.wh.passwd", "file", b""), ("etc/shadow", "file", b"s" * 5000), (".wh.gone", "file", b""),
    ("dir/", "dir", None), ("dir/.wh..wh..opq", "file", b""), ("dir/b", "file", b"bb"), ("dangling", "symlink", "/no/where"),
)  # fmt: skip
TOP = tar(("etc/", "dir", None), ("etc/motd", "file", b"hello\n"))
TREE = [
    "away", "bin", "dangling", "dir", "dir/b", "etc", "etc/motd", "etc/shadow", "usr", "usr/bin", "usr/bin/again",
    "usr/bin/prog",
]  # fmt: skip


@pytest.fixture(params=["aufs", "overlay2"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> OldHost:
    return OldHost(tmp_path / "docker", request.param)


@pytest.fixture(params=["overlay", "aufs", "vfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", driver=request.param, fsync=False) as opened:
        yield opened


def bring(store: Store, old: OldHost) -> list[str]:
    """Import, and the lines that were told."""
    lines: list[str] = []
    _, count = store.import_docker_host(old.root, old.driver, told=lines.append)
    assert count == len(lines)
    assert store.check(content=True).damage == []
    return lines


def tree_of(store: Store, name: str) -> list[str]:
    key = f"look-{time.monotonic_ns()}"
    store.view(key, name)
    try:
        with store.paths(key) as paths:
            return sorted(os.fsdecode(path) for path, _ in paths.walk() if path)
    finally:
        store.remove(key)


def test_images_come_with_names_and_digests(store: Store, old: OldHost, tmp_path: Path) -> None:
    """Layers are shared as they were, and an export is the very archive that Docker had."""
    id, _ = old.image("app:1", BASE, NEXT, TOP)
    old.image("other/base:2", BASE)
    assert bring(store, old) == []
    assert sorted(tag.name for tag in store.tags()) == ["app:1", "other/base:2"]
    assert tree_of(store, "app:1") == TREE
    assert store.totals().count["committed"] == 3
    assert store.config("app:1") == (old.db / "imagedb/content/sha256" / id).read_text()
    store.export("app:1", tmp_path / "layer.tar", format="layer")
    assert (tmp_path / "layer.tar").read_bytes() == TOP
    store.export(store.chain("app:1")[1].name, tmp_path / "next.tar", format="layer")
    assert (tmp_path / "next.tar").read_bytes() == NEXT
    assert bring(store, old) == []  # once more: nothing is new
    assert store.totals().count["committed"] == 3


def test_of_a_damaged_layer_the_rest_comes(store: Store, old: OldHost) -> None:
    """A file is missing, one was cut off: a line for each, and the layer as it is, under another digest."""
    _, (_, second, _) = old.image("app:1", BASE, NEXT, TOP)
    old.image("whole:1", BASE)
    (old.files(second) / "etc" / "shadow").unlink()
    (old.files(second) / "dir" / "b").write_bytes(b"b")
    lines = bring(store, old)
    assert any("etc/shadow: No such file" in line for line in lines)
    assert any("dir/b: has 1 bytes, its archive says 2" in line for line in lines)
    assert any("comes as its directory is" in line for line in lines)
    assert tree_of(store, "app:1") == [name for name in TREE if name != "etc/shadow"]
    assert "whole:1" in {tag.name for tag in store.tags()}


def test_other_contents_of_the_same_size_are_seen(store: Store, old: OldHost) -> None:
    _, (first, *_) = old.image("app:1", BASE, TOP)
    (old.files(first) / "etc" / "passwd").write_bytes(b"evil\n" * 900)
    lines = bring(store, old)
    assert any("other contents" in line for line in lines)
    store.view("view", "app:1")
    with store.paths("view") as paths:
        assert paths.read_bytes(b"etc/passwd") == b"evil\n" * 900


def test_a_lost_record_is_found_by_the_layer_above(store: Store, old: OldHost) -> None:
    """cache-id or the whole record of a layer is gone: aufs/layers and overlay2/l know what is beneath the next one."""
    _, (first, second, _) = old.image("app:1", BASE, NEXT, TOP)
    for record in (old.db / "layerdb/sha256").iterdir():
        if (record / "cache-id").read_text() == first:
            shutil.rmtree(record)
        elif (record / "cache-id").read_text() == second:
            (record / "cache-id").write_text("")
            (record / "tar-split.json.gz").write_bytes(b"\x1f\x8bdamaged")
    lines = bring(store, old)
    assert any("no tar-split" in line for line in lines)
    assert any("tar-split.json.gz is damaged" in line for line in lines)
    assert tree_of(store, "app:1") == TREE


def test_what_cannot_come_is_told(store: Store, old: OldHost) -> None:
    """A layer without its directory, a configuration that is another, a name of no image, a file that is no image: the rest comes."""
    _, (first, *_) = old.image("lost:1", tar(("only", "file", b"here")))
    id, _ = old.image("broken:1", tar(("x", "file", b"x")))
    old.image("good:1", BASE, NEXT)
    shutil.rmtree(old.files(first))
    config = old.db / "imagedb/content/sha256" / id
    config.write_bytes(config.read_bytes() + b" ")
    (config.parent / "README").write_text("")
    old.names["nobody"] = {"nobody:1": f"sha256:{'0' * 64}"}
    (old.db / "repositories.json").write_text(json.dumps({"Repositories": old.names}))
    lines = bring(store, old)
    assert len(lines) == 4, lines
    assert any(line.startswith("image lost:1 is left out: layer 1 of 1") for line in lines)
    assert any(line.startswith("image broken:1 is left out: its configuration has another digest") for line in lines)
    assert any(line.startswith("nobody:1: its image") for line in lines)
    assert [tag.name for tag in store.tags()] == ["good:1"]


def test_without_names_images_come_all_the_same(store: Store, old: OldHost) -> None:
    old.image("app:1", BASE)
    (old.db / "repositories.json").write_text("{")
    (line,) = bring(store, old)
    assert "without names" in line
    assert store.totals().count["committed"] == 1


def test_no_name_leads_out_of_a_layer(store: Store, old: OldHost, tmp_path: Path) -> None:
    """A link in the layer to a directory of the host, and a name that climbs: what is read is inside, or nothing."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_bytes(b"secret of the host")
    hostile = tar(("out", "symlink", str(secret)), ("inside", "file", b"xxxxxxxxxxxxxxxxxx"))
    old.image("app:1", hostile)
    record = next((old.db / "layerdb/sha256").iterdir())
    import gzip

    from support.dockerhost import split

    for name in ("out/file", f"../../../../../../..{secret}/file", f"{secret}/file"):
        text = gzip.decompress(split(hostile)).replace(b'"inside"', json.dumps(name).encode())
        (record / "tar-split.json.gz").write_bytes(gzip.compress(text))
        lines = bring(store, old)
        assert any("No such file" in line for line in lines), lines
    for info in store.walk():
        store.view("look", info.name)
        with store.paths("look") as paths:
            for path, attributes in paths.walk():
                if (attributes.mode & 0o170000) == 0o100000:
                    assert b"secret" not in paths.read_bytes(path)
        store.remove("look")


def test_moved_storage_is_followed(store: Store, old: OldHost) -> None:
    """The directory of a layer, or of all, is a link: an admin moved it to another disk."""
    _, (first, _) = old.image("app:1", BASE, NEXT)
    moved = old.root.parent / "disk"
    moved.mkdir()
    shutil.move(str(old.files(first)), moved / "layer")
    old.files(first).symlink_to(moved / "layer")
    shutil.move(str(old.root / old.driver), moved / old.driver)
    (old.root / old.driver).symlink_to(moved / old.driver)
    assert bring(store, old) == []


def test_the_command(old: OldHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0 when all came, 1 with a line for what did not, 3 where there is no such host."""
    old.image("app:1", BASE, NEXT)
    root = ["--root", str(tmp_path / "cli")]
    option = f"--from-docker-{old.driver}"
    assert main(["import", *root, option, str(old.root)]) == 0
    assert "app:1" in capsys.readouterr().out
    old.image("more:1", tar(("f", "file", b"f" * 9)))
    (old.files(old.image("more:1", tar(("f", "file", b"f" * 9)))[1][0]) / "f").unlink()
    assert main(["import", *root, option, str(old.root)]) == 1
    said = capsys.readouterr()
    assert "cowfs: note: image more:1, layer 1: f: No such file" in said.err
    assert "Traceback" not in said.err
    assert main(["import", *root, option, str(tmp_path)]) == 3
    assert main(["import", *root, option, str(old.root), "source"]) == 2
    assert main(["import", *root]) == 2
    with pytest.raises(NotFound), Store.open(tmp_path / "cli") as store:
        store.import_docker_host(tmp_path / "nowhere", old.driver)


def test_what_a_real_dockerd_left(tmp_path: Path, scratch: Path) -> None:
    """An image of ours loaded by dockerd (its driver overlay2): each layer of its directory has the diff id that it had."""
    needs_dockerd()
    old = OldHost(tmp_path / "docker", "overlay2")
    with Store.open(tmp_path / "made", fsync=False) as made:
        old.image("app:1", BASE, NEXT, TOP)
        bring(made, old)
        made.export("app:1", tmp_path / "image.tar", format="docker")
        ids = [made.index.get(info.name).diff_id for info in made.chain("app:1")]
    # On the session's tmpfs: overlay2 can lie there whatever the host is, and the addresses of sockets below it are short.
    dockerd = PlainDockerd(scratch / f"k{os.getpid()}")
    try:
        dockerd.start_with("-s", "overlay2")
        dockerd.docker("load", "-i", tmp_path / "image.tar")
        dockerd.stop()
        with Store.open(tmp_path / "store", fsync=False) as store:
            lines: list[str] = []
            store.import_docker_host(dockerd.base / "data", "overlay2", told=lines.append)
            assert lines == []
            assert tree_of(store, "app:1") == TREE
            assert [store.index.get(info.name).diff_id for info in store.chain("app:1")] == ids
    finally:
        dockerd.clean_up()
