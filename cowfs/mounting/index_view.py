"""Inside a mount's server process: the view of a snapshot, its lower tree from the index.

Strategy: the server gets a directory (the layer's tree) and finds everything else from there:
the store two levels up, the row by the id in the path, the parent's tree in the row. So a
store that was moved still mounts, and the lower layers are never scanned.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs._record import replace
from cowfs._typed import TYPE_CHECKING, Any, cast
from cowfs.errors import NotFound
from cowfs.index.database import Index, Row
from cowfs.index.mounted import IndexTree
from cowfs.model import Limit
from cowfs.row.view import View
from cowfs.union import quota

if TYPE_CHECKING:
    from cowfs.mounting.resources import Stack
    from cowfs.union import Options
    from cowfs.union.options import TreeIndex
    from cowfs.union.view import View as Merged

__all__ = ["count_from_now", "keep_limit", "view"]


def view(stack: Stack, options: Options) -> View:
    """Make the view of the snapshot whose tree is the stack's upper.

    Raises:
        NotFound: the index does not know the layer.
        OSError: as :class:`cowfs.View`.
    """
    assert stack.upper is not None
    index, row = row_of(stack.upper)
    root, _ = place_of(stack.upper)
    form = index.meta("form") or "auto"
    tree = _lower(index, row, stack.lowers, root)
    made = View(stack.lowers, stack.upper, stack.work, options=replace(options, form=form, index=tree))
    if (row.base.bytes or row.base.inodes) and not made.readonly:
        _count(made, row)
        made.set_limit(stack.limit)
    return made


def _count(view: Merged, row: Row) -> None:
    """Begin to count the use of a snapshot's layer for its limit.

    For a whole layer, copied data counts neither as use nor for the limit; the use of live snapshots beneath counts, too.
    """
    space = quota.Space(view)
    space.offset(-(row.base.bytes // quota.UNIT), -row.base.inodes)
    view.swap_space(space)


def place_of(tree: str) -> tuple[str, str]:
    """(the store's directory, the layer's id) of a layer's tree, wherever in the layer's directory its driver has it."""
    root, _, below = tree.rpartition("/layers/")
    return root, below.partition("/")[0]


def row_of(upper: str) -> tuple[Index, Row]:
    """The index of the store that a layer's tree is in, and the layer's row.

    Raises:
        NotFound: the index does not know the layer.
    """
    root, id = place_of(upper)
    index = Index(os.path.join(root, "index.db"))
    row = index.find_id(id)
    if row is None:
        index.close()
        raise NotFound(f"the index of {root} does not know the layer {id}")
    return index, row


def keep_limit(upper: str, limit: Limit) -> None:
    """Record the limit of the active snapshot whose layer's tree is ``upper``, for all mounts to come.

    Raises:
        NotFound: the index does not know the layer.
        CowfsError: the index cannot be written.
    """
    index, row = row_of(upper)
    try:
        with index.write() as change:
            change.set_limit(row.num, limit)
    finally:
        index.close()


def count_from_now(view: Merged, upper: str) -> None:
    """Make a view that was mounted without a limit count as one with a limit."""
    index, row = row_of(upper)
    index.close()
    _count(view, row)


def _lower(index: Index, row: Row, lowers: Sequence[str], root: str) -> TreeIndex | None:
    """The tree beneath, if the lowers are exactly the layers that its records refer to."""
    parent = index.by_num(row.parent) if row.parent is not None else None
    if parent is None or parent.root is None:
        return None
    chain = index.chain(parent.num)
    if [place_of(lower) for lower in lowers] != [(root, id) for _, id in chain]:
        return None
    bottom = len(chain) - 1
    tree: Any = IndexTree(index, parent.root, {num: bottom - place for place, (num, _) in enumerate(chain)})
    return cast("TreeIndex", tree)
