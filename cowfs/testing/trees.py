"""Comparison of two trees in all that a user sees, except access times and the sizes and link counts of directories.

Compared: names, types, modes, owners, mtime to the nanosecond, xattrs, devices, link targets,
sizes and link counts of all but directories, content, and which names are one file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import NamedTuple

__all__ = ["Seen", "differences", "tree_of"]


class Seen(NamedTuple):
    """One name of a tree; ``content`` is a file's digest or a link's target, ``twin`` the first name of the same file."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    nlink: int
    rdev: int
    content: str
    twin: str
    xattrs: tuple[tuple[str, bytes], ...]


def tree_of(top: str | os.PathLike[str], *, times: bool = True) -> dict[str, Seen]:
    """Read a tree: path relative to ``top`` ("." is the top itself) -> the object there.

    Args:
        top: a directory; no link is followed.
        times: compare modification times, too.
    """
    found: dict[str, Seen] = {}
    twins: dict[tuple[int, int], str] = {}
    todo = ["."]
    while todo:
        path = todo.pop()
        full = os.path.join(top, path)
        st = os.lstat(full)
        is_dir = stat.S_ISDIR(st.st_mode)
        if is_dir:
            below = sorted(os.listdir(full), reverse=True)
            todo += [name if path == "." else f"{path}/{name}" for name in below]
        content, twin = "", ""
        if stat.S_ISREG(st.st_mode):
            with open(full, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(st.st_mode):
            content = os.readlink(full)
        if not is_dir and st.st_nlink > 1:
            twin = twins.setdefault((st.st_dev, st.st_ino), path)
        xattrs = tuple(sorted((name, os.getxattr(full, name, follow_symlinks=False)) for name in _listed(full)))
        found[path] = Seen(
            st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns if times else 0, 0 if is_dir else st.st_size,
            0 if is_dir else st.st_nlink, st.st_rdev if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode) else 0,
            content, twin, xattrs,
        )  # fmt: skip
    return found


def _listed(path: str) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError:
        return []


def differences(one: dict[str, Seen], other: dict[str, Seen]) -> list[str]:
    """The differences of two trees (``one`` and ``other``, by :func:`tree_of`), one line each; empty when they are equal."""
    lines = [f"only in the first: {path}" for path in sorted(one.keys() - other.keys())]
    lines += [f"only in the second: {path}" for path in sorted(other.keys() - one.keys())]
    for path in sorted(one.keys() & other.keys()):
        if one[path] != other[path]:
            a, b = one[path]._asdict(), other[path]._asdict()
            what = ", ".join(f"{field} {a[field]!r} != {b[field]!r}" for field in a if a[field] != b[field])
            lines.append(f"{path}: {what}")
    return lines
