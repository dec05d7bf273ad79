"""A stack of layers and the view over it, without any mount.

``stack`` makes layers of either form (``trusted`` needs root); ``Stack.open`` gives a
:class:`~cowfs.union.paths.Paths` over the merged view, ``Stack.kernel`` the same stack mounted with
the kernel's overlayfs, which is asked what a layer means.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import mounts, namespace
from support.layers import Layer

from cowfs.row.view import View
from cowfs.union import Options
from cowfs.union.paths import Paths


class Stack:
    """Layers bottom first (``add``), an upper and a work directory."""

    def __init__(self, base: Path, form: str, cleanup: ExitStack) -> None:
        self.base, self.form, self._cleanup = base, form, cleanup
        self.layers: list[Layer] = []
        self.upper, self.work = base / "upper", base / "work"
        self.upper.mkdir()
        self.work.mkdir()
        (base / "kernel").mkdir()

    def add(self) -> Layer:
        """A new topmost lower layer."""
        layer = Layer(self.base / f"layer{len(self.layers)}", self.form)
        self.layers.append(layer)
        return layer

    def open(self, readonly: bool = False, **options: Any) -> Paths:
        """The merged view; closed at the end of the test, or by ``close``."""
        lowers = [os.fspath(layer) for layer in reversed(self.layers)] or [str(self.base / "kernel")]
        places = () if readonly else (str(self.upper), str(self.work))
        view = View(lowers, *places, options=Options(form=self.form, **options))
        self._cleanup.callback(view.close)
        return Paths(view)

    def again(self, paths: Paths, **options: Any) -> Paths:
        """Close the view and open the same layers anew, as a remount does."""
        paths.view.close()
        return self.open(**options)

    def kernel(self) -> Path:
        """The stack as the kernel's overlayfs shows it; close the view first."""
        target = self.base / "kernel"
        self._cleanup.enter_context(mounts.overlay(self.layers, target, self.upper, self.work, form=self.form))
        return target


@pytest.fixture(params=["trusted", "user"])
def stack(request: pytest.FixtureRequest, space: Path) -> Iterator[Stack]:
    """A stack of each form."""
    with ExitStack() as cleanup:
        yield Stack(space, request.param, cleanup)


@pytest.fixture
def unprivileged(space: Path) -> Iterator[Stack]:
    """A stack of the form without privilege, in which a rename of a lower directory copies."""
    with ExitStack() as cleanup:
        yield Stack(space, "user", cleanup)


@pytest.fixture
def trusted(space: Path) -> Iterator[Stack]:
    """A stack of the privileged form, which alone has redirects and metacopy."""
    if namespace.why_not:
        pytest.skip(namespace.why_not)
    with ExitStack() as cleanup:
        yield Stack(space, "trusted", cleanup)
