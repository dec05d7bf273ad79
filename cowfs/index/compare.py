"""What differs between any two trees of the index, without looking at a file.

Strategy: go down both trees together and only where content digests differ; within a directory
only entries whose packed content halves differ are unpacked. Two files that agree in all the
index knows, but are different objects without a digest, are put to the caller's ``same_data``.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from typing import Protocol

from cowfs.index.directory import Entry, Pair, Records, Ref, decode, differing, join
from cowfs.model import TYPE_NAMES, Change

__all__ = ["SameData", "compare", "differences", "different_attributes"]

SameData = Callable[[bytes, Entry, bytes, Entry], bool]
"""Whether two files hold the same bytes: (path in layer, entry) twice."""


def compare(
    records: Records, old: Pair | None, new: Pair | None, same_data: SameData | None = None
) -> Iterator[Change]:
    """What differs between two trees given by their root entries, in path order.

    Args:
        records: the index.
        old, new: root entries; None is a tree with nothing in it.
        same_data: asked about two files that agree in all else while a digest is missing;
            without it they count as equal (size, mtime and the rest decide).

    Yields:
        One :class:`Change` a path. A deleted directory is one change; an added one is a change
        for itself and for everything in it. A directory that became something else is one
        change of type and no deletions below it.
    """
    stack: list[Iterator[tuple[bytes, bytes, bytes, Pair | None, Pair | None]]] = [iter([(b"", b"", b"", old, new)])]
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
            continue
        path, old_path, new_path, before, after = step
        a = decode(before) if before is not None else None
        b = decode(after) if after is not None else None
        if b is None:
            if a is not None:
                yield Change(path=path, kind="deleted", type=TYPE_NAMES[a.type], size=_size(a))
            continue
        if a is None and not path:
            pass  # every tree has a root
        elif a is None:
            yield Change(path=path, kind="added", type=TYPE_NAMES[b.type], size=_size(b))
        else:
            what = differences(a, b, old_path, new_path, same_data)
            if what:
                yield Change(path=path, kind="changed", type=TYPE_NAMES[b.type], size=_size(b), what=what)
        if b.ref is None:
            continue
        a_ref = a.ref if a is not None else None
        if a_ref is not None and a_ref.content == b.ref.content:
            continue
        old_base = old_path if a is None or a.base is None else a.base
        new_base = new_path if b.base is None else b.base
        stack.append(_below(records, path, old_base, new_base, a_ref, b.ref))


def _below(
    records: Records, path: bytes, old_base: bytes, new_base: bytes, old: Ref | None, new: Ref
) -> Iterator[tuple[bytes, bytes, bytes, Pair | None, Pair | None]]:
    for name, before, after in differing(records, old, new):
        yield join(path, name), join(old_base, name), join(new_base, name), before, after


class Attributes(Protocol):
    """What :func:`different_attributes` looks at: ``mode`` with its type, times in nanoseconds."""

    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


def different_attributes(a: Attributes, b: Attributes) -> set[str]:
    """Which of a change's words (``Change.what``) two objects' attributes give: type, mode, owner, mtime."""
    pairs = {
        "type": (stat.S_IFMT(a.mode), stat.S_IFMT(b.mode)),
        "mode": (a.mode & 0o7777, b.mode & 0o7777),
        "owner": ((a.uid, a.gid), (b.uid, b.gid)),
        "mtime": (a.mtime_ns, b.mtime_ns),
    }
    return {word for word, (before, after) in pairs.items() if before != after}


def _size(entry: Entry) -> int:
    return entry.size if entry.type == stat.S_IFREG else 0


def differences(a: Entry, b: Entry, a_path: bytes, b_path: bytes, same_data: SameData | None = None) -> frozenset[str]:
    """The ``what`` of a change from one entry to another; empty when users see no difference."""
    what = different_attributes(a, b)
    if a.xattrs != b.xattrs:
        what.add("xattrs")
    if a.type == b.type and not _same_content(a, b, a_path, b_path, same_data):
        what.add("content")
    return frozenset(what)


def _same_content(a: Entry, b: Entry, a_path: bytes, b_path: bytes, same_data: SameData | None) -> bool:
    if a.type != stat.S_IFREG:
        return (a.target, a.rdev) == (b.target, b.rdev)
    if a.size != b.size:
        return False
    if a.digest is not None and b.digest is not None:
        return a.digest == b.digest
    if (a.layer, a.ino) == (b.layer, b.ino) or not a.size:
        return True
    if a.mtime_ns != b.mtime_ns:
        return False
    return same_data is None or same_data(a.path or a_path, a, b.path or b_path, b)
