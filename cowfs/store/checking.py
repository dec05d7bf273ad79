"""Checking a store: garbage, damage, and repairs.

Rules:

1. Garbage are directories without a row, and records that no tree reaches. Only garbage is
   ever deleted.
2. Damage is reported at its place, with everything that depends on it; intact snapshots stay usable. Harmless
differences (a time stamp, an inode number after a restore) are not damage. 3. A repair removes garbage, rebuilds
   records from an intact layer if they come out the same, and puts other damaged snapshots in quarantine: the row has
   the reason, and verbs refuse them. A later repair that finds the layer restored lets it out again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from cowfs import archive
from cowfs._typed import TYPE_CHECKING
from cowfs.errors import Corrupt, CowfsError
from cowfs.index.database import Row
from cowfs.index.directory import Entry, Pair, Ref, children_of, decode, entries, join, root_digest
from cowfs.model import Kind
from cowfs.store import kernel_image
from cowfs.store.archived import HEADERS
from cowfs.store.layers import KeptDigests, SameData, file_digest, unmark
from cowfs.store.reserve import names_full
from cowfs.store.staging import RM, leftovers, orphans, sweep
from cowfs.sys.regular import open_regular

if TYPE_CHECKING:
    from cowfs.store.archived import Archived
    from cowfs.store.context import Context
    from cowfs.store.exporting import Exporting
    from cowfs.store.scanning import Scanning

__all__ = ["Checking", "Problem", "Report"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One fault.

    Attributes:
        kind: ``garbage``, ``layer``, ``records``, ``content``, ``archive``, ``links`` or ``index``.
        name: the faulty snapshot; "" for garbage.
        what: one line.
        repaired: the repair that was made, "" for none.
    """

    kind: str
    name: str
    what: str
    repaired: str = ""


@dataclass(slots=True)
class Report:
    """The result of a check.

    Attributes:
        problems: in the order found.
        snapshots, records, files: the numbers examined.
        undigested: files without a known digest, as (snapshot, path); only with ``content``.
    """

    problems: list[Problem] = field(default_factory=list)
    snapshots: int = 0
    records: int = 0
    files: int = 0
    undigested: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def damage(self) -> list[Problem]:
        """All problems except garbage, mended ones, and links that the kernel may have broken."""
        return [
            problem for problem in self.problems if problem.kind not in ("garbage", "links") and not problem.repaired
        ]


class Checking:
    """The check of a store, and its repairs."""

    def __init__(self, context: Context, scanning: Scanning, archived: Archived, exporting: Exporting) -> None:
        self.context = context
        self._scanning = scanning
        self._archived = archived
        self._exporting = exporting

    @names_full
    def check(self, *, content: bool = False, repair: bool = False, progress: Progress | None = None) -> Report:
        """As :meth:`cowfs.Store.check`."""
        if repair:
            return self.context.freeing(lambda: self._check(content, repair, progress))
        return self._check(content, repair, progress)

    def _check(self, content: bool, repair: bool, progress: Progress | None) -> Report:
        report = Report()
        self._check_database(report)
        self._check_garbage(report, repair)
        if content:
            for path, what in kernel_image.damaged(self.context.driver):
                if repair:
                    os.unlink(path)
                report.problems.append(
                    Problem(
                        kind="image",
                        name=os.path.basename(path),
                        what=what,
                        repaired="removed: it is made again" if repair else "",
                    )
                )
        rows = list(self.context.index.rows())
        known = {row.num: row for row in rows}
        good: dict[bytes, bool] = {}
        bad: dict[int, str] = {}
        for at, row in enumerate(rows):
            if progress is not None:
                progress("snapshots", at, len(rows))
            report.snapshots += 1
            why = None
            with self._unless_changed(report, row, known):
                why = self._check_row(report, row, good, repair)
            if why is not None and not self._is_as_before(row, known):
                why = None
                good.clear()
            if why is None and row.parent in bad:
                why = f"its ancestor is damaged: {bad[row.parent]}"
            if why is not None:
                bad[row.num] = why
        if content:
            for at, row in enumerate(rows):
                if progress is not None:
                    progress("content", at, len(rows))
                with self._unless_changed(report, row, known):
                    if row.num not in bad and row.kind is not Kind.VIEW:
                        self._check_marks(report, row)
                    if row.root is not None and row.num not in bad:
                        self._check_content(report, row, repair)
        if repair:
            self._quarantine(report, known, bad)
        return report

    def _is_as_before(self, row: Row, known: Mapping[int, Row]) -> bool:
        """Whether a snapshot and its ancestors are recorded as they were, with the same layers.

        Args:
            known: the snapshots as the check found them, by number.
        """
        above: Row | None = row
        while above is not None:
            now = self.context.index.find_id(above.id)
            if now is None or (now.num, now.parent) != (above.num, above.parent):
                return False
            above = None if above.parent is None else known.get(above.parent)
        return True

    @contextmanager
    def _unless_changed(self, report: Report, row: Row, known: Mapping[int, Row]) -> Iterator[None]:
        """Forget the problems of a snapshot, or a failed look at it, if another process removed or squashed it meanwhile."""
        problems, undigested = len(report.problems), len(report.undigested)
        try:
            yield
        except (OSError, CowfsError, LookupError):
            if self._is_as_before(row, known):
                raise
        if len(report.problems) > problems and not self._is_as_before(row, known):
            del report.problems[problems:], report.undigested[undigested:]

    def _check_database(self, report: Report) -> None:
        for line in self.context.index.damage_of_file():
            report.problems.append(Problem(kind="index", name="", what=f"the index is damaged: {line}"))

    def _check_garbage(self, report: Report, repair: bool) -> None:
        lost = [f"layers/{id}" for id in orphans(self.context.driver, self.context.index)]
        lost += leftovers(self.context.driver, self.context.index)
        if repair and lost:
            gone = {name.removeprefix(RM) for name in sweep(self.context.driver, self.context.index, everything=True)}
        else:
            gone = set()
        for name in lost:
            done = "deleted" if not os.path.lexists(f"{self.context.root}/{name}") and gone else ""
            report.problems.append(
                Problem(kind="garbage", name="", what=f"{name}: no snapshot records this directory", repaired=done)
            )

    def _check_row(self, report: Report, row: Row, good: dict[bytes, bool], repair: bool) -> str | None:
        """Check a snapshot's layer and records, and return the reason why it cannot be used, or None."""
        found = self.context.driver.check(row.id)
        for what in found:
            report.problems.append(Problem(kind="layer", name=row.name, what=what))
        if found:
            return found[0]
        if row.root is None:
            return None
        broken = self._broken_record(report, root_digest(row.root[1]), good)
        if broken is None:
            return None
        what = f"the index lacks the record {broken.hex()} of its tree"
        if repair and self._rebuild(row):
            good.clear()
            report.problems.append(Problem(kind="records", name=row.name, what=what, repaired="rebuilt from the layer"))
            return None
        report.problems.append(Problem(kind="records", name=row.name, what=what))
        return what

    def _broken_record(self, report: Report, root: bytes, good: dict[bytes, bool]) -> bytes | None:
        """A record below ``root`` that is missing or does not match its digest; None if there is none."""
        import hashlib

        todo = [root]
        with self.context.index.read():
            while todo:
                digest = todo.pop()
                if digest in good:
                    if not good[digest]:
                        return digest
                    continue
                try:
                    data = self.context.index.record(digest)
                except Corrupt:
                    good[digest] = False
                    return digest
                report.records += 1
                children = self.context.index.record_children(digest)
                sound = hashlib.sha256(data).digest() == digest
                below = children_of(data) if sound else []
                if not sound or (children is not None and children != b"".join(below)):
                    good[digest] = False
                    return digest
                good[digest] = True
                todo += below
        return None

    def _rebuild(self, row: Row) -> bool:
        """Make a snapshot's records anew from its layer. Returns whether they are those of the row."""
        for links in (True, False):  # as cowfs records a tree, and as it did before 2026-12
            try:
                scanned = self._scanning.scan_row(row, KeptDigests.load(self.context.driver, row.id), links=links)
            except (Corrupt, OSError):
                return False
            if scanned.root == row.root:
                with self.context.index.write() as change:
                    change.replace_records(scanned.pending.new)
                return True
        return False

    def _check_layer(self, report: Report, row: Row, repair: bool) -> None:
        from cowfs.store import damage

        parent = self.context.index.by_num(row.parent).root if row.parent is not None else None
        data = SameData(self.context.driver, self.context.index)
        assert row.root is not None
        root: Pair = row.root
        if self.context.driver.capabilities.whole:
            root = self._check_whole(report, row, parent, repair)
        elif damage.is_old(root):
            for what in damage.several_with_one_number(self.context.index, parent, root):
                report.problems.append(Problem(kind="links", name=row.name, what=what))
        for path, where, entry in self._own_files(row.num, parent, root):
            report.files += 1
            if entry.digest is None:
                if entry.size:
                    report.undigested.append((row.name, path))
                continue
            try:
                file = data.open(row.num, where)
            except Corrupt as error:
                report.problems.append(Problem(kind="content", name=row.name, what=error.message))
                continue
            with file:
                right = file.size == entry.size and file_digest(file) == entry.digest
            if not right:
                what = f"{os.fsdecode(path)!r} in layer {row.id} is not what was committed"
                report.problems.append(Problem(kind="content", name=row.name, what=what))

    def _check_content(self, report: Report, row: Row, repair: bool) -> None:
        """Verify a layer, and its archive if it is exported as one."""
        self._check_layer(report, row, repair)
        if not self._archived.is_archived(row):
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                self._exporting.write_layer(row, nowhere, "none", None)
            left = self._not_deleted(row)
        except Corrupt as error:
            why = error.message
        else:
            if not left:
                return
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            why = f"{os.fsdecode(left[0])!r}{more} should be deleted; import the image again"
        done = ""
        if repair:
            with self.context.index.write() as change:
                change.forget_archive(row.num)
            unmark(f"{self.context.driver.directory(row.id)}/{HEADERS}")
            done = "its diff id is forgotten"
        what = f"layer {row.id} is not the archive {row.diff_id}: {why}"
        report.problems.append(Problem(kind="archive", name=row.name, what=what, repaired=done))

    def _check_marks(self, report: Report, row: Row) -> None:
        """Report writes that a mark hides. Only a user can choose the right data: a repair leaves them."""
        from cowfs.store import damage

        if self.context.driver.capabilities.whole:
            return
        trees = [self.context.driver.tree(id) for _, id in self.context.index.chain(row.num)]
        try:
            for path in damage.unseen(trees, self.context.driver.form):
                what = (
                    f"{os.fsdecode(path)!r} holds writes that no mount shows, since a mark could not be removed;"
                    f" they are in {self.context.driver.tree(row.id)}"
                )
                report.problems.append(Problem(kind="content", name=row.name, what=what))
        except OSError as error:
            what = f"layer {row.id} cannot be read: {error.strerror}"
            report.problems.append(Problem(kind="content", name=row.name, what=what))

    def _check_whole(self, report: Report, row: Row, parent: Pair | None, repair: bool) -> Pair:
        """Compare a whole layer with its records; a repair records the layer's content, which users see.

        Returns:
            The recorded root entry.
        """
        from cowfs.store import damage

        assert row.root is not None
        found = damage.compare_whole(self.context.driver, self.context.index, row, parent)
        mends = bool(repair and found.lines and found.mendable)
        if mends:
            with self.context.index.write() as change:
                change.add_records(found.scanned.pending.new)
                change.set_root(row.num, found.scanned.root)
        done = "recorded as it is" if mends else ""
        report.problems += [Problem(kind="content", name=row.name, what=what, repaired=done) for what in found.lines]
        return found.scanned.root if mends else row.root

    def _own_files(self, num: int, parent: Pair | None, root: Pair) -> Iterator[tuple[bytes, bytes, Entry]]:
        """(path, path in the layer, entry) of the regular files whose data is in layer ``num``."""
        before = decode(parent).ref if parent is not None else None
        top = decode(root)
        assert top.ref is not None
        todo: list[tuple[bytes, bytes, Ref | None, Ref]] = [(b"", top.base or b"", before, top.ref)]
        while todo:
            path, base, old_ref, ref = todo.pop()
            old = entries(self.context.index, old_ref.storage) if old_ref is not None else {}
            for name, pair in entries(self.context.index, ref.storage).items():
                was = old.get(name)
                if was == pair:
                    continue
                entry = decode(pair)
                implied = join(base, name)
                if entry.ref is not None:
                    old_below = decode(was).ref if was is not None else None
                    if old_below is None or old_below.storage != entry.ref.storage:
                        todo.append(
                            (join(path, name), implied if entry.base is None else entry.base, old_below, entry.ref)
                        )
                elif entry.layer == num and entry.type == 0o100000 and not entry.flags:
                    yield join(path, name), implied if entry.path is None else entry.path, entry

    def _not_deleted(self, row: Row) -> list[bytes]:
        """Paths of a snapshot that the archive of its layer deletes. Raises Corrupt."""
        from cowfs.store import damage

        assert row.root is not None
        with open(open_regular(f"{self.context.driver.directory(row.id)}/{HEADERS}"), "rb") as log:
            return sorted(damage.not_deleted(self.context.index, row.root, lambda: archive.member_names(log)))

    def _quarantine(self, report: Report, known: Mapping[int, Row], bad: dict[int, str]) -> None:
        """Put damaged snapshots in quarantine, and let intact ones out."""
        with self.context.index.write() as change:
            for row in known.values():
                why = bad.get(row.num)
                if why != row.damage and self._is_as_before(row, known):
                    change.set_damage(row.num, why)
        for at, problem in enumerate(report.problems):
            if problem.kind in ("layer", "records") and not problem.repaired:
                report.problems[at] = Problem(
                    kind=problem.kind, name=problem.name, what=problem.what, repaired="put in quarantine"
                )
