"""A snapshotter for each test that asks for one, and real containerd upon it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.containerd import Containerd, Snapshotter, needs_containerd

_numbers = itertools.count()


@pytest.fixture
def make_snapshotter(scratch: Path, can_mount: None) -> Iterator[Callable[..., Snapshotter]]:
    """A function that makes a snapshotter; it is ended after the test, and a traceback in its log fails the test."""
    pytest.importorskip("grpc", reason="the extra cowfs-storage[containerd] is not installed")
    made: list[Snapshotter] = []

    def make(*arguments: str) -> Snapshotter:
        base = scratch / f"s{next(_numbers)}"  # short: the address of a unix socket has 107 bytes
        made.append(Snapshotter(base, *arguments))
        return made[-1]

    yield make
    for each in made:
        each.clean_up()
        shutil.rmtree(each.base, ignore_errors=True)


@pytest.fixture
def containerd(make_snapshotter: Callable[..., Snapshotter], scratch: Path) -> Iterator[Containerd]:
    """Real containerd on a snapshotter with the driver overlay."""
    needs_containerd()
    made = Containerd(scratch / f"c{next(_numbers)}", make_snapshotter("-s", "overlay").start())
    yield made.start()
    made.clean_up()
