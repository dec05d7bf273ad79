"""The switch of a key to another layer, the common part of snapshot and rollback.

A snapshot re-parents its key: the layer written so far becomes a committed snapshot, and the key goes on over a new,
empty layer. If cowfs's server has the key mounted, it switches layers itself, between two requests
(:mod:`cowfs.mounting.verbs.live`); open descriptors stay valid.

Order, so that a kill at any point leaves the state before or the state after:

1. ``live-ID`` is made, filled and locked, and ``live-ID.json`` beside it notes its purpose;
2. the server leaves its mark in it and switches (nothing was written to it before);
3. one transaction writes the rows and renames it to ``layers/ID``.

===========================  ========================================================
found with the note          what :meth:`Switching.recover` does, at each open and gc
===========================  ========================================================
the directory, locked        nothing: somebody is at it
the directory, no mark       deletes it: the state before
the directory, marked        carries on with step 3: the state after
the directory, a row         removes the note: the transaction was committed
no directory                 removes the note
===========================  ========================================================

The directory is called ``live-ID``, or ``layers/ID`` when the transaction was lost after the rename.

The limit of a key counts the writes since prepare, so the use of its live snapshots is in the row as a negative base.
"""

from __future__ import annotations

import contextlib
import json
import os

from cowfs._typed import TYPE_CHECKING, Any, NamedTuple
from cowfs.errors import AlreadyExists, CowfsError, FailedPrecondition
from cowfs.index.database import Row
from cowfs.index.transaction import Committed, NameTaken
from cowfs.model import Kind, Usage
from cowfs.mounting.switch_mark import MARK
from cowfs.store import layers
from cowfs.store.names import new_id
from cowfs.store.staging import NEW, _lock, _make_locked, discard, read_note, unlink
from cowfs.sys import trees
from cowfs.sys.atomic import fsync_directory
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.instant import Instant
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted
    from cowfs.store.scanning import Scanning

__all__ = ["Switch", "Switching", "read_switch"]

LIVE, NOTE = "live-", ".json"


class Switch(NamedTuple):
    """The purpose of ``live-ID``, from its note."""

    verb: str
    num: int
    name: str
    labels: dict[str, str]


class Switching:
    """The switch of a key to another layer, and its end after a kill."""

    def __init__(
        self, context: Context, lookup: Lookup, scanning: Scanning, mounted: Mounted, instant: Instant
    ) -> None:
        self.context = context
        self._lookup = lookup
        self._scanning = scanning
        self._mounted = mounted
        self._instant = instant

    def switch(self, row: Row, switch: Switch, parents: list[str], verb: str, **more: Any) -> None:
        """Put a key on a fresh layer; the server of a mounted key does it, between two requests.

        Args:
            parents: ids of the layers beneath the fresh one, nearest first.
            verb: of the server's control protocol, with ``more`` as its arguments.

        Raises:
            FailedPrecondition: in use by another verb, or mounted by the kernel.
            AlreadyExists: the name was taken meanwhile; the snapshot has another one.
        """
        server = self._mounted.server_of(row, made_by="store")
        if server is not None:
            try:
                self._make_and_switch(row, switch, parents, server, verb, more)
                return
            except CowfsError:
                if (
                    self._mounted.server_of(row, made_by="store") is not None
                    or self.context.index.by_num(row.num) != row
                ):
                    raise
                # it was unmounted just now, without a switch
        with layers.hold(self.context.driver, self.context.index, row, switch.verb):
            self._make_and_switch(row, switch, parents, None, verb, more)

    def _make_and_switch(
        self,
        row: Row,
        switch: Switch,
        parents: list[str],
        server: dict[str, Any] | None,
        verb: str,
        more: dict[str, Any],
    ) -> None:
        id = new_id()
        driver = self.context.driver
        lock = _make_locked(driver.directory(NEW + id))
        here = NEW + id
        marked = False
        try:
            driver.create(here, parents, row.limit)
            if driver.capabilities.whole:
                layers.mark_copied(driver, here, parents[0], only_root=False)
            _write_note(self._note(id), switch)
            driver.publish(here, LIVE + id)
            here = LIVE + id
            point("switch.made")
            if server is not None:
                from cowfs.mounting import protocol

                mark = os.path.join(driver.directory(here), MARK)
                places = {"upper": driver.tree(here), "work": driver.work(here)}
                final = {"final_upper": driver.tree(id), "final_work": driver.work(id)}
                try:
                    protocol.ask(server["socket"], verb, timeout=600.0, mark=mark, **places, **final, **more)
                except CowfsError:
                    if not os.path.exists(mark):
                        raise
                    # it switched, and ended before its answer
            else:
                os.close(os.open(os.path.join(driver.directory(here), MARK), os.O_WRONLY | os.O_CREAT, 0o600))
            marked = True
            point("switch.done")
            self._finish(id, switch)
        except BaseException:
            if not marked and not os.path.exists(os.path.join(driver.directory(here), MARK)):
                driver.remove(here)
                unlink(self._note(id))
            raise
        finally:
            os.close(lock)

    def _finish(self, id: str, switch: Switch) -> None:
        """Step 3: the rows, and the directory's final name."""
        row = self.context.index.by_num(switch.num)
        name = switch.name
        if switch.verb == "rollback":
            self._finish_rollback(id, row, switch)
        elif not self._finish_snapshot(id, row, switch):  # too late to go back
            name = f"{name}.{id}"
            self._finish_snapshot(id, row, switch._replace(name=name))
        unlink(os.path.join(self.context.driver.directory(id), MARK))
        unlink(self._note(id))
        if name != switch.name:
            raise AlreadyExists(
                f"the name {switch.name!r} was taken meanwhile", remedy=f"the snapshot is called {name}"
            )

    def _note(self, id: str) -> str:
        return os.path.join(self.context.root, f"{LIVE}{id}{NOTE}")

    def _finish_snapshot(self, id: str, row: Row, switch: Switch) -> bool:
        """Returns whether the name was free."""
        self.context.driver.settle(row.id)
        scanned = self._scanning.scan_row(row, layers.KeptDigests.load(self.context.driver, row.id))
        if self.context.driver.fsync:
            trees.sync_tree(self.context.driver.tree(row.id))
        base = Usage(bytes=row.base.bytes - scanned.usage.bytes, inodes=row.base.inodes - scanned.usage.inodes)
        try:
            with self.context.index.write() as change:
                held = Committed(usage=scanned.usage, root=scanned.root, records=scanned.pending.new)
                change.commit_active(row.num, switch.name, switch.labels, held)
                change.add_snapshot(
                    id=id,
                    name=row.name,
                    kind=Kind.ACTIVE,
                    parent=(row.num, row.depth),
                    labels=row.labels,
                    limit=self.context.index.by_num(row.num).limit,  # it may have been changed meanwhile
                    base=base,
                    shares_limit=True,
                    created=row.created,
                    config=self.context.index.config_of(row.num),
                )
                self._publish(id)
        except NameTaken:
            return False
        point("switch.committed")
        return True

    def _finish_rollback(self, id: str, row: Row, switch: Switch) -> None:
        ancestor = self.context.index.get(switch.name)
        base, shares_limit = self.base_at(row, ancestor)
        with self.context.index.write() as change:
            change.stand_on(row.num, (ancestor.num, ancestor.depth), base=base, shares_limit=shares_limit, id=id)
            self._publish(id)
        point("switch.committed")

    def base_at(self, row: Row, ancestor: Row) -> tuple[Usage, bool]:
        """The base that a key has over one of its ancestors, and whether they share a limit: its own snapshots count for it."""
        if self.context.driver.capabilities.whole:
            return self._instant.base_at(row, ancestor)
        under = row
        for num, _ in self.context.index.chain(row.parent):
            one = self.context.index.by_num(num)
            if not under.shares_limit:
                break
            if num == ancestor.num:
                return _after(one), True
            under = one
        return Usage(), False

    def _publish(self, id: str) -> None:
        """The final name, inside the transaction that writes the row."""
        point("switch.recorded")
        if os.path.isdir(self.context.driver.directory(LIVE + id)):  # else a killed process had done it
            self.context.driver.publish(LIVE + id, id)
        if self.context.driver.fsync:
            fsync_directory(f"{self.context.root}/layers")
            fsync_directory(self.context.root)
        point("switch.renamed")

    def recover(self) -> None:
        """Finish or undo the switches of killed processes, by the table above."""
        for name in os.listdir(self.context.root):
            if not name.startswith(LIVE) or not name.endswith(NOTE):
                continue
            id = name.removeprefix(LIVE).removesuffix(NOTE)
            here = LIVE + id if os.path.isdir(self.context.driver.directory(LIVE + id)) else id
            if not os.path.isdir(self.context.driver.directory(here)):
                unlink(self._note(id))
                continue
            lock = _lock(self.context.driver.directory(here))
            if lock is None:
                continue
            try:
                self._recover(id, here)
            finally:
                os.close(lock)

    def is_half_done(self, num: int) -> bool:
        """Whether a note names the active snapshot with this number."""
        notes = [name for name in os.listdir(self.context.root) if name.startswith(LIVE) and name.endswith(NOTE)]
        found = [read_switch(os.path.join(self.context.root, name)) for name in notes]
        return any(switch is not None and switch.num == num for switch in found)

    def _recover(self, id: str, here: str) -> None:
        directory = self.context.driver.directory(here)
        switch = read_switch(self._note(id))
        if self.context.index.find_id(id) is None:
            if switch is None or not os.path.exists(os.path.join(directory, MARK)):
                self.context.driver.remove(here)
                unlink(self._note(id))
                return
            row = self.context.index.find_num(switch.num)
            if row is None or row.kind is not Kind.ACTIVE:
                raise FailedPrecondition(
                    f"{directory} belongs to a snapshot that is no longer active",
                    remedy="move it away and look into it",
                )
            former = row.id
            with contextlib.suppress(AlreadyExists):
                self._finish(id, switch)
            if switch.verb == "rollback":
                discard(self.context.driver, former)
            return
        if here != id:
            self.context.driver.publish(here, id)
        unlink(os.path.join(self.context.driver.directory(id), MARK))
        unlink(self._note(id))


def _after(row: Row) -> Usage:
    """The base of a key that goes on over the snapshot made of it."""
    held = row.usage or Usage()
    return Usage(bytes=row.base.bytes - held.bytes, inodes=row.base.inodes - held.inodes)


def _write_note(path: str, switch: Switch) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(switch._asdict(), file)
        file.flush()
        os.fsync(file.fileno())


def read_switch(path: str) -> Switch | None:
    """The content of a note; ``None`` without one, or if its writer was killed before it was whole."""
    note = read_note(path)
    try:
        return Switch(**note) if note is not None else None
    except TypeError:
        return None
