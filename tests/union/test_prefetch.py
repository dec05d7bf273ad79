"""Reading ahead across files: what is asked for, and that nothing else happens. (That it helps is a benchmark.)"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.union import View
from cowfs.union.node import Dir
from cowfs.union.prefetch import FILES, ReadAhead


@pytest.fixture
def view(tmp_path: Path) -> Iterator[View]:
    for layer, names in (("low", range(50)), ("top", range(40, 60))):
        (tmp_path / layer / "d").mkdir(parents=True)
        for number in names:
            (tmp_path / layer / "d" / f"f{number:02}").write_bytes(b"x" * 100)
    (tmp_path / "low/lone").write_bytes(b"y")
    os.symlink("f00", tmp_path / "low/d/f00-link")
    os.mkfifo(tmp_path / "low/d/f00-pipe")
    made = View([str(tmp_path / "top"), str(tmp_path / "low")])
    yield made
    made.close()


def test_the_second_wait_in_a_directory_asks_for_the_files_that_follow(view: View) -> None:
    """Regular files only, by name, from every layer, at most FILES entries; links and pipes are passed over."""
    directory = view.lookup(view.root, b"d")
    assert isinstance(directory, Dir)
    ahead = ReadAhead()
    first, second = view.lookup(directory, b"f00"), view.lookup(directory, b"f30")
    assert ahead.cold(first) == 0
    assert ahead.cold(second) == 29  # f31 to f59
    assert ahead.cold(first) == 0
    assert ahead.cold(first) == FILES - 2 - 1  # a link, a pipe, and f30, which is a node already


def test_waits_in_different_directories_ask_for_nothing(view: View) -> None:
    directory = view.lookup(view.root, b"d")
    assert isinstance(directory, Dir)
    node = view.lookup(directory, b"f01")
    ahead = ReadAhead()
    assert ahead.cold(node) == 0
    assert ahead.cold(view.lookup(view.root, b"lone")) == 0
    assert ahead.cold(node) == 0


def test_a_file_that_vanished_is_passed_over(view: View, tmp_path: Path) -> None:
    directory = view.lookup(view.root, b"d")
    assert isinstance(directory, Dir)
    node = view.lookup(directory, b"f57")
    (tmp_path / "top/d/f58").unlink()
    ahead = ReadAhead()
    ahead.cold(node)
    assert ahead.cold(node) == 1
