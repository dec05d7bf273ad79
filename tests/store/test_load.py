"""Several processes on one store: one of two wins, nobody sees a half, and any of them may be killed at any moment."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support import command

from cowfs.driver.interface import Driver
from cowfs.errors import AlreadyExists, CowfsError, NotFound
from cowfs.index.database import Row
from cowfs.model import Kind, Usage
from cowfs.store import Store
from cowfs.store.checking import Checking, Report
from cowfs.store.staging import discard, staged

from .conftest import BIG, content, overwrite, tree_path


def in_children(count: int, act: Callable[[int], int]) -> list[int]:
    """Run ``act`` in child processes that start at one moment; their exit codes (negative: signals)."""
    reading, writing = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.close(writing)
                os.read(reading, 1)  # ends when the parent closes its end
                code = act(number)
            except BaseException:  # noqa: BLE001  (a thread's failure must reach the test)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    os.close(reading)
    os.close(writing)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_of_two_processes_that_prepare_one_key_one_wins(space: Path, driver: str) -> None:
    root = space / "store"
    Store.open(root, driver=driver, fsync=False).close()

    def prepare(number: int) -> int:
        with Store.open(root, fsync=False) as store:
            lost = 0
            for round_ in range(10):
                try:
                    store.prepare(f"key-{round_}", labels={"by": str(number)})
                except AlreadyExists:
                    lost += 1
            return lost

    lost = in_children(2, prepare)
    assert sum(lost) == 10
    with Store.open(root, fsync=False) as store:
        assert len(list(store.walk())) == 10
        assert len(os.listdir(root / "layers")) == 10
        assert store.check().problems == []


def test_a_store_may_be_opened_for_the_first_time_by_several(space: Path) -> None:
    root = space / "store"

    def first(number: int) -> int:
        with Store.open(root, fsync=False) as store:
            store.prepare(f"k{number}")
        return 0

    assert in_children(6, first) == [0] * 6
    with Store.open(root, fsync=False) as store:
        assert len(list(store.walk())) == 6


def test_threads_share_a_store(store: Store) -> None:
    store.prepare("k")
    store.commit("k", "base")

    def work(number: int) -> None:
        for round_ in range(5):
            key = f"{number}-{round_}"
            store.prepare(key, "base")
            (tree_path(store, key) / key).write_text(key)
            store.commit(key, key.upper() + "-done")
            assert [change.path for change in store.diff(key.upper() + "-done") if change.path] == [key.encode()]
            store.remove(key.upper() + "-done")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [info.name for info in store.walk()] == ["base"]
    assert store.check().problems == []


def test_one_image_imported_by_several_at_once_is_there_once(space: Path, driver: str) -> None:
    root, source = space / "store", space / "rootfs"
    (source / "etc").mkdir(parents=True)
    (source / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    Store.open(root, driver=driver, fsync=False).close()

    def bring(number: int) -> int:
        with Store.open(root, fsync=False) as store:
            store.import_image(source, f"tag{number}")
        return 0

    assert in_children(4, bring) == [0] * 4
    with Store.open(root, fsync=False) as store:
        assert len(list(store.walk())) == 1
        assert len(os.listdir(root / "layers")) == 1
        assert {tag.name for tag in store.tags()} == {f"tag{number}" for number in range(4)}


def worker(root: Path, seed: int, log: int) -> int:
    """Random verbs; each committed name is told to the parent once commit has returned."""
    dice = random.Random(seed)
    with Store.open(root, fsync=False) as store:
        for count in range(10_000):
            key = f"k-{seed}-{count}"
            try:
                parents = [info.name for info in store.walk(["kind==committed"])]
                parent = dice.choice([*parents[-8:], "base"])
                store.prepare(key, parent)
                tree = tree_path(store, key)
                (tree / f"f{dice.randrange(5)}").write_text(key)
                (tree / "last").write_text(key)
                if store.driver.capabilities.row:
                    overwrite(store, key, "shared", dice.randrange(len(BIG) - 9), b"%09d" % count)
                what = dice.random()
                if what < 0.6:
                    store.commit(key, key.upper())
                    os.write(log, key.upper().encode() + b"\n")
                else:
                    store.remove(key)
                if what < 0.1:
                    store.gc()
                old = list(store.walk([f"name~=^K-{seed}-"]))
                if len(old) > 4:
                    store.remove(dice.choice(old).name)
                    os.write(log, b"?\n")
            except CowfsError:
                pass  # somebody else's child, or a parent that is gone: what races are for
    return 0


def test_more_garbage_than_there_are_descriptors(space: Path) -> None:
    """A deletion holds the directory's lock, a descriptor: a store full of them is opened and cleared all the same."""
    root = space / "store"
    with Store.open(root, fsync=False) as store:
        store.prepare("k")
        store.commit("k", "base")
    for number in range(150):
        for name in (f"rm-gone{number:06}", f"new-half{number:06}", f"layers/lost{number:06}"):
            (root / name / "fs/d").mkdir(parents=True)
    for words in (("label", "base", "a=b"), ("gc",)):
        done = subprocess.run(
            ["prlimit", "--nofile=100:100", sys.executable, "-m", "cowfs", *words, "--root", str(root)],
            capture_output=True, text=True, check=False, env=command.environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert not [name for name in os.listdir(root) if name.startswith(("rm-", "new-"))]
    assert len(os.listdir(root / "layers")) == 1
    with Store.open(root) as store:
        assert not store.check().problems


def test_gc_meets_a_removal_of_the_same_directory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that removes renames without the write lock, so between gc's look and its own rename."""
    for key in ("kept", "gone", "lost"):
        store.prepare(key)
    lost = [os.path.basename(os.path.dirname(tree_path(store, key))) for key in ("gone", "lost")]
    with store.index.write() as change:
        for key in ("gone", "lost"):
            change.remove(store.index.get(key).num)
    publish = type(store.driver).publish

    def beaten(driver: Driver, staged: str, id: str) -> None:
        if staged == lost[0]:
            publish(driver, staged, id)
            driver.remove(id)
        publish(driver, staged, id)

    monkeypatch.setattr(type(store.driver), "publish", beaten)
    assert store.gc().directories == (f"rm-{lost[1]}",)
    assert len(os.listdir(Path(store.root) / "layers")) == 1
    assert store.check().problems == []


@pytest.mark.parametrize("content", [False, True])
def test_check_meets_a_removal(store: Store, monkeypatch: pytest.MonkeyPatch, content: bool) -> None:
    """A snapshot that another process removes during the check is no damage, and none of its own is put in quarantine."""
    for key in ("stays", "goes"):
        store.prepare(key)
        (tree_path(store, key) / "f").write_text(key)
        store.commit(key, key.upper())
    going = store.index.get("GOES").id
    driver_check, check_content = type(store.driver).check, Checking._check_content

    def remove() -> None:
        with Store.open(store.root, fsync=False) as other:
            other.remove("GOES")

    def first(driver: Driver, id: str) -> list[str]:
        if id == going and not content:
            remove()
        return driver_check(driver, id)

    def later(checking: Checking, report: Report, row: Row, repair: bool) -> None:
        if row.id == going:
            remove()
        check_content(checking, report, row, repair)

    monkeypatch.setattr(type(store.driver), "check", first)
    monkeypatch.setattr(Checking, "_check_content", later)
    assert store.check(content=content, repair=True).problems == []
    assert [info.name for info in store.walk()] == ["STAYS"]


def test_a_layer_that_is_being_made_is_no_garbage_to_check(store: Store) -> None:
    with staged(store.driver, store.index, "abcdefghij"):
        assert store.check().problems == []
        assert store.check(repair=True).problems == []
        assert os.path.isdir(f"{store.root}/new-abcdefghij")
    os.mkdir(f"{store.root}/new-bcdefghijk")
    assert "new-bcdefghijk: no snapshot records this directory" in [each.what for each in store.check().problems]


@pytest.mark.parametrize("verb", ["rename", "commit", "snapshot", "apply", "limit", "rollback"])
def test_a_verb_meets_a_removal(store: Store, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """The key is gone before the verb has its layer: it says that there is none, not that the store is damaged."""
    if verb in ("snapshot", "rollback") and not store.driver.capabilities.live:
        pytest.skip(f"the driver {store.driver.name} has no {verb}")
    store.prepare("b")
    store.commit("b", "base")
    store.prepare("k", "base")
    opened = type(store.driver).open_tree
    gone: list[bool] = []

    def late(driver: Driver, id: str) -> AbstractContextManager[int]:
        if not gone:
            gone.append(True)
            with Store.open(store.root, fsync=False) as other:
                row = other.index.get("k")
                with other.index.write() as change:
                    change.remove(row.num)
                discard(other.driver, row.id)
        return opened(driver, id)

    monkeypatch.setattr(type(store.driver), "open_tree", late)
    act: dict[str, Callable[[], object]] = {
        "rename": lambda: store.rename("k", "new"),
        "commit": lambda: store.commit("k", "done"),
        "snapshot": lambda: store.snapshot("k", "done"),
        "apply": lambda: store.apply("k", io.BytesIO(b"\0" * 1024)),
        "limit": lambda: store.limit("k", size=1 << 20),
        "rollback": lambda: store.rollback("k", "base"),
    }
    with pytest.raises(NotFound, match="'k'"):
        act[verb]()
    monkeypatch.undo()
    assert [info.name for info in store.walk()] == ["base"]
    assert store.check().problems == []


def test_usage_meets_a_removal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.prepare("k")
    usage = type(store.driver).usage

    def late(driver: Driver, id: str) -> Usage:
        with Store.open(store.root, fsync=False) as other:
            other.remove("k")
        return usage(driver, id)

    monkeypatch.setattr(type(store.driver), "usage", late)
    with pytest.raises(NotFound, match="'k'"):
        store.usage("k")


@pytest.mark.parametrize("backend", ["overlay", "vfs", "row"])
def test_killed_under_load_from_four_processes_nothing_is_lost(
    space: Path, backend: str, request: pytest.FixtureRequest
) -> None:
    kills = int(request.config.getoption("--kills"))
    dice = random.Random(int(request.config.getoption("--seed")))
    root = space / "store"
    with Store.open(root, driver=backend, fsync=False) as store:
        store.prepare("base")
        (tree_path(store, "base") / "shared").write_bytes(BIG)
        store.commit("base", "BASE")
        store.prepare("base", "BASE")
        store.commit("base", "base")
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    running: dict[int, int] = {}
    seed = 0

    def start() -> None:
        nonlocal seed
        seed += 1
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(reading)
                code = worker(root, seed, writing)
            except BrokenPipeError:
                code = 0
            except BaseException:  # noqa: BLE001  (a child process: shown, and its status tells)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        running[pid] = seed

    try:
        for _ in range(4):
            start()
        for _ in range(kills):
            time.sleep(dice.uniform(0.0, 0.06))
            pid = dice.choice(sorted(running))
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "a worker failed by itself"
            del running[pid]
            start()
    finally:
        for pid in running:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except ProcessLookupError:
                pass  # it failed, and that is what the test says
        os.close(writing)
    told = os.read(reading, 1 << 20)
    os.close(reading)
    assert told.count(b"\n") > kills / 5, "the load was too light to mean anything"
    with Store.open(root, fsync=False) as store:
        assert store.check().damage == []
        store.gc()
        assert store.check(content=True).problems == []
        assert set(os.listdir(root / "layers")) == {row.id for row in store.index.rows()}
        assert not [name for name in os.listdir(root) if name.startswith(("new-", "rm-"))]
        for info in list(store.walk()):
            if info.kind is Kind.COMMITTED and info.name.startswith("K-"):
                assert b"last" in {change.path for change in store.diff(info.name)}
                if store.driver.capabilities.row:
                    assert len(content(store, info.name, "shared")) == len(BIG)
            elif info.kind is Kind.ACTIVE:
                list(store.diff(info.name))
                store.mounts(info.name)
