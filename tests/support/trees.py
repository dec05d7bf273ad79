"""The model of a tree: everything that two trees must agree on.

``snapshot`` reads a directory tree through plain system calls into one record a name;
``differences`` tells in words where two of them differ. Compared, as semantics.md says: names,
types, modes, owners, mtime to the nanosecond, xattrs, device numbers, link targets, sizes and
link counts of everything but directories, content, and which names are one file. Not compared:
atime, directory sizes and link counts, inode numbers. Change times on request.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import xattr

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One name of a tree. Times in ns; ``content`` a digest, or a link's target."""

    type: str
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    nlink: int
    mtime: int
    ctime: int
    xattrs: tuple[tuple[str, bytes], ...]
    content: str
    same_as: str


Tree = dict[str, Entry]


def _content(path: str, type_: str) -> str:
    if type_ == "symlink":
        return os.readlink(path)
    if type_ != "file":
        return ""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    attributes = xattr.xattr(path, xattr.XATTR_NOFOLLOW)  # not the calls that cowfs itself makes
    try:
        names = attributes.list()
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # zfs-fuse has none
            raise
        return ()
    return tuple(sorted((name, attributes.get(name)) for name in names))


def entry(path: str, same_as: str = "", *, xattrs: bool = True) -> Entry:
    """The record of one name (never follows a symbolic link)."""
    status = os.lstat(path)
    type_ = TYPES[stat.S_IFMT(status.st_mode)]
    directory = type_ == "dir"
    return Entry(
        type=type_,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        rdev=status.st_rdev if type_ in ("char", "block") else 0,
        size=0 if directory else status.st_size,
        nlink=0 if directory else status.st_nlink,
        mtime=status.st_mtime_ns,
        ctime=status.st_ctime_ns,
        xattrs=_xattrs(path) if xattrs else (),
        content=_content(path, type_),
        same_as=same_as,
    )


def snapshot(root: str | os.PathLike[str], *, skip: Iterable[str] = (), xattrs: bool = True) -> Tree:
    """Every name below ``root`` ('' is the root itself) with its record; ``skip`` are relative paths."""
    top = os.fspath(root)
    left_out = set(skip)
    tree: Tree = {"": entry(top, xattrs=xattrs)}
    first: dict[tuple[int, int], str] = {}
    pending = [""]
    while pending:
        at = pending.pop()
        names = sorted(os.listdir(os.path.join(top, at)))
        if len(set(names)) != len(names):
            raise AssertionError(f"{at or '/'}: the listing names an entry twice: {names}")
        for name in names:
            path = f"{at}/{name}" if at else name
            if path in left_out:
                continue
            full = os.path.join(top, path)
            status = os.lstat(full)
            same = ""
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            elif status.st_nlink > 1:
                same = first.setdefault((status.st_dev, status.st_ino), path)
            tree[path] = entry(full, same, xattrs=xattrs)
    return _canonical_links(tree)


def _canonical_links(tree: Tree) -> Tree:
    """Name each group of hard links in the tree by its smallest path, whatever the walk's order was."""
    groups: dict[str, list[str]] = {}
    for path, record in tree.items():
        if record.same_as:
            groups.setdefault(record.same_as, []).append(path)
    for members in groups.values():
        head = min(members) if len(members) > 1 else ""
        for path in members:
            tree[path] = replace(tree[path], same_as=head)
    return tree


def differences(
    left: Tree, right: Tree, *, ignore: Iterable[str] = ("ctime",), names: tuple[str, str] = ("left", "right")
) -> list[str]:
    """One line a difference, sorted by path; ``ignore`` are field names of ``Entry``."""
    ignored = set(ignore)
    compared = [field.name for field in fields(Entry) if field.name not in ignored]
    out = []
    for path in sorted(left.keys() | right.keys()):
        one, two = left.get(path), right.get(path)
        if one is None or two is None:
            out.append(f"{path or '/'}: only in {names[0] if two is None else names[1]}: {one or two}")
            continue
        for field in compared:
            if getattr(one, field) != getattr(two, field):
                out.append(
                    f"{path or '/'}: {field}: {names[0]} {_show(field, getattr(one, field))}, "
                    f"{names[1]} {_show(field, getattr(two, field))}"
                )
    return out


_FORMATS: dict[str, Callable[[int], str]] = {"mode": oct}


def _show(field: str, value: object) -> str:
    return _FORMATS[field](value) if field in _FORMATS and isinstance(value, int) else repr(value)


def assert_same(
    left: Tree, right: Tree, *, ignore: Iterable[str] = ("ctime",), names: tuple[str, str] = ("left", "right")
) -> None:
    """Fail with every difference listed (at most 40 lines)."""
    found = differences(left, right, ignore=ignore, names=names)
    assert not found, f"{len(found)} differences between {names[0]} and {names[1]}:\n  " + "\n  ".join(found[:40])
