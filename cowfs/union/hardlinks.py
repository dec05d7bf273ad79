"""The names of a lower inode.

The kernel's overlayfs breaks hard links on copy-up: one name gets the copy, the others keep the
old file. cowfs does not: the copy gets all names. Those that were never looked up are found by one scan
of the layer that holds the inode, kept as inode -> paths for inodes with more than one. A lower tree that an index knows
is read there instead: its inodes may have their names in one layer and their data in another.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import xattr
from cowfs.union import from_index, lifetime
from cowfs.union.attr import nlink_of
from cowfs.union.layers import Descriptors, Layer, Source
from cowfs.union.moves import Groups
from cowfs.union.node import DT_DIR, Dir, Node

if TYPE_CHECKING:
    from cowfs.union.core import Core

_HELD = 64  # descriptors that a scan holds at most


@contextmanager
def _apart(layer: Layer) -> Iterator[Source]:
    """The layer's root for a scan with descriptors of its own.

    A scan runs in the middle of an operation, which may hold Sources: those must stay open, and a large layer has more
    of them than a process may have descriptors.
    """
    descriptors = Descriptors(_HELD)
    root = Source(layer, None, b"", descriptors)
    root.fd = layer.root.fd
    try:
        yield root
    finally:
        descriptors.close_all()


def scan_groups(layer: Layer) -> Groups:
    """inode -> its paths in a layer, for inodes with more than one link."""
    groups: Groups = {}
    with _apart(layer) as root:
        pending: list[tuple[Source, bytes]] = [(root, b"")]
        while pending:
            source, prefix = pending.pop()
            fd = source.open()
            with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((source.child(entry.name), prefix + entry.name + b"/"))
                        continue
                    st = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
                    if st.st_nlink > 1 and not (stat.S_ISCHR(st.st_mode) and st.st_rdev == 0):
                        groups.setdefault(st.st_ino, []).append(prefix + entry.name)
            source.descriptors.trim()
    return groups


def _indexed_groups(view: Core) -> Groups:
    """File -> its paths in the tree that the index knows, for files with more than one link."""
    index, kept = from_index.tree(view), view.moves.groups
    groups = kept.get(index)
    if groups is None:
        groups = kept[index] = {}
        pending = [(index.root(), b"")]
        while pending:
            record, prefix = pending.pop()
            for name, entry in index.entries(record).items():
                if entry.type == DT_DIR:
                    pending.append((entry.record, prefix + name + b"/"))
                elif entry.nlink > 1:
                    groups.setdefault(entry.file, []).append(prefix + name)
    return groups


def complete(view: Core, node: Node) -> bool:
    """Look up every name of a lower inode. Returns whether it has more than one."""
    where = node.where
    if where is None or where.layer is view.stack.upper or node.parent is None:
        return node in view.table.names
    entry = from_index.entry_of(view, node)
    if entry is not None:
        layer, paths = view.stack.layers[view.stack.indexed_layers - 1], []
        if entry.nlink > 1:
            paths = _indexed_groups(view).get(entry.file, [])
    else:
        layer, paths = where.layer, []
        if nlink_of(view.attr(node)) > 1:
            st = os.stat(node.name, dir_fd=where.open(), follow_symlinks=False)
            groups = view.moves.groups.get(layer)
            if groups is None:
                groups = view.moves.groups[layer] = scan_groups(layer)
            paths = groups.get(st.st_ino, [])
    for path in paths:
        for shown in merged_paths(view, layer, path):
            _walk(view, shown)
    return node in view.table.names


def find_place(view: Core, node: Node) -> None:
    """Look up the file of a node by its present first name, in its layer."""
    parent, where = node.parent, node.where
    if parent is None or where is None:
        return
    if view.stack.index is not None and where.layer.index < view.stack.indexed_layers and parent.record is not None:
        entry = from_index.tree(view).entries(parent.record).get(node.name)
        if entry is not None:
            node.where, data = from_index.locate(view, parent, node.name, entry)
            if not node.data.stays:
                node.data = data
            return
    node.where = lifetime.source_in(view, parent, where.layer)


def merged_paths(view: Core, layer: Layer, path: bytes) -> list[bytes]:
    """The place of a layer's path in the merged tree, after the moved directories of the layers above."""
    paths = [path]
    for above in view.stack.layers[layer.index + 1 :]:
        moves = view.moves.redirects.get(above)
        if above is view.stack.upper:
            if moves is None:
                find_moved(view)
            there = [directory for directory in view.moves.moved if directory.parent is not None]
            moves = [(directory.lowpath, view.path(directory)) for directory in there if directory.lowpath]
        elif moves is None:
            moves = view.moves.redirects[above] = scan_redirects(view, above)
        paths = [now for before in paths for now in _after(before, moves)]
    return paths


def _after(path: bytes, moves: list[tuple[bytes, bytes]]) -> list[bytes]:
    """A path after a layer's moves: the deepest directory above it that was moved takes it along."""
    deepest = max((len(low) for low, _ in moves if path.startswith(low + b"/")), default=0)
    return [now + path[deepest:] for low, now in moves if len(low) == deepest and path.startswith(low + b"/")] or [path]


def _walk(view: Core, path: bytes) -> None:
    """Look up a path, as far as it exists, which gives its node all names on the way."""
    here: Node | None = view.root
    for part in path.split(b"/"):
        if not isinstance(here, Dir):
            return
        here = view.child(here, part)


def scan_redirects(view: Core, layer: Layer) -> list[tuple[bytes, bytes]]:
    """The directories of a layer that renames moved: (path beneath, path in this layer)."""
    found: list[tuple[bytes, bytes]] = []
    if not view.form.redirects:
        return found
    with _apart(layer) as root:
        pending: list[tuple[Source, bytes, bytes]] = [(root, b"", b"")]
        while pending:
            source, prefix, beneath = pending.pop()
            fd = source.open()
            with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            for name in names:
                redirect = xattr.try_get(fd, name, view.form.redirect)
                if redirect:
                    low = redirect[1:] if redirect.startswith(b"/") else beneath + redirect
                    found.append((low, prefix + name))
                else:
                    low = beneath + name
                pending.append((source.child(name), prefix + name + b"/", low + b"/"))
            source.descriptors.trim()
    return found


def find_moved(view: Core) -> None:
    """Look up every directory of the upper layer that a rename moved before this view was made."""
    assert view.stack.upper is not None
    view.moves.redirects[view.stack.upper] = []  # from now on ``view.moves.moved`` has them all
    for _, path in scan_redirects(view, view.stack.upper):
        _walk(view, path)
