"""Images out: other tools accept what is written, with the same digests, and the same bytes each time."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from support import trees
from support.small_images import DOCKER, LAYER, OCI, TOP, apply_all, digest_of

from cowfs.archive import apply_layer, export_layer, rebuild
from cowfs.archive.compress import Packer
from cowfs.errors import AlreadyExists, Corrupt, CowfsError, InvalidArgument
from cowfs.images import OutImage, OutLayer, make_config, open_image, write_docker, write_oci
from cowfs.sys.mounts import mountinfo


def _from_bytes(data: bytes) -> OutLayer:
    def write(out: BinaryIO, compression: str) -> Packer:
        packer = Packer(out, compression)
        packer.write(data)
        packer.close()
        return packer

    return OutLayer(diff_id=digest_of(data), write=write)


def _image(*layers: bytes, tags: Sequence[str] = ("app:1",)) -> OutImage:
    return OutImage(
        config=make_config([digest_of(layer) for layer in layers]),
        layers=[_from_bytes(layer) for layer in layers],
        tags=tags,
    )


@pytest.fixture
def unpacked(space: Path) -> OutImage:
    """The image that buildah made, applied to layer directories, ready to be written from there."""
    layers = []
    with open_image(OCI) as source:
        image = source.pick()
        for number, layer in enumerate(image.layers):
            target, log = space / f"layer{number}", space / f"log{number}"
            target.mkdir()
            with layer.open() as stream, open(log, "wb") as side:
                apply_layer(stream, str(target), log=side, diff_id=layer.diff_id, blob_digest=layer.digest)
            layers.append(OutLayer(diff_id=str(layer.diff_id), write=_rebuilder(target, log)))
        return OutImage(config=image.config, layers=layers, tags=image.tags)


def _rebuilder(layer: Path, log: Path) -> Any:
    def write(out: BinaryIO, compression: str) -> Any:
        fd = os.open(layer, os.O_RDONLY)
        try:
            with open(log, "rb") as side:
                return rebuild(side, fd, out, compression=compression)
        finally:
            os.close(fd)

    return write


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@pytest.mark.root
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("kind", ["oci-archive", "oci", "docker-archive"])
def test_skopeo_copies_what_we_write_and_verifies_every_layer(
    space: Path, unpacked: OutImage, kind: str, compression: str
) -> None:
    skopeo = _tool("skopeo")
    target = str(space / "out")
    if kind == "docker-archive":
        if compression != "gzip":
            pytest.skip("a docker-archive has uncompressed layers")
        write_docker(target, [unpacked])
        reference = f"docker-archive:{target}"
    else:
        write_oci(target, [unpacked], directory=kind == "oci", compression=compression)
        reference = f"{kind}:{target}:{unpacked.tags[0]}"
    policy = space / "policy.json"
    policy.write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
    _run(skopeo, "--policy", str(policy), "copy", reference, f"dir:{space}/copied")
    shown = json.loads(_run(skopeo, "inspect", "--config", reference))
    assert shown["rootfs"]["diff_ids"] == [layer.diff_id for layer in unpacked.layers]


@pytest.mark.root
def test_umoci_unpacks_our_layout_to_the_tree_that_apply_makes(space: Path, unpacked: OutImage) -> None:
    umoci = _tool("umoci")
    write_oci(str(space / "layout"), [unpacked], directory=True)
    _run(umoci, "unpack", "--image", f"{space}/layout:small:1", str(space / "bundle"))
    with open_image(space / "layout") as source:
        apply_all(source, space / "tree")
    trees.assert_same(
        trees.snapshot(space / "bundle" / "rootfs"), trees.snapshot(space / "tree"), names=("umoci", "cowfs")
    )


@pytest.mark.root
def test_what_umoci_writes_is_read_to_the_tree_that_umoci_makes(space: Path) -> None:
    """Its archives have no end blocks; the second layer has whiteouts, an xattr and a time with nanoseconds."""
    umoci = _tool("umoci")
    layout = f"{space}/layout"
    _run(umoci, "init", "--layout", layout)
    _run(umoci, "new", "--image", f"{layout}:a")
    _run(umoci, "unpack", "--image", f"{layout}:a", f"{space}/b1")
    with open_image(OCI) as source:
        apply_all(source, space / "tree")
    _run("cp", "-a", f"{space}/tree/.", f"{space}/b1/rootfs/")
    _run(umoci, "repack", "--image", f"{layout}:a", f"{space}/b1")
    _run(umoci, "unpack", "--image", f"{layout}:a", f"{space}/b2")
    root = space / "b2" / "rootfs"
    shutil.rmtree(root / "dir" / "renamed")
    (root / "etc" / "passwd").unlink()
    (root / "etc" / "new").write_bytes(b"new")
    os.setxattr(root / "etc" / "new", "user.note", b"x")
    os.utime(root / "etc" / "new", ns=(1, 1_234_567_890_123_456_789))
    _run(umoci, "repack", "--image", f"{layout}:a", f"{space}/b2")
    _run(umoci, "unpack", "--image", f"{layout}:a", f"{space}/b3")
    with open_image(layout) as source:
        apply_all(source, space / "ours")
    trees.assert_same(trees.snapshot(space / "b3" / "rootfs"), trees.snapshot(space / "ours"), names=("umoci", "cowfs"))


@pytest.mark.root
@pytest.mark.parametrize("program", ["podman", "buildah"])
@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_podman_and_buildah_load_what_we_write(space: Path, unpacked: OutImage, program: str, kind: str) -> None:
    tool = _tool(program)
    if not any(mount.target == b"/" for mount in mountinfo()):
        pytest.skip("in a chroot: containers/storage must make / private")
    target = str(space / "out.tar")
    if kind == "docker-archive":
        write_docker(target, [unpacked])
    else:
        write_oci(target, [unpacked])
    policy = space / "policy.json"
    policy.write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
    run = tempfile.mkdtemp(prefix="cf")  # podman refuses a longer path than 50 characters
    place = ["--root", f"{space}/root", "--runroot", run, "--storage-driver", "vfs"]
    try:
        _run(tool, *place, "pull", "-q", "--signature-policy", str(policy), f"{kind}:{target}")
        listed = json.loads(
            _run(tool, *place, "images", *(["--format", "json"] if program == "podman" else ["--json"]))
        )
        assert len(listed) == 1
        identity = str(listed[0].get("id") or listed[0].get("Id"))
        assert digest_of(unpacked.config)[7:].startswith(identity)
        assert any("small:1" in name for name in listed[0].get("names") or listed[0].get("Names"))
    finally:
        subprocess.run([tool, *place, "rmi", "-af"], capture_output=True, check=False)
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.root
def test_a_round_trip_through_every_format_keeps_chain_and_configuration(space: Path, unpacked: OutImage) -> None:
    write_oci(str(space / "a.tar"), [unpacked], compression="zstd")
    write_docker(str(space / "b.tar"), [unpacked])
    write_oci(str(space / "c"), [unpacked], directory=True, compression="none")
    with open_image(DOCKER) as source:
        chain = source.pick().chain
    for name in ("a.tar", "b.tar", "c"):
        with open_image(space / name) as source:
            image = source.pick()
            assert image.chain == chain
            assert image.config == unpacked.config
            assert image.tags == ("small:1",)
            apply_all(source, space / f"tree-{name}")
    for name in ("b.tar", "c"):
        trees.assert_same(trees.snapshot(space / "tree-a.tar"), trees.snapshot(space / f"tree-{name}"))


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    for write in (write_oci, write_docker):
        outs = []
        for _ in range(2):
            out = io.BytesIO()
            write(out, [_image(LAYER, TOP), _image(LAYER, tags=["base", "base:2"])])
            outs.append(out.getvalue())
        assert outs[0] == outs[1]
    with open_image(io.BytesIO(outs[0])) as source:
        assert [image.tags for image in source.images] == [("app:1",), ("base:latest", "base:2")]


def test_a_layer_that_two_images_share_is_written_once() -> None:
    calls = []
    shared = _from_bytes(LAYER)

    def write(out: BinaryIO, compression: str) -> Any:
        calls.append(compression)
        return shared.write(out, compression)

    images = [
        OutImage(
            config=make_config([shared.diff_id]), layers=[OutLayer(diff_id=shared.diff_id, write=write)], tags=[tag]
        )
        for tag in ("a:1", "b:1")
    ]
    for writer, compression in ((write_oci, "gzip"), (write_docker, "none")):
        calls.clear()
        writer(io.BytesIO(), images)
        assert calls == [compression]


def test_images_are_added_to_a_layout_that_is_there(tmp_path: Path) -> None:
    layout = str(tmp_path / "layout")
    write_oci(layout, [_image(LAYER)], directory=True)
    write_oci(layout, [_image(LAYER, TOP, tags=["app:2"])], directory=True)
    write_oci(layout, [_image(TOP, tags=["app:1"])], directory=True)  # the name moves
    with open_image(layout) as source:
        assert sorted(image.tags for image in source.images) == [("app:1",), ("app:2",)]
        assert source.pick("app:1").layers[0].diff_id == digest_of(TOP)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(AlreadyExists, match="something else"):
        write_oci(str(tmp_path / "full"), [_image(LAYER)], directory=True)


@pytest.mark.parametrize("write", [write_oci, write_docker])
def test_a_layer_that_is_not_what_it_should_be_leaves_nothing(tmp_path: Path, write: Any) -> None:
    lying = OutLayer(diff_id=digest_of(LAYER), write=_from_bytes(TOP).write)
    image = OutImage(config=make_config([digest_of(LAYER)]), layers=[lying])
    with pytest.raises(Corrupt, match="diff id"):
        write(str(tmp_path / "out.tar"), [image])
    assert os.listdir(tmp_path) == []
    with pytest.raises(Corrupt, match="same diff ids"):
        write(str(tmp_path / "out.tar"), [OutImage(config=make_config([]), layers=[lying])])
    assert os.listdir(tmp_path) == []


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.tar"
    target.write_bytes(b"old")

    def fail(out: BinaryIO, compression: str) -> None:
        out.write(b"some")
        raise OSError(28, "No space left on device")

    image = OutImage(config=make_config([digest_of(LAYER)]), layers=[OutLayer(diff_id=digest_of(LAYER), write=fail)])
    with pytest.raises(OSError, match="No space"):
        write_oci(str(target), [image])
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.tar"]


def test_bad_arguments_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="compression"):
        write_oci(io.BytesIO(), [_image(LAYER)], compression="lzw")
    with pytest.raises(InvalidArgument, match="path"):
        write_oci(io.BytesIO(), [_image(LAYER)], directory=True)
    with pytest.raises(CowfsError):
        write_oci(io.BytesIO(), [OutImage(config=b"{}", layers=[])])


@pytest.mark.root
def test_layers_made_here_are_written_too(space: Path) -> None:
    layer = space / "layer"
    (layer / "d").mkdir(parents=True)
    (layer / "d" / "f").write_bytes(b"made here")
    os.mknod(layer / "gone", 0o020000, 0)
    diff_id = export_layer(str(layer), io.BytesIO()).diff_id

    def write(out: BinaryIO, compression: str) -> Any:
        return export_layer(str(layer), out, compression=compression)

    image = OutImage(
        config=make_config([digest_of(LAYER), diff_id]),
        layers=[_from_bytes(LAYER), OutLayer(diff_id=diff_id, write=write)],
    )
    out = io.BytesIO()
    write_oci(out, [image])
    with open_image(io.BytesIO(out.getvalue())) as source:
        assert source.pick().layers[1].diff_id == diff_id
