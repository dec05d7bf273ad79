"""How layers become one tree: which directories merge, which names hide which.

Rules (kernel Documentation/filesystems/overlayfs.rst):

1. A name is looked up from the topmost layer down. A whiteout ends the search; a file ends it;
   a directory goes on, until one of its layers says *opaque*.
2. A directory with ``redirect`` continues under that name in the layers beneath: one component is
   a sibling, a leading slash starts at the root of the layers.
3. A regular file with ``metacopy`` has only attributes; its data is the first regular file
   beneath that has some, found by the same rules.

Everything here only reads.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from cowfs.format import whiteout
from cowfs.format.whiteout import Form
from cowfs.sys import xattr
from cowfs.union.layers import Source, lstat
from cowfs.union.node import DT_CHR, DT_DIR, DT_LNK, DT_REG, Node, type_of


class Data:
    """Where a metacopy's data is.

    Attributes:
        where, name: a regular file of a lower layer.
        path: its path in the merged lower tree (what ``redirect`` would say), no leading slash.
        size: bytes.
        blocks: st_blocks, 512-byte units.
    """

    __slots__ = ("blocks", "name", "path", "size", "where")

    def __init__(self, where: Source, name: bytes, path: bytes, size: int, blocks: int) -> None:
        self.where = where
        self.name = name
        self.path = path
        self.size = size
        self.blocks = blocks

    def at(self, path: bytes) -> Data:
        """The same data, found by another path of the merged lower tree."""
        return Data(self.where, self.name, path, self.size, self.blocks)


def redirect_of(fd: int, name: bytes, form: Form) -> bytes | None:
    """The checked value of ``redirect``: a single component, or absolute."""
    if not form.redirects:
        return None
    value = xattr.try_get(fd, name, form.redirect)
    if not value:
        return None
    parts = value[1:].split(b"/") if value.startswith(b"/") else [value]
    if any(part in (b"", b".", b"..") or b"/" in part for part in parts):
        raise OSError(errno.EIO, f"bad redirect {value!r}", name)
    return value


def merged_dirs(queue: Sequence[Source], name: bytes, form: Form, roots: Sequence[Source]) -> list[Source]:
    """All layer directories that merge into ``name`` looked up in ``queue`` (topmost first).

    ``roots`` are the layers' roots, topmost first, where absolute redirects start. Empty when the
    name is not a directory.
    """
    found: list[Source] = []
    position = 0
    while position < len(queue):
        source = queue[position]
        position += 1
        st = lstat(source, name)
        if st is None:
            if whiteout.hidden_by_dotwh(source.open(), name, form):
                break
            continue
        if not stat.S_ISDIR(st.st_mode):
            break
        child = source.child(name)
        found.append(child)
        if source.layer.index == 0 or whiteout.hidden_by_dotwh(source.open(), name, form):
            break
        fd = child.open()
        value = whiteout.opaque_value(fd, form)
        if value == b"y":
            break
        if value == b"x":
            source.layer.xwhiteouts = True
        redirect = redirect_of(fd, b"", form)
        if redirect is not None:
            queue, name = _follow(queue[position:], redirect, source.layer.index, form, roots)
            position = 0
    return found


def _follow(
    rest: Sequence[Source], redirect: bytes, index: int, form: Form, roots: Sequence[Source]
) -> tuple[Sequence[Source], bytes]:
    """Where the search goes on after a redirect met in layer ``index``."""
    if not redirect.startswith(b"/"):
        return rest, redirect
    parts = redirect[1:].split(b"/")
    below: Sequence[Source] = [root for root in roots if root.layer.index < index]
    for part in parts[:-1]:
        below = merged_dirs(below, part, form, roots)
        if below:
            below[0].descriptors.trim()  # a long way: who looks something up opens its directories again
    return below, parts[-1]


def metacopy_data(
    queue: Sequence[Source],
    at: Source,
    name: bytes,
    path: bytes,
    form: Form,
    roots: Sequence[Source],
) -> Data | None:
    """The data of a regular file ``name`` in ``at`` if it is a metacopy, else ``None``.

    ``queue`` holds the parent's sources below ``at``; ``path`` is the name's path in the merged
    lower tree. The path of the data is the one in the tree right beneath ``at``, which is what a redirect in
    that layer says, however many layers further down it goes on. A metacopy without data beneath is EIO, as in the kernel.
    """
    if not form.redirects or at.layer.index == 0:
        return None
    fd = at.fd if at.fd >= 0 else at.open()
    top = at
    if xattr.try_get(fd, name, form.metacopy) is None:
        return None
    while True:
        redirect = redirect_of(fd, name, form)
        if redirect is not None:
            queue, name = _follow(queue, redirect, at.layer.index, form, roots)
            if at is top:
                path = redirect[1:] if redirect.startswith(b"/") else _sibling(path, redirect)
        for number, source in enumerate(queue):
            st = lstat(source, name)
            if st is None:
                continue
            if not stat.S_ISREG(st.st_mode):
                raise OSError(errno.EIO, "metacopy without data", name)
            fd, at = source.open(), source
            if source.layer.index and xattr.try_get(fd, name, form.metacopy) is not None:
                queue = queue[number + 1 :]
                break
            return Data(source, name, path, st.st_size, st.st_blocks)
        else:
            raise OSError(errno.EIO, "metacopy without data", name)


def _sibling(path: bytes, name: bytes) -> bytes:
    head, slash, _ = path.rpartition(b"/")
    return head + slash + name


def scan(source: Source, form: Form) -> tuple[dict[bytes, int], set[bytes], bool]:
    """Read one layer directory: (name -> DT_*, names it deletes beneath, opaque by ``.wh..wh..opq``)."""
    fd = source.fd if source.fd >= 0 else source.open()
    names: dict[bytes, int] = {}
    deleted: set[bytes] = set()
    opaque = False
    look_for_xattr = source.layer.xwhiteouts and whiteout.opaque_value(fd, form) == b"x"
    with os.scandir(b"/proc/self/fd/%d" % fd) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_file(follow_symlinks=False):
                kind = DT_REG
                if look_for_xattr and whiteout.has_whiteout_xattr(fd, name, form):
                    deleted.add(name)
                    continue
            elif entry.is_dir(follow_symlinks=False):
                kind = DT_DIR
            elif entry.is_symlink():
                kind = DT_LNK
            else:
                st = entry.stat(follow_symlinks=False)
                kind = type_of(st.st_mode)
                if kind == DT_CHR and st.st_rdev == 0:
                    deleted.add(name)
                    continue
            if form.dotwh and name.startswith(whiteout.WH_PREFIX):
                target = whiteout.wh_target(name)
                if target:
                    deleted.add(target)
                opaque = opaque or name == whiteout.WH_OPAQUE
                continue
            names[name] = kind
    return names, deleted, opaque


def merge(sources: Sequence[Source], form: Form) -> dict[bytes, Node | int]:
    """Merge read-only directories into name -> code; ``sources`` topmost first."""
    if len(sources) == 1:
        return {**scan(sources[0], form)[0]}
    merged: dict[bytes, Node | int] = {}
    for position, source in enumerate(reversed(sources)):
        names, deleted, opaque = scan(source, form)
        if opaque:
            merged.clear()
        for name in deleted:
            merged.pop(name, None)
        base = position << 4
        for name, kind in names.items():
            merged[name] = base | kind
    return merged
