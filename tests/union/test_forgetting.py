"""Nodes that the kernel forgets, in whatever order: names, link counts and content stay those of a plain directory."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import mounts, stacks
from support.forgetting import InView, Pair

from cowfs.row.view import View
from cowfs.union import Options

if TYPE_CHECKING:
    from .conftest import Stack


class Stacked(Pair):
    """Over a random stack of layers."""

    def __init__(self, base: Path, seed: int, form: str, row: bool) -> None:
        super().__init__(base / "plain", seed, counted=form == "trusted")
        lowers = stacks.random_stack(self.rng.randrange(1 << 20), self.rng.choice((3, 8, 15, 23, 30)), base, form)
        for name in ("kernel", "plain", "upper", "work"):
            (base / name).mkdir()
        with mounts.overlay(lowers, base / "kernel", form=form):
            mounts.copy_tree(base / "kernel", base / "plain")
        self._arguments = ([os.fspath(layer) for layer in reversed(lowers)], str(base / "upper"), str(base / "work"))
        self._options = Options(form=form, row=4096 if row else None)
        self.ours = InView(View(*self._arguments, options=self._options))

    def again(self) -> None:
        """A new view shows the same."""
        self.let_go()
        self.ours.view.close()
        self.ours = InView(View(*self._arguments, options=self._options))
        self.compare()


@pytest.mark.parametrize("row", [False, True], ids=["", "row"])
@pytest.mark.parametrize("form", ["trusted", "user"])
def test_a_view_whose_nodes_are_forgotten_equals_a_plain_directory(
    space: Path, form: str, row: bool, request: pytest.FixtureRequest
) -> None:
    os.umask(0o022)
    steps, number = request.config.getoption("--steps") // 12, 0
    while number * 100 < steps:
        base = space / f"{number}"
        base.mkdir()
        pair = Stacked(base, request.config.getoption("--seed") + number, form, row)
        try:
            for _ in range(100):
                pair.step()
            pair.compare()
            pair.again()
        finally:
            pair.let_go()
            pair.ours.view.close()
            shutil.rmtree(base)
        number += 1


def client_of(stack: Stack) -> InView:
    return InView(stack.open().view)


def test_hard_links_in_directories_that_changed_places_are_found_after_all_was_forgotten(trusted: Stack) -> None:
    """The names of a lower inode stand under directories that renames moved into each other."""
    trusted.add().dir("d").dir("d/e").dir("c").dir("c/c").file("d/b", b"x").link("d/b", "c/c/b").link("d/b", "c/c/d")
    ours = client_of(trusted)
    ours.exchange(b"c/c", b"d")
    ours.client.forget_all()
    ours.rename(b"c", b"x")
    ours.client.forget_all()
    ours.unlink(b"x/c/b")
    assert [ours.stat(b"d/b")[1], ours.stat(b"d/d")[1]] == [2, 2]
    assert ours.inode(b"d/b") == ours.inode(b"d/d")


def test_a_redirect_beside_is_one_beneath_the_parents_own_redirect(trusted: Stack) -> None:
    """Hard links are found through a lower layer that the kernel wrote: a relative redirect in a moved directory."""
    trusted.add().dir("a").dir("a/b").file("a/b/one", b"x").link("a/b/one", "two")
    trusted.add().redirect("moved", "/a").whiteout("a").redirect("moved/c", "b").whiteout("moved/b")
    ours = client_of(trusted)
    ours.unlink(b"two")
    assert ours.stat(b"moved/c/one")[1] == 1


def _two_names(trusted: Stack) -> InView:
    """An upper inode with the names one and two, of which only one is known, and open."""
    trusted.add()
    ours = client_of(trusted)
    ours.create(b"one")
    ours.link(b"one", b"two")
    ours.client.forget_all()
    ours.open(0, b"one")
    ours.unlink(b"one")
    return ours


def test_an_open_file_whose_known_name_went_is_the_one_that_its_last_name_shows(trusted: Stack) -> None:
    ours = _two_names(trusted)
    ours.chmod(b"two", 0o600)
    assert ours.fstat(0) == (stat.S_IFREG | 0o600, 1, 0)
    ours.unlink(b"two")
    assert ours.fstat(0) == (stat.S_IFREG | 0o600, 0, 0)


def test_an_open_file_whose_known_name_went_gets_another(trusted: Stack) -> None:
    ours = _two_names(trusted)
    ours.flink(0, b"three")
    ours.client.forget_all()
    assert ours.inode(b"two") == ours.inode(b"three")
    assert ours.fstat(0) == ours.stat(b"three") == (stat.S_IFREG | 0o644, 2, 0)


def test_a_redirect_file_without_a_name_goes_on_for_who_has_it_open(trusted: Stack) -> None:
    trusted.add().file("f", b"x" * 20_000)
    ours = InView(trusted.open(row=4096).view)
    ours.write(b"f", 5000)
    ours.client.forget_all()
    ours.open(0, b"f")
    ours.unlink(b"f")
    ours.fwrite(0, 9000)
    buffer = bytearray(20_000)
    assert ours.view.pread(ours.client.node(ours.client.open[0]), 0, memoryview(buffer)) == 20_000
    expected = bytearray(b"x" * 20_000)
    expected[5000:5012], expected[9000:9009] = b"written 5000", b"open 9000"
    assert buffer == expected
