"""prune, rename, copy and dry runs: random histories, with the rule spelt out once more as the judge."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command import environment, run_module
from support.trees import assert_same, snapshot

from cowfs.errors import AlreadyExists, CowfsError, FailedPrecondition, InvalidArgument, NotFound
from cowfs.store import Store

ROOT = os.geteuid() == 0


@pytest.fixture
def store(space: Path) -> Iterator[Store]:
    with Store.open(space / "store", driver="overlay", fsync=False) as opened:
        yield opened


def history(store: Store, rng: random.Random, steps: int = 40) -> None:
    """Snapshots of all kinds, names that people give and names of layers, tags."""
    committed: list[str | None] = [None]
    for number in range(steps):
        parent = rng.choice(committed)
        kind = rng.choice(["layer", "layer", "named", "run", "key", "view", "tag"])
        if kind in ("layer", "named"):
            name = f"sha256:{number:064x}" if kind == "layer" else f"v{number}"
            store.prepare("tmp", parent)
            store.commit("tmp", name, labels={"containerd.io/gc.ref": "x"} if rng.random() < 0.1 else {})
            committed.append(name)
        elif kind == "tag" and parent is not None:
            store.tag(f"tag{number}", parent)
        elif kind == "view" and parent is not None:
            store.view(f"look{number}", parent)
        else:
            store.prepare(f"run-{number}" if kind == "run" else f"key{number}", parent)


def expected(store: Store, *, every: bool) -> set[str]:
    """The expected removals of prune: again and again every leaf that may go."""
    rows = {row.name: row for row in store.index.rows()}
    numbers = {row.num: row.name for row in rows.values()}
    tagged = {tag.target for tag in store.tags()}
    gone: set[str] = set()
    while True:
        parents = {numbers[row.parent] for name, row in rows.items() if name not in gone and row.parent is not None}
        more = {
            name
            for name, row in rows.items()
            if name not in gone | parents | tagged
            and (every or name.startswith(("sha256:", "run-")))
            and not any(label.startswith("containerd.io/") for label in row.labels)
        }
        if not more:
            return gone
        gone |= more


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_prune_removes_what_nothing_needs_and_nothing_else(store: Store, seed: int, every: bool) -> None:
    history(store, random.Random(seed))
    before = {info.name for info in store.walk()}
    wanted = expected(store, every=every)
    planned = store.prune(every=every, dry_run=True)
    assert {info.name for info in store.walk()} == before
    done = store.prune(every=every)
    assert done == planned
    assert set(done.names) == wanted
    assert before - {info.name for info in store.walk()} == wanted
    assert store.prune(every=every).names == ()
    assert store.check().damage == []


def test_prune_by_age_count_and_filter(store: Store) -> None:
    for number in range(6):
        store.prepare("tmp")
        store.commit("tmp", f"ci-{number}", labels={"team": "web" if number % 2 else "app"})
    assert store.prune().names == ()
    assert store.prune(every=True, older=3600).names == ()
    assert store.prune(["labels.team==web"], every=True, keep=1).names == ("ci-1", "ci-3")
    assert store.prune(every=True, keep=2).names == ("ci-0", "ci-2")
    assert store.prune(every=True, keep=9).names == ()
    with pytest.raises(InvalidArgument):
        store.prune(older=-1)
    with pytest.raises(InvalidArgument):
        store.prune(["??"])


def test_prune_leaves_what_is_in_use(store: Store) -> None:
    store.prepare("run-1")
    store.prepare("run-2")
    with store.paths("run-1"):
        for dry in (True, False):
            done = store.prune(dry_run=dry)
            assert done.names == ("run-2",)
            assert [name for name, _ in done.kept] == ["run-1"]
    assert store.prune().names == ("run-1",)


@pytest.mark.parametrize("seed", range(4))
def test_removable_says_what_remove_does(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    history(store, rng)
    names = [info.name for info in store.walk()] + [tag.name for tag in store.tags()]
    for name in rng.sample(names, len(names)):
        chain = rng.random() < 0.5
        try:
            planned = store.removable(name, chain=chain)
        except CowfsError as error:
            with pytest.raises(type(error)):
                store.remove(name, chain=chain)
            continue
        assert store.remove(name, chain=chain) == planned


def test_garbage_is_what_gc_deletes(store: Store, space: Path) -> None:
    store.prepare("k")
    with store.paths("k") as paths:
        paths.makedirs("a/b/c")
    store.commit("k", "c")
    store.remove("c")
    (space / "store/layers/orphan").mkdir()
    (space / "store/new-left").mkdir()
    paths_, records = store.garbage()
    assert (paths_, records) == (["layers/orphan", "new-left"], 4)
    assert (space / "store/layers/orphan").is_dir()
    done = store.gc()
    assert len(done.directories) == 2
    assert done.records == records
    assert store.garbage() == ([], 0)


def test_rename_moves_keys_names_and_tags(store: Store) -> None:
    store.prepare("a", size="1M")
    with store.paths("a") as paths:
        paths.write_bytes("f", b"1")
    store.rename("a", "b")
    store.commit("b", "base")
    store.tag("t:1", "base")
    store.prepare("k", "base")
    store.rename("base", "bottom")
    assert store.stat("k").parent == "bottom"
    assert [(tag.name, tag.target) for tag in store.tags()] == [("t:1", "bottom")]
    store.rename("t:1", "t:2")
    assert store.resolve("t:2").name == "bottom"
    assert [change.path for change in store.diff("bottom")][-1:] == [b"f"]
    with pytest.raises(NotFound):
        store.rename("base", "x")
    for taken in ("k", "t:2"):
        with pytest.raises(AlreadyExists):
            store.rename("bottom", taken)
    with pytest.raises(AlreadyExists):
        store.rename("t:2", "bottom")
    with pytest.raises(InvalidArgument):
        store.rename("t:2", "a tag")
    with store.paths("k"), pytest.raises(FailedPrecondition):
        store.rename("k", "l")
    store.rename("k", "l")
    assert [event.action for event in store.events(since=0) if event.action == "rename"] == ["rename"] * 3


@pytest.mark.parametrize("to", ["overlay", "row", "vfs"])
@pytest.mark.parametrize("source", ["overlay", "row", "vfs"])
def test_copies_in_another_store_are_the_same_trees(space: Path, source: str, to: str) -> None:
    rng = random.Random(f"{source}{to}")
    with (
        Store.open(space / "one", driver=source, fsync=False) as one,
        Store.open(space / "two", driver=to, fsync=False) as two,
    ):
        parent = None
        for number in range(4):
            one.prepare("k", parent)
            with one.paths("k") as paths:
                paths.makedirs(f"d{number}/deep")
                paths.write_bytes(f"d{number}/deep/f", rng.randbytes(200_000))
                paths.link(f"d{number}/deep/f", f"d{number}/hard")
                if number:
                    paths.write_at(f"d{number - 1}/deep/f", 5000, b"changed")
                    paths.rmtree(f"d{number - 1}/gone")
                paths.makedirs(f"d{number}/gone/x")
                paths.symlink("nowhere", f"link{number}")
            parent = f"s{number}"
            one.commit("k", parent, labels={"n": str(number)})
        one.tag("app:1", "s3", config='{"config": {"Cmd": ["x"]}}')
        assert one.copy_to("s1", two) == ["s0", "s1"]
        assert one.copy_to("app:1", two) == ["s2", "s3"]
        assert one.copy_to("app:1", two) == []
        assert two.stat("s2").labels == {"n": "2"}
        assert two.config("app:1") == one.config("app:1")
        for name in ("s1", "s3"):
            one.copy_out(name, "/", space / f"one-{name}")
            two.copy_out(name, "/", space / f"two-{name}")
            assert_same(snapshot(space / f"one-{name}"), snapshot(space / f"two-{name}"))
        assert two.check(content=True).damage == []
        with pytest.raises(InvalidArgument):
            one.copy_to("s1", one)
        one.prepare("k")
        with pytest.raises(InvalidArgument):
            one.copy_to("k", two)


def test_a_name_that_is_another_tree_there_is_told_and_a_failed_copy_leaves_no_key(space: Path) -> None:
    with Store.open(space / "one", fsync=False) as one, Store.open(space / "two", fsync=False) as two:
        for each, data in ((one, b"one"), (two, b"two")):
            each.prepare("k")
            with each.paths("k") as paths:
                paths.write_bytes("f", data)
            each.commit("k", "same")
        with pytest.raises(InvalidArgument, match="another snapshot"):
            one.copy_to("same", two)
        with two.open_file("same", "f") as file:
            assert file.read() == b"two"
        layer = Path(one.driver.tree(one.index.get("same").id)) / "f"
        one.prepare("k", "same")
        one.commit("k", "top")
        one.export("top", space / "digests.tar")  # its digests are known now
        layer.write_bytes(b"!!!")
        two.remove(two.resolve("same").name)
        for info in list(two.walk(reverse=True)):
            two.remove(info.name)
        with pytest.raises(CowfsError):
            one.copy_to("top", two)
        assert list(two.walk()) == []


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cowfs(space: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = run_module(
            "cowfs", *arguments, env={**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
        )
        assert done.returncode == status, done.stderr
        return done

    return run


def test_the_verbs_of_the_command(cowfs: Callable[..., subprocess.CompletedProcess[str]], space: Path) -> None:
    cowfs("prepare", "k")
    cowfs("commit", "k", "base")
    cowfs("prepare", "run-x", "base")
    assert cowfs("prune", "--dry-run").stdout == "run-x\n"
    assert json.loads(cowfs("prune", "--json").stdout)[0]["removed"] == ["run-x"]
    assert "would remove 0 snapshots" in cowfs("prune", "--older", "7d", "--keep", "2", "-n").stderr
    cowfs("prune", "--older", "soon", status=2)
    cowfs("tag", "app:1", "base")
    cowfs("rename", "base", "bottom")
    assert cowfs("rm", "--dry-run", "app:1", "--chain").stdout == "bottom\n"
    assert cowfs("copy", "app:1", "--to", space / "other").stdout == "bottom\n"
    assert cowfs("copy", "app:1", "--to", space / "other").stdout == ""
    assert cowfs("images", "--root", space / "other").stdout.split()[5] == "app:1"
    cowfs("copy", "nothing", "--to", space / "third", status=3)
    assert not (space / "third").exists()
    cowfs("tag", "-d", "app:1")
    cowfs("tag", "-d", "app:1", status=3)
    cowfs("tag", "-d", "app:1", "bottom", status=2)
    cowfs("tag", "app:1", status=2)
    cowfs("rename", "bottom", "-x", status=2)
    (space / "store/layers/orphan").mkdir()
    assert "would delete layers/orphan" in cowfs("gc", "--dry-run").stdout
    assert (space / "store/layers/orphan").exists()
    assert cowfs("rm", "bottom", "-n").stdout == "bottom\n"
    assert "bottom" in cowfs("ls", "-q").stdout
    cowfs("prepare", "k", "bottom")
    assert cowfs("squash", "bottom", "--dry-run").stdout == "k\n"
    assert cowfs("ls", "-q").stdout.split() == ["bottom", "k"]


@pytest.mark.skipif(not (ROOT and os.path.exists("/dev/fuse")), reason="needs root and /dev/fuse")
def test_logs_of_a_mount(cowfs: Callable[..., subprocess.CompletedProcess[str]], space: Path) -> None:
    cowfs("prepare", "k")
    (space / "mnt").mkdir()
    cowfs("mount", "--key", "k", space / "mnt", "--trace")
    try:
        (space / "mnt/f").write_text("x")
        for what in (space / "mnt", "k"):
            assert "create" in cowfs("logs", what).stdout.lower()
        assert len(cowfs("logs", "k", "-n", "1").stdout.splitlines()) == 1
    finally:
        cowfs("umount", space / "mnt")
    cowfs("logs", "k", status=3)


def test_doctor_has_a_remedy_for_everything_that_is_not_fine(space: Path) -> None:
    found = json.loads(run_module("cowfs", "doctor", "--json", "--root", space / "store").stdout)
    assert {one["about"] for one in found} >= {
        "kernel",
        "/dev/fuse",
        "mounting",
        "namespaces",
        "overlayfs",
        "store",
        "driver vfs",
    }
    for one in found:
        assert one["state"] in ("ok", "note", "missing")
        assert bool(one["remedy"]) == (one["state"] != "ok"), one
    assert not (space / "store").exists()


@pytest.mark.skipif(not ROOT, reason="needs root to be another user")
def test_doctor_tells_a_user_without_any_right_what_is_missing(space: Path) -> None:
    """No /dev/fuse, no helper, no place for a store."""
    code = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); os.environ['PATH'] = '/nowhere';"
        "from cowfs.store.doctor import examine;"
        "print([(one.about, one.state) for one in examine('/proc/none')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    if "Permission denied" in done.stderr and "site-packages" in done.stderr:
        pytest.skip("the interpreter's directory is not readable for others here")
    assert done.returncode == 0, done.stderr
    told = dict(eval(done.stdout))
    assert told["mounting"] == told["store"] == "missing"
