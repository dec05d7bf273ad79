"""The kind of a source: its content tells images from trees, and ``form`` decides where the content does not."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from support.archives import OneByOne, directory, member, symlink, tar
from support.images import Layout, archive, config, digest, docker

from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded
from cowfs.images import open_image

ONE = tar(directory("./"), member("a", b"1"))
OLD = "1" * 64
WEB = b'{"name":"web app","icons":[]}'


def entry(config_name: str = "config", layers: tuple[str, ...] = ("layers/0",)) -> bytes:
    return json.dumps([{"Config": config_name, "RepoTags": ["odd:1"], "Layers": layers}]).encode()


TREES = {
    "manifest.json of a web app": {"manifest.json": WEB, "index.html": b"x"},
    "manifest.json last": {"index.html": b"x", "manifest.json": WEB},
    "manifest.json alone": {"manifest.json": WEB},
    "a list": {"manifest.json": b"[]", "x": b""},
    "a list of names": {"manifest.json": b'["a", "b"]'},
    "not JSON": {"manifest.json": b"\xff\xfe\x00"},
    "large": {"manifest.json": b" " * (5 << 20), "x": b""},
    "deep": {"manifest.json": b"[" * 100_000},
    "index.json of something else": {"index.json": b'{"pages":[]}', "blobs": b""},
    "oci-layout of something else": {"oci-layout": b"how our office is laid out"},
    "JSON files": {f"{number}.json": b"{}" for number in range(200)},
    "an image further down": {f"etc/{name}": data for name, data in Layout().add([ONE], "x").files().items()},
}  # fmt: skip


def ways(data: bytes, space: Path) -> dict[str, Any]:
    (space / "x.tar").write_bytes(data)
    (space / "x.tar.gz").write_bytes(gzip.compress(data))
    folder = space / "folder"
    folder.mkdir()
    subprocess.run(["tar", "-xf", space / "x.tar", "-C", folder], check=True)
    return {
        "tar": space / "x.tar", "gzip": space / "x.tar.gz", "directory": folder, "pipe": io.BytesIO(data),
        "compressed pipe": io.BytesIO(gzip.compress(data)),
    }  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize("what", TREES)
def test_trees_that_have_a_name_of_an_image(space: Path, what: str) -> None:
    for way, source in ways(archive(TREES[what]), space).items():
        with open_image(source, spool_dir=str(space)) as opened:
            assert opened.kind == ("dir" if way == "directory" else "rootfs"), way
            with opened.pick().layers[0].open() as stream:
                assert stream.read(512)


@pytest.mark.parametrize("what", TREES)
def test_a_tree_is_no_image_whoever_asks(what: str) -> None:
    with pytest.raises(InvalidArgument, match="no image"):
        open_image(io.BytesIO(archive(TREES[what])), form="image")


@pytest.mark.root
def test_a_docker_archive_with_other_names(space: Path) -> None:
    document = config([ONE])
    for order in (("config", "layers/0", "manifest.json"), ("manifest.json", "layers/0", "config")):
        files = {"config": document, "layers/0": ONE, "manifest.json": entry()}
        folder = space / order[0]
        folder.mkdir()
        for way, source in ways(archive({name: files[name] for name in order}), folder).items():
            with open_image(source, spool_dir=str(space)) as opened:
                assert opened.kind == "docker", way
                assert opened.pick().tags == ("odd:1",)


@pytest.mark.root
def test_leading_dots_and_directories_change_nothing(space: Path) -> None:
    files = Layout().add([ONE], "x").files()
    parts = [directory("./"), directory("./blobs"), directory("./blobs/sha256")]
    data = tar(*parts, *(member("./" + name, content) for name, content in files.items()))
    for way, source in ways(data, space).items():
        with open_image(source, spool_dir=str(space)) as opened:
            assert opened.kind == "oci", way


BROKEN = {
    "docker save of before 1.10": {
        f"{OLD}/VERSION": b"1.0", f"{OLD}/json": b"{}", f"{OLD}/layer.tar": ONE,
        "repositories": json.dumps({"app": {"latest": OLD}}).encode(),
    },
    "a layout without index.json": {
        name: data for name, data in Layout().add([ONE], "x").files().items() if name != "index.json"
    },
    "a layout without oci-layout": {
        name: data for name, data in Layout().add([ONE], "x").files().items() if name != "oci-layout"
    },
    "blobs alone": {"blobs/sha256/" + digest(ONE)[7:]: ONE},
    "a layout whose index is damaged": {**Layout().add([ONE], "x").files(), "index.json": b'{"manifests": ['},
    "a layout of a later version": {**Layout().add([ONE], "x").files(), "oci-layout": b'{"imageLayoutVersion":"2.0.0"}'},
    "a layout whose oci-layout is damaged": {**Layout().add([ONE], "x").files(), "oci-layout": b"{"},
    "a docker-archive whose manifest is cut short": {
        digest(ONE)[7:] + ".tar": ONE, digest(config([ONE]))[7:] + ".json": config([ONE]),
        "manifest.json": entry()[:-5],
    },
    "a docker-archive whose manifest is in UTF-16": {
        digest(ONE)[7:] + ".tar": ONE, "manifest.json": entry().decode().encode("utf-16"),
    },
    "a docker-archive without its layer": {"config": config([ONE]), "manifest.json": entry()},
    "a docker-archive without its configuration": {"layers/0": ONE, "manifest.json": entry()},
}  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize("what", BROKEN)
def test_what_looks_like_an_image_and_cannot_be_read_is_an_error(space: Path, what: str) -> None:
    for way, source in ways(archive(BROKEN[what]), space).items():
        with pytest.raises(CowfsError) as told:
            open_image(source, spool_dir=str(space))
        assert "\n" not in str(told.value), way
    with open_image(io.BytesIO(archive(BROKEN[what])), form="rootfs") as opened:
        assert opened.kind == "rootfs"


@pytest.mark.root
def test_the_form_decides(space: Path) -> None:
    data = docker(([ONE], ["app:1"], None))
    for way, source in ways(data, space).items():
        with open_image(source, form="rootfs") as opened:
            assert opened.kind == ("dir" if way == "directory" else "rootfs")
    with open_image(io.BytesIO(ONE), form="layer") as opened:
        assert (opened.kind, opened.pick().layers[0].whole) == ("layer", False)
    with pytest.raises(InvalidArgument, match="directory"):
        open_image(space / "folder", form="layer")


def test_what_is_put_aside_is_bounded(space: Path) -> None:
    data = docker(([tar(member("big", bytes(2 << 20)))], ["app:1"], None))
    for source in (data, gzip.compress(data)):
        with pytest.raises(LimitExceeded, match="max-size"):
            open_image(io.BytesIO(source), spool_dir=str(space), max_bytes=1 << 20)


@pytest.mark.parametrize("zeros", [512, 1024, 10240])
def test_an_archive_of_zeros_is_an_empty_tree(zeros: int) -> None:
    with open_image(cast(BinaryIO, OneByOne(bytes(zeros)))) as opened:
        assert opened.kind == "rootfs"


def test_links_out_of_an_archive_lead_nowhere() -> None:
    data = tar(symlink("layer.tar", "../../../etc/passwd"), member("config", config([ONE])),
               member("manifest.json", entry(layers=("layer.tar",))))  # fmt: skip
    with pytest.raises(CowfsError, match=r"layer\.tar"):
        open_image(io.BytesIO(data))
