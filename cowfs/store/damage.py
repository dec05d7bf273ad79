"""Damage that older versions of cowfs left in stores, and that only content shows: what ``check --content`` looks for.

*Whole layers.* Commit took an edit that keeps size and modification time for none (its marks were believed in a copied store),
and gave names that were exchanged the old entries. The layer is what users see: compared with its records, byte by byte.

*Archives.* A layer that was edited in a copied store got the diff id of the archive that it once came from: the archive is made
again from the layer, and its digest compared.

*Links.* Squash broke links, or brought a name back: several files that changed in one layer then show one inode number. A
copy-up by the kernel's overlayfs does that, too, so it is told, and is no damage. Only trees recorded before 2026-12 are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

from cowfs.errors import Corrupt
from cowfs.index import compare, scan
from cowfs.index.database import Row
from cowfs.index.directory import EMPTY, Pair, Records, decode, differing, join, lookup
from cowfs.store import layers

if TYPE_CHECKING:
    from cowfs.driver.interface import Driver
    from cowfs.index.database import Index

P = ParamSpec("P")

__all__ = ["Whole", "compare_whole", "is_old", "several_with_one_number"]


def _or_not(same: Callable[P, bool]) -> Callable[P, bool]:
    """The same question, answered no where a file is gone."""

    def answer(*args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            return same(*args, **kwargs)
        except Corrupt:
            return False

    return answer


class Whole(NamedTuple):
    """A whole layer beside its records.

    Attributes:
        lines: what differs, a line each; other times are no difference, nor is a file that has a digest of its own.
        mendable: whether all of that is what the records took from the parent.
        scanned: the records as they should be.
    """

    lines: list[str]
    mendable: bool
    scanned: scan.Scanned


def compare_whole(driver: Driver, index: Index, row: Row, parent: Pair | None) -> Whole:
    """Compare a whole layer with its records, byte by byte. Files of other layers that are gone equal nothing."""
    assert row.root is not None
    known = layers.KeptDigests.load(driver, row.id)
    fd = os.open(driver.tree(row.id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        same = _or_not(layers.Unchanged(driver, index, row.id, fd, believe=False))
        found = scan.scan_full(fd, num=row.num, form=driver.form, base=parent, records=index, same=same, known=known)
    finally:
        os.close(fd)
    lines, mendable = [], True
    data = layers.SameData(driver, index)
    for change in compare.compare(found.pending, row.root, found.root, _or_not(data)):
        if change.what == {"mtime"}:
            continue
        pair = lookup(index, row.root, change.path)
        entry = decode(pair) if pair is not None else None
        if entry is not None and entry.layer == row.num and change.what != {"links"}:
            if entry.digest is not None:
                continue
            mendable = False
        elif entry is not None and entry.digest is not None and change.what <= {"content", "mtime"}:
            with data.open(row.num, change.path) as file:
                if layers.file_digest(file) == entry.digest:
                    continue  # it is the parent's file that is another one now
        words = ", ".join(sorted(change.what)) or change.kind
        lines.append(f"{os.fsdecode(change.path)!r} in layer {row.id} is not what is recorded of it ({words})")
    return Whole(lines, mendable, found)


def is_old(root: Pair) -> bool:
    """Whether a tree was recorded before records knew which names are one file."""
    return not decode(root).flags & scan.KNOWS_LINKS


def several_with_one_number(records: Records, parent: Pair | None, root: Pair) -> Iterator[str]:
    """Files that differ from the parent's tree, show one inode number, and are several; a line for each number."""
    numbers: dict[int, dict[tuple[int, int], bytes]] = {}
    pending = [(b"", decode(parent).ref if parent is not None else None, decode(root).ref or EMPTY)]
    while pending:
        path, before, after = pending.pop()
        for name, was, pair in differing(records, before, after):
            if pair is None:
                continue
            entry, here = decode(pair), join(path, name)
            if entry.ref is not None:
                pending.append((here, decode(was).ref if was is not None else None, entry.ref))
            else:
                numbers.setdefault(entry.ino, {}).setdefault(entry.file, here)
    for names in numbers.values():
        if len(names) > 1:
            shown = " and ".join(repr(os.fsdecode(path)) for path in sorted(names.values()))
            yield (
                f"{shown} have one inode number and are several files: a link was broken, or a name that was deleted came"
                " back; only a new snapshot can link it again or remove it"
            )
