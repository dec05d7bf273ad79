"""Live snapshots, rollback, squash and fork, through real mounts: the tree then is the judge."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.store import Store
from cowfs.store.handle import LiveHandle

Tree = dict[str, tuple[int, int, int, bytes]]

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")


def tree_of(root: Path) -> Tree:
    found: Tree = {}
    for at, directories, names in os.walk(root):
        for name in directories + names:
            path = os.path.join(at, name)
            status = os.lstat(path)
            regular = stat.S_ISREG(status.st_mode)
            data = Path(path).read_bytes() if regular else b""
            links = status.st_nlink if regular else 0
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_mtime_ns, links, data)
    return found


def change(root: Path, rng: random.Random, steps: int) -> None:
    """Random changes; what cannot be done is left."""
    for _ in range(steps):
        names = sorted(tree_of(root)) or ["d"]
        one, two = root / rng.choice(names), root / (rng.choice(names) + rng.choice(["", "/x", "2", "/y"]))
        kind = rng.randrange(7)
        try:
            if kind == 0:
                two.write_bytes(rng.randbytes(rng.choice([0, 10, 9000])))
            elif kind == 1:
                os.rename(one, two)
            elif kind == 2:
                two.mkdir()
            elif kind == 3:
                shutil.rmtree(one) if one.is_dir() else one.unlink()
            elif kind == 4:
                one.chmod(rng.choice([0o600, 0o755]))
            elif kind == 5:
                os.link(one, two)
            else:
                with open(one, "r+b") as file:
                    file.seek(rng.choice([0, 3, 6000]))
                    file.write(b"patch")
        except OSError:
            continue


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", driver="overlay", fsync=False) as made:
        made.prepare("seed")
        (tmp_path / "mnt").mkdir()
        with made.mount("seed", tmp_path / "mnt"):
            for name in ("d/e", "g/h"):
                (tmp_path / "mnt" / name).mkdir(parents=True)
                (tmp_path / "mnt" / name / "f").write_bytes(name.encode() * 3000)
            os.link(tmp_path / "mnt/d/e/f", tmp_path / "mnt/hard")
        made.commit("seed", "base")
        made.prepare("k", "base")
        yield made


def shown(store: Store, name: str, at: Path) -> Tree:
    """A committed snapshot's tree."""
    store.view("look", name)
    try:
        with store.mount("look", at):
            return tree_of(at)
    finally:
        store.remove("look")


@pytest.mark.parametrize("seed", range(6))
def test_every_snapshot_keeps_the_tree_it_was_made_of(store: Store, tmp_path: Path, seed: int) -> None:
    rng, mnt, look = random.Random(seed), tmp_path / "mnt", tmp_path / "look"
    look.mkdir()
    then: dict[str, Tree] = {}
    with store.mount("k", mnt):
        for number in range(4):
            change(mnt, rng, 25)
            then[f"s{number}"] = tree_of(mnt)
            store.snapshot("k", f"s{number}")
            assert tree_of(mnt) == then[f"s{number}"]
        change(mnt, rng, 25)
        now = tree_of(mnt)
    for name, tree in then.items():
        assert shown(store, name, look) == tree
    with store.mount("k", mnt):
        assert tree_of(mnt) == now
    for name in ("s1", "s2", "s0"):
        store.squash(name)
        assert not store.check().problems
    assert shown(store, "s3", look) == then["s3"]
    with store.mount("k", mnt):
        assert tree_of(mnt) == now


@pytest.mark.parametrize("seed", range(6))
def test_rollback_brings_the_tree_of_then_back_under_the_mount(store: Store, tmp_path: Path, seed: int) -> None:
    rng, mnt = random.Random(seed), tmp_path / "mnt"
    with store.mount("k", mnt):
        change(mnt, rng, 25)
        first = tree_of(mnt)
        store.snapshot("k", "s1")
        change(mnt, rng, 25)
        second = tree_of(mnt)
        store.snapshot("k", "s2")
        change(mnt, rng, 25)
        store.rollback("k", "s2")
        assert tree_of(mnt) == second
        change(mnt, rng, 10)
        store.rollback("k", "s1", keep="kept")
        assert tree_of(mnt) == first
        change(mnt, rng, 25)
        now = tree_of(mnt)
    with store.mount("k", mnt):
        assert tree_of(mnt) == now
    assert not store.check().problems
    assert not store.gc().directories


def test_rollback_and_snapshot_without_a_mount(store: Store, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    store.snapshot("k", "empty")
    with store.mount("k", mnt):
        (mnt / "new").write_text("x")
    store.rollback("k", "base")
    with store.mount("k", mnt):
        assert not (mnt / "new").exists()
    assert store.stat("k").parent == "base"


def test_the_mount_record_of_a_key_allows_what_its_snapshots_left_of_the_limit(store: Store, tmp_path: Path) -> None:
    def sizes() -> list[str]:
        (record,) = store.mounts("limited", mount_type="fuse")
        return [option for option in record.options if option.startswith(("size=", "inodes="))]

    mnt = tmp_path / "mnt"
    store.prepare("limited", "base", size=1 << 20, inodes=100)
    assert sizes() == ["size=1048576", "inodes=100"]
    with store.mount("limited", mnt):
        (mnt / "new").write_bytes(bytes(256 << 10))
    store.snapshot("limited", "held")
    assert sizes() == ["size=786432", "inodes=99"]
    with store.mount("limited", mnt):
        (mnt / "full").write_bytes(bytes(768 << 10))
    store.snapshot("limited", "full")
    assert sizes() == ["size=1", "inodes=98"]


def test_descriptors_on_changed_files_are_stale_after_a_rollback(store: Store, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    with store.mount("k", mnt) as handle:
        assert isinstance(handle, LiveHandle)
        with open(mnt / "d/e/f", "r+b") as changed, open(mnt / "g/h/f", "rb") as left:
            left.read(10)
            changed.write(b"new")
            changed.flush()
            store.rollback("k", "base")
            with pytest.raises(OSError) as caught:
                os.pread(changed.fileno(), 10, 0)
            assert caught.value.errno == errno.ESTALE
            assert left.read(10)
        assert (mnt / "d/e/f").read_bytes()[:3] == b"d/e"
        handle.unmount()


def test_a_snapshot_has_what_was_stored_through_a_map_before_it(store: Store, tmp_path: Path) -> None:
    mnt, look = tmp_path / "mnt", tmp_path / "look"
    look.mkdir()
    with store.mount("k", mnt) as handle:
        assert isinstance(handle, LiveHandle)
        with open(mnt / "d/e/f", "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
            mapped[:6] = b"before"
            handle.snapshot("s")
            mapped[:6] = b"after!"
            mapped.flush()
        assert (mnt / "d/e/f").read_bytes()[:6] == b"after!"
    assert shown(store, "s", look)["d/e/f"][3][:6] == b"before"


def test_a_snapshot_under_load_holds_acknowledged_fsyncs_and_nothing_later(store: Store, tmp_path: Path) -> None:
    mnt, look = tmp_path / "mnt", tmp_path / "look"
    look.mkdir()
    done, stop = [0], threading.Event()

    def write() -> None:
        number = 0
        with open(mnt / "log", "ab", buffering=0) as file:
            while not stop.is_set():
                number += 1
                file.write(b"%08d\n" % number)
                os.fsync(file.fileno())
                done[0] = number

    with store.mount("k", mnt):
        writer = threading.Thread(target=write)
        writer.start()
        between: list[tuple[str, int, int]] = []
        try:
            for name in ("s0", "s1", "s2"):
                while done[0] < 20 * (len(between) + 1):
                    stop.wait(0.005)
                before = done[0]
                store.snapshot("k", name)
                between.append((name, before, done[0] + 1))
        finally:
            stop.set()
            writer.join()
    for name, before, after in between:
        lines = shown(store, name, look)["log"][3].split()
        assert lines == [b"%08d" % number for number in range(1, len(lines) + 1)]
        assert before <= len(lines) <= after


def test_a_file_written_before_a_snapshot_keeps_its_data_when_its_mode_changes_after_it(
    store: Store, tmp_path: Path
) -> None:
    """The index knows an older file of that name, from before the mount."""
    file = tmp_path / "mnt/d/e/f"
    with store.mount("k", tmp_path / "mnt"):
        file.write_bytes(b"longer" * 10_000)
        store.snapshot("k", "s")
        file.chmod(0o600)
        assert file.read_bytes() == b"longer" * 10_000


def test_fork_prepares_many(store: Store) -> None:
    made = store.fork("base", "a", "b", "c")
    assert list(made) == ["a", "b", "c"]
    with pytest.raises(AlreadyExists):
        store.fork("base", "new", "b")
    assert "new" not in [info.name for info in store.walk()]


def test_what_cannot_be_rolled_back_or_squashed_says_why(store: Store, tmp_path: Path) -> None:
    store.prepare("other")
    store.commit("other", "stranger")
    with pytest.raises(InvalidArgument, match="not an ancestor"):
        store.rollback("k", "stranger")
    with pytest.raises(FailedPrecondition, match="no child"):
        store.squash("stranger")
    store.prepare("k2", "base")
    with pytest.raises(FailedPrecondition, match="2 children"):
        store.squash("base")
    with Store.open(tmp_path / "whole", driver="vfs") as whole:
        whole.prepare("k")
        with pytest.raises(Unsupported, match="whole trees"):
            whole.snapshot("k", "s")
