"""Snapshots over a pipe: random chains against a plain look at both stores; what is cut, damaged or hostile brings in nothing wrong."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.archive import ApplyOptions
from cowfs.errors import Corrupt, CowfsError, FailedPrecondition, InvalidArgument
from cowfs.store import Store
from cowfs.store.stream import MAGIC, StreamIn, StreamOut

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers with owners: needs root")
DRIVERS = ["overlay", "row", "vfs", "aufs"]


@pytest.fixture(params=DRIVERS)
def pair(space: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Store, Store]]:
    """A store of each driver, and one of another."""
    other = {"overlay": "row", "row": "row", "vfs": "overlay", "aufs": "overlay"}[request.param]
    with (
        Store.open(space / "here", driver=request.param, fsync=False) as here,
        Store.open(space / "there", driver=other, fsync=False) as there,
    ):
        yield here, there


def sent(store: Store, *names: str, since: str | None = None) -> bytes:
    out = io.BytesIO()
    store.send(names, out, since=since)
    return out.getvalue()


def looked_at(store: Store, name: str) -> list[tuple[object, ...]]:
    """All that a tree is: paths, attributes, links and data."""
    firsts: dict[object, bytes] = {}
    found: list[tuple[object, ...]] = []
    for each in store.walk_files(name):
        first = firsts.setdefault(each.file, each.path) if each.nlink > 1 and each.type != "dir" else each.path
        data = b""
        if each.type == "file":
            with store.open_file(name, each.path) as file:
                data = file.read()
        found.append(
            (
                each.path,
                each.type,
                each.mode,
                each.uid,
                each.gid,
                each.mtime,
                each.rdev,
                each.target,
                first,
                data,
            )
        )
    return found


def change(store: Store, key: str, rng: random.Random, steps: int) -> None:
    """Random changes of an active snapshot."""
    with store.paths(key) as paths:
        for _ in range(steps):
            there = [path for path, attributes in paths.walk() if path and attributes.mode & 0o170000 == 0o100000]
            name = b"f%d" % rng.randrange(12)
            kind = rng.choice(["write", "write", "big", "dir", "link", "symlink", "chmod", "rename", "remove", "patch"])
            try:
                if kind == "write":
                    paths.write_bytes(name, rng.randbytes(rng.randrange(9000)), mode=0o640)
                elif kind == "big":
                    paths.write_bytes(name, rng.randbytes(300_000) + bytes(200_000))
                elif kind == "dir":
                    paths.makedirs(b"d%d/e" % rng.randrange(4))
                elif kind == "link" and there:
                    paths.link(rng.choice(there), b"l%d" % rng.randrange(6))
                elif kind == "symlink":
                    paths.symlink(b"../to/%d" % rng.randrange(9), b"s%d" % rng.randrange(4))
                elif kind == "chmod" and there:
                    paths.chmod(rng.choice(there), rng.choice([0o600, 0o755, 0o4711]))
                elif kind == "rename" and there:
                    paths.rename(rng.choice(there), b"r%d" % rng.randrange(4))
                elif kind == "remove" and there:
                    paths.unlink(rng.choice(there))
                elif kind == "patch" and there:
                    with paths.open(rng.choice(there), "r+b") as file:
                        file.seek(rng.randrange(0, 100_000) // 4096 * 4096)
                        file.write(rng.randbytes(4096))
            except (FileExistsError, IsADirectoryError, NotADirectoryError):
                pass


def chain(store: Store, rng: random.Random, length: int) -> list[str]:
    names: list[str] = []
    for number in range(length):
        key = f"key{number}"
        store.prepare(key, names[-1] if names else None)
        change(store, key, rng, 12)
        store.commit(key, f"v{number}", labels={"number": str(number)} if number % 2 else {})
        names.append(f"v{number}")
    return names


@pytest.mark.parametrize("seed", range(4))
def test_what_is_received_is_what_was_sent(pair: tuple[Store, Store], seed: int) -> None:
    here, there = pair
    rng = random.Random(seed)
    names = chain(here, rng, 5)
    first = rng.randrange(4)
    assert there.receive(io.BytesIO(sent(here, names[first]))) == names[: first + 1]
    assert there.receive(io.BytesIO(sent(here, names[-1], since=names[first]))) == names[first + 1 :]
    for name in names:
        assert looked_at(there, name) == looked_at(here, name)
        assert there.stat(name).labels == here.stat(name).labels
        assert there.image(name).layers[-1].diff_id == here.image(name).layers[-1].diff_id
        assert not there.limit(name)
    assert there.check(content=True).problems == []
    assert there.receive(io.BytesIO(sent(here, *names))) == []  # all of it is there
    assert there.copy_to("v4", here) == []  # and is the same for the way back
    assert {info.name for info in there.walk()} == set(names)


def asked(here: Store, there: Store, *names: str) -> tuple[tuple[str, ...], list[str], int]:
    """Send with answers: what was sent, what was new, and the bytes that went over."""
    to_there, to_here = os.pipe(), os.pipe()
    copied: list[str] = []
    failed: list[BaseException] = []

    def other() -> None:
        try:
            with open(to_there[0], "rb") as pipe, open(to_here[1], "wb") as answers:
                copied.extend(there.receive(pipe, answers=answers))
        except BaseException as error:  # noqa: BLE001  told in the other thread
            failed.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    count = 0
    with open(to_there[1], "wb") as pipe, open(to_here[0], "rb") as answers:

        class Counting(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, data: object) -> int:
                nonlocal count
                count += len(data)  # type: ignore[arg-type]
                return pipe.write(data)  # type: ignore[arg-type]

            def flush(self) -> None:
                if not pipe.closed:
                    pipe.flush()

        done = here.send(names, Counting(), answers=answers)  # type: ignore[arg-type]
    thread.join()
    assert not failed, failed
    assert done.copied == tuple(copied)
    return done.layers, copied, count


def test_a_receiver_that_is_asked_gets_what_it_lacks(pair: tuple[Store, Store]) -> None:
    here, there = pair
    names = chain(here, random.Random(7), 4)
    here.tag("app:1", "v3")
    assert asked(here, there, "v1")[0] == ("v0", "v1")
    layers, copied, _ = asked(here, there, "app:1", "v2")
    assert (list(layers), copied) == (["v2", "v3"], ["v2", "v3"])
    assert looked_at(there, "app:1") == looked_at(here, names[-1])
    assert asked(here, there, "app:1")[2] < 2000


def test_a_block_of_a_big_file_travels_as_a_block(space: Path) -> None:
    with (
        Store.open(space / "here", driver="row", fsync=False) as here,
        Store.open(space / "there", driver="row", fsync=False) as there,
    ):
        here.prepare("k")
        with here.paths("k") as paths:
            paths.write_bytes(b"disk", random.Random(1).randbytes(16 << 20))
        here.commit("k", "v1")
        there.receive(io.BytesIO(sent(here, "v1")))
        here.prepare("k", "v1")
        with here.open_file("k", "disk", "r+b") as file:
            file.seek(5 << 20)
            file.write(b"new")
        here.commit("k", "v2")
        stream = sent(here, "v2", since="v1")
        assert len(stream) < 20_000
        there.receive(io.BytesIO(stream))
        assert there.usage("v2").bytes < 100_000
        with there.open_file("v2", "disk") as file:
            file.seek(5 << 20)
            assert file.read(3) == b"new"


def test_images_keep_their_layers_and_their_configuration(space: Path) -> None:
    (space / "tree").mkdir()
    (space / "tree/file").write_text("text")
    with (
        Store.open(space / "here", fsync=False) as here,
        Store.open(space / "there", driver="vfs", fsync=False) as there,
    ):
        here.import_image(space / "tree", "plain")
        here.prepare("k", "plain")
        here.commit("k", "v1")
        here.export("v1", space / "x.tar")
        top = here.import_image(space / "x.tar", "app:1")
        assert there.receive(io.BytesIO(sent(here, "app:1")))[-1] in (top, "v1")
        assert json.loads(there.config("app:1")) == json.loads(here.config("app:1"))
        for store in (here, there):
            store.export("app:1", space / f"{Path(store.root).name}.tar", format="layer")
        assert (space / "here.tar").read_bytes() == (space / "there.tar").read_bytes()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(space: Path) -> Iterator[tuple[bytes, Store]]:
    """A stream of three small layers, and an empty store."""
    with Store.open(space / "here", driver="row", fsync=False) as here:
        chain(here, random.Random(3), 3)
        stream = sent(here, "v2")
    with Store.open(space / "there", driver="overlay", fsync=False) as there:
        yield stream, there


def whole(store: Store) -> None:
    """Nothing is there but committed snapshots that are what they say."""
    assert {info.kind.value for info in store.walk()} <= {"committed"}
    for info in store.walk():
        looked_at(store, info.name)
    assert store.check(content=True).damage == []
    assert not [name for name in os.listdir(store.root) if name.startswith(("new-", "rm-"))]


def test_a_cut_at_any_place_leaves_whole_layers_and_can_go_on(made: tuple[bytes, Store]) -> None:
    stream, there = made
    rng = random.Random(5)
    cuts = sorted({0, 1, 11, 12, 20, len(stream) - 1, *(rng.randrange(len(stream)) for _ in range(30))})
    for cut in cuts:
        with pytest.raises(Corrupt, match="cut short"):
            there.receive(io.BytesIO(stream[:cut]))
    whole(there)
    had = {info.name for info in there.walk()}
    assert had  # the last cut was behind the first layer
    copied = there.receive(io.BytesIO(stream))
    assert set(copied) == {"v0", "v1", "v2"} - had
    whole(there)


def test_a_byte_that_changed_is_noticed(made: tuple[bytes, Store]) -> None:
    stream, there = made
    rng = random.Random(9)
    for _ in range(60):
        at = rng.randrange(len(stream))
        damaged = bytearray(stream)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            there.receive(io.BytesIO(bytes(damaged)))
        except CowfsError:
            pass
        else:
            raise AssertionError(f"a change of byte {at} was taken")
    whole(there)


def frames(*parts: tuple[bytes, object]) -> bytes:
    """A stream of any frames, rightly ended."""
    out = io.BytesIO()
    stream = StreamOut(out)
    for kind, payload in parts:
        stream.frame(kind, payload if isinstance(payload, bytes) else json.dumps(payload).encode())
    stream.end()
    return out.getvalue()


DIGEST = "sha256:" + "a" * 64
LAYER = {"name": "v0", "diff_id": DIGEST, "labels": {}}
SNAPSHOT = {"name": "v0", "layers": [LAYER], "config": None}
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "something else": b"PK\x03\x04" + bytes(100),
    "a newer version": struct.pack("<8sHH", MAGIC, 2, 0),
    "a frame of four gigabytes": struct.pack("<8sHH", MAGIC, 1, 0) + struct.pack("<cI", b"N", 0xFFFFFFFF),
    "an unknown frame": frames((b"?", b"")),
    "data before a layer": frames((b"D", b"x")),
    "no layers": frames((b"N", {**SNAPSHOT, "layers": []})),
    "layers that are none": frames((b"N", {**SNAPSHOT, "layers": [1]})),
    "too many layers": frames((b"N", {**SNAPSHOT, "layers": [{}] * 20_000})),
    "no name": frames((b"N", {**SNAPSHOT, "name": None})),
    "a name that is a path": frames((b"N", {**SNAPSHOT, "name": "../../x"})),
    "a digest that is none": frames((b"N", {**SNAPSHOT, "layers": [{**LAYER, "diff_id": "sha256:../../x"}]})),
    "labels that are none": frames((b"N", {**SNAPSHOT, "layers": [{**LAYER, "labels": {"a": None}}]})),
    "labels that do not end": frames((b"N", {**SNAPSHOT, "layers": [{**LAYER, "labels": {"a": "x" * 100_000}}]})),
    "a configuration that is none": frames((b"N", {**SNAPSHOT, "config": "[]"})),
    "deep JSON": frames((b"N", b'{"name":' + b"[" * 100_000)),
    "a layer out of the list": frames((b"N", SNAPSHOT), (b"L", {"at": 1, "form": "tar"})),
    "a layer that is no number": frames((b"N", SNAPSHOT), (b"L", {"at": True, "form": "tar"})),
    "a form that is none": frames((b"N", SNAPSHOT), (b"L", {"at": 0, "form": "zip"})),
    "blocks over nothing": frames((b"N", SNAPSHOT), (b"L", {"at": 0, "form": "blocks"})),
    "a layer that is missing": frames((b"N", SNAPSHOT), (b"C", b"")),
    "an empty piece": frames((b"N", SNAPSHOT), (b"L", {"at": 0, "form": "tar"}), (b"D", b"")),
    "another archive than it says": frames(
        (b"N", SNAPSHOT), (b"L", {"at": 0, "form": "tar"}), (b"D", bytes(10240)),
        (b"E", __import__("hashlib").sha256(bytes(10240)).digest()), (b"C", b""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_streams_are_refused(space: Path, case: str) -> None:
    with Store.open(space / "there", fsync=False) as there:
        with pytest.raises(CowfsError) as caught:
            there.receive(io.BytesIO(HOSTILE[case]))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        assert list(there.walk()) == []
        assert there.tags() == []
        assert os.listdir(f"{there.root}/layers") == []


def test_a_bomb_is_bounded(space: Path) -> None:
    with (
        Store.open(space / "here", driver="row", fsync=False) as here,
        Store.open(space / "there", driver="row", fsync=False) as there,
    ):
        here.prepare("k")
        here.commit("k", "v1")
        here.prepare("k", "v1")
        with here.paths("k") as paths:
            paths.write_bytes(b"big", random.Random(1).randbytes(4 << 20))
        here.commit("k", "v2")
        for stream in (sent(here, "v2"), sent(here, "v2", since="v1")):
            with pytest.raises(CowfsError):
                there.receive(io.BytesIO(stream), options=ApplyOptions(max_bytes=1 << 20))
            assert {info.name for info in there.walk()} == {"v1"}


def test_a_sender_cannot_put_a_tree_under_another_digest(space: Path) -> None:
    """The rule that what is there is not taken again must not be one that a stranger can use."""
    with Store.open(space / "here", fsync=False) as here, Store.open(space / "there", fsync=False) as there:
        here.prepare("k")
        with here.paths("k") as paths:
            paths.write_bytes(b"f", b"honest")
        here.commit("k", "honest")
        right = here.image("honest").layers[0].diff_id
        here.prepare("k")
        with here.paths("k") as paths:
            paths.write_bytes(b"f", b"evil")
        here.commit("k", "evil")
        wrong = here.image("evil").layers[0].diff_id
        stream = sent(here, "evil").replace(wrong.encode(), right.encode())
        with pytest.raises(CowfsError):
            there.receive(io.BytesIO(stream))
        assert list(there.walk()) == []
        there.receive(io.BytesIO(sent(here, "honest")))
        assert looked_at(there, "honest") == looked_at(here, "honest")


def test_names_that_are_taken_there_stay_what_they_are(space: Path) -> None:
    with Store.open(space / "here", fsync=False) as here, Store.open(space / "there", fsync=False) as there:
        for store, text in ((here, b"here"), (there, b"there")):
            store.prepare("k")
            with store.paths("k") as paths:
                paths.write_bytes(b"f", text)
            store.commit("k", "v1")
        before = looked_at(there, "v1")
        with pytest.raises(InvalidArgument, match="another snapshot"):
            there.receive(io.BytesIO(sent(here, "v1")))
        assert looked_at(there, "v1") == before
        here.tag("mine", "v1")
        there.receive(io.BytesIO(sent(here, "mine")))
        assert looked_at(there, "mine") == looked_at(here, "v1")


def test_wrong_usages_of_the_library(space: Path) -> None:
    with Store.open(space / "here", fsync=False) as here, Store.open(space / "there", fsync=False) as there:
        here.prepare("work")
        with pytest.raises(InvalidArgument, match="not committed"):
            sent(here, "work")
        here.commit("work", "v1")
        here.prepare("k", "v1")
        here.commit("k", "v2")
        with pytest.raises(InvalidArgument, match="no ancestor"):
            sent(here, "v1", since="v2")
        with pytest.raises(FailedPrecondition, match="--since"):
            there.receive(io.BytesIO(sent(here, "v2", since="v1")))
        for answer in (
            b"",
            b"rubbish, longer than a header",
            frames((b"H", {"have": 9})),
            frames((b"H", {"have": -1})),
        ):
            with pytest.raises(CowfsError):
                here.send(["v1"], io.BytesIO(), answers=io.BytesIO(answer))
        assert StreamIn(io.BytesIO(sent(here, "v1"))).next(b"N")[0] == b"N"
