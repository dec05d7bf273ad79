"""A process killed between any two steps of a verb leaves the state before it or the one after it.

The points are not sampled: each verb is run once to record which points it passes, then once more for
each of them, killed there. Together they pass every point that ``cowfs.sys.faults`` names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.drivers import ALL

from cowfs.model import Kind
from cowfs.store import Store
from cowfs.sys import faults

from .conftest import BIG, content, overwrite, tree_path

Act = Callable[[Store], object]
BIGGER = BIG[:5000] + b"own" + BIG[5003:]
LIVE = ("squash.", "switch.")
LIMITS = "settle."  # test_limit_loop kills there
"""Points of the verbs on live mounts, which have tests of their own."""


@pytest.fixture(params=ALL)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _layer_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("one", b"1"), ("two", b"22"), ("sub/three", b"333")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _docker_archive() -> bytes:
    """Three layers as `docker save` writes them."""
    parts = []
    for number in range(3):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name in (f"layer-{number}", "sub/same"):
                info = tarfile.TarInfo(name)
                info.size = 5
                tar.addfile(info, io.BytesIO(b"%05d" % number))
        parts.append(out.getvalue())
    ids = ["sha256:" + hashlib.sha256(part).hexdigest() for part in parts]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": ids}}
    files = {f"{id[7:]}/layer.tar": part for id, part in zip(ids, parts, strict=True)}
    document = json.dumps(config).encode()
    named = hashlib.sha256(document).hexdigest() + ".json"
    manifest = [{"Config": named, "RepoTags": ["three:1"], "Layers": list(files)}]
    files |= {named: document, "manifest.json": json.dumps(manifest).encode()}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _make(root: Path, driver: str) -> None:
    """base < leaf, an active snapshot with two changes, a directory that nothing records."""
    with Store.open(root, driver=driver, fsync=False) as store:
        store.prepare("k")
        tree = tree_path(store, "k")
        (tree / "dir").mkdir()
        (tree / "dir" / "file").write_text("base")
        (tree / "dir" / "big").write_bytes(BIG)
        store.commit("k", "base")
        store.prepare("k", "base")
        (tree_path(store, "k") / "leaf").write_text("leaf")
        store.commit("k", "leaf")
        store.prepare("work", "base")
        (tree_path(store, "work") / "work").write_text("work")
        overwrite(store, "work", "dir/big", 5000, b"own")
        (root / "layers" / "aaaaaaaaaa" / "fs").mkdir(parents=True)


def _prepared(store: Store, before: bool) -> None:
    if store.exists("new"):
        assert store.stat("new").kind is Kind.ACTIVE
        assert list(store.diff("new")) == []
        store.mounts("new")


def _viewed(store: Store, before: bool) -> None:
    if store.exists("look"):
        assert store.stat("look").kind is Kind.VIEW


def _committed(store: Store, before: bool) -> None:
    assert store.exists("work") != store.exists("done")
    name = "done" if store.exists("done") else "work"
    assert [change.path for change in store.diff(name) if change.kind == "added"] == [b"work"]
    if name == "done":
        assert store.usage("done").inodes == (1 if store.driver.capabilities.whole else 3)
        assert list(store.diff("done", "base"))
    assert content(store, name, "dir/big") == BIGGER
    assert content(store, "base", "dir/big") == BIG


def _applied(store: Store, before: bool) -> None:
    assert store.stat("work").kind is Kind.ACTIVE
    list(store.diff("work"))  # whatever part is there can be read
    assert content(store, "work", "dir/big") == BIGGER


def _removed(store: Store, before: bool) -> None:
    if store.exists("leaf"):
        assert [change.path for change in store.diff("leaf") if change.kind == "added"] == [b"leaf"]


def _updated(store: Store, before: bool) -> None:
    assert dict(store.stat("base").labels) in ({}, {"a": "1", "b": "2"})


def _imported(store: Store, before: bool) -> None:
    for info in store.walk(["name~=^sha256"]):
        assert {change.path for change in store.diff(info.name)} >= {b"one", b"two", b"sub/three"}


def _imported_image(store: Store, before: bool) -> None:
    """The existing layers are complete from the bottom up, and a second try brings the rest."""
    there = list(store.walk(["name~=^sha256"]))
    for number, info in enumerate(there):
        assert f"layer-{number}".encode() in {change.path for change in store.diff(info.name)}
    if not before:
        store.import_image(io.BytesIO(_docker_archive()))
        assert [info.name for info in store.walk(["name~=^sha256"])][: len(there)] == [info.name for info in there]
        assert [len(store.chain(tag.name)) for tag in store.tags()] == [3]


def _nothing(store: Store, before: bool) -> None:
    assert store.exists("leaf")


VERBS: dict[str, tuple[Act, Callable[[Store, bool], None]]] = {
    "prepare": (lambda store: store.prepare("new", "base"), _prepared),
    "view": (lambda store: store.view("look", "base"), _viewed),
    "commit": (lambda store: store.commit("work", "done"), _committed),
    "apply": (lambda store: store.apply("work", io.BytesIO(_layer_tar())), _applied),
    "remove": (lambda store: store.remove("leaf"), _removed),
    "removal in two steps": (lambda store: (store.remove("leaf", defer=True), store.cleanup()), _removed),
    "update": (lambda store: store.update("base", {"a": "1", "b": "2"}), _updated),
    "gc": (lambda store: store.gc(), _nothing),
    "import": (lambda store: store.import_image(io.BytesIO(_layer_tar()), "tag"), _imported),
    "import of three": (lambda store: store.import_image(io.BytesIO(_docker_archive())), _imported_image),
}


def _in_child(root: Path, act: Act, hook: Callable[[str], None]) -> int:
    """Run a verb in a child with a hook; its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with Store.open(root, fsync=False) as store:
                faults.hook = hook
                act(store)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def _passed(root: Path, act: Act) -> list[str]:
    """The points that a verb passes, in order."""
    reading, writing = os.pipe()
    status = _in_child(root, act, lambda name: (os.write(writing, name.encode() + b"\n"), None)[1])
    os.close(writing)
    assert status == 0
    with open(reading) as pipe:
        return pipe.read().split()


@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_between_two_steps_leaves_a_whole_state(
    verb: str, home: Path, driver: str, request: pytest.FixtureRequest
) -> None:
    act, verify = VERBS[verb]
    sample = driver == "zfs" and not request.config.getoption("--thorough")  # its programs sync the entire machine
    if sample and verb not in ("prepare", "commit", "removal in two steps"):
        return
    _make(home / "record", driver)
    points = _passed(home / "record", act)
    assert points
    for number, name in enumerate(points):
        if sample and number != len(points) // 2:
            continue
        root = home / f"kill-{number}"
        _make(root, driver)
        count = 0

        def kill(passed: str, number: int = number) -> None:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        status = _in_child(root, act, kill)
        assert os.WIFSIGNALED(status), f"{verb} was not killed at {name}"
        with Store.open(root, fsync=False) as store:
            report = store.check()
            assert report.damage == [], f"{verb} killed at {name}"
            verify(store, True)
            store.gc()
            assert store.check(content=True).problems == [], f"{verb} killed at {name}"
            assert not [left for left in os.listdir(root) if left.startswith(("new-", "rm-"))]
            assert set(os.listdir(root / "layers")) == {row.id for row in store.index.rows()}
            verify(store, False)


def test_the_verbs_pass_every_point(space: Path) -> None:
    seen: set[str] = set()
    for verb, (act, _) in VERBS.items():
        _make(space / verb, "overlay")
        seen |= set(_passed(space / verb, act))
    others = {
        name for name in faults.POINTS if name.startswith((*LIVE, LIMITS, "migrate."))
    }  # those have their own tests
    assert seen == set(faults.POINTS) - others


def test_a_point_that_is_not_in_the_table_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "hook", lambda name: None)
    with pytest.raises(KeyError):
        faults.point("nowhere.at.all")
