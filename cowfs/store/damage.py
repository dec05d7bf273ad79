"""Damage by older versions of cowfs that only content shows; ``check --content`` looks for it.

*Whole layers.* Commit missed edits that keep size and modification time (its marks were believed in a copied store),
and gave exchanged names their old entries. Users see the layer, so it is compared with its records, byte by byte.

*Archives.* A layer that was edited in a copied store got the diff id of the archive that it once came from: the archive is made
again from the layer, and its digest compared.

*Links.* Squash broke links, or brought a name back: several files that changed in one layer then show one inode number.
A copy-up by the kernel's overlayfs does that, too, so it is reported, but is no damage. Only trees recorded before
2026-12 are examined.

*Marks.* A metacopy mark that the host did not remove was silently left: the written data is in the file, and every
mount since then shows the file beneath. Data that differs from the visible data was written so; that of an interrupted
copy equals it.

*Deletions.* A layer archive that deleted the target of one of its hard links, or everything by a mark at its root, left
it in place with overlay and row. The archive's deletions are compared with the tree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from cowfs._typed import TYPE_CHECKING, NamedTuple, ParamSpec
from cowfs.archive.names import Meaning, meaning
from cowfs.errors import Corrupt
from cowfs.index import compare, scan
from cowfs.index.database import Row
from cowfs.index.directory import EMPTY, Pair, Records, decode, differing, entries, join, lookup
from cowfs.store import layers
from cowfs.sys import files, xattr
from cowfs.sys.regular import open_regular

if TYPE_CHECKING:
    from cowfs.driver.interface import Driver
    from cowfs.format.whiteout import Form
    from cowfs.index.database import Index

P = ParamSpec("P")

__all__ = ["Whole", "compare_whole", "is_old", "not_deleted", "several_with_one_number", "unseen"]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1 << 20


def _or_not(same: Callable[P, bool]) -> Callable[P, bool]:
    """A comparison of data that is False if a file is gone."""

    def answer(*args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            return same(*args, **kwargs)
        except Corrupt:
            return False

    return answer


class Whole(NamedTuple):
    """The comparison of a whole layer with its records.

    Attributes:
        lines: the differences, a line each; neither other times nor a file with a digest of its own count.
        mendable: whether all of them came from the parent's records.
        scanned: the records as they should be.
    """

    lines: list[str]
    mendable: bool
    scanned: scan.Scanned


def compare_whole(driver: Driver, index: Index, row: Row, parent: Pair | None) -> Whole:
    """Compare a whole layer with its records, byte by byte. Missing files of other layers equal none."""
    assert row.root is not None
    known = layers.KeptDigests.load(driver, row.id)
    with driver.open_tree(row.id) as fd:
        same = _or_not(layers.Unchanged(driver, index, row.id, fd, believe=False))
        found = scan.scan_full(fd, num=row.num, form=driver.form, base=parent, records=index, same=same, known=known)
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
                    continue  # the parent's file is another one now
        words = ", ".join(sorted(change.what)) or change.kind
        lines.append(f"{os.fsdecode(change.path)!r} in layer {row.id} is not what is recorded of it ({words})")
    return Whole(lines, mendable, found)


def is_old(root: Pair) -> bool:
    """Whether a tree was recorded before records identified files with several names."""
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


def not_deleted(records: Records, root: Pair, names: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
    """Paths that a snapshot has although the archive of its layer deletes them (OCI image-spec layer.md, "Whiteouts").

    Args:
        names: makes an iterator over the canonical paths of the archive's members.
    """
    gone: set[bytes] = set()
    emptied: set[bytes] = set()
    for path in names():
        what, concerned = meaning(path)
        # in the tar of a whole tree these are ordinary names
        if what in (Meaning.WHITEOUT, Meaning.OPAQUE) and lookup(records, root, path) is None:
            (gone if what is Meaning.WHITEOUT else emptied).add(concerned)
    if not gone and not emptied:
        return
    own: set[bytes] = set()  # the archive's own objects, and the directories above
    for path in names():
        what, concerned = meaning(path)
        if what is not Meaning.SKIP:
            above = [*_above(concerned)] if what is Meaning.WHITEOUT else [concerned, *_above(concerned)]
            if not emptied.isdisjoint(above) or not gone.isdisjoint(above):
                own.update(above)
    pending = []
    for path in gone:
        pair = lookup(records, root, path)
        if pair is not None and path not in own:
            yield path
        elif pair is not None:
            pending.append((path, pair))
    pending += [(path, pair) for path in emptied if (pair := lookup(records, root, path)) is not None]
    while pending:
        path, pair = pending.pop()
        ref = decode(pair).ref
        for name, inner in entries(records, ref.storage).items() if ref is not None else ():
            here = join(path, name)
            if here in own:
                pending.append((here, inner))
            else:
                yield here


def _above(path: bytes) -> Iterator[bytes]:
    """The directories above a path, the root (b"") last."""
    while path:
        path = path.rpartition(b"/")[0]
        yield path


def unseen(trees: Sequence[str], form: Form) -> Iterator[bytes]:
    """Files of a layer with data under a metacopy mark that differs from the visible data.

    Args:
        trees: the layer and those beneath it, topmost first.
    """
    if not form.redirects:
        return
    root = os.open(trees[0], _DIR)
    try:
        pending = [b""]
        while pending:
            path = pending.pop()
            fd = files.open_beneath(root, path, _DIR)
            try:
                with os.scandir(fd) as found:
                    listed = [
                        (os.fsencode(e.name), e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False))
                        for e in found
                    ]
                for name, is_dir, is_file in listed:
                    here = join(path, name)
                    if is_dir:
                        pending.append(here)
                    elif (
                        is_file
                        and xattr.try_get(fd, name, form.metacopy) is not None
                        and xattr.try_get(fd, name, form.row) is None
                        and _is_unseen(fd, name, trees, here, form)
                    ):
                        yield here
            finally:
                os.close(fd)
    finally:
        os.close(root)


def _is_unseen(dirfd: int, name: bytes, trees: Sequence[str], path: bytes, form: Form) -> bool:
    fd = open_regular(name, dir_fd=dirfd)
    try:
        st = os.fstat(fd)
        ranges = files.data_ranges(fd, st.st_size) if st.st_blocks else []
        if not ranges:
            return False
        with layers.open_shown(trees, path, form.name) as shown:
            for start, end in ranges:
                for at in range(start, end, _PIECE):
                    own = os.pread(fd, min(_PIECE, end - at), at).rstrip(b"\0")  # a copy may end within a block
                    if own != shown.pread(len(own), at):
                        return True
    finally:
        os.close(fd)
    return False
