"""Listing a directory, with cookies to go on later.

There is no open directory anywhere: a listing goes on from a *cookie*, and creates and removes in between must neither
skip nor repeat other names. So a name's cookie is a hash of the name, and names come in the order of their cookies. The
order is kept only while a listing is under way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.sys import xattr
from cowfs.union import from_index
from cowfs.union.layers import lstat
from cowfs.union.node import DT_DIR, Dir

if TYPE_CHECKING:
    from cowfs.union.core import Core

_FIRST_COOKIE = 3  # 1 and 2 are "." and ".."
_COOKIES = (1 << 63) - 1 - _FIRST_COOKIE


def cookie_of(name: bytes) -> int:
    """A name's place in listings."""
    return hash(name) % _COOKIES + _FIRST_COOKIE


def listing(view: Core, directory: Dir, cookie: int = 0) -> Iterator[tuple[bytes, int]]:
    """(name, cookie) of the entries after ``cookie``; 0 starts, with ``.`` and ``..`` first.

    A listing that goes on after creates and removes neither skips nor repeats other names:
    the cookie is a hash of the name, and names come in its order.
    """
    if cookie < 1:
        yield b".", 1
    if cookie < 2:
        yield b"..", 2
    children = directory.children
    if children is None:
        children = view.load(directory)
        view.table.parents.reserve(len(view.nodes) + len(children))
    order = directory.order
    if order is None:
        order = directory.order = sorted(children, key=cookie_of)
    start = 0 if cookie < _FIRST_COOKIE else bisect_right(order, cookie, key=cookie_of)
    for position in range(start, len(order)):
        name = order[position]
        if name in children:
            yield name, cookie_of(name)
    directory.order = None


def entry(view: Core, directory: Dir, name: bytes) -> tuple[int, int]:
    """(inode number, DT_*) of a listed name, without making a node."""
    if name in (b".", b".."):
        node: Any = directory if name == b"." else view.parent(directory)
        return (view.root_ino if node is view.root else node.id), DT_DIR
    item = directory.children.get(name) if directory.children is not None else None
    if item is None:
        return 0, 0
    if item.__class__ is not int:
        return item.id, item.type  # type: ignore[union-attr]
    if item < 0:
        entry = view.stack.index.entries(directory.record)[name]  # type: ignore[union-attr]
        known = view.table.linked.get(entry.file) if entry.nlink > 1 else None
        return known or from_index.ino_of(view, entry), entry.type
    if item & 15 == DT_DIR:
        made = view.child(directory, name)
        return (made.id, DT_DIR) if made is not None else (0, 0)
    source = directory.sources[-1 - (item >> 4)]
    st = lstat(source, name)
    if st is None:
        return 0, 0
    ino = view.inodes.shown(st.st_dev, st.st_ino)
    if source.layer is view.stack.upper and source.impure:
        origin = xattr.try_get(source.open(), name, view.form.origin)
        ino = view.inodes.from_origin(origin or b"") or ino
    return ino, item & 15
