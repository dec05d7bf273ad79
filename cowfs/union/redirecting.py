"""Which implementation of redirect files views use: union reads and writes layers that hold some, and knows none itself.

The package that has one (``cowfs.row``) is above this one; ``cowfs`` itself, which is above both, names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cowfs.union.filedata import Redirects

__all__ = ["provide", "redirects_of"]

_makers: list[Callable[[Any], Redirects | None]] = []


def provide(make: Callable[[Any], Redirects | None]) -> None:
    """Name what makes the redirect files of each view from now on: called with the view, once its layers are open."""
    _makers[:] = [make]


def redirects_of(view: object) -> Redirects | None:
    """The redirect files of a view that may have some; ``None`` for any other."""
    return next((made for make in _makers if (made := make(view)) is not None), None)
