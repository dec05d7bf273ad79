"""The lifetime of nodes: their names, look-up counts, forgotten nodes.

The front end counts the ids it hands out. At zero a node is dropped and its names turn back into codes; only its
parent's id stays, so that a file handle made earlier (name_to_handle_at(2)) finds it again.
"""

from __future__ import annotations

import errno
import os

from cowfs._typed import TYPE_CHECKING
from cowfs.union import holding
from cowfs.union.inodes import SYNTHETIC
from cowfs.union.layers import Layer, Source
from cowfs.union.node import PLAIN, Dir, Node

if TYPE_CHECKING:
    from cowfs.union.core import Core


def bind(view: Core, parent: Dir, name: bytes, node: Node) -> None:
    """Make ``name`` name ``node``: its first name, or one more."""
    children = parent.children
    if children is None:
        children = view.load(parent)
    children[name] = node
    parent.live += 1
    if node.parent is None:
        node.parent = parent
    else:
        view.table.names.setdefault(node, []).append((parent, name))


def unbind(view: Core, parent: Dir, name: bytes, node: Node) -> bool:
    """Take a name away from a node. Returns whether it has another known name."""
    if parent.children is not None:
        parent.children.pop(name, None)
    parent.live -= 1
    others = view.table.names.get(node)
    if others is None:
        if node.parent is parent:
            node.parent = None
        return False
    if node.parent is parent and node.name == name:
        node.parent, node.name = others.pop(0)
        if node.where is not None:
            node.where = source_in(view, node.parent, node.where.layer)
    else:
        others.remove((parent, name))
    if not others:
        del view.table.names[node]
    return True


def source_in(view: Core, directory: Dir, layer: Layer) -> Source:
    """The part of a merged directory that is in ``layer``."""
    for source in directory.sources:
        if source.layer is layer:
            return source
    return view.source_at(layer, view.low_path(directory))


def names_of(view: Core, node: Node) -> list[tuple[Dir, bytes]]:
    """Every name of a node that is known, the first one first."""
    return view.table.names_of(node)


def upper_of(view: Core, directory: Dir) -> Source | None:
    """The directory's part in the upper layer, or ``None``."""
    sources = directory.sources
    return sources[0] if sources and sources[0].layer is view.stack.upper else None


def in_upper(view: Core, node: Node) -> bool:
    """Whether a node's inode is in the upper layer (or was, for an orphan)."""
    return node.where is None or node.where.layer is view.stack.upper


def path(view: Core, node: Node) -> bytes:
    """One merged path, without a leading slash."""
    parts = []
    here: Node | None = node
    while here is not None and here is not view.root:
        parts.append(here.name)
        here = here.parent
    return b"/".join(reversed(parts))


def low_path(view: Core, directory: Dir) -> bytes:
    """A directory's path in the merged lower tree (kernel: the base of ``redirect``)."""
    parts = []
    here = directory
    while here is not view.root:
        if here.lowpath is not None:
            parts.append(here.lowpath)
            break
        parts.append(here.name)
        here = here.parent or view.root
    return b"/".join(reversed(parts))


def low_child(view: Core, parent: Dir, name: bytes) -> bytes:
    """The path in the merged lower tree of a name in ``parent``."""
    head = view.low_path(parent)
    return head + b"/" + name if head else name


def forget(view: Core, id: int, count: int) -> None:
    """Count look-ups down; at zero the node goes, and its name becomes a code again."""
    node = view.nodes.get(id)
    if node is None:
        return
    node.nlookup -= count
    if node.nlookup <= 0:
        view.drop(node)


def drop(view: Core, node: Node) -> None:
    """Drop an unused node, and parents that were kept for it."""
    while node is not view.root and node.nlookup <= 0:
        if node.__class__ is Dir and node.live > 0:
            return
        if view.nodes.pop(node.id, None) is None:
            return
        table = view.table
        if node.data is not PLAIN:
            node.data.close()
        if node.fd >= 0:
            view.open_files.close(node)
        if node.__class__ is Dir:
            for source in node.sources:
                source.close()
            node.children = None
        parent = node.parent
        if parent is None:
            holding.unhold(view, node)
            if node in table.astray:
                table.astray.discard(node)
            else:
                _bury(view, node)
            return
        if node.id < SYNTHETIC:
            table.parents[node.id] = parent.id
        for directory, name in table.names.pop(node, ()):
            _fold(view, directory, name, node)
            if directory is not parent and directory.nlookup <= 0:
                view.drop(directory)
        _fold(view, parent, node.name, node)
        if node in view.moves.moved:
            view.moves.drop(node, view.stack.upper)
        node = parent


def _fold(view: Core, parent: Dir, name: bytes, node: Node) -> None:
    parent.live -= 1
    children = parent.children
    if children is None or children.get(name) is not node:
        return
    layer = node.where.layer if node.where is not None else None
    if node.__class__ is Dir:
        layer = node.sources[0].layer
    sources = parent.sources
    for position, source in enumerate(sources):
        if source.layer is layer and (layer.index >= view.stack.indexed_layers or parent.record is None):
            children[name] = (len(sources) - 1 - position) << 4 | node.type
            return
    if parent.record is not None:
        children[name] = -1
    else:  # its layer is not one of the parent's any more: read the directory again
        parent.children = None


def _bury(view: Core, node: Node) -> None:
    """Release the space and the number of an unlinked node that is no longer in use."""
    if view.space is not None and view.in_upper(node):
        view.space.release(node)
    view.table.parents.discard(node.id)
    if node.id < SYNTHETIC and not view.monotonic:
        view.table.spend(node)


def revive(view: Core, id: int) -> Node:
    """The node of a file handle, forgotten or not. Raises ESTALE."""
    way: dict[int, None] = {}
    node = view.nodes.get(id)
    while node is None:
        parent = view.table.parents.get(id)
        if parent is None or id in way:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        way[id] = None
        id = parent
        node = view.nodes.get(id)
    for wanted in reversed(way):
        node = _child_of_id(view, node, wanted)
    return node


def _child_of_id(view: Core, parent: Node, id: int) -> Node:
    """The node of a forgotten id in the directory that it was in. Raises ESTALE."""
    if isinstance(parent, Dir):
        children = parent.children
        if children is None:
            children = view.load(parent)
        for name in list(children):
            if view.entry(parent, name)[0] == id:
                found = view.child(parent, name)
                if found is not None and found.id == id:
                    return found
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
