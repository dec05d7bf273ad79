"""Inside a mount's server process: the view of a snapshot, its lower tree from the index.

Strategy: the server is told a directory (the layer's tree) and finds everything else from there:
the store two levels up, the row by the id in the path, the parent's tree in the row. So a
store that was moved still mounts, and the lower layers are never scanned.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cowfs.errors import NotFound
from cowfs.index import Index, Row
from cowfs.tree import IndexTree
from cowfs.union import View, space

if TYPE_CHECKING:
    from cowfs.stack import Stack
    from cowfs.union import Options

__all__ = ["FACTORY", "view"]

FACTORY = "cowfs.store.serve:view"
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
    row = next(index.rows("s.id = ?", (id,)), None)
    if row is None:
        raise NotFound(f"the index of {root} does not know the layer {id}")
    form = index.meta("form") or "auto"
    if row.base.inodes or row.parent is None or _is_whole(stack, root):
        made = View(stack.lowers, stack.upper, stack.work, options=replace(options, form=form))
        if made.upper is not None and row.base.inodes and not made.readonly:
            made.space = space.Space(made)
            made.space.add(-(row.base.bytes // space.UNIT), -row.base.inodes)
            made.set_limit(stack.limit)
        return made
    tree = _lower(index, row)
    return View(stack.lowers, stack.upper, stack.work, options=replace(options, form=form, index=tree))


def _is_whole(stack: Stack, root: str) -> bool:
    """Whether nothing but the empty directory is beneath: a layer that is an entire tree."""
    return list(stack.lowers) == [f"{root}/empty"]


def _lower(index: Index, row: Row) -> IndexTree | None:
    parent = index.by_num(row.parent) if row.parent is not None else None
    if parent is None or parent.root is None:
        return None
    nums = [num for num, _ in index.chain(parent.num)]
    return IndexTree(index, parent.root, {num: len(nums) - 1 - place for place, num in enumerate(nums)})
