"""Snapshots of a live view: the upper layer is frozen, a new one goes on; and back again.

*Freeze* has no cost per file, since a node is "in the upper layer" exactly when the layer that holds it is
``view.stack.upper``: with another layer in that place every node has become a lower one, and its next change copies it up.
Two things must follow: the root (every layer has one) and the directories that renames had moved: the path
in the merged lower tree, which ``redirect`` names, is from now on the path they have now.

*Rollback* drops the layers above a frozen one. Their content is gone: their files' nodes are struck out, so that
descriptors on them answer ESTALE instead of old offsets on other data, and directories that also exist below are read
again. Files that the dropped layers did not touch keep their nodes, open descriptors and cached pages.

*Replace* is the rollback of a view whose upper layer is an entire tree: another one, which has content, takes its place, and
every node but the root is struck out.

The caller makes the directories, commits the frozen layer to its index, and tells the kernel what is stale.
"""

from __future__ import annotations

import errno
import os

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING
from cowfs.union import from_index, hardlinks, holding, quota, stored
from cowfs.union.layers import Layer, Source
from cowfs.union.meta import Meta
from cowfs.union.node import Dir, Node
from cowfs.union.workdir import WorkDir

if TYPE_CHECKING:
    from cowfs.union.core import Core


@record(frozen=True, slots=True)
class Stale:
    """Ids and names that a front end's caches must forget after a rollback.

    Attributes:
        inodes: ids whose attributes and data are no longer valid.
        entries: (directory id, name) that may name something else now, or nothing.
    """

    inodes: tuple[int, ...]
    entries: tuple[tuple[int, bytes], ...]


def freeze(view: Core, upper: str | bytes, work: str | bytes) -> Layer:
    """Make the upper layer a lower one, and ``upper`` (an empty directory) the upper layer.

    Args:
        upper: becomes the writable layer; on the same file system as the present one.
        work: its work directory.

    Returns:
        The frozen layer.

    Raises:
        OSError: EROFS for a read-only view; ENOTEMPTY, EXDEV for unsuitable directories.
            Then nothing has changed.
    """
    frozen, before = view.need_upper(), view.stack.workdir
    layer = _new_upper(view, upper, work, frozen.dev, stored.read_meta(view, view.root))
    if before is not None and view.stack.workdir is not None:
        holding.carry_over(before, view.stack.workdir)
    _push(view, layer)
    return frozen


def _new_upper(view: Core, upper: str | bytes, work: str | bytes, dev: int, root: Meta) -> Layer:
    """Open and check a new upper layer, whose root gets the attributes ``root``; swaps the work directory."""
    path = os.fsencode(upper)
    if os.listdir(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
    layer = Layer(path, len(view.stack.layers), view.descriptors)
    try:
        if layer.dev != dev:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        workdir = WorkDir(os.fsencode(work), layer, view.form)
    except BaseException:
        layer.close()
        raise
    stored.write_meta(layer.root.open(), b".", root, view)
    view.stack.work_in(workdir)
    return layer


def _push(view: Core, layer: Layer) -> None:
    if view.space is not None:
        view.space.freeze()
    view.moves.froze(view.stack.upper)
    view.stack.add(layer, upper=True)
    view.inodes.forget_claims()
    layer.root.whiteouts, layer.root.shadow, layer.root.impure = set(), set(), True
    root = view.root
    root.sources.insert(0, layer.root)
    root.where = layer.root
    if view.space is not None:
        for node in view.nodes.values():
            if not holding.is_nameless(view, node):
                node.space = None


def rollback(view: Core, frozen: Layer, upper: str | bytes, work: str | bytes) -> Stale:
    """Go back to the state in which ``frozen`` was the top layer, with a new, empty upper layer.

    Args:
        frozen: the result of :func:`freeze`, or any lower layer of the view.
        upper, work: as for :func:`freeze`.

    Returns:
        Ids and names that the kernel must be told to forget.

    Raises:
        OSError: EINVAL when ``frozen`` is not a lower layer of the view, else as :func:`freeze`.
    """
    present = view.need_upper()
    if frozen is present or frozen not in view.stack.layers:
        raise OSError(errno.EINVAL, "not a lower layer of this view")
    if frozen.index < view.stack.indexed_layers - 1:
        raise OSError(errno.EINVAL, "the layers below an index cannot be rolled back")
    dropped = view.stack.layers[frozen.index + 1 :]
    layer = _new_upper(view, upper, work, present.dev, stored.root_meta(view, frozen))
    stale, entries = _strike_out(view, set(dropped))
    view.stack.cut(frozen)
    view.moves.moved.clear()
    for old in dropped:
        view.moves.forget(old)
        if view.rows is not None:
            view.rows.forget(old)
        old.close()
    counted = view.swap_space(None)  # its count is gone with the layer
    _push(view, layer)
    view.root.attr = None
    if counted is not None:
        space = quota.Space(view)
        space.set_limit(counted.limit)
        view.swap_space(space)
        for node in view.nodes.values():
            node.space = None
    return Stale(tuple(stale), tuple(entries))


def replace(view: Core, upper: str | bytes, work: str | bytes) -> Stale:
    """Go on with another upper layer in place of the present one, whose content is gone for the view.

    Args:
        upper: an entire tree.
        work: its work directory, on its file system.

    Returns:
        Ids and names that the kernel must be told to forget: all.

    Raises:
        OSError: EROFS for a read-only view; EINVAL for one whose lower tree is from an index; an error of the new
            directories. Then nothing has changed.
    """
    view.need_upper()
    if view.stack.index is not None:
        raise OSError(errno.EINVAL, "the view has a lower tree")
    layer = Layer(os.fsencode(upper), len(view.stack.layers) - 1, view.descriptors)
    try:
        workdir = WorkDir(os.fsencode(work), layer, view.form)
    except BaseException:
        layer.close()
        raise
    view.stack.work_in(workdir)
    stale, entries = [view.root.id], []
    for node in list(view.nodes.values()):
        if node is view.root:
            continue
        stale.append(node.id)
        entries += [(parent.id, name) for parent, name in view.names_of(node)]
        if isinstance(node, Dir):
            for source in node.sources:
                if source.parent is not None:
                    source.close()
        _strike(view, node)
    old = view.stack.drop_upper()
    view.moves.moved.clear()
    view.moves.forget(old)
    if view.rows is not None:
        view.rows.forget(old)
    counted = view.swap_space(None)  # its count is gone with the layer
    root = view.root
    before = root.children or {}
    root.sources[:] = [source for source in root.sources if source.layer is not old]
    old.close()
    view.stack.add(layer, upper=True)
    view.inodes.forget_claims()
    root.sources.insert(0, layer.root)
    root.where = layer.root
    root.children = root.order = root.attr = None
    root.live = 0
    entries += [(root.id, name) for name in before.keys() | view.load(root).keys()]
    if counted is not None:
        space = quota.Space(view)
        space.set_limit(counted.limit)
        view.swap_space(space)
    return Stale(tuple(stale), tuple(entries))


def _strike_out(view: Core, dropped: set[Layer]) -> tuple[list[int], list[tuple[int, bytes]]]:
    """Take every node that lives in a dropped layer out of the view."""
    stale: list[int] = []
    entries: list[tuple[int, bytes]] = []
    touched: list[Dir] = []
    for node in list(view.nodes.values()):
        if isinstance(node, Dir):
            if node.sources[0].layer in dropped:
                touched.append(node)
        elif node.where is None or node.where.layer in dropped or node.data.home in dropped:
            stale.append(node.id)
            entries += [(parent.id, name) for parent, name in view.names_of(node)]
            _strike(view, node)
    for directory in touched:
        kept = [source for source in directory.sources if source.layer not in dropped]
        if not kept and directory.record is not None:
            kept = [from_index.source_of(view, directory)]
        elsewhere = directory.record is not None and directory.record.path != view.path(directory)
        moved = directory.lowpath is not None or not kept or elsewhere or _was_elsewhere(view, directory, kept, dropped)
        for source in directory.sources:
            if source.layer in dropped and source.parent is not None:
                source.close()
        if moved and directory is not view.root:
            stale.append(directory.id)
            if directory.parent is not None:
                entries.append((directory.parent.id, directory.name))
            _strike(view, directory)
        else:
            directory.sources[:] = kept
            directory.where = kept[0]
            stale.append(directory.id)
    entries += _drop_under_struck(view, stale)
    for directory in touched:
        if view.nodes.get(directory.id) is directory:
            entries += _reread(view, directory)
    return stale, entries


def _was_elsewhere(view: Core, directory: Dir, kept: list[Source], dropped: set[Layer]) -> bool:
    """Whether the rest of a directory had another name, or another parent, before the dropped layers."""
    top, above = kept[0], directory.parent
    if (
        top.parent is None
        or above is None
        or (view.stack.index is not None and top.layer.index < view.stack.indexed_layers)
    ):
        return False
    there = top.parent.path()
    return top.name != directory.name or not any(
        source.layer is top.layer and source.path() == there for source in above.sources if source.layer not in dropped
    )


def _strike(view: Core, node: Node) -> None:
    """Make a node's id answer ESTALE from now on; it is never used again."""
    view.table.strike(node)
    node.data.close()
    view.open_files.close(node)


def _drop_under_struck(view: Core, stale: list[int]) -> list[tuple[int, bytes]]:
    """Strike out the nodes whose way to the root leads through one that was struck out; returns the names that others lost.

    A file with further names keeps those that lead to the root.
    """
    lost: list[tuple[int, bytes]] = []
    changed = True
    while changed:
        changed = False
        for node in list(view.nodes.values()):
            if node is view.root or node.parent is None:
                continue
            names = view.names_of(node)
            kept = [(parent, name) for parent, name in names if view.nodes.get(parent.id) is parent]
            if len(kept) == len(names):
                continue
            changed = True
            lost += [(parent.id, name) for parent, name in names]
            if not kept:
                stale.append(node.id)
                _strike(view, node)
                continue
            view.table.names.pop(node, None)
            if len(kept) > 1:
                view.table.names[node] = kept[1:]
            if (node.parent, node.name) != kept[0]:
                node.parent, node.name = kept[0]
                hardlinks.find_place(view, node)
    return lost


def _reread(view: Core, directory: Dir) -> list[tuple[int, bytes]]:
    """Read a directory's names again, keeping the nodes that still match."""
    before = directory.children or {}
    directory.children = directory.order = directory.attr = None
    now = view.load(directory)
    changed = [(directory.id, name) for name in before.keys() ^ now.keys()]
    directory.live = 0
    for name, item in before.items():
        if isinstance(item, int):
            continue
        if view.nodes.get(item.id) is item and name in now and (directory, name) in view.names_of(item):
            now[name] = item
            directory.live += 1
        else:
            changed.append((directory.id, name))
    return changed


__all__ = ["Stale", "freeze", "replace", "rollback"]
