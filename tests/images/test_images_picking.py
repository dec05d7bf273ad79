"""Which image of a source is meant: by name, by platform; nothing else of it is read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from support.archives import directory, member, tar
from support.images import FULL_NAME, INDEX, MANIFEST, REF_NAME, Layout, archive, config, digest, docker, platform

from cowfs.errors import CowfsError, InvalidArgument, NotFound, Unsupported
from cowfs.images import ImageSource, open_image
from cowfs.images.platforms import Platform, parse_platform, ranking

FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


def layer(name: str) -> bytes:
    return tar(directory("./"), member(name, name.encode()))


def source(layout: Layout) -> ImageSource:
    return open_image(io.BytesIO(layout.tar()))


def many(*platforms: str, nested: bool = True, tag: str | None = "app") -> Layout:
    """An image for each platform, its layer's file named after it."""
    layout = Layout()
    entries = []
    for text in platforms:
        one = layer(text.replace("/", "-"))
        entries.append(layout.manifest([one], config([one], **platform(text)), platform=platform(text)))
    notes = {"annotations": {REF_NAME: tag}} if tag else {}
    layout.manifests = [layout.index(entries, **notes)] if nested else [{**entry, **notes} for entry in entries]
    return layout


def picked(opened: ImageSource, wanted: str | None) -> str:
    return opened.pick(platform=wanted).platform


@pytest.fixture(autouse=True)
def on_amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cowfs.images.reading.here", lambda: Platform("linux", "amd64"))


# Platforms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        (("linux/arm/v6", "linux/arm/v7"), "linux/arm", "linux/arm/v7"),
        (("linux/arm/v7", "linux/arm/v6"), "linux/arm/v6", "linux/arm/v6"),
        (("linux/arm/v5", "linux/arm/v6"), "linux/arm/v7", "linux/arm/v6"),
        (("linux/arm/v6", "linux/arm/v7"), "linux/arm/v8", "linux/arm/v7"),
        (("linux/amd64", "linux/amd64/v3"), None, "linux/amd64"),
        (("linux/amd64/v3", "linux/amd64"), "linux/amd64", "linux/amd64"),
        (("linux/amd64", "linux/amd64/v2", "linux/amd64/v3"), "linux/amd64/v3", "linux/amd64/v3"),
        (("linux/amd64", "linux/amd64/v2"), "linux/amd64/v4", "linux/amd64/v2"),
        (("linux/arm64/v8", "linux/amd64"), "linux/arm64", "linux/arm64"),
        (("linux/arm64", "linux/amd64"), "linux/arm64/v8", "linux/arm64"),
        (("linux/arm64", "linux/amd64"), "linux/aarch64", "linux/arm64"),
        (("windows/amd64", "linux/amd64"), None, "linux/amd64"),
        (("windows/amd64", "linux/amd64"), "windows/amd64", "windows/amd64"),
        (("linux/arm64", "linux/386"), None, "linux/386"),
        (("linux/arm64",), None, "linux/arm64"),
        (("linux/amd64", "linux/s390x"), "linux/x86_64", "linux/amd64"),
    ],
)
def test_the_platform_that_containerd_picks(
    there: tuple[str, ...], wanted: str | None, expected: str, nested: bool
) -> None:
    with source(many(*there, nested=nested)) as opened:
        assert picked(opened, wanted) == expected


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (("linux/amd64/v3",), "linux/amd64"),
        (("linux/386",), "linux/amd64"),
        (("linux/arm/v7",), "linux/arm/v6"),
        (("linux/amd64", "linux/arm64"), "linux/riscv64"),
        (("linux/amd64", "linux/arm64"), "windows/amd64"),
    ],
)
def test_a_platform_that_is_not_there(there: tuple[str, ...], wanted: str) -> None:
    with source(many(*there)) as opened, pytest.raises(NotFound, match=wanted) as told:
        opened.pick(platform=wanted)
    assert all(name in str(told.value) for name in there)


@pytest.mark.parametrize(
    "text", ["linux", "linux/", "/amd64", "linux/arm/v7/x", "", "linux amd64", "linux/amd 64", "a//b"]
)
def test_what_is_no_platform_is_said_so(text: str) -> None:
    with pytest.raises(InvalidArgument, match="platform"):
        parse_platform(text)


def test_ranking_is_that_of_containerd() -> None:
    def names(text: str, *, asked: bool = False) -> list[str]:
        return [str(each) for each in ranking(parse_platform(text), asked=asked)]

    assert names("linux/amd64") == ["linux/amd64", "linux/386"]
    assert names("linux/amd64/v3") == ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"]
    assert names("linux/arm/v7") == ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]
    assert names("linux/arm64") == ["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v6", "linux/arm/v5"]
    assert names("linux/s390x") == ["linux/s390x"]


def test_several_without_a_choice_are_said_with_their_platforms() -> None:
    with source(many("linux/arm64", "linux/s390x")) as opened, pytest.raises(InvalidArgument, match="2 images") as told:
        opened.pick()
    assert "linux/arm64" in str(told.value)
    assert "linux/s390x" in str(told.value)


def test_the_platform_of_a_flat_index_is_read_from_the_configuration_where_it_does_not_say() -> None:
    layout = Layout()
    for arch in ("arm64", "amd64"):
        layout.add([layer(arch)], "app", config([layer(arch)], architecture=arch))
    with source(layout) as opened:
        assert picked(opened, None) == "linux/amd64"
        assert picked(opened, "linux/arm64") == "linux/arm64"


# Images with missing parts -------------------------------------------------------------------------


def gone(layout: Layout, number: int) -> None:
    del layout.blobs[inside(layout)[number]["digest"]]


def inside(layout: Layout) -> list[Any]:
    found: list[Any] = json.loads(layout.blobs[layout.manifests[0]["digest"]])["manifests"]
    return found


def changed(layout: Layout, **fields: Any) -> None:
    entries = inside(layout)
    entries[1].update(fields)
    layout.manifests = [layout.index(entries, annotations={REF_NAME: "app"})]


def config_gone(layout: Layout) -> None:
    manifest = json.loads(layout.blobs[inside(layout)[1]["digest"]])
    del layout.blobs[manifest["config"]["digest"]]


def manifest_of(layout: Layout, data: bytes) -> None:
    """The second manifest is something else."""
    changed(layout, **{key: layout.put(data, MANIFEST)[key] for key in ("digest", "size")})


ELSEWHERE: dict[str, Callable[[Layout], object]] = {
    "manifest absent": lambda o: gone(o, 1),
    "layer absent": lambda o: o.blobs.pop(digest(layer("linux-arm64"))),
    "configuration absent": config_gone,
    "sha512": lambda o: changed(o, digest="sha512:" + "a" * 128),
    "no digest at all": lambda o: changed(o, digest=None),
    "a list as digest": lambda o: changed(o, digest=["x"]),
    "a list as media type": lambda o: changed(o, mediaType=["x"]),
    "an object as media type": lambda o: changed(o, mediaType={}),
    "wrong size": lambda o: changed(o, size=-1),
    "platform a list": lambda o: changed(o, platform=["linux"], digest="sha256:" + "0" * 64, mediaType="x/y"),
    "attestation absent": lambda o: changed(
        o, digest="sha256:" + "0" * 64, platform={"os": "unknown", "architecture": "unknown"},
        annotations={"vnd.docker.reference.type": "attestation-manifest"},
    ),
    "not JSON": lambda o: manifest_of(o, b"\xff\xfe{}"),
    "a nested index that is absent": lambda o: changed(o, mediaType=INDEX, digest="sha256:" + "0" * 64, platform=None),
    "an unknown media type": lambda o: changed(o, mediaType="application/vnd.cncf.helm.config.v1+json"),
}  # fmt: skip


@pytest.mark.parametrize("wanted", [None, "linux/amd64"])
@pytest.mark.parametrize("what", ELSEWHERE)
def test_only_what_is_picked_is_read(what: str, wanted: str | None) -> None:
    layout = many("linux/amd64", "linux/arm64")
    ELSEWHERE[what](layout)
    with source(layout) as opened:
        assert picked(opened, wanted) == "linux/amd64"
    with source(layout) as opened, pytest.raises(CowfsError) as told:
        opened.pick(platform="linux/arm64").layers[0].open()
    assert "\n" not in str(told.value)


def test_foreign_layers_of_windows() -> None:
    layout = Layout()
    windows = layer("w")
    entries = [
        layout.manifest([layer("l")], platform=platform("linux/amd64")),
        layout.manifest(
            [windows], config([windows], os="windows"), media=FOREIGN, platform=platform("windows/amd64")
        ),
    ]  # fmt: skip
    layout.manifests = [layout.index(entries, annotations={REF_NAME: "app"})]
    del layout.blobs[digest(windows)]
    with source(layout) as opened:
        assert picked(opened, None) == "linux/amd64"
        with pytest.raises(NotFound, match="foreign"):
            opened.pick(platform="windows/amd64")


def test_a_digest_of_another_algorithm_is_said_where_it_is_picked() -> None:
    layout = many("linux/amd64", "linux/arm64")
    changed(layout, digest="sha512:" + "a" * 128)
    with source(layout) as opened, pytest.raises(Unsupported, match="sha512"):
        opened.pick(platform="linux/arm64")


def test_of_a_docker_archive_only_what_is_picked_is_read() -> None:
    one, two = layer("one"), layer("two")
    data = docker(([one], ["app:1"], None), ([two], ["app:2"], None))
    without = data.replace(f'"{digest(two)[7:]}.tar"'.encode(), f'"{"0" * 64}.tar"'.encode())
    with open_image(io.BytesIO(without)) as opened:
        assert opened.pick("app:1").layers[0].diff_id == digest(one)
        with pytest.raises(CowfsError):
            opened.pick("app:2")


# Names ---------------------------------------------------------------------------------------------


def test_the_full_name_comes_before_the_ref_name() -> None:
    layout = Layout()
    for name in ("one", "two"):
        notes = {FULL_NAME: f"docker.io/library/{name}:latest", REF_NAME: "latest"}
        layout.add([layer(name)], None, annotations=notes)
    with source(layout) as opened:
        assert opened.pick("docker.io/library/two:latest").tags == ("docker.io/library/two:latest",)
        assert opened.pick("two:latest").layers[0].diff_id == digest(layer("two"))
        with pytest.raises(InvalidArgument, match="2 images"):
            opened.pick("latest")


def test_a_docker_save_that_is_a_layout_as_well_has_the_other_platforms() -> None:
    """Its ``manifest.json`` lists one image of several."""
    layout = many("linux/amd64", "linux/arm64", tag="1")
    files = layout.files()
    first = json.loads(layout.blobs[inside(layout)[0]["digest"]])
    files["manifest.json"] = json.dumps(
        [
            {
                "Config": "blobs/sha256/" + first["config"]["digest"][7:],
                "RepoTags": ["app:1"],
                "Layers": ["blobs/sha256/" + each["digest"][7:] for each in first["layers"]],
            }
        ]
    ).encode()
    with open_image(io.BytesIO(archive(files))) as opened:
        assert (opened.kind, opened.pick().tags) == ("docker", ("app:1",))
        assert picked(opened, "linux/arm64") == "linux/arm64"
