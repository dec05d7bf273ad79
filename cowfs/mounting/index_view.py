"""Inside a mount's server process: the view of a snapshot, its lower tree from the index.

Strategy: the server is told a directory (the layer's tree) and finds everything else from there:
the store two levels up, the row by the id in the path, the parent's tree in the row. So a
store that was moved still mounts, and the lower layers are never scanned.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from cowfs.errors import NotFound
from cowfs.index.database import Index, Row
from cowfs.index.mounted import IndexTree
from cowfs.union import View, quota

if TYPE_CHECKING:
    from cowfs.mounting.resources import Stack
    from cowfs.union import Options
    from cowfs.union.options import TreeIndex

__all__ = ["FACTORY", "view"]

FACTORY = "cowfs.mounting.index_view:view"
"""What a mount's wish names, so that its server calls :func:`view`."""


def view(stack: Stack, options: Options) -> View:
    """Make the view of the snapshot whose tree is the stack's upper.

    Raises:
        NotFound: the index does not know the layer.
        OSError: as :class:`cowfs.union.View`.
    """
    assert stack.upper is not None
    root, _, id = os.path.dirname(stack.upper).rpartition("/layers/")
    index = Index(os.path.join(root, "index.db"))
    row = index.find_id(id)
    if row is None:
        raise NotFound(f"the index of {root} does not know the layer {id}")
    form = index.meta("form") or "auto"
    tree = _lower(index, row, stack.lowers, root)
    made = View(stack.lowers, stack.upper, stack.work, options=replace(options, form=form, index=tree))
    if (row.base.bytes or row.base.inodes) and not made.readonly:
        # a whole layer: what was copied is neither use nor limit; or live snapshots below hold what counts
        made.space = quota.Space(made)
        made.space.offset(-(row.base.bytes // quota.UNIT), -row.base.inodes)
        made.set_limit(stack.limit)
    return made


def _lower(index: Index, row: Row, lowers: Sequence[str], root: str) -> TreeIndex | None:
    """The tree beneath, if the lowers are exactly the layers that its records refer to."""
    parent = index.by_num(row.parent) if row.parent is not None else None
    if parent is None or parent.root is None:
        return None
    chain = index.chain(parent.num)
    if list(lowers) != [f"{root}/layers/{id}/fs" for _, id in chain]:
        return None
    bottom = len(chain) - 1
    tree: Any = IndexTree(index, parent.root, {num: bottom - place for place, (num, _) in enumerate(chain)})
    return cast("TreeIndex", tree)
