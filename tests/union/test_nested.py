"""An upper layer on a host that is an overlay itself, as in a container: nobody may make a device 0/0 there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support import mounts, namespace

from cowfs.model import Limit
from cowfs.union.quota import measure

Stack = Any


@pytest.fixture
def nested(stack: Stack, space: Path) -> Stack:
    """A stack whose upper and work directory lie on the kernel's overlayfs."""
    if namespace.why_not:
        pytest.skip(namespace.why_not)
    host = space / "host"
    for name in ("below", "above", "work", "merged"):
        (host / name).mkdir(parents=True)
    stack._cleanup.enter_context(mounts.overlay([host / "below"], host / "merged", host / "above", host / "work"))
    stack.upper, stack.work = host / "merged" / "upper", host / "merged" / "workdir"
    stack.upper.mkdir()
    stack.work.mkdir()
    return stack


def _layer(stack: Stack) -> None:
    layer = stack.add().dir("d").dir("moved").dir("gone").file("f", b"f").file("d/f", b"df").file("moved/f", b"mf")
    layer.file("d/keep", b"keep").file("gone/x", b"x").file("victim", b"v")


def test_what_was_removed_stays_away(nested: Stack) -> None:
    _layer(nested)
    paths = nested.open()
    paths.unlink("f")
    paths.unlink("d/f")
    paths.write_bytes("victim", b"new")
    paths.unlink("victim")
    paths.unlink("gone/x")
    paths.rmdir("gone")
    paths.rename("d/keep", "kept")
    paths = nested.again(paths)
    assert sorted(paths.listdir("/")) == [b"d", b"kept", b"moved"]
    assert paths.listdir("d") == []


def test_a_name_that_was_removed_can_be_made_again(nested: Stack) -> None:
    _layer(nested)
    paths = nested.open()
    paths.unlink("f")
    paths.write_bytes("f", b"second")
    paths.unlink("d/f")
    paths.mkdir("d/f")
    paths = nested.again(paths)
    assert paths.read_bytes("f") == b"second"
    assert sorted(paths.listdir("d")) == [b"f", b"keep"]
    assert paths.listdir("d/f") == []


def test_a_directory_moves_over_a_name_that_was_removed(nested: Stack) -> None:
    _layer(nested)
    paths = nested.open()
    paths.mkdir("d/new")
    paths.unlink("f")
    paths.rename("d/new", "f")
    paths.rename("moved", "d/f2")
    paths = nested.again(paths)
    assert paths.listdir("f") == []
    assert sorted(paths.listdir("/")) == [b"d", b"f", b"gone", b"victim"]
    assert paths.read_bytes("d/f2/f") == b"mf"


def test_whiteouts_stay_free(nested: Stack) -> None:
    _layer(nested)
    paths = nested.open(limit=Limit(bytes=1 << 20, inodes=100))
    for name in ("f", "d/f", "victim"):
        paths.unlink(name)
    view = paths.view
    assert view.usage() == measure(view.upper, view.form)


def test_the_layer_can_lie_beneath_others(nested: Stack, tmp_path: Path) -> None:
    _layer(nested)
    paths = nested.open()
    paths.unlink("f")
    paths.unlink("d/f")
    paths.view.close()
    nested.layers.append(os.fspath(nested.upper))
    nested.upper, nested.work = nested.upper.parent / "second", nested.upper.parent / "second-work"
    nested.upper.mkdir()
    nested.work.mkdir()
    paths = nested.open()
    assert paths.listdir("d") == [b"keep"]
    assert b"f" not in paths.listdir("/")
