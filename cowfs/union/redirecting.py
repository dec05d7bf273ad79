"""Which implementation of redirect files views use: union reads and writes layers that hold some, and knows none itself.

The package that has one (``cowfs.row``) is above this one. The package ``cowfs`` itself is above both, is always loaded before
them, and puts them together: its ``redirects_of`` is asked here, not imported, since it imports this package.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.union.core import Core
    from cowfs.union.filedata import Redirects

__all__ = ["redirects_of"]


def redirects_of(view: Core) -> Redirects | None:
    """The redirect files of a view whose layers are open, if it may have some; ``None`` for any other."""
    made: Redirects | None = sys.modules["cowfs"].redirects_of(view)
    return made
