"""Images in: every kind of source becomes the same description, and every digest is checked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given, strategies as st
from support import trees
from support.archives import OneByOne, directory, hardlink, member, symlink, tar
from support.small_images import DOCKER, LAYER, OCI, TOP, Oci, apply_all, digest_of, docker_archive

from cowfs.archive import apply_layer
from cowfs.errors import Corrupt, CowfsError, InvalidArgument, LimitExceeded, NotFound, Unsupported
from cowfs.images import ImageSource, chain_ids, check_digest, make_config, open_image


def _open(data: bytes, **options: Any) -> ImageSource:
    return open_image(io.BytesIO(data), **options)


# Accepted sources ----------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("path", [OCI, DOCKER], ids=["oci", "docker"])
def test_an_image_that_buildah_made(space: Path, path: Path) -> None:
    with open_image(path) as source:
        assert source.kind == path.stem.removeprefix("small-")
        image = source.pick()
        assert image.tags[0].endswith("small:1")
        assert image.platform == "linux/amd64"
        assert json.loads(image.config)["config"]["Env"] == ["PATH=/bin"]
        assert image.config_digest == "sha256:9c33d969275253f462e75d433ce358a90b9551c9f65a6bcfd068744db262313d"
        assert image.chain == chain_ids([str(layer.diff_id) for layer in image.layers])
        apply_all(source, space / "tree")
    tree = trees.snapshot(space / "tree")
    assert "dir/b" not in tree
    assert sorted(path for path in tree if path.startswith("opq")) == ["opq", "opq/z"]
    assert (tree["dir/a"].mode, tree["bin/suid"].mode) == (0o600, 0o4755)
    assert tree["dir/fifo"].type == "fifo"
    assert dict(tree["etc/layer"].xattrs) in ({"user.note": b"hello"}, {})


@pytest.mark.root
def test_every_container_of_one_image_gives_the_same_tree(space: Path) -> None:
    layout = space / "layout"
    layout.mkdir()
    subprocess.run(["tar", "-xf", str(OCI), "-C", str(layout)], check=True)
    piped = OCI.read_bytes()
    ways: dict[str, Any] = {
        "tar": OCI, "directory": layout, "docker": DOCKER,
        "pipe": OneByOne(piped[:]), "gzip": io.BytesIO(gzip.compress(piped)), "file object": io.BytesIO(piped),
    }  # fmt: skip
    found = []
    for name, way in ways.items():
        with open_image(way, spool_dir=str(space)) as source:
            apply_all(source, space / f"tree-{name}")
        found.append(trees.snapshot(space / f"tree-{name}"))
    for other in found[1:]:
        trees.assert_same(found[0], other)
    assert not [name for name in os.listdir(space) if name.startswith("cowfs-")]  # the spool has no name


def test_a_layer_can_be_streamed_again_and_two_at_a_time(space: Path) -> None:
    with _open(Oci([LAYER, TOP]).tar()) as source:
        first, second = source.pick().layers
        with first.open() as one, second.open() as two, first.open() as again:
            parts = [one.read(10), two.read(7), again.read(10)]
            assert parts[0] == parts[2]
            assert gzip.decompress(parts[0] + one.read()) == LAYER
            assert gzip.decompress(parts[1] + two.read()) == TOP


OLD_ID = "ab" * 32
OTHER_ID = "cd" * 32


@pytest.mark.parametrize(
    "data",
    [
        docker_archive([(f"{OLD_ID}/layer.tar", LAYER), (f"{OTHER_ID}/layer.tar", TOP)]),
        docker_archive([(hashlib.sha256(LAYER).hexdigest() + ".tar", LAYER), (hashlib.sha256(TOP).hexdigest() + ".tar", TOP)]),
        docker_archive([("blobs/sha256/" + hashlib.sha256(LAYER).hexdigest(), LAYER),
                 ("blobs/sha256/" + hashlib.sha256(TOP).hexdigest(), TOP)],
                member("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), member("index.json", b'{"manifests":[]}')),
    ],
    ids=["old docker save", "skopeo", "docker 25 and later"],
)  # fmt: skip
def test_each_layout_of_docker_archives(data: bytes) -> None:
    with _open(data) as source:
        assert source.kind == "docker"
        image = source.pick("app:1")
        assert [layer.open().read() for layer in image.layers] == [LAYER, TOP]
        assert image.chain[-1] == chain_ids([digest_of(LAYER), digest_of(TOP)])[1]


def test_an_old_docker_archive_links_a_layer_that_it_has_already() -> None:
    parts = [
        member(f"{OLD_ID}/layer.tar", LAYER), symlink(f"{OTHER_ID}/layer.tar", f"../{OLD_ID}/layer.tar"),
        hardlink("third.tar", f"{OLD_ID}/layer.tar"),
    ]  # fmt: skip
    config = make_config([digest_of(LAYER)] * 3)
    entry = {
        "Config": "c.json",
        "RepoTags": None,
        "Layers": [f"{OLD_ID}/layer.tar", f"{OTHER_ID}/layer.tar", "third.tar"],
    }
    data = tar(*parts, member("c.json", config), member("manifest.json", json.dumps([entry]).encode()))
    with _open(data) as source:
        assert [layer.open().read() for layer in source.pick().layers] == [LAYER] * 3


@pytest.mark.root
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_root_filesystem_is_one_layer(space: Path, pack: Any) -> None:
    data = tar(directory("./"), directory("etc"), member("etc/passwd", b"x"))
    (space / "root.tar").write_bytes(pack(data))
    for way in (space / "root.tar", io.BytesIO(pack(data)), cast(BinaryIO, OneByOne(pack(data)))):
        target = space / f"t{id(way)}"
        target.mkdir()
        with open_image(way) as source:
            assert source.kind == "rootfs"
            [layer] = source.pick().layers
            assert layer.diff_id is None
            done = apply_layer(layer.open(), str(target), form="plain")
            assert done.diff_id == digest_of(data)
            if isinstance(way, Path):
                assert layer.open().read(10) == pack(data)[:10]
            else:
                with pytest.raises(InvalidArgument, match="once"):
                    layer.open()
        assert (target / "etc" / "passwd").read_bytes() == b"x"


@pytest.mark.root
def test_a_directory_is_one_layer_and_the_same_each_time(space: Path) -> None:
    root = space / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "passwd").write_bytes(b"x" * 1_000_000)
    with open_image(root) as source:
        assert source.kind == "dir"
        [layer] = source.pick().layers
        (space / "copy").mkdir()
        first = apply_layer(layer.open(), str(space / "copy"), form="plain")
        with layer.open() as stream:
            assert digest_of(b"".join(iter(lambda: stream.read(65536), b""))) == first.diff_id
        with layer.open() as stream:
            stream.read(5)  # given up early: the exporting thread ends with the pipe
    trees.assert_same(trees.snapshot(root), trees.snapshot(space / "copy"))


@pytest.mark.root
def test_an_error_of_the_directory_reaches_the_reader(space: Path) -> None:
    root = space / "root"
    root.mkdir()
    (root / ".wh.x").touch()
    with (
        open_image(root) as source,
        source.pick().layers[0].open() as stream,
        pytest.raises(InvalidArgument, match=r"\.wh\.x"),
    ):
        stream.read(1 << 20)
        stream.read(1 << 20)


def test_an_index_of_platforms_and_nested_indexes() -> None:
    builds = {arch: Oci([LAYER], tag=None, config={"architecture": arch}) for arch in ("amd64", "arm64")}
    oci = Oci([LAYER])
    for build in builds.values():
        build_descriptor = build.descriptor()
        oci.blobs.update(build.blobs)
        build.manifests = [build_descriptor]
    index = json.dumps({"manifests": [b.manifests[0] for b in builds.values() if b.manifests]}).encode()
    outer = {"mediaType": "application/vnd.oci.image.index.v1+json", **oci.put(index),
             "annotations": {"org.opencontainers.image.ref.name": "many:1"}}  # fmt: skip
    attestation = {
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", **oci.put(b"{}")},
        "layers": [],
    }
    note = {"mediaType": "application/vnd.oci.image.manifest.v1+json", **oci.put(json.dumps(attestation).encode())}
    oci.manifests = [outer, note]
    with _open(oci.tar()) as source:
        assert [image.platform for image in source.images] == ["linux/amd64", "linux/arm64"]
        assert source.pick("many:1", platform="linux/arm64").platform == "linux/arm64"
        assert source.pick("1", platform="linux/amd64").tags == ("many:1",)
        with pytest.raises(NotFound, match="linux/s390x"):
            source.pick("many:1", platform="linux/s390x")
        with pytest.raises(NotFound, match=r"other.*many:1"):
            source.pick("other")


def test_two_names_of_one_image_are_one_image() -> None:
    oci = Oci([LAYER])
    one = oci.descriptor()
    oci.manifests = [one, {**one, "annotations": {"org.opencontainers.image.ref.name": "app:latest"}}]
    other = Oci([LAYER, TOP])
    oci.manifests.append({**other.descriptor(), "annotations": {"org.opencontainers.image.ref.name": "other:1"}})
    oci.blobs.update(other.blobs)
    with _open(oci.tar()) as source:
        assert [image.tags for image in source.images] == [("app:1", "app:latest"), ("other:1",)]
        assert len(source.pick("app:latest").layers) == 1
        with pytest.raises(InvalidArgument, match="2 images"):
            source.pick()


# Refused sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["sha256:../../../etc/passwd", "sha256:" + "g" * 64, "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha256:" + "0" * 65,
     "SHA256:" + "0" * 64, "sha256:" + "0" * 64 + "\n", "", "sha256", None, 5, ["sha256:" + "0" * 64], "sha256:" + "\u0660" * 64],
)  # fmt: skip
def test_a_digest_has_one_form(text: object) -> None:
    with pytest.raises(CowfsError, match=r"digest"):
        check_digest(text)


@given(st.text(max_size=80))
def test_nothing_but_a_digest_passes_for_one(text: str) -> None:
    try:
        check_digest(text)
    except CowfsError as error:
        assert "\n" not in str(error)
    else:
        assert len(text) == 71
        assert text.isascii()


def test_other_algorithms_are_told_apart() -> None:
    with pytest.raises(Unsupported, match="sha512"):
        check_digest("sha512:" + "0" * 128)


@pytest.mark.parametrize("where", ["manifest", "config", "layer", "index"])
def test_a_digest_that_would_be_a_path_is_refused(where: str) -> None:
    oci = Oci([LAYER])
    evil = {"digest": "sha256:../../oci-layout", "size": 30}
    if where == "config":
        oci.manifest["config"].update(evil)  # type: ignore[attr-defined]
    elif where == "layer":
        oci.manifest["layers"][0].update(evil)  # type: ignore[index]
    else:
        kind = "index" if where == "index" else "manifest"
        oci.manifests = [{"mediaType": f"application/vnd.oci.image.{kind}.v1+json", **evil}]
    with pytest.raises(InvalidArgument, match="digest"):
        _open(oci.tar())


@pytest.mark.parametrize("where", ["manifest", "config"])
def test_a_document_that_is_not_what_its_digest_says_is_refused(where: str) -> None:
    oci = Oci([LAYER])
    descriptor = oci.descriptor()
    digest = descriptor["digest"] if where == "manifest" else oci.manifest["config"]["digest"]  # type: ignore[index]
    oci.manifests = [descriptor]
    oci.blobs[digest] = oci.blobs[digest].replace(b"layers", b"lAyers")
    with pytest.raises(Corrupt, match="digest"):
        _open(oci.tar())
    oci.blobs[digest] += b" "
    with pytest.raises(Corrupt, match="bytes instead of"):
        _open(oci.tar())


@pytest.mark.root
def test_a_layer_that_is_not_what_its_digest_says_is_refused_when_it_is_read(space: Path) -> None:
    oci = Oci([LAYER])
    digest = oci.manifest["layers"][0]["digest"]  # type: ignore[index]
    swapped = gzip.compress(tar(directory("./"), member("f", b"HELLO")), mtime=0)
    data = oci.blobs[digest]
    oci.blobs[digest] = swapped + bytes(len(data) - len(swapped))
    with _open(oci.tar()) as source, pytest.raises(Corrupt, match="diff id"):
        apply_all(source, space / "tree")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda o: o.extra.update({"oci-layout": b'{"imageLayoutVersion":"2.0.0"}'}), Unsupported, "version"),
        (lambda o: o.extra.update({"index.json": b"[]"}), InvalidArgument, r"index\.json"),
        (lambda o: o.extra.update({"index.json": b"{"}), InvalidArgument, r"index\.json is not JSON"),
        (lambda o: o.extra.update({"index.json": b"[" * 100_000}), InvalidArgument, r"index\.json is not JSON"),
        (lambda o: o.extra.update({"index.json": b'{"manifests":{}}'}), InvalidArgument, "no manifests"),
        (lambda o: o.extra.update({"index.json": b'{"manifests":[5]}'}), InvalidArgument, "descriptors"),
        (lambda o: o.extra.update({"index.json": b'{"manifests":[]}'}), InvalidArgument, "no image"),
        (lambda o: o.extra.update({"index.json": b" " * (17 << 20)}), LimitExceeded, "bytes long"),
        (lambda o: o.manifest.update(layers=[]), Corrupt, "0 layers"),
        (lambda o: o.manifest.update(layers=None), InvalidArgument, "layers"),
        (lambda o: o.manifest.update(layers=[5]), InvalidArgument, "descriptors"),
        (lambda o: o.manifest["layers"][0].update(size=1), Corrupt, "bytes instead of"),
        (lambda o: o.manifest["layers"][0].update(mediaType="x.tar+gzip+encrypted"), Unsupported, "encrypted"),
        (lambda o: o.blobs.pop(o.manifest["layers"][0]["digest"]), NotFound, "not in the source"),
        (lambda o: o.blobs.pop(o.manifest["config"]["digest"]), NotFound, "no file"),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(change: Any, error: type[CowfsError], message: str) -> None:
    oci = Oci([LAYER])
    change(oci)
    with pytest.raises(error, match=message) as caught:
        _open(oci.tar())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"Layers": ["../../../etc/passwd"]}, InvalidArgument, r"\.\."),
        ({"Layers": ["/etc/passwd"]}, NotFound, "etc/passwd"),
        ({"Layers": ["a.tar", "a.tar"]}, Corrupt, "2 layers"),
        ({"Layers": "a.tar"}, InvalidArgument, "layers"),
        ({"Layers": [5]}, InvalidArgument, "layers"),
        ({"RepoTags": [5]}, InvalidArgument, "RepoTags"),
        ({"Config": "../x"}, InvalidArgument, r"\.\."),
        ({"Config": "missing.json"}, NotFound, "missing"),
        ({"Config": None}, InvalidArgument, "configuration"),
        ({"Config": "a.tar"}, InvalidArgument, "configuration is not JSON"),
    ],
)  # fmt: skip
def test_docker_archives_that_are_refused(changes: dict[str, Any], error: type[CowfsError], message: str) -> None:
    with pytest.raises(error, match=message):
        _open(docker_archive([("a.tar", LAYER)], **changes))


def test_a_docker_configuration_that_is_not_what_its_name_says_is_refused() -> None:
    config = make_config([digest_of(LAYER)])
    entry = {"Config": "0" * 64 + ".json", "Layers": ["a.tar"]}
    with pytest.raises(Corrupt, match="digest"):
        _open(
            tar(
                member("manifest.json", json.dumps([entry]).encode()),
                member("a.tar", LAYER),
                member("0" * 64 + ".json", config),
            )
        )


def test_links_out_of_a_docker_archive_lead_nowhere() -> None:
    for link in (
        symlink("a.tar", "../../../etc/passwd"),
        symlink("a.tar", "/etc/passwd"),
        hardlink("a.tar", "/etc/passwd"),
    ):
        data = docker_archive([("a.tar", LAYER)])
        config_and_manifest = data[len(member("a.tar", LAYER)) :]
        with pytest.raises(CowfsError, match=r"out of the archive|no file"):
            _open(link + config_and_manifest)
    loop = symlink("a.tar", "b.tar") + symlink("b.tar", "a.tar")
    with pytest.raises(NotFound, match="no file"):
        _open(loop + docker_archive([("a.tar", LAYER)])[len(member("a.tar", LAYER)) :])


@pytest.mark.root
def test_links_in_a_layout_directory_are_followed_to_files_that_have_the_digest(space: Path) -> None:
    """Bazel makes layouts of links."""
    layout = Oci([LAYER]).write(space / "layout")
    secret = space / "secret"
    for name in sorted(os.listdir(layout / "blobs" / "sha256")):
        blob = layout / "blobs" / "sha256" / name
        secret.write_bytes(blob.read_bytes())
        blob.unlink()
        blob.symlink_to(secret)
        open_image(layout).close()
        blob.unlink()
        os.mkfifo(blob)
        with pytest.raises(CowfsError):
            open_image(layout)
        blob.unlink()
        blob.symlink_to("/dev/zero")
        with pytest.raises(NotFound):
            open_image(layout)
        blob.unlink()
        blob.write_bytes(secret.read_bytes())
    shutil.move(layout / "blobs", space / "blobs")
    (layout / "blobs").symlink_to(space / "blobs")
    for name in ("index.json", "oci-layout"):
        shutil.move(layout / name, space / name)
        (layout / name).symlink_to(space / name)
    with open_image(layout) as source:
        apply_all(source, space / "tree")
    assert (space / "tree" / "f").read_bytes() == b"hello"


@pytest.mark.root
def test_links_in_a_docker_archive_directory_are_not_followed(space: Path) -> None:
    (space / "a.tar").write_bytes(docker_archive([("layer.tar", LAYER)]))
    archive = space / "archive"
    archive.mkdir()
    subprocess.run(["tar", "-xf", space / "a.tar", "-C", archive], check=True)
    open_image(archive).close()
    shutil.move(archive / "layer.tar", space / "layer.tar")
    (archive / "layer.tar").symlink_to(space / "layer.tar")
    with pytest.raises(NotFound):
        open_image(archive)


def test_truncated_and_foreign_sources_are_refused(tmp_path: Path) -> None:
    whole = OCI.read_bytes()
    for length in (1, 100, 513, len(whole) // 2, len(whole) - 2048):
        with pytest.raises(CowfsError):
            _open(whole[:length])
    for data in (b"", b"not an image at all" * 100, gzip.compress(b"neither")):
        with pytest.raises(InvalidArgument):
            _open(data)
    with pytest.raises(NotFound, match="no such file"):
        open_image(tmp_path / "missing")


def test_a_root_filesystem_that_starts_like_an_image_is_one_all_the_same() -> None:
    for parts in (
        [member("oci-layout", b"{}"), member("etc/passwd")],
        [member("backup.tar", bytes(9 << 20)), directory("etc")],
    ):
        data = tar(*parts)
        with _open(data) as source:
            assert source.kind == "rootfs"
            assert digest_of(source.pick().layers[0].open().read(len(data) + 1)) == digest_of(data)


def test_names_as_other_writers_of_docker_archives_choose_them() -> None:
    """jib, kaniko and bazel: no hexadecimal names, compressed layers."""
    config = make_config([digest_of(LAYER)])
    entry = {"Config": "config.json", "RepoTags": ["x:1"], "Layers": ["a.tar.gz"]}
    data = tar(
        member("a.tar.gz", gzip.compress(LAYER)),
        member("config.json", config),
        member("manifest.json", json.dumps([entry]).encode()),
    )
    with _open(data) as source:
        assert source.kind == "docker"
        assert source.pick("x:1").layers[0].diff_id == digest_of(LAYER)


@given(st.data())
def test_any_damage_is_a_clear_error(data: st.DataObject) -> None:
    whole = bytearray(OCI.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        _open(bytes(whole)).close()
    except CowfsError as error:
        assert "\n" not in str(error)


# Arithmetic ----------------------------------------------------------------------------------------


def test_chain_ids_are_as_the_specification_says() -> None:
    a, b, c = ("sha256:" + letter * 64 for letter in "abc")
    ab = digest_of(f"{a} {b}".encode())
    assert chain_ids([a, b, c]) == [a, ab, digest_of(f"{ab} {c}".encode())]
    assert chain_ids([]) == []


def test_a_configuration_is_extended_with_its_history() -> None:
    a, b = ("sha256:" + letter * 64 for letter in "ab")
    base = json.dumps({"os": "linux", "history": [{"created_by": "x"}, {"empty_layer": True}],
                       "rootfs": {"diff_ids": [a]}}).encode()  # fmt: skip
    made = json.loads(make_config([a, b], base, created="2026-01-01T00:00:00Z"))
    assert made["rootfs"]["diff_ids"] == [a, b]
    assert len(made["history"]) == 3
    assert made["created"] == "2026-01-01T00:00:00Z"
    assert json.loads(make_config([], base))["history"] == [
        {"created_by": "x", "empty_layer": True},
        {"empty_layer": True},
    ]
