"""Squash: merge a snapshot into its only child, so that chains of live snapshots do not grow without end.

Mounts go on meanwhile. The way depends on the child:

*A committed child*: the two layers stay as they are, and a third one that holds both is built (:mod:`cowfs.store.layer_merge`).
The records of everything above are made again, since files that were in the snapshot's layer are in the child's now. One
transaction writes all that and renames the new layer; every mount above is then told to stand on the new one
(:mod:`cowfs.mounting.verbs.restack`); the two old ones are deleted when all have done so.

*An active child*: its layer takes over the visible content of the snapshot's (:mod:`cowfs.union.absorb`), in the server
of the mount or here, and then shows the same tree without it. One transaction gives it the snapshot's parent.

Order, so that a kill at any point leaves the state before or the state after. ``squash-ID.json`` notes the squash,
locked while it runs; ID is the new layer's id, or the snapshot's if an active child takes it over.

=======================================  ====================================================================
found with the note                      what :meth:`Restacking.recover` does, at each open and gc
=======================================  ====================================================================
locked                                   nothing
merge, no row with ID                    removes the note (``new-ID`` is swept like any other)
merge, a row with ID                     tells the mounts again, deletes the old layers, removes the note
take-over, no mark in the layer          leaves one that the server heeds, removes the note: what was copied up
                                         does no harm
take-over, marked (the server switched)  carries on with the transaction, deletes the layer, removes the note
take-over, no row with ID                deletes the layer, removes the note
=======================================  ====================================================================

The old layers of a note are no garbage while it exists. A mount that does not answer keeps its old layers: the
note then stays, and the next open tries again.

The use for a limit does not change for a child that did not count the snapshot. A child that did (by its base) counts
the merged layer instead, and overwritten data is free again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.errors import CowfsError
from cowfs.index.database import Row
from cowfs.model import Kind, Usage
from cowfs.mounting.switch_mark import MARK, leave_mark
from cowfs.store import layers
from cowfs.store.key_lock import turn
from cowfs.store.staging import SQUASH, discard, read_note, unlink
from cowfs.sys import locks
from cowfs.sys.atomic import fsync_directory
from cowfs.sys.faults import point
from cowfs.sys.regular import read_small

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.mounted import Mounted

__all__ = ["Restacking", "marked", "write_note"]


class Restacking:
    """Exchanging the layers beneath mounts, and ending a squash after a kill."""

    def __init__(self, context: Context, mounted: Mounted) -> None:
        self.context = context
        self._mounted = mounted

    def above(self, row: Row) -> list[Row]:
        """Everything that has ``row`` as an ancestor, parents before children."""
        found: list[Row] = []
        pending = [row]
        while pending:
            one = pending.pop()
            below = self.context.index.rows_on(one.num)
            found += below
            pending += below
        return found

    def served(self, rows: Iterable[Row]) -> dict[int, dict[str, Any]]:
        """The answers of the servers of mounted ones, by number."""
        asked = (
            (row.num, self._mounted.server_of(row, made_by="store")) for row in rows if row.kind is not Kind.COMMITTED
        )
        return {num: server for num, server in asked if server is not None}

    def switch_mounts(self, served: dict[int, dict[str, Any]], rows: dict[int, Row]) -> None:
        """Switch every mount to the layers that the index has now.

        Raises:
            CowfsError: one of them failed; the others switched.
        """
        from cowfs.mounting import protocol

        failures: list[str] = []
        for num, server in served.items():
            row = self.context.index.by_num(num)
            if row.id != rows[num].id:
                continue
            lowers = [self.context.driver.tree(id) for _, id in self.context.index.chain(row.parent)]
            more = {
                "lowers": lowers,
                "num": row.parent,
                "index": self.context.index.path,
                "upper": self.context.driver.tree(row.id),
            }
            before = rows[num].base
            freed = {"bytes": row.base.bytes - before.bytes, "inodes": row.base.inodes - before.inodes}
            try:
                protocol.ask(server["socket"], "restack", timeout=600.0, freed=freed, **more)
            except CowfsError as error:
                try:
                    with layers.hold(self.context.driver, self.context.index, row, "squash"):
                        continue  # unmounted meanwhile
                except CowfsError:
                    failures.append(f"{server['mountpoint']} ({error.message})")
        if failures:
            raise CowfsError(
                f"merged, but these mounts still use the old layers, which stay: {', '.join(failures)}",
                remedy="unmount them, then 'cowfs gc'",
            )

    def finish_take_over(self, row: Row, child: Row, moved: Usage) -> None:
        """Give the child the snapshot's parent, and delete the snapshot, unless it is in use by now."""
        from cowfs.store.owners import carry

        carry(self.context.driver, [row.id], child.id)
        with self.context.index.write() as change:
            child = self.context.index.by_num(child.num)
            base = row.base
            if not child.shares_limit:
                base = Usage(bytes=child.base.bytes + moved.bytes, inodes=child.base.inodes + moved.inodes)
            beneath = None if row.parent is None else (row.parent, row.depth - 1)
            change.stand_on(child.num, beneath, base=base, shares_limit=row.shares_limit and child.shares_limit)
            if not self.context.index.children(row.num) and not self.context.index.tags_of(row.num):
                change.remove(row.num)
            point("squash.recorded")
        point("squash.committed")

    def note(self, id: str) -> str:
        """The path of the note that tells of a squash."""
        return os.path.join(self.context.root, f"{SQUASH}{id}.json")

    def recover(self) -> None:
        """Finish or undo the squashes of killed processes, by the table above."""
        for name in os.listdir(self.context.root):
            if not name.startswith(SQUASH) or not name.endswith(".json"):
                continue
            path = os.path.join(self.context.root, name)
            lock = _lock_note(path)
            if lock is None:
                continue
            try:
                note = read_note(path)
                if note is None:
                    unlink(path)
                else:
                    self._recover(path, name.removeprefix(SQUASH).removesuffix(".json"), note)
            finally:
                os.close(lock)

    def is_half_done(self, num: int) -> bool:
        """False: after any step of a squash all its snapshots are usable."""
        return False

    def _recover(self, path: str, id: str, note: dict[str, Any]) -> None:
        there = self.context.index.find_id(id)
        child = self.context.index.find_num(note["child"])
        if "row" in note:
            mark = os.path.join(self.context.driver.directory(id), MARK)
            if there is not None and child is not None and child.parent == there.num and not _taken_back(mark):
                self.finish_take_over(there, child, marked(mark))
                there = self.context.index.find_id(id)
            if there is None:
                discard(self.context.driver, id)
        elif there is not None:
            above = self.above(there)
            with turn(self.context.root, *(one.name for one in above), wait=False) as mine:
                if not mine:
                    return
                try:
                    self.switch_mounts(self.served(above), {one.num: one for one in above})
                except CowfsError:
                    return  # the old layers stay
                for old in note["old"]:
                    discard(self.context.driver, old)
        unlink(path)


def _taken_back(mark: str) -> bool:
    """Undo a take-over, unless the server has left its mark: only one of the two can make the file."""
    try:
        leave_mark(mark, {"taken back": True})
    except FileExistsError:
        return "moved" not in json.loads(read_small(mark))
    return True


def marked(mark: str) -> Usage:
    """The figures of a server's take-over."""
    return Usage(**json.loads(read_small(mark))["moved"])


def write_note(path: str, note: dict[str, Any]) -> int:
    """Write a note and return a descriptor that holds its lock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        locks.lock(fd, wait=True)
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(fd)):
            break
        os.close(fd)  # a recovery took the empty note for that of a killed process
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
            return None  # no note of cowfs
        return locks.open_locked(path, flags=os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
