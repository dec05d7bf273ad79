"""A lower tree that an index knows already: no layer is ever scanned.

A directory node of such a view has a ``record``; its lower names are the record's entries (code -1 in
``children``), with attributes and xattrs from there. Layers are opened only for data. An upper
directory merges with the record at its own path, or at the one that its ``redirect`` names.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.sys import xattr
from cowfs.union import merge
from cowfs.union.attr import ATTR, NS, encode_dev, unpack
from cowfs.union.filedata import Lower
from cowfs.union.layers import Layer, Source
from cowfs.union.node import DT_DIR, DT_REG, PLAIN, Dir, FileData, Node
from cowfs.union.options import TreeIndex
from cowfs.union.table import ROOT_ID

if TYPE_CHECKING:
    from cowfs.union.core import Core


def tree(view: Core) -> TreeIndex:
    """The view's index."""
    assert view.stack.index is not None
    return view.stack.index


def merged_dir(view: Core, queue: Sequence[Source], record: Any, name: bytes) -> tuple[list[Source], Any]:
    """The parts of the directory ``name``: (parts in scanned layers topmost first, entry or ``None``).

    ``queue`` holds the parent's parts in layers above the index, ``record`` its record. The rules are those of
    :func:`cowfs.union.merge.merged_dirs`, with the index as the lowest layer.
    """
    search = merge.Search(queue, name, view.form, scanned(view, view.stack.roots))
    found = merge.merged_by(search, view.form)
    entry = None if search.ended else _goes_on(view, search, record)[0]
    return found, entry if entry is not None and entry.type == DT_DIR else None


def _goes_on(view: Core, search: merge.Search, record: Any) -> tuple[Any, Any]:
    """(entry, the record that holds it) at which an unfinished search goes on in the index; (None, None) if there is none."""
    if search.from_root:
        record = tree(view).root()
    for part in search.parts[:-1]:
        entry = tree(view).entries(record).get(part) if record is not None else None
        record = entry.record if entry is not None else None
    return (None, None) if record is None else (tree(view).entries(record).get(search.parts[-1]), record)


def names(view: Core, directory: Dir, below: Sequence[Source]) -> dict[bytes, Node | int]:
    """The merged names of a directory's record and the scanned layers in ``below``, as codes."""
    merged: dict[bytes, Node | int] = dict.fromkeys(tree(view).entries(directory.record), -1)
    for source in reversed(scanned(view, below)):
        base = (len(directory.sources) - 1 - directory.sources.index(source)) << 4
        there, deleted, _ = merge.scan(source, view.form)
        for name in deleted:
            merged.pop(name, None)
        for name, kind in there.items():
            merged[name] = base | kind
    return merged


def scanned(view: Core, sources: Sequence[Source]) -> Sequence[Source]:
    """Those parts of a directory that are in layers above the index."""
    return [source for source in sources if source.layer.index >= view.stack.indexed_layers]


def metacopy_data(view: Core, parent: Dir, position: int, name: bytes, low: bytes) -> Lower | None:
    """The data of a regular file in a layer above the index if it is a metacopy, else ``None``."""
    at = parent.sources[position]
    if not view.form.redirects or xattr.try_get(at.open(), name, view.form.metacopy) is None:
        return None
    search = merge.Search(
        scanned(view, parent.sources[position + 1 :]), name, view.form, scanned(view, view.stack.roots)
    )
    low = merge.beneath(at, name, low, search, view.form)
    data = merge.data_by(search, low, view.form)
    if data is not None:
        return data
    entry, record = (None, None) if search.ended else _goes_on(view, search, parent.record)
    if entry is None or entry.type != DT_REG:
        raise OSError(errno.EIO, "metacopy without data", name)
    return _data_at(view, entry, path_of(entry, record, search.parts[-1]), low.lstrip(b"/"))


def path_of(entry: Any, record: Any, name: bytes) -> bytes:
    """The place of an entry in its layer."""
    if entry.path is not None:
        return bytes(entry.path)
    return bytes(record.path + b"/" + name) if record.path else name


def _data_at(view: Core, entry: Any, path: bytes, low: bytes) -> Lower:
    head, _, real = path.rpartition(b"/")
    where = source_at(view, view.stack.layers[entry.layer], head)
    st = os.stat(real, dir_fd=where.open(), follow_symlinks=False)
    return Lower(where, real, low, st.st_size, st.st_blocks)


def find_entry(view: Core, path: bytes) -> Any:
    """The entry of a path in the lower tree, or ``None``."""
    record, entry = tree(view).root(), None
    for part in path.split(b"/") if path else ():
        if record is None:
            return None
        entry = tree(view).entries(record).get(part)
        if entry is None:
            return None
        record = entry.record
    return entry


def entry_of(view: Core, node: Node) -> Any:
    """The entry of a node that only a lower layer has; ``None`` for any other."""
    if view.stack.index is None or node is view.root or view.in_upper(node):
        return None
    if isinstance(node, Dir):
        if node.record is None or node.sources[0].layer.index >= view.stack.indexed_layers:
            return None
        return find_entry(view, node.record.path)
    parent, where = node.parent, node.where
    if parent is None or parent.record is None or where is None or where.layer.index >= view.stack.indexed_layers:
        return None  # the last: of a layer frozen since, where the index may know an older file by this name
    return tree(view).entries(parent.record).get(node.name)


def ino_of(view: Core, entry: Any) -> int:
    """The inode number shown for an entry."""
    return view.inodes.shown(view.stack.layers[entry.layer].dev, entry.ino)


def source_at(view: Core, layer: Layer, path: bytes) -> Source:
    """The Source of a directory path in a layer, made without opening anything."""
    if not path:
        return layer.root
    missing = []
    found = view.stack.sources.get((layer.index, path))
    while found is None:
        missing.append(path)
        path = path.rpartition(b"/")[0]
        found = view.stack.sources.get((layer.index, path)) if path else layer.root
    for below in reversed(missing):
        name = below.rpartition(b"/")[2]
        if name in (b"", b".", b".."):  # an index may come from a stranger
            raise OSError(errno.EIO, "the index has a path that leads out", below)
        found = view.stack.sources[layer.index, below] = found.child(name)
    return found


def source_of(view: Core, directory: Dir) -> Source:
    """The place in the index of a directory of its tree."""
    path = directory.record.path
    if not path:
        return view.stack.layers[view.stack.indexed_layers - 1].root
    entry = find_entry(view, path)
    return source_at(view, view.stack.layers[entry.layer], entry.path if entry.path is not None else path)


def make(view: Core, parent: Dir, name: bytes) -> Node | None:
    """The node of an entry of ``parent``'s record."""
    entry = tree(view).entries(parent.record).get(name)
    if entry is None:
        return None
    layer = view.stack.layers[entry.layer]
    path = path_of(entry, parent.record, name)
    ino = ino_of(view, entry)
    if entry.type == DT_DIR:
        made = view.new_dir(parent, name, [source_at(view, layer, path)], ino)
        made.record = entry.record
        made.attr = attr_of(view, made, entry)
        return made
    if entry.nlink > 1:  # files of different layers may have had the same number: one then shows another, for good
        ino = view.table.linked.get(entry.file) or (
            ino if view.table.shown.setdefault(ino, entry.file) == entry.file else view.table.fresh_id()
        )
    first, ino = ino, view.table.reborn.get(ino, ino)
    existing = view.nodes.get(ino)
    if existing is not None or ino <= ROOT_ID or ino in view.table.burnt:
        if existing is not None and entry.nlink > 1 and _is_same(view, existing, layer, entry):
            if existing.parent is None:  # the known names are gone
                existing.name = name
                existing.where, data = locate(view, parent, name, entry)
                if not existing.data.stays:
                    existing.data = data
            view.bind(parent, name, existing)
            return existing
        ino = view.table.instead_of(ino, first)
    if entry.nlink > 1:
        view.table.linked[entry.file] = ino
    where, data = locate(view, parent, name, entry)
    node = Node(ino, entry.type, name, where)
    node.data = data
    data.bind(node)
    view.table.add(node)
    view.bind(parent, name, node)
    node.attr = attr_of(view, node, entry)
    return node


def locate(view: Core, parent: Dir, name: bytes, entry: Any) -> tuple[Source, FileData]:
    """The place of a file of ``parent``'s record, and its data."""
    path = path_of(entry, parent.record, name)
    head, _, real = path.rpartition(b"/")
    where, data = source_at(view, view.stack.layers[entry.layer], head), PLAIN
    if entry.type == DT_REG:
        if view.rows is not None and entry.layer:
            data = view.rows.find(where, real, PLAIN)
        if data is PLAIN and real != name:
            data = _data_at(view, entry, path, view.low_child(parent, name))
    return where, data


def _is_same(view: Core, node: Node, layer: Layer, entry: Any) -> bool:
    """Whether an entry with a node's number is that file: numbers of files of several layers may be equal."""
    if node.parent is not None:
        there = entry_of(view, node)
        return there is not None and there.nlink > 1 and bool(there.file == entry.file)
    if node.where is None or node.where.layer is not layer:
        return False
    if node.attr is None:
        return True
    a, b = unpack(node.attr), unpack(attr_of(view, node, entry))
    return (a.mode, a.uid, a.gid, a.size, a.mtime_ns) == (b.mode, b.uid, b.gid, b.size, b.mtime_ns)


def attr_of(view: Core, node: Node, entry: Any) -> bytes:
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
