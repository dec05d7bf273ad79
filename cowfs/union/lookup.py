"""Look-up: from a name to its node.

A directory's names are read from its layers once and kept as codes (see :mod:`cowfs.union.node`); a code turns into
a node, with one lstat and at most two xattr reads, when that name is looked up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import xattr
from cowfs.union import dotwh, from_index, holding, merge
from cowfs.union.attr import pack, with_size
from cowfs.union.inodes import Beneath
from cowfs.union.layers import Layer, Source
from cowfs.union.node import DT_DIR, PLAIN, Dir, FileData, Node, type_of
from cowfs.union.table import ROOT_ID

if TYPE_CHECKING:
    from cowfs.union.core import Core


def node(view: Core, id: int) -> Node:
    """The live node of an id. Raises ESTALE."""
    try:
        return view.nodes[id]
    except KeyError:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None


def directory(view: Core, id: int) -> Dir:
    """The live directory of an id, at the start of an operation. Raises ESTALE, ENOTDIR."""
    node = view.node(id)
    if not isinstance(node, Dir):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), node.name)
    if len(view.descriptors.opened) > view.descriptors.budget:
        view.descriptors.trim()
    return node


def lookup(view: Core, parent: Dir, name: bytes) -> Node:
    """The node of a name. Raises ENOENT, ENOTDIR, ENAMETOOLONG."""
    node = view.child(parent, name)
    if node is None:
        if len(name) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return node


def child(view: Core, parent: Dir, name: bytes) -> Node | None:
    """The node of a name, or ``None``."""
    children = parent.children
    if children is None:
        children = view.load(parent)
    item = children.get(name)
    if item.__class__ is int:
        if len(view.descriptors.opened) > view.descriptors.budget:
            view.descriptors.trim()
        return _make(view, parent, name, item)
    return item  # type: ignore[return-value]


def parent(view: Core, node: Dir) -> Dir:
    """A directory's parent; the root's is the root."""
    return node.parent or view.root


def load(view: Core, directory: Dir) -> dict[bytes, Node | int]:
    """Read a directory's names from its layers, once."""
    if directory.__class__ is not Dir:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory.name)
    sources = directory.sources
    upper = view.upper_of(directory)
    below = sources[1:] if upper is not None else sources
    merged: dict[bytes, Node | int]
    if directory.record is not None:
        merged = from_index.names(view, directory, below)
    else:
        merged = merge.merge(below, view.form)
    if upper is not None:
        names, deleted, _ = merge.scan(upper, view.form)
        if view.form.dotwh and not view.readonly:
            dotwh.own_whiteouts(view, upper, names, deleted)
        upper.whiteouts = deleted
        merges = bool(below) or directory.record is not None
        upper.impure = merges or bool(xattr.try_get(upper.open(), b"", view.form.impure))
        upper.shadow = set()
        if merged:
            upper.shadow = merged.keys() & names.keys()
            for name in deleted:
                merged.pop(name, None)
        base = (len(sources) - 1) << 4
        for name, kind in names.items():
            merged[name] = base | kind
    view.work.read_directory()
    directory.children = merged
    return merged


def _make(view: Core, parent: Dir, name: bytes, code: int) -> Node | None:
    """Turn a code into a node."""
    if code < 0:
        return from_index.make(view, parent, name)
    sources = parent.sources
    position = len(sources) - 1 - (code >> 4)
    source = sources[position]
    fd = source.fd if source.fd >= 0 else source.open()
    try:
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:  # a layer was changed outside of the view
        parent.children.pop(name, None)  # type: ignore[union-attr]
        return None
    mode = st.st_mode
    if mode & 0o170000 == 0o040000:
        return _make_dir(view, parent, name, position)
    is_upper = source.layer is view.stack.upper
    ino = view.inodes.shown(st.st_dev, st.st_ino)
    data = PLAIN
    if mode & 0o170000 == 0o100000:
        data = data_of(view, parent, position, name, st)
    if source.impure if is_upper else _keeps_origin(view, source.layer):
        origin = xattr.try_get(fd, name, view.form.origin)
        if origin:
            # paths differ by name, but a file with several names shows the same number under all of them
            beneath = _beneath(view, parent, position + 1, name) if st.st_nlink == 1 else ()
            ino = view.inodes.from_origin(origin, beneath) or ino
    node = bind_inode(view, parent, name, source, st, ino)
    if node.attr is None:
        if data is not node.data:  # both are PLAIN, as a rule
            if not node.data.stays:
                node.data = data
            data.bind(node)
        view.pack_into(node, st, source, name)
    return node


def data_of(view: Core, parent: Dir, position: int, name: bytes, st: os.stat_result) -> FileData:
    """The data of the regular file ``name`` in one of ``parent``'s parts."""
    source, data = parent.sources[position], PLAIN
    if merge.may_be_metacopy(source.layer, st.st_size, st.st_blocks):
        low = view.low_child(parent, name)
        if view.stack.index is not None:
            found = from_index.metacopy_data(view, parent, position, name, low)
        else:
            found = merge.metacopy_data(parent.sources[position + 1 :], source, name, low, view.form, view.stack.roots)
        if found is not None:
            data = found
    return view.rows.find(source, name, data) if view.rows is not None and source.layer.index else data


def pack_into(view: Core, node: Node, st: os.stat_result, source: Source, name: bytes) -> None:
    """Set a node's attributes from a fresh stat result."""
    if view.owners is None:
        attr = pack(st, node.id, st.st_mode, st.st_uid, st.st_gid)
    else:
        attr = pack(st, node.id, *view.owners.show(st, source.open(), name))
    if node.data is not PLAIN:
        attr = with_size(attr, *node.data.shown(st))
    node.attr = attr


def bind_inode(view: Core, parent: Dir, name: bytes, source: Source, st: os.stat_result, ino: int) -> Node:
    """The node of inode number ``ino``, new or, for one more hard link, the existing one."""
    table = view.table
    first, ino = ino, table.reborn.get(ino, ino)
    real = (st.st_dev, st.st_ino)
    free = True
    if st.st_nlink > 1:
        ino = table.displaced.get(real, ino)
        free = source.layer is not view.stack.upper or view.inodes.claim(ino, *real)
    existing = table.nodes.get(ino)
    if existing is not None or ino <= ROOT_ID or ino in table.burnt or not free:
        nameless = existing is not None and existing.parent is None
        if existing is not None and (nameless or st.st_nlink > 1) and _same(existing, source, st):
            if nameless:  # its other names were unknown until now
                table.astray.discard(existing)
                holding.unhold(view, existing)
                existing.where, existing.name, existing.attr = source, name, None
                if existing.fd >= 0:
                    view.open_files.add(existing)
            view.bind(parent, name, existing)
            view.attr(existing)
            return existing
        burnt, ino = ino in table.burnt, table.instead_of(ino, first)
        if not burnt and st.st_nlink > 1:
            table.displaced[real] = ino
    node = Node(ino, type_of(st.st_mode), name, source)
    table.add(node)
    view.bind(parent, name, node)
    return node


def _same(node: Node, source: Source, st: os.stat_result) -> bool:
    """Whether a node is the inode that ``st`` describes."""
    if node.__class__ is not Node:
        return False
    if node.where is None:
        there = os.fstat(node.fd)
    elif node.where.layer is not source.layer:
        return False
    else:
        try:
            there = os.stat(node.name, dir_fd=node.where.open(), follow_symlinks=False)
        except FileNotFoundError:
            return False
    return (there.st_dev, there.st_ino) == (st.st_dev, st.st_ino)


def _beneath(view: Core, parent: Dir, start: int, name: bytes) -> Iterator[Beneath]:
    """The possible places in lower layers of the source of a copy, by its path."""
    origin = view.form.origin
    for source in parent.sources[start:]:
        fd = source.open()
        try:
            yield fd, name, xattr.try_get(fd, name, origin), None
        except FileNotFoundError:
            continue
    if view.stack.index is not None and parent.record is not None:
        entry = from_index.tree(view).entries(parent.record).get(name)
        if entry is not None and entry.type != DT_DIR:
            path = from_index.path_of(entry, parent.record, name)
            head, _, real = path.rpartition(b"/")
            fd = from_index.source_at(view, view.stack.layers[entry.layer], head).open()
            yield fd, real, xattr.try_get(fd, real, origin), from_index.ino_of(view, entry)


def _keeps_origin(view: Core, layer: Layer) -> bool:
    """Whether a layer was this mount's, or is a store's: files copied into it keep their former numbers."""
    return layer.index >= (view.stack.indexed_layers if view.stack.index is not None else view.stack.plain_layers)


def _make_dir(view: Core, parent: Dir, name: bytes, position: int) -> Dir | None:
    queue: Sequence[Source] = parent.sources[position:]
    entry = None
    if view.stack.index is not None:
        found, entry = from_index.merged_dir(view, from_index.scanned(view, queue), parent.record, name)
    else:
        found = merge.merged_dirs(queue, name, view.form, view.stack.roots)
    if not found:
        return None
    top = found[0]
    is_upper = top.layer is view.stack.upper
    if entry is not None:
        ino = from_index.ino_of(view, entry)
    else:
        kept = _keeps_origin(view, found[-1].layer)
        anchor = found[-1] if kept else found[1] if is_upper and len(found) > 1 else top
        st = os.fstat(anchor.open())
        ino = view.inodes.shown(st.st_dev, st.st_ino)
        if kept and (anchor.layer is not view.stack.upper or parent.sources[position].impure):
            origin = xattr.try_get(anchor.open(), b"", view.form.origin)
            if origin:
                ino = view.inodes.from_origin(origin) or ino
    node = view.new_dir(parent, name, found, ino)
    if entry is not None:
        node.record = entry.record
    if is_upper and (len(found) > 1 or entry is not None):
        redirect = merge.redirect_of(top.open(), b"", view.form)
        if redirect:
            node.lowpath = redirect[1:] if redirect.startswith(b"/") else view.low_child(parent, redirect)
            view.moves.moved[node] = None
    return node


def new_dir(view: Core, parent: Dir, name: bytes, sources: list[Source], ino: int) -> Dir:
    """A bound directory node."""
    first, ino = ino, view.table.reborn.get(ino, ino)
    if not view.table.free(ino):
        ino = view.table.instead_of(ino, first)
    node = Dir(ino, name, sources)
    view.table.add(node)
    view.bind(parent, name, node)
    return node
