"""Images from strangers, damaged at random: every one is read, or refused in one line; never a traceback, never a full disk.

Three kinds of damage: bytes of an archive, values of its documents (any place gets any value), and what its tar says of names and sizes.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.archives import directory, hardlink, member, symlink, tar
from support.images import FULL_NAME, Layout, archive, config, digest, docker, platform

from cowfs.archive import apply_layer
from cowfs.archive.options import ApplyOptions
from cowfs.errors import CowfsError
from cowfs.images import make_config, open_image, write_docker, write_oci
from cowfs.images.writing import OutImage

pytestmark = pytest.mark.root
ONE = tar(directory("./"), member("a", b"1" * 3000), symlink("l", "a"), hardlink("h", "a"))
TWO = tar(member("b", b"2"), member(".wh.a"), directory("d"))
BOUND = 1 << 20

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1e308, 2**63, 10**30, "", "x", "\ud83d", "\0", "../../etc/passwd", "/", "a" * 5000, [], {},
    ["x"], [[]], {"x": []}, "sha256:" + "0" * 64, "sha512:" + "0" * 128, "sha256:../x", "linux", "unknown",
    "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json",
]  # fmt: skip
TEXTS = [b"", b"{", b"[]", b"null", b"1e999", b"NaN", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"\xff", b"[" * 3000, b'{"a":' * 2000,
         b"9" * 5000, b"-", b'"\\ud83d"']  # fmt: skip


def layout() -> Layout:
    made = Layout()
    entries = [
        made.manifest([ONE, TWO], config([ONE, TWO], history=[{"created_by": "x"}]), platform=platform("linux/amd64")),
        made.manifest([TWO], config([TWO], architecture="arm", variant="v7"), platform=platform("linux/arm/v7")),
    ]
    made.manifests = [made.index(entries, annotations={FULL_NAME: "docker.io/library/app:1"})]
    return made.add([ONE], "other:1", compressed=True)


def check(data: bytes, space: Path) -> None:
    """Read it as far as it goes."""
    target = space / "target"
    try:
        with open_image(io.BytesIO(data), spool_dir=str(space), max_bytes=64 << 20) as source:
            for tag in (None, "1", "app:1", "other:1"):
                for wanted in (None, "linux/arm/v7", "linux/amd64"):
                    try:
                        image = source.pick(tag, platform=wanted)
                    except CowfsError as error:
                        said(error)
                        continue
                    read(image, target)
    except CowfsError as error:
        said(error)
    except OSError as error:
        assert error.strerror  # of the target: a name that it cannot have
    finally:
        shutil.rmtree(target, ignore_errors=True)


def read(image: Any, target: Path) -> None:
    for each in image.tags:
        each.encode("utf-8", "backslashreplace")
    ids = [layer.diff_id for layer in image.layers]
    if None not in ids:
        json.loads(make_config([*ids, digest(b"x")], image.config))
        out = io.BytesIO()
        writer = OutImage(config=make_config([], image.config), layers=[], tags=["x:1"])
        write_oci(out, [writer])
        write_docker(out, [writer])
    for layer in image.layers:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        try:
            with layer.open() as stream:
                apply_layer(
                    stream, str(target), form="plain", diff_id=layer.diff_id, blob_digest=layer.digest,
                    options=ApplyOptions(max_bytes=BOUND),
                )  # fmt: skip
        except CowfsError as error:
            said(error)
        taken = sum(
            os.lstat(os.path.join(where, name)).st_blocks * 512 for where, _, names in os.walk(target) for name in names
        )
        assert taken <= 2 * BOUND


def said(error: CowfsError) -> None:
    line = str(error)
    assert "\n" not in line
    assert len(line) < 10_000
    line.encode("utf-8", "backslashreplace")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a document can be changed."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(rng: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    path = rng.choice(places(value))
    new = rng.choice(VALUES)
    if not path:
        return new
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[path[-1]]
    elif rng.random() < 0.1 and isinstance(inner, list):
        inner.extend(copy.deepcopy(inner))
    else:
        inner[path[-1]] = new
    return value


def by_documents(rng: random.Random) -> bytes:
    """One document of a layout is changed; those that name it follow, so that only its content is wrong."""
    made = layout()
    name = rng.choice([*made.blobs, "index"])
    if rng.random() < 0.15:
        files = made.files()
        files[rng.choice([name for name in files if name.endswith(("json", "layout"))])] = rng.choice(TEXTS)
        return archive(files)
    try:
        document = made.manifests if name == "index" else json.loads(made.blobs[name])
    except ValueError:
        return made.tar()
    text = rng.choice(TEXTS) if name != "index" and rng.random() < 0.2 else None
    new = changed(rng, document)
    if name == "index":
        made.manifests = new if isinstance(new, list) else [new]
        return made.tar()
    data = json.dumps(new).encode() if text is None else text
    return follow(made, name, data)


def follow(made: Layout, name: str, data: bytes) -> bytes:
    """Replace a blob, and its digest and size wherever they are named."""
    size, todo = len(made.blobs[name]), {name: data}
    while todo:
        old, new = todo.popitem()
        size = len(made.blobs.get(old, b""))
        made.blobs[digest(new)] = new
        swap = ((old.encode(), digest(new).encode()), (f'"size": {size}'.encode(), f'"size": {len(new)}'.encode()))
        for each, body in list(made.blobs.items()):
            if old.encode() in body and each != old:
                after = body
                for before, now in swap:
                    after = after.replace(before, now)
                todo[each] = after
        text = json.dumps(made.manifests).encode()
        for before, now in swap:
            text = text.replace(before, now)
        made.manifests = json.loads(text)
    return made.tar()


def by_manifest(rng: random.Random) -> bytes:
    """A docker-archive with a changed ``manifest.json`` or configuration."""
    document = config([ONE, TWO])
    entries = [{"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["1.tar", "2.tar"]}]
    listed: Any = changed(rng, entries) if rng.random() < 0.7 else entries
    text = json.dumps(changed(rng, json.loads(document))).encode() if rng.random() < 0.5 else document
    if rng.random() < 0.1:
        text = rng.choice(TEXTS)
    manifest = rng.choice(TEXTS) if rng.random() < 0.1 else json.dumps(listed).encode()
    files = [("1.tar", ONE), ("2.tar", TWO), ("c.json", text), ("manifest.json", manifest)]
    rng.shuffle(files)
    return archive(dict(files))


def by_bytes(rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated."""
    data = bytearray(
        rng.choice([layout().tar(), docker(([ONE, TWO], ["app:1"], None)), ONE, gzip.compress(layout().tar(), mtime=0)])
    )
    for _ in range(rng.choice((1, 1, 2, 5, 50))):
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.choice((1, 100, 512, 5000))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 512, 4096))]
        elif kind == 3:
            data[at : at + 12] = rng.choice((b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"\xff" * 12))
        else:
            at -= at % 512
            data[at : at + 512] = rng.choice((bytes(512), rng.randbytes(512)))
        if not data:
            return b"x"
    return bytes(data)


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "bytes": by_bytes,
    "documents": by_documents,
    "manifest": by_manifest,
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_are_read_or_refused(space: Path, kind: str, request: pytest.FixtureRequest) -> None:
    rng = random.Random(f"{request.config.getoption('--seed')} damage {kind}")
    for step in range(request.config.getoption("--steps") // 50):
        data = KINDS[kind](rng)
        try:
            check(data, space)
        except Exception as error:
            (space / "failed").write_bytes(data)
            raise AssertionError(f"step {step}: {len(data)} bytes, {data[:80]!r}...") from error


def test_the_undamaged_ones_are_read(space: Path) -> None:
    for data in (layout().tar(), docker(([ONE, TWO], ["app:1"], None))):
        with open_image(io.BytesIO(data), spool_dir=str(space)) as source:
            image = source.pick("app:1", platform="linux/amd64")
            assert [layer.diff_id for layer in image.layers] == [digest(ONE), digest(TWO)]
            read(image, space / "target")
