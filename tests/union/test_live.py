"""Freeze and rollback of a view: random operations, with a snapshot of the whole tree as the judge."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.model import Limit
from cowfs.union import Options, View
from cowfs.union.paths import Paths

Tree = dict[bytes, tuple[int, int, int, bytes]]


def tree_of(view: View) -> Tree:
    """Everything that must be the same again: mode, size, links, content or target."""
    paths, found = Paths(view), {}
    for path, attr in paths.walk():
        data = b""
        if stat.S_ISREG(attr.mode):
            data = paths.read_bytes(path)
        elif stat.S_ISLNK(attr.mode):
            data = paths.readlink(path)
        links = 0 if stat.S_ISDIR(attr.mode) else attr.nlink
        found[path] = (attr.mode, attr.size if not stat.S_ISDIR(attr.mode) else 0, links, data)
    return found


class Bench:
    """A stack of two layers in a directory, and fresh pairs of upper and work."""

    def __init__(self, base: Path, options: Options | None = None) -> None:
        self.base, self.options, self.count = base, options or Options(), 0
        (base / "l0/a/b").mkdir(parents=True)
        (base / "l0/a/f").write_text("hello")
        (base / "l0/a/b/g").write_bytes(b"g" * 5000)
        os.link(base / "l0/a/f", base / "l0/hl")
        (base / "l1/a").mkdir(parents=True)
        (base / "l1/a/h").write_text("hh")
        self.lowers = [str(base / "l1"), str(base / "l0")]
        self.upper, self.work = self.pair()
        self.view = self.open()

    def pair(self) -> tuple[str, str]:
        self.count += 1
        names = [str(self.base / f"{kind}{self.count}") for kind in ("up", "work")]
        for name in names:
            os.mkdir(name)
        return names[0], names[1]

    def open(self) -> View:
        return View(self.lowers, self.upper, self.work, options=self.options)

    def reopened(self) -> Tree:
        """The tree of a new view of the same directories."""
        self.view.close()
        self.view = self.open()
        return tree_of(self.view)


@pytest.fixture(params=["auto", "user"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(tmp_path, Options(form=request.param))
    yield made
    made.view.close()


def change(paths: Paths, rng: random.Random, steps: int) -> None:
    """Random changes; what cannot be done is left."""
    for _ in range(steps):
        names = [path for path, _ in paths.walk()] or [b"a"]
        one, two = rng.choice(names), rng.choice(names) + rng.choice([b"", b"/x", b"2", b"/y"])
        kind = rng.randrange(8)
        try:
            if kind == 0:
                paths.write_bytes(two, rng.randbytes(rng.choice([0, 10, 5000])))
            elif kind == 1:
                paths.rename(one, two)
            elif kind == 2:
                paths.makedirs(two)
            elif kind == 3:
                paths.rmtree(one) if stat.S_ISDIR(paths.stat(one).mode) else paths.unlink(one)
            elif kind == 4:
                paths.chmod(one, rng.choice([0o600, 0o755, 0o4711]))
            elif kind == 5:
                paths.link(one, two)
            elif kind == 6:
                paths.write_at(one, rng.choice([0, 3, 6000]), b"patch")
            else:
                paths.rename(one, two.replace(b"/", b"_"), 2)
        except OSError:
            continue


def test_a_frozen_view_shows_the_same_tree(bench: Bench) -> None:
    paths = Paths(bench.view)
    change(paths, random.Random(1), 60)
    before = tree_of(bench.view)
    bench.view.freeze(*bench.pair())
    assert tree_of(bench.view) == before


@pytest.mark.parametrize("seed", range(12))
def test_changes_after_a_freeze_leave_the_frozen_layers_alone(bench: Bench, seed: int) -> None:
    rng, states = random.Random(seed), []
    for _ in range(3):
        change(Paths(bench.view), rng, 40)
        states.append((list(bench.lowers), tree_of(bench.view)))
        frozen, pair = bench.upper, bench.pair()
        bench.view.freeze(*pair)
        bench.lowers, (bench.upper, bench.work) = [frozen, *bench.lowers], pair
        states[-1] = (list(bench.lowers), states[-1][1])
    change(Paths(bench.view), rng, 40)
    now = tree_of(bench.view)
    assert bench.reopened() == now
    for lowers, tree in states:
        old = View(lowers, options=bench.options)
        assert tree_of(old) == tree
        old.close()


@pytest.mark.parametrize("seed", range(12))
def test_rollback_shows_the_tree_of_then_and_can_be_written(bench: Bench, seed: int) -> None:
    rng = random.Random(seed)
    change(Paths(bench.view), rng, 40)
    then = tree_of(bench.view)
    pair = bench.pair()
    frozen = bench.view.freeze(*pair)
    bench.lowers = [bench.upper, *bench.lowers]
    change(Paths(bench.view), rng, 40)
    bench.view.freeze(*bench.pair())
    change(Paths(bench.view), rng, 40)
    bench.upper, bench.work = bench.pair()
    bench.view.rollback(frozen, bench.upper, bench.work)
    assert tree_of(bench.view) == then
    change(Paths(bench.view), rng, 60)
    now = tree_of(bench.view)
    assert bench.reopened() == now


def test_nodes_of_rolled_back_files_are_stale_and_others_are_not(bench: Bench) -> None:
    view, paths = bench.view, Paths(bench.view)
    frozen = view.freeze(*bench.pair())
    touched, left = paths.node("a/f"), paths.node("a/b/g")
    touched.nlookup = left.nlookup = 1
    paths.write_bytes("a/f", b"new")
    stale = view.rollback(frozen, *bench.pair())
    assert touched.id in stale.inodes
    assert left.id not in stale.inodes
    with pytest.raises(OSError) as caught:
        view.node(touched.id)
    assert caught.value.errno == errno.ESTALE
    assert view.node(left.id) is left
    assert paths.node("a/f").id != touched.id
    assert paths.read_bytes("a/f") == b"hello"


def test_a_file_unlinked_before_a_freeze_stays_usable(bench: Bench) -> None:
    view, paths = bench.view, Paths(bench.view)
    paths.write_bytes("tmp", b"mine")
    node = paths.node("tmp")
    node.nlookup = 1
    paths.unlink("tmp")
    view.freeze(*bench.pair())
    assert view.write(node, 4, b" still") == 6
    buffer = memoryview(bytearray(20))
    assert bytes(buffer[: view.pread(node, 0, buffer)]) == b"mine still"


def test_a_limit_counts_everything_written_since_it_was_set(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Options(limit=Limit(bytes=64 << 10)))
    paths = Paths(bench.view)
    paths.write_bytes("one", bytes(40 << 10))
    bench.view.freeze(*bench.pair())
    assert bench.view.usage().bytes == 40 << 10
    with pytest.raises(OSError) as caught:
        paths.write_bytes("two", bytes(40 << 10))
    assert caught.value.errno == errno.ENOSPC
    bench.view.close()


def test_freeze_refuses_a_directory_that_is_not_empty(bench: Bench) -> None:
    upper, work = bench.pair()
    Path(upper, "something").touch()
    before = tree_of(bench.view)
    with pytest.raises(OSError) as caught:
        bench.view.freeze(upper, work)
    assert caught.value.errno == errno.ENOTEMPTY
    assert tree_of(bench.view) == before
