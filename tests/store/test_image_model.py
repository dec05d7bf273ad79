"""Random images through a store, against a dictionary: what goes in under a name comes out under it.

The model of an image is its configuration and its layers, byte for byte. Images share layers on purpose, and configurations
differ where layers do not. Sources are written here, or by skopeo, buildah and umoci where they are installed; what is
exported is read back here and by skopeo.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.archives import directory, hardlink, member, symlink, tar
from support.images import FULL_NAME, REF_NAME, Layout, config, digest, docker, platform

from cowfs.images import open_image
from cowfs.store import Store

pytestmark = pytest.mark.root
NAMES = ["app:1", "app:2", "other", "registry.example:5000/team/app:v1", "docker.io/library/app:latest"]
FORMATS = ["oci", "docker"]


@dataclass
class Model:
    """The expected export of a tag or a snapshot made here."""

    config: bytes
    layers: (
        list[bytes | None] | None
    )  # bottom first, None: made here; None: squashed, only the configuration is looked at
    exact: bool = True  # the configuration comes out byte for byte
    wanted: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wanted = json.loads(self.config)["config"]


class Images:
    """A pool of layers, and random images of them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pool: list[list[bytes]] = [[] for _ in range(4)]

    def layer(self, depth: int) -> bytes:
        rng = self.rng
        known = self.pool[depth]
        if known and rng.random() < 0.7:
            return rng.choice(known)
        parts = [
            directory("./"),
            directory(f"d{depth}"),
            member(f"d{depth}/f", rng.randbytes(rng.choice((0, 1, 600, 70_000)))),
        ]
        if rng.random() < 0.5:
            parts.append(symlink(f"d{depth}/l", "f"))
            parts.append(hardlink(f"d{depth}/h", f"d{depth}/f"))
        if depth and rng.random() < 0.5:
            parts.append(member(f"d{depth - 1}/.wh.f"))
        if rng.random() < 0.3:
            parts.append(member("x", b"x", pax={"SCHILY.xattr.user.a%3Db": "v", "mtime": "1.25"}))
        known.append(tar(*parts))
        return known[-1]

    def image(self, **fields: Any) -> tuple[bytes, list[bytes]]:
        rng = self.rng
        layers = [self.layer(depth) for depth in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
        more: dict[str, Any] = {"config": {"Env": [f"A={rng.randrange(4)}"], "Cmd": [rng.choice("ab")]}, **fields}
        if rng.random() < 0.5:
            more["history"] = [{"created_by": str(step)} for step in range(rng.randrange(6))]
        if rng.random() < 0.2:
            more["labels"] = {"x": "\ud83d"}  # a lone surrogate, escaped
        return config(layers, **more), layers


class Run:
    """One run: a store, its model, and the operations."""

    def __init__(self, space: Path, driver: str, rng: random.Random, *, tools: bool) -> None:
        self.space, self.driver, self.rng, self.tools = space, driver, rng, tools
        self.images = Images(rng)
        self.tags: dict[str, Model] = {}
        self.made: dict[str, Model] = {}
        self.count = 0
        self.store = self.open()

    def open(self) -> Store:
        return Store.open(self.space / "store", driver=self.driver, fsync=False)

    def path(self, suffix: str = "") -> Path:
        self.count += 1
        return self.space / f"t{self.count}{suffix}"

    # Inputs ------------------------------------------------------------------------------------

    def source(self, document: bytes, layers: list[bytes], name: str) -> tuple[Any, dict[str, Any]]:
        """An image in some form, with others beside it; what to ask for."""
        rng = self.rng
        ask: dict[str, Any] = {}
        if rng.random() < 0.3:
            others = [self.images.image() for _ in range(rng.randrange(3))]
            entries = [
                (layers, [name], document),
                *((more, [f"beside:{n}"], about) for n, (about, more) in enumerate(others)),
            ]
            rng.shuffle(entries)
            if others:
                ask["tag"] = name
            return self.carried(docker(*entries)), ask
        layout = Layout()
        notes = {REF_NAME: name} if rng.random() < 0.7 else {FULL_NAME: name, REF_NAME: name.rpartition(":")[2]}
        packed = rng.random() < 0.5
        if rng.random() < 0.4:
            about, more = self.images.image(architecture="s390x")
            absent = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:" + "0" * 64,
                      "size": 3, "platform": platform("linux/arm64")}  # fmt: skip
            manifests: list[dict[str, Any]] = [
                layout.manifest(layers, document, compressed=packed, platform=platform("linux/amd64")),
                layout.manifest(more, about, platform=platform("linux/s390x")), absent,
            ]  # fmt: skip
            rng.shuffle(manifests)
            layout.manifests = [layout.index(manifests, annotations=notes)]
            ask["platform"] = "linux/amd64"
        else:
            layout.add(layers, None, document, compressed=packed, annotations=notes)
        if rng.random() < 0.4:
            self.count += 1
            return layout.write(self.path()), ask
        return self.carried(layout.tar()), ask

    def carried(self, data: bytes) -> Any:
        if self.rng.random() < 0.5:
            return io.BytesIO(data)
        path = self.path(".tar")
        path.write_bytes(data)
        return str(path)

    def through_a_tool(self, document: bytes, layers: list[bytes]) -> str:
        """The same image as another tool writes it; its configuration must come through untouched."""
        layout, target = self.path(), self.path(".tar")
        Layout().add(layers, "x:1", document).write(layout)
        form = self.rng.choice(("docker-archive", "oci-archive"))
        subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:x:1", f"{form}:{target}:app:1"], check=True)
        return str(target)

    def do_import(self) -> None:
        document, layers = self.images.image()
        name = self.rng.choice(NAMES)
        model = Model(document, list(layers))
        if self.tools and layers and self.rng.random() < 0.15 and b"ud83d" not in document:
            self.store.import_image(self.through_a_tool(document, layers), name)
        else:
            source, ask = self.source(document, layers, name)
            given = self.rng.random() < 0.4
            self.store.import_image(source, name if given else None, told=lambda line: None, **ask)
        self.tags[name] = model

    # Operations --------------------------------------------------------------------------------

    def do_child(self) -> None:
        base = self.rng.choice([*self.tags, *self.made] or [""])
        if not base:
            return
        self.count += 1
        name = f"child{self.count}"
        self.store.prepare("w", base)
        self.store.apply("w", io.BytesIO(tar(member(f"c{self.count}", self.rng.randbytes(10)))))
        self.store.commit("w", name)
        was = self.tags.get(base) or self.made[base]
        layers = None if was.layers is None else [*was.layers, None]
        self.made[name] = Model(was.config, layers, exact=False)
        if self.rng.random() < 0.4:
            tag = self.rng.choice(NAMES)
            self.store.tag(tag, name)
            self.tags[tag] = self.made[name]

    def do_retag(self) -> None:
        if self.tags:
            name, target = self.rng.choice(NAMES), self.rng.choice(list(self.tags))
            self.store.tag(name, target)
            self.tags[name] = self.tags[target]

    def do_remove(self) -> None:
        if self.tags:
            name = self.rng.choice(list(self.tags))
            del self.tags[name]
            self.store.remove(name)

    def do_squash(self) -> None:
        """Merge the snapshot beneath a child made here into it, where that is all that stands on it."""
        if self.driver == "vfs" or not self.made:
            return
        name = self.rng.choice(list(self.made))
        beneath = self.store.stat(name).parent
        if beneath is None:
            return
        row = self.store.index.get(beneath)
        if len(self.store.index.children(row.num)) != 1 or self.store.index.tags_of(row.num):
            return
        self.store.squash(beneath)
        self.made.pop(beneath, None)
        above = [each for each in (*self.made, *self.tags) if name in [info.name for info in self.store.chain(each)]]
        for each in above:  # what stands on it has a layer fewer
            model = self.tags.get(each) or self.made[each]
            model.exact, model.layers = False, None

    def do_gc(self) -> None:
        self.store.gc()

    def do_reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    # Outputs -----------------------------------------------------------------------------------

    def do_export(self) -> None:
        if self.tags or self.made:
            self.check(self.rng.choice([*self.tags, *self.made]))

    def check(self, name: str) -> None:
        model = self.tags.get(name) or self.made[name]
        form = self.rng.choice(FORMATS)
        target = self.path(".tar")
        packing: dict[str, Any] = {"compression": self.rng.choice(["none", "gzip"])} if form == "oci" else {}
        self.store.export(name, str(target), format=form, **packing)
        with open_image(target) as source:
            image = source.pick()
            names = [name] if name in self.tags else [tag for tag, each in self.tags.items() if each is model]
            full = [each if form == "oci" or ":" in each else f"{each}:latest" for each in names]
            assert sorted(image.tags) == sorted(full)
            found = json.loads(image.config)
            if model.exact:
                assert image.config_digest == digest(model.config)
            assert found["config"] == model.wanted
            out = []
            for layer in image.layers:
                with layer.open() as stream:
                    out.append(stream.read())
            if model.layers is not None:
                assert len(image.layers) == max(1, len(model.layers))
                for want, layer in zip(model.layers, image.layers, strict=False):
                    assert want is None or layer.diff_id == digest(want)
            steps = [step for step in found.get("history", []) if not step.get("empty_layer")]
            changed = found["rootfs"]["diff_ids"] != json.loads(model.config)["rootfs"]["diff_ids"]
            assert not changed or "history" not in found or len(steps) == len(found["rootfs"]["diff_ids"])
        if self.tools and self.rng.random() < 0.2 and b"ud83d" not in model.config and found["rootfs"]["diff_ids"]:
            self.by_skopeo(target, form, found)

    def by_skopeo(self, target: Path, form: str, found: dict[str, Any]) -> None:
        transport = "oci-archive" if form == "oci" else "docker-archive"
        done = subprocess.run(
            ["skopeo", "inspect", "--config", "--raw", f"{transport}:{target}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == found
        copied = self.path()
        subprocess.run(["skopeo", "copy", "-q", f"{transport}:{target}", f"dir:{copied}"], check=True)
        shutil.rmtree(copied)

    def finish(self) -> None:
        for name in (*self.tags, *self.made):
            self.check(name)
        assert self.store.check(content=True).problems == []
        assert {tag.name for tag in self.store.tags()} == set(self.tags)
        self.store.close()


@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_random_images_come_out_as_they_went_in(space: Path, driver: str, request: pytest.FixtureRequest) -> None:
    steps = request.config.getoption("--steps") // 100
    rng = random.Random(f"{request.config.getoption('--seed')} images {driver}")
    run = Run(space, driver, rng, tools=shutil.which("skopeo") is not None)
    operations: list[Callable[[], None]] = [
        *[run.do_import] * 6, *[run.do_export] * 6, *[run.do_child] * 3, run.do_retag, run.do_remove, run.do_squash,
        run.do_squash, run.do_gc, run.do_reopen,
    ]  # fmt: skip
    for step in range(steps):
        operation = rng.choice(operations)
        try:
            operation()
        except Exception as error:
            raise AssertionError(f"step {step}, {operation.__name__}") from error
        for left in space.glob("t*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    run.finish()


@pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not installed")
@pytest.mark.parametrize("form", ["oci-archive", "docker-archive", "oci"])
def test_two_images_of_buildah_on_the_same_layers(space: Path, form: str) -> None:
    """As ``FROM base`` with another CMD makes them; each goes round with its own id."""
    flags = ["--root", str(space / "buildah"), "--runroot", str(space / "run"), "--storage-driver", "vfs"]
    policy = space / "policy.json"  # a bare machine has none
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def buildah(verb: str, *arguments: object) -> str:
        trust = ["--signature-policy", str(policy)] if verb in ("from", "commit", "push") else []
        done = subprocess.run(
            ["buildah", *flags, verb, *trust, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    (space / "file").write_bytes(b"data")
    base = buildah("from", "scratch")
    buildah("copy", base, space / "file", "/file")
    ids = {}
    buildah("commit", "-q", base, "base:1")
    for name in ("one", "two"):
        container = buildah("from", "--pull-never", "base:1")
        buildah("config", "--cmd", name, container)
        ids[name] = buildah("commit", "-q", container, f"{name}:1")
        buildah("push", "-q", f"{name}:1", f"{form}:{space / name}:{name}:1")
    with Store.open(space / "store", fsync=False) as store:
        for name in ids:
            store.import_image(space / name, name)
        for name in ids:
            out = io.BytesIO()
            store.export(name, out, format="docker")
            with open_image(io.BytesIO(out.getvalue())) as source:
                assert json.loads(source.pick().config)["config"]["Cmd"] == [name]
                if form != "docker-archive":
                    assert source.pick().config_digest.endswith(ids[name])
