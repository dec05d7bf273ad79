"""The merged view: names found in a directory of three layers, without any mount."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowfs.row.view import View
from cowfs.union import Dir

NAMES = 2_000


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    found = []
    for number in range(3):
        layer = tmp_path / f"{number}"
        (layer / "lib").mkdir(parents=True)
        for at in range(number, NAMES, 3):
            (layer / "lib" / f"file-{at:06}").write_bytes(b"x")
        found.append(str(layer))
    return found


@pytest.fixture
def view(layers: list[str]) -> Iterator[View]:
    view = View(layers)
    yield view
    view.close()


def test_known_names(benchmark: Any, view: View) -> None:
    """Look-ups of names that have nodes."""
    lib = view.lookup(view.root, b"lib")
    assert isinstance(lib, Dir)
    names = [b"file-%06d" % at for at in range(NAMES)]
    for name in names:
        view.lookup(lib, name)
    benchmark(lambda: [view.lookup(lib, name) for name in names])


def test_first_look_at_each_name(benchmark: Any, layers: list[str]) -> None:
    """One scan of a directory of three layers, then a node for each of its names."""

    def walk() -> None:
        view = View(layers)
        lib = view.lookup(view.root, b"lib")
        assert isinstance(lib, Dir)
        for at in range(NAMES):
            view.lookup(lib, b"file-%06d" % at)
        view.close()

    benchmark(walk)
