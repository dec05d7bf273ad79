"""Squash: merge a snapshot into its only child, so that chains of live snapshots do not grow without end.

Under mounts that go on. Which way depends on the child:

*A committed child*: the two layers stay as they are, and a third one that holds both is built (:mod:`cowfs.store.layer_merge`).
The records of everything above are made again, since files that were in the snapshot's layer are in the child's now. One
transaction writes all that and renames the new layer; every mount above is then told to stand on the new one
(:mod:`cowfs.mounting.verbs.restack`); the two old ones are deleted when all have done so.

*An active child*: its layer takes over what is seen of the snapshot's (:mod:`cowfs.union.absorb`), in the server of the mount
or here, and is then as good without it as with it. One transaction gives it the snapshot's parent.

Order, so that a kill at any point leaves the state before or the state after. ``squash-ID.json`` notes what is under way,
locked for as long as somebody is at it; ID is the new layer's id, or the snapshot's where an active child takes it over.

=======================================  ====================================================================
found with the note                      what :meth:`SquashVerbs.recover` does, at each open and gc
=======================================  ====================================================================
locked                                   nothing
merge, no row with ID                    removes the note (``new-ID`` is swept like any other)
merge, a row with ID                     tells the mounts again, deletes the old layers, removes the note
take-over, no mark in the layer          leaves one that the server heeds, removes the note: what was copied up
                                         does no harm
take-over, marked (the server switched)  carries on with the transaction, deletes the layer, removes the note
take-over, no row with ID                deletes the layer, removes the note
=======================================  ====================================================================

What a note names as old is no garbage to anybody while it is there. A mount that does not answer keeps its old layers: the
note then stays, and the next open tries again.

What counts for a limit does not change for a child that did not count the snapshot. One that did (its base says so) counts
the merged layer instead, and what is overwritten is free again.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cowfs.errors import CowfsError, FailedPrecondition, Unsupported
from cowfs.index.database import Row
from cowfs.model import Info, Kind, Limit, Usage
from cowfs.mounting.switch_mark import MARK, leave_mark
from cowfs.store import layers
from cowfs.store.key_lock import turn
from cowfs.store.live import LiveVerbs, unlink
from cowfs.store.names import new_id
from cowfs.store.reserve import names_full
from cowfs.store.snapshots import _sound
from cowfs.store.staging import SQUASH, discard, read_note, staged
from cowfs.sys import locks, trees
from cowfs.sys.atomic import fsync_directory
from cowfs.sys.faults import point
from cowfs.sys.regular import read_small

if TYPE_CHECKING:
    from cowfs.index import scan
    from cowfs.index.directory import Pair, Pending

__all__ = ["SquashVerbs"]

_LONG = 86400.0  # seconds that a server may take to take over a layer
_TRIES = 5


class SquashVerbs(LiveVerbs):
    """squash."""

    @names_full
    def squash(self, name: str, *, dry_run: bool = False) -> Info:
        """Merge a committed snapshot into its only child, and remove it; mounts above it go on.

        Args:
            name: a committed snapshot, or a tag.
            dry_run: change nothing: only look whether it can be done.

        Returns:
            The child.

        Raises:
            NotFound: no such snapshot.
            FailedPrecondition: it is not committed, has a tag, has no child or several, or something above it is in use by
                another verb or mounted in a way that cannot switch layers; the message says what.
            Unsupported: the driver keeps whole trees (there is nothing to gain).
        """
        if self.driver.capabilities.whole:
            raise Unsupported(f"the driver {self.driver.name} keeps whole trees: nothing to squash", remedy="cowfs rm")
        if dry_run:
            row, child = self._pair(name)
            above = [child, *self._above(child)]
            with self._holding([one for one in above if one.kind is not Kind.COMMITTED], self._served(above)):
                return child.info()
        for _ in range(_TRIES):
            row, child = self._pair(name)
            above = self._above(child)
            with turn(self.root, *(one.name for one in (row, child, *above))):
                self.recover()
                if self._pair(name) != (row, child) or self._above(child) != above:
                    continue
                if child.kind is Kind.ACTIVE:
                    self._take_over(row, child)
                else:
                    self._merge(row, child, above)
                return self.index.get(child.name).info()
        raise FailedPrecondition(f"what is above {name!r} keeps changing", remedy="try again")

    def _pair(self, name: str) -> tuple[Row, Row]:
        """A snapshot that can be squashed, and its child."""
        row = self.resolve(name)
        if row.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"{name!r} is not committed", remedy="commit it first")
        children = self.index.children(row.num)
        if len(children) != 1:
            what = f"has {len(children)} children" if children else "has no child"
            raise FailedPrecondition(
                f"{name!r} {what}: squash takes one with exactly one", remedy="cowfs tree shows them"
            )
        tags = self.index.tags_of(row.num)
        if tags:
            raise FailedPrecondition(
                f"{name!r} is tagged {', '.join(tag.name for tag in tags)}",
                remedy=f"cowfs rm {tags[0].name} drops the tag",
            )
        _sound(row)
        child = self.index.get(children[0])
        if child.kind is Kind.VIEW:
            raise FailedPrecondition(
                f"the child of {name!r} is a view, {child.name!r}", remedy=f"cowfs rm {child.name}"
            )
        return row, child

    def _above(self, row: Row) -> list[Row]:
        """Everything that has ``row`` as an ancestor, parents before children."""
        found: list[Row] = []
        pending = [row]
        while pending:
            one = pending.pop()
            below = self.index.rows_on(one.num)
            found += below
            pending += below
        return found

    # -- who uses the layers ------------------------------------------------------------------------

    def _served(self, rows: Iterable[Row]) -> dict[int, dict[str, Any]]:
        """What the servers of those that are mounted say, by number."""
        asked = ((row.num, self._server_of(row, made_by="store")) for row in rows if row.kind is not Kind.COMMITTED)
        return {num: server for num, server in asked if server is not None}

    @contextlib.contextmanager
    def _holding(self, rows: Iterable[Row], served: dict[int, dict[str, Any]]) -> Iterator[None]:
        """Nobody but our servers uses any of these, nor will."""
        with contextlib.ExitStack() as held:
            for row in rows:
                server = served.get(row.num)
                if server is None:
                    held.enter_context(layers.hold(self.driver, row, "squash"))
                elif server.get("io") == "passthrough" or server.get("frontend") != "kernel":
                    how = (
                        "--io passthrough" if server.get("io") == "passthrough" else f"--frontend {server['frontend']}"
                    )
                    raise FailedPrecondition(
                        f"{row.name!r} is mounted with {how}, which cannot switch layers", remedy="unmount it first"
                    )
            yield

    # -- a committed child --------------------------------------------------------------------------

    def _merge(self, row: Row, child: Row, above: list[Row]) -> None:
        served = self._served(above)
        with contextlib.ExitStack() as held:
            held.enter_context(self._holding((row, child, *above), served))
            new = self._build(row, child, above, held)
            self._switch_mounts(served, {one.num: one for one in above})
            point("squash.switched")
            for id in (row.id, child.id):
                discard(self.driver, id)
            unlink(self._squash_note(new))

    def _build(self, row: Row, child: Row, above: list[Row], held: contextlib.ExitStack) -> str:
        """Make the merged layer, and record it. Returns its id."""
        from cowfs.index import compare
        from cowfs.index.directory import Pending
        from cowfs.store.layer_merge import write_changes
        from cowfs.store.owners import carry

        parent = self.index.by_num(row.parent) if row.parent is not None else None
        base = [id for _, id in self.index.chain(row.parent)]
        with staged(self.driver, new_id()) as layer:
            self.driver.create(layer.staged, base, Limit())
            carry(self.driver, [child.id, row.id], layer.staged)
            pending = Pending(self.index)
            after = self._tree(child, pending)
            same = layers.SameData(self.driver, self.index)
            changes = compare.changes_with_links(pending, parent.root if parent else None, after, same)
            made = write_changes(self.driver, changes, base, [child.id, row.id, *base], layer.staged)
            self.driver.settle(layer.staged)
            point("squash.built")
            if self.driver.fsync:
                trees.sync_tree(self.driver.tree(layer.staged))
            pending = Pending(self.index)
            roots: dict[int, Pair] = {}
            usage: dict[int, Usage] = {}
            if parent is not None and parent.root is not None:
                roots[parent.num] = parent.root
            for one in (child, *above):
                if one.kind is not Kind.COMMITTED:
                    continue
                under = row.parent if one is child else one.parent
                root = roots.get(under) if under is not None else None
                names = made.names if one is child else {}
                scanned = self._scan_over(layer.staged if one is child else one.id, one, root, pending, names)
                pending.new.update(scanned.pending.new)
                roots[one.num], usage[one.num] = scanned.root, scanned.usage
            note = {"old": [row.id, child.id], "child": child.num}
            held.callback(os.close, _write_note(self._squash_note(layer.id), note))
            try:
                with self.index.write() as change:
                    self._look_again(row, child)
                    change.add_records(pending.new)
                    for one in (child, *above):
                        change.lower(one.num, roots[one.num] if one.kind is Kind.COMMITTED else None)
                    change.replace_layer(
                        child.num,
                        id=layer.id,
                        parent=row.parent,
                        usage=usage[child.num],
                        shares_limit=row.shares_limit and child.shares_limit,
                    )
                    bases = _bases(row, child, above, usage[child.num])
                    for num, kept in bases.items():
                        change.set_base(num, kept)
                    change.remove(row.num)
                    point("squash.recorded")
                    layer.publish()
                    point("squash.renamed")
            except BaseException:
                unlink(self._squash_note(layer.id))
                raise
        point("squash.committed")
        return layer.id

    def _look_again(self, row: Row, child: Row) -> None:
        """In the transaction: is it still as it was when we began?"""
        now = self.index.by_num(row.num)
        if (
            self.index.children(row.num) != [child.name]
            or self.index.by_num(child.num).id != child.id
            or now.id != row.id
        ):
            raise FailedPrecondition(f"{row.name!r} got another child meanwhile", remedy="cowfs tree shows them")
        if self.index.tags_of(now.num):
            raise FailedPrecondition(f"{row.name!r} was tagged meanwhile", remedy="cowfs images shows the tags")

    def _scan_over(self, id: str, row: Row, base: Pair | None, records: Pending, names: dict[int, int]) -> scan.Scanned:
        from cowfs.index import scan

        known = layers.KeptDigests.load(self.driver, row.id)
        fd = os.open(self.driver.tree(id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return scan.scan_delta(
                fd, num=row.num, form=self.driver.form, base=base, records=records, known=known, names=names
            )
        finally:
            os.close(fd)

    def _switch_mounts(self, served: dict[int, dict[str, Any]], rows: dict[int, Row]) -> None:
        """Have every mount stand on the layers that the index has now.

        Raises:
            CowfsError: one of them does not; the others do.
        """
        from cowfs.mounting import protocol

        failures: list[str] = []
        for num, server in served.items():
            row = self.index.by_num(num)
            if row.id != rows[num].id:
                continue
            lowers = [self.driver.tree(id) for _, id in self.index.chain(row.parent)]
            more = {"lowers": lowers, "num": row.parent, "index": self.index.path, "upper": self.driver.tree(row.id)}
            before = rows[num].base
            freed = {"bytes": row.base.bytes - before.bytes, "inodes": row.base.inodes - before.inodes}
            try:
                protocol.ask(server["socket"], "restack", timeout=600.0, freed=freed, **more)
            except CowfsError as error:
                try:
                    with layers.hold(self.driver, row, "squash"):
                        continue  # unmounted meanwhile
                except CowfsError:
                    failures.append(f"{server['mountpoint']} ({error.message})")
        if failures:
            raise CowfsError(
                f"merged, but these mounts still use the old layers, which stay: {', '.join(failures)}",
                remedy="unmount them, then 'cowfs gc'",
            )

    # -- an active child ----------------------------------------------------------------------------

    def _take_over(self, row: Row, child: Row) -> None:
        server = self._served([child]).get(child.num)
        with self._holding((row, child), {} if server is None else {child.num: server}):
            note = self._squash_note(row.id)
            lock = _write_note(note, {"old": [row.id], "child": child.num, "row": row.num})
            mark = os.path.join(self.driver.directory(row.id), MARK)
            unlink(mark)  # of one that was taken back
            try:
                moved = self._absorb(row, child, server, mark)
                point("squash.absorbed")
                self._finish_take_over(row, child, moved)
            except BaseException:
                if not os.path.exists(mark):
                    unlink(note)
                raise
            finally:
                os.close(lock)
            discard(self.driver, row.id)
            unlink(note)

    def _absorb(self, row: Row, child: Row, server: dict[str, Any] | None, mark: str) -> Usage:
        lowers = [self.driver.tree(id) for _, id in self.index.chain(row.num)]
        if server is None:
            return self._absorb_here(child, lowers)
        from cowfs.mounting import protocol

        held = None
        if child.shares_limit:
            usage = row.usage or Usage()
            held = {"bytes": usage.bytes, "inodes": usage.inodes}
        more = {"lowers": lowers, "num": row.parent, "index": self.index.path, "upper": self.driver.tree(child.id)}
        try:
            protocol.ask(
                server["socket"], "absorb", timeout=_LONG, mark=mark, held=held, empty=f"{self.root}/empty", **more
            )
        except CowfsError:
            if not os.path.exists(mark):
                raise  # the server ended before it switched
        return _marked(mark)

    def _absorb_here(self, child: Row, lowers: list[str]) -> Usage:
        from cowfs.row.view import View
        from cowfs.union import Options
        from cowfs.union.absorb import absorb

        driver = self.driver
        options = Options(form=driver.form.name, volatile=not driver.fsync, row=driver.capabilities.row or None)
        view = View(lowers, driver.tree(child.id), driver.work(child.id), options=options)
        try:
            moved = absorb(view)
        except OSError as error:
            raise CowfsError(f"{child.name!r} cannot take over what is beneath it: {error.strerror}") from None
        finally:
            view.close()
        if driver.fsync:
            trees.sync_tree(driver.tree(child.id))
        return moved

    def _finish_take_over(self, row: Row, child: Row, moved: Usage) -> None:
        """The child's parent is the snapshot's now; the snapshot goes, unless somebody has begun to use it."""
        from cowfs.store.owners import carry

        carry(self.driver, [row.id], child.id)
        with self.index.write() as change:
            child = self.index.by_num(child.num)
            base = row.base
            if not child.shares_limit:
                base = Usage(bytes=child.base.bytes + moved.bytes, inodes=child.base.inodes + moved.inodes)
            beneath = None if row.parent is None else (row.parent, row.depth - 1)
            change.stand_on(child.num, beneath, base=base, shares_limit=row.shares_limit and child.shares_limit)
            if not self.index.children(row.num) and not self.index.tags_of(row.num):
                change.remove(row.num)
            point("squash.recorded")
        point("squash.committed")

    # -- after a kill -------------------------------------------------------------------------------

    def _squash_note(self, id: str) -> str:
        return os.path.join(self.root, f"{SQUASH}{id}.json")

    def recover(self) -> None:
        """Finish, or take back, what killed processes left half done. Called by :meth:`open` and :meth:`gc`.

        Raises:
            OSError: a file of the store cannot be read or changed.
        """
        super().recover()
        if self.index.refused:
            return
        for name in os.listdir(self.root):
            if not name.startswith(SQUASH) or not name.endswith(".json"):
                continue
            path = os.path.join(self.root, name)
            lock = _lock_note(path)
            if lock is None:
                continue
            try:
                note = read_note(path)
                if note is None:
                    unlink(path)
                else:
                    self._recover_squash(path, name.removeprefix(SQUASH).removesuffix(".json"), note)
            finally:
                os.close(lock)

    def _recover_squash(self, path: str, id: str, note: dict[str, Any]) -> None:
        there = self.index.find_id(id)
        child = self.index.find_num(note["child"])
        if "row" in note:
            mark = os.path.join(self.driver.directory(id), MARK)
            if there is not None and child is not None and child.parent == there.num and not _taken_back(mark):
                self._finish_take_over(there, child, _marked(mark))
                there = self.index.find_id(id)
            if there is None:
                discard(self.driver, id)
        elif there is not None:
            above = self._above(there)
            with turn(self.root, *(one.name for one in above), wait=False) as mine:
                if not mine:
                    return
                try:
                    self._switch_mounts(self._served(above), {one.num: one for one in above})
                except CowfsError:
                    return  # the old layers stay
                for old in note["old"]:
                    discard(self.driver, old)
        unlink(path)


def _bases(row: Row, child: Row, above: list[Row], merged: Usage) -> dict[int, Usage]:
    """What the merged child and all above it have as their base, by number, so that each counts what it should."""
    held, own = row.usage or Usage(), child.usage or Usage()
    if not child.shares_limit:  # what the child counts stays what it was
        return {
            child.num: Usage(
                bytes=child.base.bytes + merged.bytes - own.bytes, inodes=child.base.inodes + merged.inodes - own.inodes
            )
        }
    bases = {child.num: row.base}
    freed = Usage(bytes=held.bytes + own.bytes - merged.bytes, inodes=held.inodes + own.inodes - merged.inodes)
    before = {child.num: child}
    for one in above:  # parents before children
        under = before.get(one.parent) if one.parent is not None else None
        if under is not None and one.shares_limit:
            before[one.num] = one
            bases[one.num] = Usage(bytes=one.base.bytes + freed.bytes, inodes=one.base.inodes + freed.inodes)
    return bases


def _taken_back(mark: str) -> bool:
    """Take a take-over back, unless the server has left its mark: one of the two gives the file its name."""
    try:
        leave_mark(mark, {"taken back": True})
    except FileExistsError:
        return "moved" not in json.loads(read_small(mark))
    return True


def _marked(mark: str) -> Usage:
    """What a server said that it took over."""
    return Usage(**json.loads(read_small(mark))["moved"])


def _write_note(path: str, note: dict[str, Any]) -> int:
    """Write a note and return a descriptor that holds its lock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        locks.lock(fd, wait=True)
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(fd)):
            break
        os.close(fd)  # a recovery took the empty note for one of a process that was killed
    try:
        os.write(fd, json.dumps(note).encode())
        os.fsync(fd)
        fsync_directory(os.path.dirname(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock_note(path: str) -> int | None:
    """A locked descriptor of a note; ``None`` while somebody else holds it, or where it is gone."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None  # no note of ours
        return locks.open_locked(path, flags=os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
