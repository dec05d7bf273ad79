"""Which names a lower inode has.

The kernel's overlayfs breaks hard links on copy-up: one name gets the copy, the others keep the
old file. cowfs does not: the copy gets all names. Those that were never looked up are found by one scan
of the layer that holds the inode, kept as inode -> paths for inodes with more than one.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from cowfs.sys import xattr
from cowfs.union.node import Dir, Node
from cowfs.union.source import Layer, Source

if TYPE_CHECKING:
    from cowfs.union.view import View

Groups = dict[int, list[bytes]]


def scan_groups(layer: Layer) -> Groups:
    """inode -> its paths in a layer, for inodes with more than one link."""
    groups: Groups = {}
    pending: list[tuple[Source, bytes]] = [(layer.root, b"")]
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
        if source is not layer.root:
            source.close()
    return groups


def complete(view: View, node: Node) -> bool:
    """Look up every name of a lower inode. Returns whether it has more than one."""
    where = node.where
    if where is None or where.layer is view.upper or node.parent is None:
        return node in view.names
    st = os.stat(node.name, dir_fd=where.open(), follow_symlinks=False)
    if st.st_nlink < 2:
        return False
    groups = view.groups.get(where.layer)
    if groups is None:
        groups = view.groups[where.layer] = scan_groups(where.layer)
        find_moved(view)
    for path in groups.get(st.st_ino, ()):
        for candidate in _merged_paths(view, path):
            found = _walk(view, candidate)
            if found is node:
                break
    return node in view.names


def _merged_paths(view: View, path: bytes) -> list[bytes]:
    """Where a path of the lower tree may show in the merged one: as it is, or moved."""
    found = []
    for directory in view.moved:
        low = directory.lowpath
        if low is not None and path.startswith(low + b"/") and directory.parent is not None:
            found.append(view.path(directory) + path[len(low) :])
    found.append(path)
    return found


def _walk(view: View, path: bytes) -> Node | None:
    here: Node = view.root
    for part in path.split(b"/"):
        if not isinstance(here, Dir):
            return None
        deeper = view.child(here, part)
        if deeper is None:
            return None
        here = deeper
    return here


def find_moved(view: View) -> None:
    """Look up every directory of the upper layer that a rename moved (it carries ``redirect``)."""
    upper = view.upper
    if upper is None or not view.form.redirects:
        return
    pending: list[tuple[Source, bytes]] = [(upper.root, b"")]
    while pending:
        source, prefix = pending.pop()
        fd = source.open()
        with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in names:
            if xattr.try_get(fd, name, view.form.redirect):
                _walk(view, prefix + name)
            pending.append((source.child(name), prefix + name + b"/"))
        if source is not upper.root:
            source.close()
