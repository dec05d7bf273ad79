"""The differences of any two trees of the index, found without reading a file.

Strategy: go down both trees together and only where content digests (or, where there are hard links, records) differ;
within a directory only entries whose packed content halves differ are unpacked. The caller's ``same_data`` decides
about two files that agree in all fields of the index, but are different objects without a digest.

Hard links. The grouping of names into files is a part of a tree. A name that both trees have has changed (``links``) if
its file's set of names differs between them; added and deleted names have changes of their own. A pass over the
differing names compares such sets, only when a name with several links differs; if a file has further names that do not
differ, as after the rename of a directory, all names of the tree are read.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator

from cowfs._typed import Protocol
from cowfs.index.directory import EMPTY, Entry, Pair, Records, Ref, decode, differing, join, ref_of
from cowfs.model import TYPE_NAMES, Change

__all__ = ["File", "SameData", "changes_with_links", "compare", "differences", "different_attributes"]

SameData = Callable[[bytes, Entry, bytes, Entry], bool]
"""Whether two files hold the same bytes: (path in layer, entry) twice."""

File = tuple[int, int]
"""Which file a name with several links is (:attr:`cowfs.index.directory.Entry.file`)."""

Steps = Iterator[tuple[bytes, bytes, bytes, Pair | None, Pair | None]]


def compare(
    records: Records, old: Pair | None, new: Pair | None, same_data: SameData | None = None
) -> Iterator[Change]:
    """The differences of two trees given by their root entries, in path order.

    Args:
        records: the index.
        old, new: root entries; None is a tree with nothing in it.
        same_data: called with two files that agree in all else while a digest is missing; without it such files count
            as equal (by size, mtime and so on).

    Yields:
        One :class:`Change` a path. A deleted directory is one change; an added one is a change
        for itself and for everything in it. A directory that became something else is one
        change of type and no deletions below it.
    """
    return (change for change, _ in _compare(records, old, new, same_data))


def changes_with_links(
    records: Records, old: Pair | None, new: Pair | None, same_data: SameData | None = None
) -> list[tuple[Change, File | None]]:
    """As :func:`compare`, with every name of each changed file that has several names.

    So a changeset made of the result has the file under all its names. Names that did not change are changes with an
    empty ``what``.

    Returns:
        (change, the new file of the path if that has several names), in path order.
    """
    found: list[tuple[Change, File | None]] = []
    there: dict[bytes, File] = {}
    links: dict[File, int] = {}
    for change, entry in _compare(records, old, new, same_data):
        file = None
        if entry is not None and entry.nlink > 1:
            file = there[change.path] = entry.file
            links[file] = entry.nlink
        found.append((change, file))
    if not links:
        return found
    count = dict.fromkeys(links, 0)
    for file in there.values():
        count[file] += 1
    lacking = {file for file, known in count.items() if known < links[file]}
    if lacking and new is not None:
        for path, _, after in _files(records, None, new):
            entry = decode(after) if after is not None else None
            if entry is not None and entry.nlink > 1 and entry.file in lacking and path not in there:
                change = Change(
                    path=path, kind="changed", type=TYPE_NAMES[entry.type], size=_size(entry), what=frozenset()
                )
                found.append((change, entry.file))
        found.sort(key=lambda pair: pair[0].path.split(b"/") if pair[0].path else [])
    return found


def _compare(
    records: Records, old: Pair | None, new: Pair | None, same_data: SameData | None
) -> Iterator[tuple[Change, Entry | None]]:
    """Each change, and the new entry."""
    stack: list[Steps] = [iter([(b"", b"", b"", old, new)])]
    torn: set[bytes] | None = None
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
                yield Change(path=path, kind="deleted", type=TYPE_NAMES[a.type], size=_size(a)), None
            continue
        if a is None and not path:
            pass  # every tree has a root
        elif a is None:
            yield Change(path=path, kind="added", type=TYPE_NAMES[b.type], size=_size(b)), b
        else:
            what = differences(a, b, old_path, new_path, same_data)
            if a.nlink > 1 or b.nlink > 1:
                if torn is None:
                    torn = _torn(records, old, new)
                if path in torn:
                    what |= {"links"}
            if what:
                yield Change(path=path, kind="changed", type=TYPE_NAMES[b.type], size=_size(b), what=what), b
        if b.ref is None:
            continue
        a_ref = a.ref if a is not None else None
        if a_ref is not None and a_ref.shows(b.ref):
            continue
        old_base = old_path if a is None or a.base is None else a.base
        new_base = new_path if b.base is None else b.base
        stack.append(_below(records, path, old_base, new_base, a_ref, b.ref))


def _torn(records: Records, old: Pair | None, new: Pair | None) -> set[bytes]:
    """Names of both trees whose links to other names of both trees have changed."""
    sides: tuple[dict[bytes, object], dict[bytes, object]] = ({}, {})
    met: tuple[dict[object, int], dict[object, int]] = ({}, {})
    links: dict[object, int] = {}
    for path, before, after in _files(records, old, new):
        entries_ = [None if pair is None else decode(pair) for pair in (before, after)]
        if all(entry is None or entry.nlink <= 1 for entry in entries_):
            continue
        for entry, side, seen in zip(entries_, sides, met, strict=True):
            if entry is not None:
                file: object = entry.file if entry.nlink > 1 else path
                seen[file] = seen.get(file, 0) + 1
                links[file] = max(entry.nlink, links.get(file, 1))
                if None not in entries_:
                    side[path] = file
    common = sides[0].keys() & sides[1].keys()
    moved = {file for path in common if sides[0][path] != sides[1][path] for file in (sides[0][path], sides[1][path])}
    if any(seen[file] < links[file] for seen in met for file in seen.keys() & moved):
        everywhere = [
            _linked_names(records, root, moved) for root in (old, new)
        ]  # the file has names that do not differ
        both = everywhere[0].keys() | sides[0].keys(), everywhere[1].keys() | sides[1].keys()
        for names, side in zip(everywhere, sides, strict=True):
            for path, file in names.items():
                if path in both[0] and path in both[1]:
                    side.setdefault(path, file)
    fellows = [_sets(side) for side in sides]
    return {path for path in common if fellows[0][sides[0][path]] != fellows[1][sides[1][path]]}


def _sets(side: dict[bytes, object]) -> dict[object, set[bytes]]:
    found: dict[object, set[bytes]] = {}
    for path, file in side.items():
        found.setdefault(file, set()).add(path)
    return found


def _linked_names(records: Records, root: Pair | None, files: Iterable[object]) -> dict[bytes, object]:
    """Path -> file for all names of some files in a tree."""
    wanted = set(files)
    found: dict[bytes, object] = {}
    for path, _, pair in _files(records, None, root):
        entry = decode(pair) if pair is not None else None
        if entry is not None and entry.nlink > 1 and entry.file in wanted:
            found[path] = entry.file
    return found


def _files(records: Records, old: Pair | None, new: Pair | None) -> Iterator[tuple[bytes, Pair | None, Pair | None]]:
    """(path, before, after) of the differing names that are no directories on either side; None for a directory too."""
    pending = [(b"", _ref(old), _ref(new))]
    while pending:
        path, a, b = pending.pop()
        for name, before, after in differing(records, a, b or EMPTY):
            here, inner = join(path, name), (_ref(before), _ref(after))
            if inner != (None, None) and not (inner[0] and inner[1] and inner[0].shows(inner[1])):
                pending.append((here, *inner))
            if (before is not None and inner[0] is None) or (after is not None and inner[1] is None):
                yield here, None if inner[0] else before, None if inner[1] else after


def _ref(pair: Pair | None) -> Ref | None:
    return ref_of(pair) if pair is not None else None


def _below(records: Records, path: bytes, old_base: bytes, new_base: bytes, old: Ref | None, new: Ref) -> Steps:
    for name, before, after in differing(records, old, new):
        yield join(path, name), join(old_base, name), join(new_base, name), before, after


class Attributes(Protocol):
    """The attributes that :func:`different_attributes` compares: ``mode`` with its type, times in nanoseconds."""

    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...


def different_attributes(a: Attributes, b: Attributes) -> set[str]:
    """The words of a change (``Change.what``) for the attributes of two objects: type, mode, owner, mtime."""
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
