"""Layers in the form of aufs and of archives: names that begin with ``.wh.`` stand for deletions.

Rules (aufs manual, "Whiteout"; OCI image-spec, layer.md):

* ``.wh.NAME``, an empty file, hides NAME of the layers beneath. Beside a NAME of the same layer it hides what that
  would merge with.
* ``.wh..wh..opq`` in a directory hides all that the layers beneath have there.
* Other names that begin with ``.wh..wh.`` are aufs's own, at a branch's root: ``.wh..wh.aufs``, ``.wh..wh.plnk/``,
  ``.wh..wh.orph/``. They are no part of the tree.

A mount writes overlayfs's marks, since it must hide a name in one step; :func:`keep_by_names`
turns them into names in a layer that nobody writes any more. A name of more than 251 bytes has no such name, and keeps
its whiteout.
"""

from __future__ import annotations

import os
import stat

from cowfs.format import whiteout
from cowfs.format.whiteout import WH_META_PREFIX, WH_OPAQUE, WH_PREFIX, Form
from cowfs.sys import files, xattr

__all__ = ["OWN", "keep_by_names"]

OWN = frozenset({b".wh..wh.aufs", b".wh..wh.plnk", b".wh..wh.orph"})
"""The entries that aufs itself makes at the root of a branch."""

_MODE = 0o444
_NAME_MAX = 255
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def keep_by_names(root: int, form: Form) -> int:
    """Turn overlayfs's whiteouts and marks of opaque directories below ``root`` into names. May be repeated, also after a kill.

    Directories keep their times.

    Returns:
        The number of whiteouts and marks.

    Raises:
        OSError: of the host.
    """
    count = 0
    pending = [b""]
    while pending:
        path = pending.pop()
        fd = files.open_beneath(root, path, _DIR)
        try:
            below, deleted = _look(fd, form)
            opaque = xattr.try_get(fd, b"", form.opaque)
            if deleted or opaque:
                count += _convert(fd, form, deleted, opaque)
        finally:
            os.close(fd)
        pending += [path + b"/" + name if path else name for name in below]
    return count


def _look(fd: int, form: Form) -> tuple[list[bytes], list[bytes]]:
    """(names of directories, names that are whiteouts)."""
    below, deleted = [], []
    nested = xattr.try_get(fd, b"", form.opaque) == b"x"
    with os.scandir(fd) as listing:
        for entry in listing:
            name = os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                below.append(name)
            elif entry.is_file(follow_symlinks=False):
                if nested and whiteout.has_whiteout_xattr(fd, name, form):
                    deleted.append(name)
            elif not entry.is_symlink():
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if whiteout.is_whiteout(st):
                    deleted.append(name)
    return below, deleted


def _convert(fd: int, form: Form, deleted: list[bytes], opaque: bytes | None) -> int:
    st = os.fstat(fd)
    count = 0
    for name in deleted:
        if len(WH_PREFIX + name) <= _NAME_MAX and not name.startswith(WH_META_PREFIX[len(WH_PREFIX) :]):
            _make(fd, WH_PREFIX + name)
            os.unlink(name, dir_fd=fd)
            count += 1
    if opaque == b"y":
        _make(fd, WH_OPAQUE)
        count += 1
    if opaque == b"y" or (opaque == b"x" and count == len(deleted)):
        xattr.drop(fd, b"", form.opaque)
    os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
    return count


def _make(fd: int, name: bytes) -> None:
    try:
        made = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE, dir_fd=fd)
    except FileExistsError:  # of a conversion that was killed
        if not stat.S_ISREG(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            raise
        return
    os.close(made)
