"""A lower tree that an index knows already: no layer is ever scanned.

A directory node of such a view has a ``record``; its lower names are the record's entries (code -1 in
``children``), with attributes and xattrs from there. Layers are opened only for data. An upper
directory merges with the record at its own path, or at the one that its ``redirect`` names.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cowfs.sys import xattr
from cowfs.union import lower
from cowfs.union.attr import ATTR, NS, encode_dev
from cowfs.union.holding import ROOT_ID
from cowfs.union.lower import Data
from cowfs.union.node import DT_DIR, DT_REG, Dir, Node
from cowfs.union.source import Layer, Source

if TYPE_CHECKING:
    from cowfs.union.view import View


def under(view: View, parent: Dir, name: bytes, top: Source) -> Any:
    """The entry that an upper directory merges with, or ``None``."""
    assert view.index is not None
    fd = top.open()
    if xattr.try_get(fd, b"", view.form.opaque) == b"y":
        return None
    redirect = lower.redirect_of(fd, b"", view.form)
    if redirect is not None and redirect.startswith(b"/"):
        found = find_entry(view, redirect[1:])
    elif parent.record is None:
        return None
    else:
        found = view.index.entries(parent.record).get(redirect or name)
    return found if found is not None and found.type == DT_DIR else None


def find_entry(view: View, path: bytes) -> Any:
    """The entry of a path in the lower tree, or ``None``."""
    assert view.index is not None
    record, entry = view.index.root(), None
    for part in path.split(b"/"):
        if record is None:
            return None
        entry = view.index.entries(record).get(part)
        if entry is None:
            return None
        record = entry.record
    return entry


def entry_of(view: View, node: Node) -> Any:
    """The entry of a node that only a lower layer has; ``None`` for any other."""
    if view.index is None or node is view.root or view.in_upper(node):
        return None
    if isinstance(node, Dir):
        return find_entry(view, view.low_path(node)) if node.record is not None else None
    parent = node.parent
    if parent is None or parent.record is None:
        return None
    return view.index.entries(parent.record).get(node.name)


def ino_of(view: View, entry: Any) -> int:
    """The inode number shown for an entry."""
    return view.inodes.shown(view.layers[entry.layer].dev, entry.ino)


def source_at(view: View, layer: Layer, path: bytes) -> Source:
    """The Source of a directory path in a layer, made without opening anything."""
    if not path:
        return layer.root
    key = (layer.index, path)
    found = view.sources.get(key)
    if found is None:
        head, _, name = path.rpartition(b"/")
        found = view.sources[key] = source_at(view, layer, head).child(name)
    return found


def make(view: View, parent: Dir, name: bytes) -> Node | None:
    """The node of an entry of ``parent``'s record."""
    assert view.index is not None
    entry = view.index.entries(parent.record).get(name)
    if entry is None:
        return None
    layer = view.layers[entry.layer]
    low = view.low_child(parent, name)
    path = entry.path if entry.path is not None else low
    ino = ino_of(view, entry)
    if entry.type == DT_DIR:
        made = view.new_dir(parent, name, [source_at(view, layer, path)], ino)
        made.record = entry.record
        made.attr = attr_of(view, made, entry)
        return made
    existing = view.nodes.get(ino)
    if existing is not None or ino <= ROOT_ID:
        if existing is not None and entry.nlink > 1 and existing.where is not None and existing.where.layer is layer:
            view.bind(parent, name, existing)
            return existing
        ino = view.fresh_id()
    head, _, real = path.rpartition(b"/")
    where = source_at(view, layer, head)
    node = Node(ino, entry.type, name, where)
    if entry.type == DT_REG and (real != name or (entry.layer and view.options.row)):
        node.data = _elsewhere(view, where, real, low, entry)
    view.nodes[ino] = node
    view.bind(parent, name, node)
    node.attr = attr_of(view, node, entry)
    return node


def _elsewhere(view: View, where: Source, real: bytes, low: bytes, entry: Any) -> Any:
    """The data of a file that its layer keeps under another name (or as a redirect file)."""
    if view.options.row and entry.layer:
        from cowfs.union import content

        return content.open_row_at(view, where, real, low)
    st = os.stat(real, dir_fd=where.open(), follow_symlinks=False)
    return Data(where, real, low, st)


def attr_of(view: View, node: Node, entry: Any) -> bytes:
    """The packed attributes of an entry."""
    mode, uid, gid = entry.mode, entry.uid, entry.gid
    if view.owners is not None:
        mode, uid, gid = view.owners.show_ids(mode, uid, gid)
    seconds, rest = divmod(entry.mtime_ns, NS)
    return ATTR.pack(
        node.id, entry.size, entry.blocks, seconds, seconds, seconds, rest, rest, rest,
        mode, 1 if entry.type == DT_DIR else entry.nlink, uid, gid,
        encode_dev(entry.rdev) if entry.rdev else 0, 4096, 0,
    )  # fmt: skip
