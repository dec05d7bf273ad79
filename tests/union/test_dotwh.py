"""Whiteouts as archives have them (``.wh.``), in lower layers and in an upper that an archive was unpacked into."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.union import Options, View
from cowfs.union.paths import Paths

Open = Callable[..., Paths]


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text(name)
    return root


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    base = make(tmp_path / "base", "d/old", "d/keep", "gone/x", "whole/below", "file")
    top = make(
        tmp_path / "top", ".wh.file", ".wh.gone", "d/.wh.old", "d/new", "whole/.wh..wh..opq", "whole/above", ".wh.both"
    )
    make(top, "both")

    def open_view(*, upper: bool) -> Paths:
        options = Options(dotwh=True)
        if not upper:
            return Paths(View([str(top), str(base)], options=options))
        (tmp_path / "work").mkdir(exist_ok=True)
        return Paths(View([str(base)], str(top), str(tmp_path / "work"), options=options))

    return open_view


@pytest.mark.parametrize("upper", [False, True])
def test_dotwh_names_hide_what_is_beneath_and_are_hidden(opened: Open, upper: bool) -> None:
    paths = opened(upper=upper)
    assert [path for path, _ in paths.walk()] == [b"both", b"d", b"d/keep", b"d/new", b"whole", b"whole/above"]
    assert not paths.exists("gone/x")


def test_an_upper_is_turned_into_the_layers_own_form(opened: Open, tmp_path: Path) -> None:
    paths = opened(upper=True)
    before = list(paths.walk())
    paths.view.close()
    assert not [name for _, _, files in os.walk(tmp_path / "top") for name in files if name.startswith(".wh.")]
    kernel_form = Paths(View([str(tmp_path / "top"), str(tmp_path / "base")]))
    assert [path for path, _ in kernel_form.walk()] == [path for path, _ in before]


def test_a_name_deleted_so_can_be_made_again(opened: Open) -> None:
    paths = opened(upper=True)
    paths.mkdir("gone")
    paths.write_bytes("file", b"again")
    assert paths.listdir("gone") == []
    assert paths.read_bytes("file") == b"again"


@pytest.mark.parametrize("name", [".wh.x", ".wh..wh..opq"])
def test_nobody_can_make_such_a_name(opened: Open, name: str) -> None:
    paths = opened(upper=True)
    for attempt in (
        lambda: paths.write_bytes(name, b""),
        lambda: paths.mkdir(name),
        lambda: paths.symlink("x", name),
        lambda: paths.rename("d/new", name),
        lambda: paths.link("d/new", name),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EINVAL
