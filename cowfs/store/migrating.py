"""A store with another driver: everything that it holds is copied into a new store, which then takes its place.

Strategy. Snapshots are copied in the order of their depth, each in one transaction, with its name, labels, times, limit and
configuration; so a new store that a killed process left has some of them whole, and the next attempt goes on from
there. A layer that is exported as its archive is unpacked again from it, so its digests stay; any other is written as
the difference of two trees that the index knows, through a merged view (:mod:`cowfs.store.layer_merge`), which can hold
any tree of a mount. Active snapshots are copied anew by every attempt, since they change without a record.

In place. The new store is made beside the old one, as ``ROOT.migrating``; the two directories are exchanged in one step
(renameat2(2), RENAME_EXCHANGE), and the old one is deleted. A process that is killed before the exchange leaves the old
store as it was, one that is killed after it the new one, and beside it an old one that the next attempt deletes.

Active snapshots and views are locked from beginning to end. A snapshot made or removed by another process meanwhile is
found after the exchange, which is then undone; a process that has had the old store open all the time must be ended
first.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING
from cowfs.driver import registry
from cowfs.errors import Corrupt, CowfsError, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.index import compare
from cowfs.index.database import Index, Row
from cowfs.index.directory import Pending, decode, lookup
from cowfs.index.records import Tag
from cowfs.index.transaction import Committed
from cowfs.model import Change, Kind, Usage
from cowfs.row.view import View
from cowfs.store import layers
from cowfs.store.key_lock import turn
from cowfs.store.layer_merge import copy_changes
from cowfs.store.layers import known_digest
from cowfs.store.names import new_id
from cowfs.store.opening import INDEX, default_root, must_run
from cowfs.store.owners import mark, policy_of
from cowfs.store.reserve import FULL, no_room
from cowfs.store.services import Services
from cowfs.store.staging import Staged, staged
from cowfs.sys import atomic, files, trees
from cowfs.sys.faults import point
from cowfs.sys.mounts import mountinfo
from cowfs.union import Options

if TYPE_CHECKING:
    from cowfs.index.scan import KnownDigest, Scanned

__all__ = ["SUFFIX", "Migrated", "migrate"]

SUFFIX = ".migrating"
_OWN = (
    "index.db",
    "layers",
    "empty",
    "live.lock",
    "reserve",
    "new-",
    "rm-",
    "live-",
    "squash-",
    "row-block",
    "images-erofs",
)
"""The names in a store's directory that are its own start with these; anything else goes along to the new one."""

_TURN = "\0migrate"  # no key has this name

_ELSEWHERE = "name a place for the new store: cowfs migrate --to DRIVER DIR"

Progress = Callable[[str, int, int], object]
"""Told (the name of a snapshot, how many are done, how many there are)."""


@record(frozen=True, slots=True, kw_only=True)
class Migrated:
    """The result of a migration.

    Attributes:
        root: the new store's directory.
        driver: its driver.
        copied: the number of snapshots that this attempt copied.
        snapshots: the number of all snapshots.
    """

    root: str
    driver: str
    copied: int
    snapshots: int


def migrate(
    root: str | os.PathLike[str] | None,
    to: str,
    target: str | os.PathLike[str] | None,
    *,
    cut_times: bool,
    fsync: bool,
    progress: Progress | None,
) -> Migrated:
    """As :meth:`cowfs.Store.migrate`."""
    path = os.path.abspath(os.fspath(root) if root is not None else default_root())
    place = os.path.abspath(target) if target is not None else path + SUFFIX
    if target is None:
        if any(entry.target == os.fsencode(os.path.realpath(path)) for entry in mountinfo()):
            raise InvalidArgument(
                f"{path} is a mount point, and cannot be exchanged with a store beside it",
                remedy=_ELSEWHERE,
            )
        _try_exchange(os.path.dirname(path))
        done = _after_exchange(path, place, to, fsync)
        if done is not None:
            return done
    with Services.open(path, create=False, fsync=fsync) as source, ExitStack() as held:
        _refuse(source, to)
        if not held.enter_context(turn(path, _TURN, wait=False)):
            raise FailedPrecondition(f"another process is moving the store {path}", remedy="wait for it")
        for row in source.context.index.rows():
            if row.kind is not Kind.COMMITTED:
                held.enter_context(layers.hold(source.context.driver, source.context.index, row, "migrate"))
        if target is None:
            must_run(registry.load(to), path)
        with Services.open(place, driver=to, fsync=fsync) as into:
            try:
                copied = _Move(source, into, cut_times).run(progress)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise no_room(error, place) from error
            count = sum(1 for _ in into.context.index.rows())
        before = _facts(source.context.index)
        if target is not None:
            return Migrated(root=place, driver=to, copied=copied, snapshots=count)
        source.context.index.close()  # its files are found by their path
        point("migrate.copied")
        _exchange(path, place)
        point("migrate.exchanged")
        with _index(place) as old:
            if _facts(old) != before:
                _exchange(path, place)
                raise FailedPrecondition("the store was changed meanwhile", remedy="end who uses it, and try again")
    _delete_old(path, place, fsync)
    return Migrated(root=path, driver=to, copied=copied, snapshots=count)


def _refuse(source: Services, to: str) -> None:
    """Refuse a store that cannot be moved.

    Raises:
        InvalidArgument: it has the driver already.
        Corrupt: a snapshot is in quarantine.
        FailedPrecondition: the store is read-only.
    """
    if source.context.driver.name == to:
        raise InvalidArgument(f"the store {source.context.root} has the driver {to} already")
    damaged = source.context.index.damaged()
    if damaged:
        raise Corrupt(
            f"{damaged[0].name!r} is in quarantine: {damaged[0].damage}",
            remedy="restore the layer and 'cowfs check --repair', or remove it",
        )
    if source.context.index.refused:
        raise FailedPrecondition(f"the store {source.context.root} can only be read", remedy="run as its owner")


def _facts(index: Index) -> tuple[list[Row], list[Tag]]:
    return list(index.rows()), index.tags()


@contextmanager
def _index(root: str) -> Iterator[Index]:
    index = Index(os.path.join(root, INDEX))
    try:
        yield index
    finally:
        index.close()


def _exchange(path: str, place: str) -> None:
    files.rename2(files.AT_FDCWD, os.fsencode(path), files.AT_FDCWD, os.fsencode(place), files.RENAME_EXCHANGE)
    atomic.fsync_directory(os.path.dirname(path))


def _try_exchange(directory: str) -> None:
    """Check that the file system can exchange two directories.

    Raises:
        Unsupported: it cannot.
    """
    with tempfile.TemporaryDirectory(prefix=".cowfs-", dir=directory) as probe:
        for name in ("one", "two"):
            os.mkdir(f"{probe}/{name}")
        try:
            _exchange(f"{probe}/one", f"{probe}/two")
        except OSError as error:
            raise Unsupported(
                f"the file system of {directory} cannot exchange two directories: {error.strerror}", remedy=_ELSEWHERE
            ) from None


def _after_exchange(path: str, place: str, to: str, fsync: bool) -> Migrated | None:
    """Finish the exchange of a killed process; None if there was none."""
    try:
        with _index(place) as old, _index(path) as now:
            there, beside = now.meta("driver"), old.meta("driver")
            count = sum(1 for _ in now.rows())
    except (CowfsError, FileNotFoundError):
        return None
    if there == to and beside not in (to, None):
        _delete_old(path, place, fsync)
        return Migrated(root=path, driver=to, copied=0, snapshots=count)
    if beside not in (to, None):
        raise InvalidArgument(
            f"{place} is a half-made move of {path} to the driver {beside}",
            remedy=f"finish it: cowfs migrate --to {beside}; or delete that directory",
        )
    return None


def _delete_old(path: str, place: str, fsync: bool) -> None:
    """Delete the old store, which is at ``place`` now; foreign files in it are deleted, too."""
    for name in os.listdir(place):
        if not name.startswith(_OWN) and not os.path.lexists(f"{path}/{name}"):
            os.rename(f"{place}/{name}", f"{path}/{name}")
    atomic.fsync_directory(path)
    point("migrate.carried")
    with Services.open(place, create=False, fsync=fsync) as old:
        for id in os.listdir(f"{place}/layers"):
            old.context.driver.remove(id)
    trees.remove_tree(place)


class _Move:
    """One attempt to copy a store into another."""

    def __init__(self, source: Services, into: Services, cut_times: bool) -> None:
        self.source, self.into = source, into
        self.cut_times = cut_times
        self.made: dict[int, Row] = {}  # number in the old store -> snapshot in the new one

    def run(self, progress: Progress | None) -> int:
        """Copy the missing snapshots, and return their number."""
        rows = sorted(
            self.source.context.index.rows(), key=lambda row: (row.kind is not Kind.COMMITTED, row.depth, row.num)
        )
        self._drop_others(rows)
        self.into.house.gc()
        copied = 0
        for at, row in enumerate(rows):
            if progress is not None:
                progress(row.name, at, len(rows))
            there = self.into.context.index.find(row.name)
            if there is None:
                self._copy(row)
                copied += 1
                there = self.into.context.index.get(row.name)
            self.made[row.num] = there
            point("migrate.snapshot")
        with self.into.context.index.write() as change:
            for row in rows:
                change.restore(self.made[row.num].num, labels=row.labels, created=row.created, updated=row.updated)
            for tag in self.source.context.index.tags():
                change.set_tag(tag.name, self.into.context.index.get(tag.target).num, tag.config, created=tag.created)
            change.record_event(
                "store", "migrate", self.source.context.driver.name, {"to": self.into.context.driver.name}
            )
        return copied

    def _drop_others(self, rows: list[Row]) -> None:
        """Remove outdated and active snapshots of an earlier attempt."""
        for tag in self.into.context.index.tags():
            self.into.naming.untag(tag.name)
        wanted = {row.name: row for row in rows if row.kind is Kind.COMMITTED}
        for there in sorted(self.into.context.index.rows(), key=lambda row: -row.depth):
            row = wanted.get(there.name)
            same = row is not None and (row.created, row.parent_name) == (there.created, there.parent_name)
            if not same or there.kind is not Kind.COMMITTED:
                self.into.snapshots.remove(there.name)

    def _copy(self, row: Row) -> None:
        """Copy one snapshot, whose parent is copied."""
        source, into = self.source, self.into
        driver, whole = into.context.driver, into.context.driver.capabilities.whole
        parent = self.made[row.parent] if row.parent is not None else None
        chain = [id for _, id in into.context.index.chain(parent.num if parent is not None else None)]
        copied = [] if row.kind is Kind.VIEW and whole else chain
        with staged(driver, into.context.index, new_id()) as layer:
            point("create.made")
            base = driver.create(layer.staged, copied, row.limit)
            if whole and chain:
                layers.mark_copied(driver, layer.staged, chain[0], only_root=not copied)
            point("create.filled")
            policy = policy_of(source.context.driver.directory(row.id))
            if policy != "fail":
                mark(driver.directory(layer.staged), policy)
            archived = source.archived.is_archived(row) and not driver.capabilities.time_step
            known: KnownDigest | None = None
            if archived:
                known = self._unpack(row, parent, layer)
            elif row.kind is not Kind.VIEW:
                known = self._write(row, chain, layer)
            num = into.context.index.reserve()
            committed = None
            if row.kind is Kind.COMMITTED:
                driver.freeze(layer.staged)
                scanned = into.scanning.scan_at(layer.staged, num, parent, known, base)
                if scanned.held is not None:
                    driver.note(layer.staged, scanned.held, scanned.sums or ())
                committed = self._committed(row, scanned, archived)
            if driver.fsync:
                with driver.open_tree(layer.staged) as fd:
                    files.syncfs(fd)
            point("create.synced")
            own = Usage() if source.context.driver.capabilities.whole else row.base
            form = source.context.index.diff_form(row.num)
            with into.context.index.write() as change:
                change.add_snapshot(
                    num=num,
                    id=layer.id,
                    name=row.name,
                    kind=row.kind,
                    parent=None if parent is None else (parent.num, parent.depth),
                    labels=row.labels,
                    limit=row.limit,
                    base=Usage(bytes=base.bytes + own.bytes, inodes=base.inodes + own.inodes),
                    shares_limit=row.shares_limit,
                    created=row.created,
                    config=source.context.index.config_of(row.num),
                    committed=committed,
                )
                if committed is not None and committed.diff_id is not None and form is not None:
                    change.set_archive(num, committed.diff_id, committed.chain_id, form=form)
                point("create.recorded")
                layer.publish()
                point("create.renamed")
        point("create.committed")

    def _committed(self, row: Row, scanned: Scanned, archived: bool) -> Committed:
        is_one = archived or not self.source.archived.is_archived(
            row
        )  # else it is not exported as its archive any more
        return Committed(
            usage=scanned.usage,
            root=scanned.root,
            records=scanned.pending.new,
            diff_id=row.diff_id if is_one else None,
            chain_id=row.chain_id if is_one else None,
        )

    def _unpack(self, row: Row, parent: Row | None, layer: Staged) -> KnownDigest:
        """Unpack a layer's own archive again."""
        from cowfs.archive import ApplyOptions

        source, into = self.source, self.into
        policy = policy_of(source.context.driver.directory(row.id))
        with tempfile.TemporaryFile(dir=into.context.root) as spool:
            source.exporting.write_layer(row, spool, "none", None)
            spool.seek(0)
            _, digests = into.applying.unpack(
                layer.staged, spool, into.scanning.content_of(parent), ApplyOptions(owners=policy), row.diff_id, None
            )
        point("apply.unpacked")
        return lambda _, st: known_digest(digests.get(st.st_ino))

    def _write(self, row: Row, chain: list[str], layer: Staged) -> KnownDigest:
        """Write a layer's changes, from the index."""
        source, into = self.source, self.into
        pending = Pending(source.context.index)
        after = source.scanning.tree(row, pending)
        before = source.context.index.by_num(row.parent).root if row.parent is not None else None
        same = layers.SameData(source.context.driver, source.context.index)
        changes = list(compare.changes_with_links(pending, before, after, same))
        if not any(change.path == b"" for change, _ in changes):
            changes.insert(0, (Change(path=b"", kind="changed", type="dir"), None))
        own = [id for _, id in source.context.index.chain(row.num)]
        with ExitStack() as held:
            lowers = _trees(source, own[:1] if source.context.driver.capabilities.whole else own, held)
            form, row_size = source.context.driver.form.name, source.context.driver.capabilities.row or None
            reading = View(lowers, options=Options(form=form, readonly=True, row=row_size))
            held.callback(reading.close)
            driver = into.context.driver
            beneath = [] if driver.capabilities.whole else _trees(into, chain, held)
            held.enter_context(driver.open_tree(layer.staged))
            options = Options(form=driver.form.name, volatile=True)
            writing = View(
                beneath or [f"{into.context.root}/empty"],
                driver.tree(layer.staged),
                driver.work(layer.staged),
                options=options,
            )
            held.callback(writing.close)
            step = 0 if self.cut_times else driver.capabilities.time_step
            try:
                copy_changes(reading, writing, changes, time_step=step)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                raise Unsupported(
                    f"{row.name!r} cannot be held by the driver {driver.name} here: {error.strerror}",
                    remedy="choose another",
                ) from None

        def known(path: bytes, _: os.stat_result) -> bytes | None:
            found = lookup(pending, after, path)
            return decode(found).digest if found is not None else None

        return known


def _trees(store: Services, ids: list[str], held: ExitStack) -> list[str]:
    """The paths of some layers' trees, held open until the end."""
    for id in ids:
        held.enter_context(layers.opened_tree(store.context.driver, id))
    return [store.context.driver.tree(id) for id in ids]
