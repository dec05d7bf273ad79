"""The redirect files of a view: whether its stack may hold some, and their maker.

A redirect file keeps only the blocks that were written (docs/row.md). The package ``cowfs.row`` has the implementation and stands
above this one, so the caller that assembles a view hands it in; :class:`cowfs.row.view.View` does.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING
from cowfs.format.redirect import is_marked

if TYPE_CHECKING:
    from cowfs.union.core import Core
    from cowfs.union.filedata import Redirects

    #: makes the redirect files of a view whose layers are open
    RedirectsMaker = Callable[[Core], Redirects]

__all__ = ["redirects_of"]


def redirects_of(view: Core, make: RedirectsMaker | None) -> Redirects | None:
    """The redirect files of a view, or None where its stack holds none.

    A stack may hold some by option, or because a layer is marked. A layer that an index describes is not checked: the store
    that keeps the index sets the option.

    Args:
        view: its layers are open.
        make: makes the redirect files of a view.

    Raises:
        OSError: EOPNOTSUPP if the stack may hold some and there is no ``make``; errors of reading a layer's mark.
    """
    stack = view.stack
    if not view.options.row and not any(
        is_marked(layer.root.open(), view.form) for layer in stack.layers[stack.indexed_layers :]
    ):
        return None
    if make is None:
        raise OSError(errno.EOPNOTSUPP, "the layers hold redirect files, which only cowfs.View reads")
    return make(view)
