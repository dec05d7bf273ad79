"""The merging of layers into one tree: which directories merge, which names hide others.

Rules (kernel Documentation/filesystems/overlayfs.rst):

1. A name is looked up from the topmost layer down. A whiteout ends the search; a file ends it;
   a directory goes on, until it is *opaque* in one of its layers.
2. A directory with ``redirect`` continues under that name in the layers beneath: one component is
   a sibling, a leading slash starts at the root of the layers.
3. A regular file with ``metacopy`` has only attributes; its data is the first regular file
   beneath that has some, found by the same rules.

This module only reads.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from cowfs.format import whiteout
from cowfs.format.whiteout import Form
from cowfs.sys import xattr
from cowfs.union.filedata import Lower
from cowfs.union.layers import WALK, Layer, Source, lstat
from cowfs.union.node import DT_CHR, DT_DIR, DT_LNK, DT_REG, Node, type_of


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


class Search:
    """A search for a name in one layer after the other, topmost first; iterate for (directory, name there, lstat of it).

    The caller passes a redirect found there to :meth:`turn`, which changes the path in the layers beneath. An
    absolute one is walked down from the root of each layer by itself, as the kernel does (fs/overlayfs/namei.c,
    ovl_lookup_layer): a layer without the path has no part in it, a whiteout or a file on the way ends the search, an
    opaque directory on the way ends it behind that layer unless an absolute redirect follows it there
    (ovl_check_redirect), and a redirect on the way changes the path for the layers beneath. So a look-up takes no more
    steps than layers times components, whatever the layers say.

    Args:
        queue: directories of the layers, topmost first, in which the name is looked up.
        name: the name; where ``queue`` holds roots, a path.
        roots: the layers' roots, topmost first.

    Attributes:
        parts: the path in the layers beneath: a name, or a path beneath their roots (``from_root``).
        ended: whether no lower layer has a part in it.
    """

    __slots__ = ("_form", "_position", "_queue", "_roots", "ended", "from_root", "parts")

    def __init__(self, queue: Sequence[Source], name: bytes, form: Form, roots: Sequence[Source]) -> None:
        self._queue, self._form, self._roots = queue, form, roots
        self._position = 0
        self.parts = name.split(b"/") if b"/" in name else [name]
        self.from_root = False
        self.ended = False

    def __iter__(self) -> Search:
        return self

    def __next__(self) -> tuple[Source, bytes, os.stat_result]:
        queue, form = self._queue, self._form
        while not self.ended and self._position < len(queue):
            source = queue[self._position]
            self._position += 1
            parts = self.parts
            name = parts[-1]
            place: Source | None = source
            if len(parts) > 1:
                place = self._walk(source)
                if place is None:
                    continue
            assert place is not None
            st = lstat(place, name)
            if form.dotwh and whiteout.hidden_by_dotwh(place.open(), name, form):
                self.ended = True
            if st is not None:
                return place, name, st
        raise StopIteration

    def turn(self, redirect: bytes, index: int) -> None:
        """Go on beneath layer ``index`` by a redirect found there."""
        if not redirect.startswith(b"/"):
            self.parts[-1] = redirect
            return
        self.parts, self.from_root = redirect[1:].split(b"/"), True
        self.ended = False  # an opaque directory on the way does not hide the target of an absolute redirect
        self._queue, self._position = [root for root in self._roots if root.layer.index < index], 0

    def _walk(self, root: Source) -> Source | None:
        """The directory of one layer that holds the last part; None when the layer has none.

        No descriptor but the last one is kept: a path may be long.
        """
        form, parts = self._form, self.parts
        beneath: list[bytes] = []  # what the parts so far are in the layers beneath
        here, fd = root, root.open()
        try:
            for number, part in enumerate(parts[:-1]):
                beneath.append(part)
                ends = whiteout.hidden_by_dotwh(fd, part, form)
                try:
                    deeper = os.open(part, WALK, dir_fd=fd)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    self.ended = self.ended or ends or error.errno != errno.ENOENT
                    self.parts = beneath + parts[number + 1 :]
                    return None
                if fd != root.fd:
                    os.close(fd)
                here, fd = here.child(part), deeper
                if root.layer.index == 0:
                    continue  # there is no layer beneath
                opaque = whiteout.opaque_value(fd, form) == b"y"
                self.ended = self.ended or ends or opaque
                redirect = None if opaque else redirect_of(fd, b"", form)
                if redirect is not None and redirect.startswith(b"/"):
                    beneath, self.ended = redirect[1:].split(b"/"), False
                elif redirect is not None:
                    beneath[-1] = redirect
            self.parts = [*beneath, parts[-1]]
            here.adopt(fd)
            fd = root.fd
            return here
        finally:
            if fd != root.fd:
                os.close(fd)


def merged_dirs(queue: Sequence[Source], name: bytes, form: Form, roots: Sequence[Source]) -> list[Source]:
    """All layer directories that merge into ``name`` looked up in ``queue`` (topmost first).

    ``roots`` are the layers' roots, topmost first, where absolute redirects start. Empty when the
    name is not a directory.
    """
    return merged_by(Search(queue, name, form, roots), form)


def merged_by(search: Search, form: Form) -> list[Source]:
    """The directories that a search finds; afterwards it holds its continuation beneath the last layer."""
    found: list[Source] = []
    for source, name, st in search:
        if not stat.S_ISDIR(st.st_mode):
            search.ended = True
            break
        child = source.child(name)
        found.append(child)
        if source.layer.index == 0:
            break
        fd = child.open()
        value = whiteout.opaque_value(fd, form)
        if value == b"y":
            search.ended = True
            break
        if value == b"x":
            source.layer.xwhiteouts = True
        redirect = redirect_of(fd, b"", form)
        if redirect is not None and (redirect.startswith(b"/") or not search.ended):
            search.turn(redirect, source.layer.index)
    return found


def may_be_metacopy(layer: Layer, size: int, blocks: int) -> bool:
    """Whether a regular file has to be checked for a metacopy: in the lowest layer, only one that is all hole."""
    return size > 0 and (layer.index > 0 or not blocks)


def is_metacopy(at: Source, name: bytes, form: Form) -> bool:
    """Whether a regular file of a layer has its data further down.

    In the lowest layer there is no data further down; still such a file must not read as zeros. Callers check only
    files without any block (:func:`may_be_metacopy`), so that ordinary files cost nothing.
    """
    if not form.redirects:
        return False
    return xattr.try_get(at.fd if at.fd >= 0 else at.open(), name, form.metacopy) is not None


def metacopy_data(
    queue: Sequence[Source],
    at: Source,
    name: bytes,
    path: bytes,
    form: Form,
    roots: Sequence[Source],
) -> Lower | None:
    """The data of a regular file ``name`` in ``at`` if it is a metacopy, else ``None``.

    ``queue`` holds the parent's sources below ``at``; ``path`` is the name's path in the merged
    lower tree. The path of the data is the one in the tree right beneath ``at``, which is the value of a redirect in
    that layer, even if the data is several layers further down. A metacopy without data beneath is EIO, as in the
    kernel.
    """
    if not is_metacopy(at, name, form):
        return None
    search = Search(queue, name, form, roots)
    found = data_by(search, beneath(at, name, path, search, form), form)
    if found is None:
        raise OSError(errno.EIO, "metacopy without data", name)
    return found


def data_by(search: Search, path: bytes, form: Form) -> Lower | None:
    """The data at ``path`` that a search finds; ``None`` when no layer of it has any.

    Afterwards the search holds its continuation. Raises EIO if another object is in the data's place.
    """
    for source, name, st in search:
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EIO, "metacopy without data", name)
        if not may_be_metacopy(source.layer, 1, st.st_blocks) or not is_metacopy(source, name, form):
            return Lower(source, name, path, st.st_size, st.st_blocks)
        beneath(source, name, path, search, form)
    return None


def beneath(at: Source, name: bytes, path: bytes, search: Search, form: Form) -> bytes:
    """Turn a search by the redirect of the metacopy at ``path``; returns the path of the data right beneath ``at``."""
    redirect = redirect_of(at.open(), name, form)
    if redirect is None:
        return path
    search.turn(redirect, at.layer.index)
    return redirect[1:] if redirect.startswith(b"/") else _sibling(path, redirect)


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
