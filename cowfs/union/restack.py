"""Another stack of layers that shows the same tree, under a view that goes on.

Strategy. The make-up of a stack may change while the tree that it shows does not: two layers are merged into one, or an index
that knew the lowest five of eight layers now knows them all. Then every node stays, with its id, attributes and open
handles. Only its place changes, and all places change here, in one call:

1. files without a name in a removed layer are copied, since they could not be found again;
2. the new layers are opened (those that stay are recognised by their root) and each directory in use is looked up anew,
   parents first. Nothing has changed so far, also after a failure;
3. directories get their parts, names their codes, files their place. Data descriptors of layers that go are closed, and
   redirect files read their chain again when they are next used.

The upper layer stays. Cost: the directories in use, not the tree.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.union import copyup, from_index, lookup, merge, quota
from cowfs.union.attr import unpack
from cowfs.union.layers import Layer, Source, lstat
from cowfs.union.node import DT_REG, PLAIN, Dir, FileData, Node

if TYPE_CHECKING:
    from cowfs.union.core import Core
    from cowfs.union.options import TreeIndex

__all__ = ["aside", "layers_under", "own_data", "restack"]

Place = tuple[list[Source], Any]
"""A directory's parts, topmost first, and its record."""


def restack(view: Core, lowers: Sequence[str | bytes], index: TreeIndex | None, covered: int) -> None:
    """Switch the view to other lower layers, which show the same tree as the present ones.

    Args:
        lowers: layer directories, topmost first.
        index: the merged tree of the lowest ``covered`` of them, if known.

    Raises:
        OSError: a layer is missing, or shows another tree than the present ones (EIO). Nothing has changed then.
    """
    assert view.stack.upper is not None
    known = {_identity(layer.root.open()): layer for layer in view.stack.layers[:-1]}
    opened: list[Layer] = []
    layers, covered_before = view.stack.layers[:], view.stack.indexed_layers
    try:
        stack = []
        for number, path in enumerate(reversed(lowers)):
            layer = Layer(os.fsencode(path), number, view.descriptors)
            there = known.get(_identity(layer.root.fd))
            if there is not None:
                layer.close()
                layer = there
            else:
                opened.append(layer)
            stack.append(layer)
        dropped = set(layers) - {*stack, view.stack.upper}
        _save_nameless(view, dropped)
        with view.stack.replaced(stack, index, covered):
            places = _find_directories(view)
    except BaseException:
        for layer in opened:
            layer.close()
        raise
    for directory, place in places.items():
        _move(view, directory, place)
    again = layers[:covered_before] != view.stack.layers[: view.stack.indexed_layers]
    for node in view.nodes.values():
        if not isinstance(node, Dir) and node.parent is not None and node.where is not None:
            _move_file(view, node, dropped, again)
    _let_go(view, dropped)


def layers_under(view: Core) -> list[bytes]:
    """The lower layers as paths that work after renames, too, topmost first."""
    return [b"/proc/self/fd/%d" % layer.root.open() for layer in reversed(view.stack.layers[:-1])]


@contextmanager
def aside(view: Core, ledger: quota.Space) -> Iterator[None]:
    """Count the changes of the block elsewhere: users did not make them, and no limit holds."""
    kept = view.swap_space(ledger)
    try:
        yield
    finally:
        view.swap_space(kept)


def own_data(view: Core, node: Node) -> None:
    """Bring all of a file's data into the upper layer at once, whatever its size."""
    if node.type != DT_REG:
        copyup.up_meta(view, node)
        return
    if view.rows is None or not node.data.pieced or not view.rows.own_all(node):
        stage = copyup.writable(view, node, plain=True)
        if stage is not None:
            stage.run()
            copyup.publish(view, stage)
    node.space = None


def depends(node: Node, layers: set[Layer]) -> bool:
    """Whether a file's inode or any of its data is in one of some layers."""
    return (node.where is not None and node.where.layer in layers) or node.data.in_layers(layers)


def _identity(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _save_nameless(view: Core, dropped: set[Layer]) -> None:
    if view.readonly:
        return
    for node in list(view.nodes.values()):
        if node.parent is not None or isinstance(node, Dir):
            continue
        if depends(node, dropped):
            with aside(view, quota.ledger(view)):
                own_data(view, node)
            if view.space is not None:
                view.space.add(quota.total_of(view.space.count(node)), 1)


# -- directories ----------------------------------------------------------------------------------


def _find_directories(view: Core) -> dict[Dir, Place]:
    """The place of each directory in use in the new stack."""
    roots = list(view.stack.roots)
    record = None
    if view.stack.index is not None:
        record = view.stack.index.root()
        roots = [root for root in roots if root.layer.index >= view.stack.indexed_layers]
    places: dict[Dir, Place | None] = {view.root: (roots, record)}
    for node in list(view.nodes.values()):
        way: list[Dir] = []
        here = node
        while isinstance(here, Dir) and here not in places:
            way.append(here)
            if here.parent is None:  # removed, and still in use
                places[here] = None
                way.pop()
                break
            here = here.parent
        for directory in reversed(way):
            assert directory.parent is not None
            above = places[directory.parent]
            places[directory] = None if above is None else _find(view, above, directory)
    return {directory: place for directory, place in places.items() if place is not None}


def _find(view: Core, above: Place, directory: Dir) -> Place:
    sources, record = above
    name, own, entry = directory.name, view.upper_of(directory), None
    if view.stack.index is not None:
        found, entry = from_index.merged_dir(view, from_index.scanned(view, sources), record, name)
    else:
        found = merge.merged_dirs(sources, name, view.form, view.stack.roots)
    if own is not None and found and found[0].layer is view.stack.upper:
        found[0].close()
        found[0] = own
    elif own is not None or (found and found[0].layer is view.stack.upper) or (not found and entry is None):
        raise OSError(errno.EIO, "the new layers do not show what the old ones do", view.path(directory))
    if not found:
        assert entry is not None
        found = [view.source_at(view.stack.layers[entry.layer], from_index.path_of(entry, record, name))]
    return found, entry.record if entry is not None else None


def _move(view: Core, directory: Dir, place: Place) -> None:
    before, children = directory.sources, directory.children
    directory.sources, directory.record = place
    directory.where = directory.sources[0]
    if children is not None:
        directory.children = _codes(view, directory, before, children)
    for source in before:
        if source not in directory.sources and source.parent is not None:
            source.close()


def _codes(
    view: Core, directory: Dir, before: list[Source], children: dict[bytes, Node | int]
) -> dict[bytes, Node | int]:
    """The names' codes in terms of the new parts."""
    own = view.upper_of(directory)
    if directory.record is not None and len(directory.sources) == 1:  # the upper part and the index: no check needed
        top = len(before) - 1 if own is not None else -1
        if own is not None:  # a whiteout may no longer hide the object beneath a removed name of the upper part
            beneath = from_index.tree(view).entries(directory.record)
            own.shadow = {name for name, item in children.items() if name in beneath and _is_own(view, item, top)}
        return {
            name: item if isinstance(item, Node) else item & 15 if item >= 0 and item >> 4 == top else -1
            for name, item in children.items()
        }
    directory.children = None
    now = view.load(directory)
    for name, item in children.items():
        if isinstance(item, Node):
            now[name] = item
    return now


def _is_own(view: Core, item: Node | int, top: int) -> bool:
    """Whether the upper part of a directory has the object of one of its names, by the former codes."""
    if isinstance(item, Dir):
        return view.upper_of(item) is not None
    return view.in_upper(item) if isinstance(item, Node) else item >= 0 and item >> 4 == top


# -- files ----------------------------------------------------------------------------------------


def _move_file(view: Core, node: Node, dropped: set[Layer], again: bool) -> None:
    """``again``: the index covers other layers now. It has a metacopy at its data's place, a scan at its own."""
    where, data = node.where, node.data
    assert where is not None and node.parent is not None
    if where.layer is not view.stack.upper and (again or where.layer in dropped):
        _find_again(view, node)
    elif data.home in dropped:  # a metacopy of it
        _close(view, node)
        node.data = _data(view, node)
    else:
        data.rebase()
    if node.data is not data:
        node.data.bind(node)


def _close(view: Core, node: Node) -> None:
    """Close data in a removed layer."""
    node.data.close()
    view.open_files.close(node)
    node.data, node.space = PLAIN, None


def _data(view: Core, node: Node) -> FileData:
    """The data of a file, found anew by its name."""
    parent, where = node.parent, node.where
    assert parent is not None and where is not None
    position = next((n for n, source in enumerate(parent.sources) if source.layer is where.layer), -1)
    if position < 0:
        return PLAIN
    st = os.stat(node.name, dir_fd=parent.sources[position].open(), follow_symlinks=False)
    return lookup.data_of(view, parent, position, node.name, st)


def _find_again(view: Core, node: Node) -> None:
    """The place of a removed layer's file in the new ones."""
    parent, name = node.parent, node.name
    assert parent is not None
    before = node.where, node.data
    for position, source in enumerate(parent.sources):
        if source.layer is view.stack.upper or (
            view.stack.index is not None and source.layer.index < view.stack.indexed_layers
        ):
            continue
        st = lstat(source, name)
        if st is not None:
            place = source, lookup.data_of(view, parent, position, name, st) if node.type == DT_REG else PLAIN
            break
    else:
        entry = (
            view.stack.index.entries(parent.record).get(name)
            if view.stack.index is not None and parent.record is not None
            else None
        )
        if entry is None:
            raise OSError(errno.EIO, "the new layers lack a file of the old ones", view.path(node))
        place = from_index.locate(view, parent, name, entry)
        if node.attr is not None and unpack(node.attr).nlink != entry.nlink:
            node.attr = from_index.attr_of(view, node, entry)
    if _same(before, place):
        node.data.rebase()
        return
    _close(view, node)
    node.where, node.data = place


def _same(one: tuple[Source | None, FileData], other: tuple[Source | None, FileData]) -> bool:
    """Whether two places of a file are one."""
    (a, data), (b, other_data) = one, other
    if a is None or b is None or a.layer is not b.layer or a.path() != b.path():
        return False
    return type(data) is type(other_data) and data.found_at() == other_data.found_at()


def _let_go(view: Core, dropped: set[Layer]) -> None:
    for layer in dropped:
        view.moves.forget(layer)
        if view.rows is not None:
            view.rows.forget(layer)
        layer.close()
    for workdir in [work for work in view.stack.retired if work.source.layer in dropped]:
        view.stack.retired.remove(workdir)
        workdir.close()
