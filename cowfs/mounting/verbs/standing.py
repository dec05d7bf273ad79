"""Switching a view to the layers of a snapshot, with their tree from the store's index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from cowfs.index.mounted import IndexTree
from cowfs.union.restack import restack

if TYPE_CHECKING:
    from cowfs.index.database import Index
    from cowfs.union.options import TreeIndex
    from cowfs.union.view import View

__all__ = ["stand_on"]


def stand_on(view: View, index: Index, lowers: Sequence[str | bytes], num: int | None) -> None:
    """Put the view on ``lowers`` (topmost first), the lowest of which are the chain of the snapshot ``num``.

    Raises:
        OSError: as :func:`cowfs.union.restack.restack`.
    """
    tree, covered = None, 0
    if num is not None:
        root, chain = index.by_num(num).root, index.chain(num)
        covered = len(chain)
        if root is not None:
            places = {above: covered - 1 - place for place, (above, _) in enumerate(chain)}
            tree = cast("TreeIndex", IndexTree(index, root, places))
    restack(view, lowers, tree, covered)
