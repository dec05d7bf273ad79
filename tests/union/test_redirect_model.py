"""Random layers full of redirects, opaque directories, whiteouts and metacopies: the view shows what the kernel's overlayfs shows.

No layer here could come from an honest mount; layers from strangers need not be honest.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from support import mounts
from support.layers import Layer

Stack = Any
NAMES = ("a", "b", "c")


def path_in(rng: random.Random, depth: int) -> str:
    return "/".join(rng.choice(NAMES) for _ in range(rng.randint(1, depth)))


def put(layer: Layer, rng: random.Random, name: str, number: int) -> None:
    """Something at ``name``, if there is room for it."""
    where = Path(layer.at(name))
    if os.path.lexists(where) or any(p.exists() and not p.is_dir() for p in where.parents):
        if where.is_dir() and rng.random() < 0.5:
            mark(where, layer, rng)
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    kind = rng.random()
    if kind < 0.2:
        where.write_bytes(b"data %d" % number)
    elif kind < 0.35:
        os.mknod(where, stat.S_IFCHR, 0)
    elif kind < 0.5:
        where.write_bytes(b"")
        os.truncate(where, 6)
        os.setxattr(where, layer.attr("metacopy"), b"")
        if rng.random() < 0.7:
            os.setxattr(where, layer.attr("redirect"), redirect(rng))
    else:
        where.mkdir()
        mark(where, layer, rng)


def redirect(rng: random.Random) -> bytes:
    return (rng.choice(NAMES) if rng.random() < 0.4 else "/" + path_in(rng, 4)).encode()


def mark(where: Path, layer: Layer, rng: random.Random) -> None:
    what = rng.random()
    if what < 0.5:
        os.setxattr(where, layer.attr("redirect"), redirect(rng))
    elif what < 0.6:
        os.setxattr(where, layer.attr("opaque"), b"y")


class Kernel:
    """The kernel's tree, asked by path."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def kind(self, path: str) -> str:
        return stat.filemode(os.lstat(self.top / path).st_mode)[0]

    def names(self, path: str) -> list[str]:
        return sorted(os.listdir(self.top / path))

    def read(self, path: str) -> bytes:
        return (self.top / path).read_bytes()


class Ours:
    """The view's."""

    def __init__(self, paths: object) -> None:
        self.paths = paths

    def kind(self, path: str) -> str:
        return stat.filemode(self.paths.stat(path).mode)[0]  # type: ignore[attr-defined]

    def names(self, path: str) -> list[str]:
        return sorted(os.fsdecode(name) for name in self.paths.listdir(path))  # type: ignore[attr-defined]

    def read(self, path: str) -> bytes:
        return bytes(self.paths.read_bytes(path))  # type: ignore[attr-defined]


def walk(tree: Kernel | Ours) -> dict[str, object]:
    """Path -> type, contents and whether it is listed; "failed" where the tree cannot say. Every name is looked up.

    A listed name that cannot be looked up is left out: the kernel lists whiteouts of directories that nothing merges with.
    """
    out: dict[str, object] = {}
    pending = [("", True)]
    while pending:
        path, listed = pending.pop()
        try:
            kind = tree.kind(path)
            out[path] = kind, listed
            if kind == "d":
                names = tree.names(path)
                pending += [(os.path.join(path, name), name in names) for name in NAMES if path.count("/") < 4]
            elif kind == "-":
                out[path] = kind, listed, tree.read(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                out[path] = "failed"
    return out


@pytest.mark.parametrize("batch", range(4))
def test_random_layers_mean_what_they_mean_to_the_kernel(
    trusted: Stack, batch: int, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(int(request.config.getoption("--seed")) + batch)
    for round_ in range(40):
        base = trusted.base / f"round-{round_}"
        layers = [Layer(base / str(number)) for number in range(rng.randint(2, 5))]
        for number, layer in enumerate(layers):
            for _ in range(rng.randint(1, 12)):
                put(layer, rng, path_in(rng, 4), number)
        trusted.layers = layers
        paths = trusted.open(readonly=True)
        ours = walk(Ours(paths))
        paths.view.close()
        target = base / "mnt"
        target.mkdir()
        with mounts.overlay(layers, target):
            theirs = walk(Kernel(target))
        assert ours == theirs, f"round {round_}: {base}"


@pytest.mark.parametrize("deep", [30, 200])
def test_a_look_up_takes_no_more_steps_than_layers_times_components(
    trusted: Stack, deep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five layers of nested directories, each redirected to a path as long as the tree is deep: followed one by one, that is
    components to the power of layers. Nor may a look-up keep every directory on the way open."""
    for number in range(5):
        layer = trusted.add()
        (layer.path / "other").mkdir()
        for depth in range(1, deep + 1):
            where = layer.path.joinpath(*["a"] * depth)
            where.mkdir()
            if number:
                os.setxattr(where, "trusted.overlay.redirect", b"/a" * deep)
    steps = 0
    really = os.open

    def counted(*args: Any, **options: Any) -> int:
        nonlocal steps
        steps += 1
        if steps > 20 * 5 * deep:
            raise OSError(errno.ELOOP, "followed without end")
        return really(*args, **options)

    paths = trusted.open(readonly=True)
    monkeypatch.setattr(os, "open", counted)
    assert stat.S_ISDIR(paths.stat("a").mode)
    assert stat.S_ISDIR(paths.stat("other").mode)
    assert len(paths.view.descriptors.opened) < 50


def test_a_metacopy_of_the_lowest_layer_is_no_file_of_zeros(trusted: Stack) -> None:
    """Its data is nowhere: EIO, as the kernel says, also where the layer that had it was left out of the mount."""
    trusted.add().metacopy("f", 6).file("g", b"data").sparse("h", 1 << 20, {})
    paths = trusted.open(readonly=True)
    with pytest.raises(OSError, match="metacopy"):
        paths.read_bytes("f")
    assert paths.read_bytes("g") == b"data"
    assert paths.read_bytes("h") == bytes(1 << 20)


@pytest.mark.parametrize("last", [False, True])
def test_an_absolute_redirect_leads_out_of_an_opaque_directory(trusted: Stack, last: bool) -> None:
    """An opaque directory hides the objects beneath it, but not the target of a redirect further down the same path
    (ovl_check_redirect)."""
    for redirect in (None, b"/d", b"/a/b" if last else b"/a/b/c"):
        layer = trusted.add()
        if redirect is None:
            (layer.path / "d/c").mkdir(parents=True)
            (layer.path / "d/f").write_bytes(b"data")
            (layer.path / "d/c/f").write_bytes(b"data")
        elif redirect == b"/d":
            (layer.path / "a/b").mkdir(parents=True)
            os.setxattr(layer.path / "a", "trusted.overlay.opaque", b"y")
            os.setxattr(layer.path / "a/b", "trusted.overlay.redirect", redirect)
        else:
            (layer.path / "x").mkdir()
            os.setxattr(layer.path / "x", "trusted.overlay.redirect", redirect)
    paths = trusted.open(readonly=True)
    ours = walk(Ours(paths))
    assert paths.read_bytes("x/f") == b"data"
    paths.view.close()
    target = trusted.base / "mnt"
    target.mkdir()
    with mounts.overlay(trusted.layers, target):
        assert (target / "x/f").read_bytes() == b"data"
        assert ours == walk(Kernel(target))
