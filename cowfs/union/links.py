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
    from cowfs.union.copyup import physical

    source, real = physical(view, node, where)
    st = os.stat(real, dir_fd=source.open(), follow_symlinks=False)
    if st.st_nlink < 2:
        return False
    layer = source.layer
    groups = view.groups.get(layer)
    if groups is None:
        groups = view.groups[layer] = scan_groups(layer)
    for path in groups.get(st.st_ino, ()):
        for candidate in _merged_paths(view, layer, path):
            if _walk(view, candidate) is node:
                break
    return node in view.names


def _merged_paths(view: View, layer: Layer, path: bytes) -> list[bytes]:
    """Where a path of a layer may show in the merged tree: directories above it may have been moved."""
    paths = [path]
    for above in view.layers[layer.index + 1 :]:
        if above is view.upper and above not in view.redirects:
            find_moved(view)
        moves = view.redirects.get(above)
        if moves is None:
            moves = view.redirects[above] = scan_redirects(view, above)
        for low, now in moves:
            paths += [now + p[len(low) :] for p in paths if p.startswith(low + b"/")]
    for directory in view.moved:
        was = directory.lowpath
        if was is not None and directory.parent is not None:
            paths += [view.path(directory) + p[len(was) :] for p in paths if p.startswith(was + b"/")]
    return paths[::-1]


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


def scan_redirects(view: View, layer: Layer) -> list[tuple[bytes, bytes]]:
    """The directories of a layer that renames moved: (path beneath, path in this layer)."""
    found: list[tuple[bytes, bytes]] = []
    if not view.form.redirects:
        return found
    pending: list[tuple[Source, bytes]] = [(layer.root, b"")]
    while pending:
        source, prefix = pending.pop()
        fd = source.open()
        with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in names:
            redirect = xattr.try_get(fd, name, view.form.redirect)
            if redirect:
                low = redirect[1:] if redirect.startswith(b"/") else prefix + redirect
                found.append((low, prefix + name))
            pending.append((source.child(name), prefix + name + b"/"))
        if source is not layer.root:
            source.close()
    return found


def find_moved(view: View) -> None:
    """Look up every directory of the upper layer that a rename moved before this view was made."""
    assert view.upper is not None
    view.redirects[view.upper] = []  # from now on ``view.moved`` has them all
    for _, path in scan_redirects(view, view.upper):
        _walk(view, path)
