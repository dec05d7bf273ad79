"""Snapshots of what is being written: snapshot, rollback, fork.

A snapshot re-parents its key: the layer written so far becomes a committed snapshot, and the key goes on over a new,
empty layer. When our server has the key mounted it switches layers itself, between two requests
(:mod:`cowfs.mounting.verbs.live`); nobody's descriptors break.

Order, so that a kill at any point leaves the state before or the state after:

1. ``live-ID`` is made, filled and locked, and ``live-ID.json`` beside it notes what it is for;
2. the server leaves its mark in it and switches (nothing was written to it before);
3. one transaction writes the rows and renames it to ``layers/ID``.

===========================  ========================================================
found with the note          what :meth:`LiveVerbs.recover` does, at each open and gc
===========================  ========================================================
the directory, locked        nothing: somebody is at it
the directory, no mark       deletes it: the state before
the directory, marked        carries on with step 3: the state after
the directory, a row         removes the note: the transaction was committed
no directory                 removes the note
===========================  ========================================================

The directory is called ``live-ID``, or ``layers/ID`` when the transaction was lost after the rename.

The limit of a key counts what was written since prepare, so what its live snapshots hold is kept in the row as a
negative base.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

from cowfs.errors import AlreadyExists, CowfsError, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.index.database import Row
from cowfs.index.transaction import Committed, NameTaken
from cowfs.model import Info, Kind, Limit, Mount, Usage
from cowfs.mounting.switch_mark import MARK
from cowfs.store import layers
from cowfs.store.checking import Collected
from cowfs.store.instant import InstantVerbs
from cowfs.store.key_lock import turn
from cowfs.store.names import check_key, check_labels, new_id
from cowfs.store.reserve import names_full
from cowfs.store.staging import NEW, _lock, _make_locked, discard, read_note
from cowfs.sys import trees
from cowfs.sys.atomic import fsync_directory
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.mounting.client import MountHandle
    from cowfs.store.handle import LiveHandle

__all__ = ["LiveVerbs"]

LIVE, NOTE = "live-", ".json"
LABEL = "cowfs.snapshot-of"
"""Label of snapshots made by :meth:`LiveVerbs.snapshot`: the key they were made of."""


class _Switch(NamedTuple):
    """What ``live-ID`` is for, as its note says."""

    verb: str
    num: int
    name: str
    labels: dict[str, str]


class LiveVerbs(InstantVerbs):
    """snapshot, rollback and fork; mounts get a handle that knows them."""

    def _live(self, handle: MountHandle, key: str) -> LiveHandle:
        from cowfs.store.handle import LiveHandle

        return LiveHandle(handle, self, key)

    # -- snapshot -------------------------------------------------------------------------------

    @names_full
    def snapshot(self, key: str, name: str, *, labels: Mapping[str, str] | None = None) -> Info:
        """Make what an active snapshot holds now a committed one; the key goes on over it, mounted or not.

        Args:
            key: an active snapshot.
            name: of the committed one.
            labels: kept with it, beside ``cowfs.snapshot-of``.

        Raises:
            NotFound, AlreadyExists: as for :meth:`commit`.
            FailedPrecondition: read-only, in use by another verb, or mounted by the kernel and the driver is none that takes snapshots itself.
            Unsupported: the driver keeps whole trees, and takes no snapshots itself.
        """
        check_key(name)
        check_labels(labels or {})
        with self._turn(key):
            return self._snapshot(key, name, labels or {})

    def _snapshot(self, key: str, name: str, labels: Mapping[str, str]) -> Info:
        row = self._active(key)
        self._free(name)
        self._can_switch("snapshot")
        switch = _Switch("snapshot", row.num, name, {**row.labels, **labels, LABEL: key})
        if self.driver.capabilities.snapshots:
            self._snapshot_at_once(row, name, switch.labels, self._server_of(row, made_by="store"))
            return self.index.get(name).info()
        self._switch(row, switch, [id for _, id in self.index.chain(row.num)], "freeze")
        return self.index.get(name).info()

    @names_full
    def rollback(self, key: str, name: str, *, keep: str | None = None) -> Info:
        """Put an active snapshot, mounted or not, back to one of its ancestors; what is newer is discarded.

        Args:
            key: an active snapshot.
            name: an ancestor, or a tag of one.
            keep: make a snapshot of this name first.

        Raises:
            NotFound: no such key or name.
            InvalidArgument: not an ancestor of the key.
            FailedPrecondition: mounted by the kernel, read-only, or in use by another verb; of whole layers mounted at all.
        """
        if keep is not None:
            check_key(keep)
        with self._turn(key):
            return self._rollback(key, name, keep)

    def _rollback(self, key: str, name: str, keep: str | None) -> Info:
        row = self._active(key)
        ancestor = self.resolve(name)
        if ancestor.num not in [num for num, _ in self.index.chain(row.parent)]:
            raise InvalidArgument(f"{name!r} is not an ancestor of {key!r}", remedy=f"'cowfs log {key}' shows them")
        self._can_switch("rollback")
        if self.driver.capabilities.whole and (where := self.mounted_at(key)) is not None:
            raise FailedPrecondition(
                f"{key!r} is mounted at {where}: the driver {self.driver.name} puts back what is not mounted",
                remedy=f"cowfs umount {where}",
            )
        if keep is not None:
            self._snapshot(key, keep, {})
            row = self._active(key)
        switch = _Switch("rollback", row.num, ancestor.name, {})
        chain = [id for _, id in self.index.chain(ancestor.num)]
        base, _ = self._base_at(row, ancestor)
        self._switch(
            row,
            switch,
            chain,
            "rollback",
            layer=self.driver.tree(ancestor.id),
            base={"bytes": base.bytes, "inodes": base.inodes},
            lowers=[self.driver.tree(id) for _, id in self.index.chain(row.parent)],
            num=ancestor.num,
            index=self.index.path,
        )
        if not os.path.isdir(self.driver.directory(row.id)):
            return self.index.get(key).info()
        discard(self.driver, row.id)
        return self.index.get(key).info()

    def fork(
        self,
        name: str,
        *keys: str,
        size: str | int | None = None,
        inodes: str | int | None = None,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> dict[str, tuple[Mount, ...]]:
        """Prepare many active snapshots of one parent. Each is made in one step; all of them are not.

        Args:
            name: the parent: a committed snapshot, or a tag.
            keys: of the snapshots to be made.
            size, inodes: the limit of each: bytes or "2G"; a count or "100k".
            labels: kept with each.
            mount_type: of the records returned, as for :meth:`mounts`.

        Returns:
            Mount records by key.

        Raises:
            NotFound: no such parent.
            AlreadyExists: a key is taken; those before it in the list were made.
            InvalidArgument: a bad key, label or limit.
        """
        for key in keys:
            self._free(key)
        return {
            key: self.prepare(key, name, size=size, inodes=inodes, labels=labels, mount_type=mount_type) for key in keys
        }

    def limit(
        self,
        name: str,
        *,
        size: str | int | EllipsisType | None = ...,
        inodes: str | int | EllipsisType | None = ...,
    ) -> Limit:
        """Tell the limit of a snapshot, mounted or not; with arguments, change it first, for this mount and all to come.

        Args:
            name: a key; to look, also a name or a tag.
            size: bytes, or "4G"; None for no limit; left out: as it was.
            inodes: a count, or "100k"; likewise.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: not a size or count, or a snapshot that is not active.
            FailedPrecondition: its mount cannot be bounded.
        """
        if isinstance(size, EllipsisType) and isinstance(inodes, EllipsisType):
            return super().limit(name)
        with self._turn(name):
            return super().limit(name, size=size, inodes=inodes)

    @contextlib.contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        """No other live verb is at a key meanwhile, and none that was killed has left it half done."""
        with turn(self.root, key):
            self.recover()
            yield

    def _commit(self, key: str, name: str, **options: Any) -> Row:
        with turn(self.root, key):
            return super()._commit(key, name, **options)

    def _remove(self, row: Row, **options: Any) -> None:
        with turn(self.root, row.name):
            super()._remove(row, **options)

    def _base_at(self, row: Row, ancestor: Row) -> tuple[Usage, bool]:
        """The base that a key has over one of its ancestors, and whether they share a limit: its own snapshots count for it."""
        if self.driver.capabilities.whole:
            return self._base_at_once(row, ancestor)
        under = row
        for num, _ in self.index.chain(row.parent):
            one = self.index.by_num(num)
            if not under.shares_limit:
                break
            if num == ancestor.num:
                return _after(one), True
            under = one
        return Usage(), False

    def _can_switch(self, verb: str) -> None:
        if not (self.driver.capabilities.live or self.driver.capabilities.snapshots):
            raise Unsupported(
                f"the driver {self.driver.name} keeps whole trees: no {verb}", remedy="use commit and prepare"
            )

    # -- the switch -----------------------------------------------------------------------------

    def _switch(self, row: Row, switch: _Switch, parents: list[str], verb: str, **more: Any) -> None:
        server = self._server_of(row, made_by="store")
        if server is not None:
            try:
                self._make_and_switch(row, switch, parents, server, verb, more)
                return
            except CowfsError:
                if self._server_of(row, made_by="store") is not None or self.index.by_num(row.num) != row:
                    raise
                # it was unmounted just now, and switched nothing
        with layers.hold(self.driver, row, switch.verb):
            self._make_and_switch(row, switch, parents, None, verb, more)

    def _make_and_switch(
        self,
        row: Row,
        switch: _Switch,
        parents: list[str],
        server: dict[str, Any] | None,
        verb: str,
        more: dict[str, Any],
    ) -> None:
        id = new_id()
        driver = self.driver
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
                    # it switched, and ended before it could say so
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

    def _finish(self, id: str, switch: _Switch) -> None:
        """Step 3: the rows, and the directory's final name."""
        row = self.index.by_num(switch.num)
        name = switch.name
        if switch.verb == "rollback":
            self._finish_rollback(id, row, switch)
        elif not self._finish_snapshot(id, row, switch):  # too late to go back
            name = f"{name}.{id}"
            self._finish_snapshot(id, row, switch._replace(name=name))
        unlink(os.path.join(self.driver.directory(id), MARK))
        unlink(self._note(id))
        if name != switch.name:
            raise AlreadyExists(
                f"the name {switch.name!r} was taken meanwhile", remedy=f"the snapshot is called {name}"
            )

    def _note(self, id: str) -> str:
        return os.path.join(self.root, f"{LIVE}{id}{NOTE}")

    def _finish_snapshot(self, id: str, row: Row, switch: _Switch) -> bool:
        """Returns whether the name was free."""
        self.driver.settle(row.id)
        scanned = self._scan(row, layers.KeptDigests.load(self.driver, row.id))
        if self.driver.fsync:
            trees.sync_tree(self.driver.tree(row.id))
        base = Usage(bytes=row.base.bytes - scanned.usage.bytes, inodes=row.base.inodes - scanned.usage.inodes)
        try:
            with self.index.write() as change:
                held = Committed(usage=scanned.usage, root=scanned.root, records=scanned.pending.new)
                change.commit_active(row.num, switch.name, switch.labels, held)
                change.add_snapshot(
                    id=id,
                    name=row.name,
                    kind=Kind.ACTIVE,
                    parent=(row.num, row.depth),
                    labels=row.labels,
                    limit=self.index.by_num(row.num).limit,  # it may have been changed meanwhile
                    base=base,
                    shares_limit=True,
                    created=row.created,
                    config=self.index.config_of(row.num),
                )
                self._publish(id)
        except NameTaken:
            return False
        point("switch.committed")
        return True

    def _finish_rollback(self, id: str, row: Row, switch: _Switch) -> None:
        ancestor = self.index.get(switch.name)
        base, shares_limit = self._base_at(row, ancestor)
        with self.index.write() as change:
            change.stand_on(row.num, (ancestor.num, ancestor.depth), base=base, shares_limit=shares_limit, id=id)
            self._publish(id)
        point("switch.committed")

    def _publish(self, id: str) -> None:
        """The final name, inside the transaction that writes the row."""
        point("switch.recorded")
        if os.path.isdir(self.driver.directory(LIVE + id)):  # else a killed process had come so far
            self.driver.publish(LIVE + id, id)
        if self.driver.fsync:
            fsync_directory(f"{self.root}/layers")
            fsync_directory(self.root)
        point("switch.renamed")

    # -- after a kill ---------------------------------------------------------------------------

    def recover(self) -> None:
        """Finish, or take back, what killed processes left half done. Called by :meth:`open` and :meth:`gc`."""
        if self.index.refused:
            return
        for name in os.listdir(self.root):
            if not name.startswith(LIVE) or not name.endswith(NOTE):
                continue
            id = name.removeprefix(LIVE).removesuffix(NOTE)
            here = LIVE + id if os.path.isdir(self.driver.directory(LIVE + id)) else id
            if not os.path.isdir(self.driver.directory(here)):
                unlink(self._note(id))
                continue
            lock = _lock(self.driver.directory(here))
            if lock is None:
                continue
            try:
                self._recover(id, here)
            finally:
                os.close(lock)

    def is_half_done(self, key: str) -> bool:
        """Whether a verb on a key was killed, or had no room, and is still to be finished: a note tells of it.

        Args:
            key: an active snapshot.

        Raises:
            NotFound: no such key.
        """
        num = self._keyed(key).num
        notes = [name for name in os.listdir(self.root) if name.startswith(LIVE) and name.endswith(NOTE)]
        found = [_read_note(os.path.join(self.root, name)) for name in notes]
        return any(switch is not None and switch.num == num for switch in found)

    def _recover(self, id: str, here: str) -> None:
        directory = self.driver.directory(here)
        switch = _read_note(self._note(id))
        if self.index.find_id(id) is None:
            if switch is None or not os.path.exists(os.path.join(directory, MARK)):
                self.driver.remove(here)
                unlink(self._note(id))
                return
            row = self.index.find_num(switch.num)
            if row is None or row.kind is not Kind.ACTIVE:
                raise FailedPrecondition(
                    f"{directory} belongs to a snapshot that is no longer active",
                    remedy="move it away and look into it",
                )
            former = row.id
            with contextlib.suppress(AlreadyExists):
                self._finish(id, switch)
            if switch.verb == "rollback":
                discard(self.driver, former)
            return
        if here != id:
            self.driver.publish(here, id)
        unlink(os.path.join(self.driver.directory(id), MARK))
        unlink(self._note(id))

    def gc(self) -> Collected:
        """Delete what nothing records: layers and records of snapshots that are gone, leftovers of killed processes.

        Each thing is deleted for itself; a kill leaves the rest for the next time. Takes as long as there are layers to delete;
        other verbs go on meanwhile.

        Returns:
            What was deleted.

        Raises:
            OSError: a file of the store cannot be deleted.
        """
        self.recover_with_room()
        return super().gc()


def _after(row: Row) -> Usage:
    """The base of a key that goes on over the snapshot made of it."""
    held = row.usage or Usage()
    return Usage(bytes=row.base.bytes - held.bytes, inodes=row.base.inodes - held.inodes)


def unlink(path: str) -> None:
    """Remove a file that may be gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _write_note(path: str, switch: _Switch) -> None:
    with open(path, "x", encoding="utf-8") as file:
        json.dump(switch._asdict(), file)
        file.flush()
        os.fsync(file.fileno())


def _read_note(path: str) -> _Switch | None:
    """What a note says; ``None`` where there is none, or its writer was killed before it was whole."""
    note = read_note(path)
    try:
        return _Switch(**note) if note is not None else None
    except TypeError:
        return None
