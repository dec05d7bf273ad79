"""The store: an index and a driver, put together into containerd's verbs.

Rules:

1. A verb looks first, then does what takes long without any lock (copying, reading a layer,
   packing records), then writes in one short transaction that looks again.
2. Files precede rows: a row is committed when its directory is on the disk under its final name,
   and a directory is deleted when its row is gone. :mod:`cowfs.store.staging` has the table.
3. Whoever writes into a layer holds an exclusive flock on its tree: the server of a mount, an
   apply, a commit, a remove. So one of them is told who the other is.
4. Nothing here walks a tree of a committed snapshot: the index knows.

Threads: a store may be used by any number of threads and, opened anew, of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from cowfs.driver.interface import Driver
from cowfs.driver.plan import MountPlan
from cowfs.errors import (
    AlreadyExists,
    Corrupt,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from cowfs.index.database import Row
from cowfs.index.transaction import Committed, NameTaken
from cowfs.model import SMALLEST_LIMIT, Info, Kind, Limit, Mount, Usage, parse_count, parse_size
from cowfs.store import layers, limit_loop
from cowfs.store.base import OpenStore
from cowfs.store.names import check_key, check_labels, new_id
from cowfs.store.reserve import names_full
from cowfs.store.staging import discard, finish, staged, sweep
from cowfs.sys import trees
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.index import scan

__all__ = ["MAX_DEPTH", "StoreCore"]

_T = TypeVar("_T")

MAX_DEPTH = 2000
"""Layers in a chain: what one mount opens at most."""


class StoreCore(OpenStore):
    """The verbs that change snapshots."""

    # ------------------------------------------------------------------- making

    def prepare(
        self,
        key: str,
        parent: str | None = None,
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """Make a writable snapshot.

        Args:
            key: its key.
            parent: a committed snapshot, or a tag; None: an empty tree.
            size, inodes: the limit on what it may hold itself: bytes or "2G"; a count or "100k".
            labels: kept with it.
            mount_type: of the records returned, as for :meth:`mounts`.

        Returns:
            How to mount it.

        Raises:
            AlreadyExists: the key is taken.
            NotFound: no such parent.
            InvalidArgument: a bad key, label or limit; a parent that is not committed.
            Corrupt: the parent is in quarantine.
        """
        limit = Limit(
            bytes=None if size is None else parse_size(size, least=SMALLEST_LIMIT),
            inodes=None if inodes is None else parse_count(inodes),
        )
        row = self._create(key, parent, Kind.ACTIVE, limit, labels or {})
        return self._mounts(row, mount_type)

    def view(
        self,
        key: str,
        parent: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """Make a read-only snapshot, in one step.

        Args:
            key: its key.
            parent: a committed snapshot, or a tag; None: an empty tree.
            labels: kept with it.
            mount_type: of the records returned, as for :meth:`mounts`.

        Returns:
            How to mount it.

        Raises:
            AlreadyExists: the key is taken.
            NotFound: no such parent.
            InvalidArgument: a bad key or label; a parent that is not committed.
        """
        return self._mounts(self._create(key, parent, Kind.VIEW, Limit(), labels or {}), mount_type)

    @names_full
    def _create(self, key: str, parent: str | None, kind: Kind, limit: Limit, labels: Mapping[str, str]) -> Row:
        check_key(key, "key")
        check_labels(labels)
        above = self._parent(parent) if parent is not None else None
        self._free(key)
        config = self._config_at(parent, above)
        chain = [id for _, id in self.index.chain(above.num if above is not None else None)]
        if len(chain) >= MAX_DEPTH:
            raise InvalidArgument(f"{parent!r} has {len(chain)} layers, {MAX_DEPTH} are allowed", remedy="cowfs squash")
        with staged(self.driver, new_id()) as layer:
            point("create.made")
            # A view of a whole layer is mounted from the parent itself: nothing is copied.
            copied = [] if kind is Kind.VIEW and self.driver.capabilities.whole else chain
            try:
                base = self.driver.create(layer.staged, copied, limit)
            except FileNotFoundError:
                if above is not None:
                    self._gone(above)
                raise
            if self.driver.capabilities.whole and chain:
                layers.mark_copied(self.driver, layer.staged, chain[0], only_root=not copied)
            point("create.filled")
            point("create.synced")
            with self.index.write() as change:
                self._free(key)
                if above is not None:
                    self._parent(above.name, above.num)
                change.add_snapshot(
                    id=layer.id,
                    name=key,
                    kind=kind,
                    parent=None if above is None else (above.num, above.depth),
                    labels=labels,
                    limit=limit,
                    base=base,
                    config=config,
                )
                point("create.recorded")
                layer.publish()
                point("create.renamed")
        point("create.committed")
        return self.index.get(key)

    def _config_at(self, name: str | None, row: Row | None) -> str:
        """The configuration of the image that a name means: the tag's, else the one that the snapshot was made from."""
        if name is None or row is None:
            return ""
        tag = self.index.tag(name) if name != row.name else None
        if tag is not None and tag.config:
            return tag.config
        own = self.index.config_of(row.num)
        if own is not None:
            return own
        tags = [tag for tag in self.index.tags_of(row.num) if tag.config]
        return min(tags, key=lambda tag: (tag.created, tag.name)).config if tags else ""

    def _parent(self, name: str, num: int | None = None) -> Row:
        row = self.index.get(name) if num is not None else self.resolve(name)
        if num is not None and row.num != num:
            raise NotFound(f"no snapshot {name!r}: it was replaced meanwhile")
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"{name!r} is {_a(row.kind)}, a parent must be committed", remedy="commit it first")
        _sound(row)
        return row

    def _gone(self, row: Row) -> None:
        """A file of a snapshot's layer is missing: say whether it was removed meanwhile, or has lost its layer."""
        if self.index.get(row.name).num != row.num:
            raise NotFound(f"no snapshot {row.name!r}: it was replaced meanwhile")
        problems = self.driver.check(row.id)
        if problems:
            raise Corrupt(f"{row.name!r}: {problems[0]}", remedy="run 'cowfs check'")

    def _free(self, name: str, *, for_tag: bool = False) -> None:
        """Refuse a key or name that a snapshot has, or (it would hide it) a tag."""
        if self.index.find(name) is not None:
            raise NameTaken(name)
        if not for_tag and self.index.tag(name) is not None:
            raise AlreadyExists(f"{name!r} is a tag", remedy=f"choose another name, or drop it: cowfs rm {name}")

    def _keyed(self, name: str) -> Row:
        """The row of a key or name; of a tag its error says so.

        Raises:
            NotFound: neither.
        """
        row = self.index.find(name)
        if row is None and (tag := self.index.tag(name)) is not None:
            raise NotFound(
                f"no snapshot {name!r}: it is a tag of {tag.target!r}, which is committed",
                remedy=f"'cowfs prepare KEY {name}' makes one to write in, 'cowfs view KEY {name}' one to read",
            )
        return row if row is not None else self.index.get(name)

    # ------------------------------------------------------------------- commit

    @names_full
    def commit(
        self,
        key: str,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        replace_labels: bool = False,
        digests: bool = False,
        mounted: bool = False,
    ) -> Info:
        """Make an active snapshot immutable and give it a name; the key is free again.

        Costs what changed: only the layer is read.

        Args:
            key: an active snapshot that nobody has mounted.
            name: of the committed one.
            labels: added to those of the key.
            replace_labels: ``labels`` are all that it has.
            digests: also compute the digest of each file in the layer.
            mounted: it may be mounted; the mount goes on, read-only. What is written through a descriptor that is open
                meanwhile is refused (EROFS) at the write, at fsync or at close.

        Raises:
            NotFound: no such key.
            AlreadyExists: the name is taken.
            FailedPrecondition: a view, committed already, or mounted (with ``mounted``: by the kernel, with files open
                for writing; or with ``io="passthrough"``).
        """
        return self._commit(
            key, name, labels=labels or {}, replace_labels=replace_labels, digests=digests, mounted=mounted
        ).info()

    def _commit(
        self,
        key: str,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        replace_labels: bool = False,
        digests: bool = False,
        mounted: bool = False,
    ) -> Row:
        check_key(name)
        check_labels(labels or {})
        row = self._active(key)
        if name != key:
            self._free(name)
        with self._alone(row, "commit", mounted=mounted) as alone:
            row = self._active(key, row.num)
            if alone:
                self.driver.freeze(row.id)
            else:
                self.driver.settle(row.id)
            point("commit.frozen")
            scanned = self._scan(row, layers.KeptDigests.load(self.driver, row.id, compute=digests))
            diff_id, chain_id = self._archive_of(row, scanned)
            point("commit.scanned")
            if scanned.held is not None:
                self.driver.note(row.id, scanned.held, scanned.sums or ())
            if self.driver.fsync:
                trees.sync_tree(self.driver.tree(row.id))
            point("commit.synced")
            merged = {**({} if replace_labels else row.labels), **(labels or {})}
            committed = Committed(
                usage=scanned.usage, root=scanned.root, records=scanned.pending.new, diff_id=diff_id, chain_id=chain_id
            )
            with self.index.write() as change:
                self._active(key, row.num)
                if name != key:
                    self._free(name)
                change.commit_active(row.num, name, merged, committed)
                point("commit.recorded")
        point("commit.committed")
        return self.index.get(name)

    @contextlib.contextmanager
    def _alone(self, row: Row, verb: str, *, mounted: bool, missing_ok: bool = False) -> Iterator[bool]:
        """Be the only one who changes a layer; whether it is not mounted either.

        Args:
            mounted: a mount of it is no hindrance. For a commit, it is read-only from now on.
        """
        with layers.hold(self.driver, row, verb, missing_ok=missing_ok, at_rest=verb != "remove"):
            yield True

    def _archive_of(self, row: Row, scanned: scan.Scanned) -> tuple[str | None, str | None]:
        """(diff id, chain id) of a layer that is exactly what one archive made it."""
        return None, None

    def _active(self, key: str, num: int | None = None) -> Row:
        row = self._keyed(key)
        if num is not None and row.num != num:
            raise NotFound(f"no snapshot {key!r}: it was replaced meanwhile")
        if row.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"{key!r} is {_a(row.kind)}, not active")
        _sound(row)
        return row

    def _scan(self, row: Row, known: scan.KnownDigest | None = None, *, links: bool = True) -> scan.Scanned:
        """Read a layer over its parent's tree."""
        parent = self.index.by_num(row.parent) if row.parent is not None else None
        return self._scan_at(row.id, row.num, parent, known, self._copied(row), links=links)

    def _copied(self, row: Row) -> Usage:
        """What of a layer's tree is its parent's, as far as that was copied; the base of a key may tell of more than one layer."""
        if not row.shares_limit or not self.driver.capabilities.whole or row.parent is None:
            return row.base
        return self.driver.held(self.index.by_num(row.parent).id)

    def _scan_at(
        self,
        id: str,
        num: int,
        parent: Row | None,
        known: scan.KnownDigest | None,
        copied: Usage,
        *,
        links: bool = True,
    ) -> scan.Scanned:
        from cowfs.index import scan

        base = parent.root if parent is not None else None
        form = self.driver.form
        with layers.opened_tree(self.driver, id) as fd:
            if not self.driver.capabilities.whole:
                return scan.scan_delta(fd, num=num, form=form, base=base, records=self.index, known=known, links=links)
            same = layers.Unchanged(self.driver, self.index, id, fd)
            scanned = self._scan_changes(id, num, parent, fd, same, known) if links else None
            if scanned is None:
                scanned = scan.scan_full(
                    fd, num=num, form=form, base=base, records=self.index, same=same, known=known, links=links
                )
            whole = scanned.usage
            usage = Usage(bytes=max(0, whole.bytes - copied.bytes), inodes=max(0, whole.inodes - copied.inodes))
            return replace(scanned, usage=usage, held=whole)

    def _scan_changes(
        self,
        id: str,
        num: int,
        parent: Row | None,
        fd: int,
        same: scan.SameAsParent,
        known: scan.KnownDigest | None,
    ) -> scan.Scanned | None:
        """Read a whole layer only where its driver says that it changed; None where all has to be read."""
        noted = (
            self.driver.noted(parent.id)
            if parent is not None and type(self.driver).changes is not Driver.changes
            else None
        )
        if parent is None or parent.root is None or noted is None or not noted[1]:
            return None
        from cowfs.index import rescan
        from cowfs.union.measure import Sums

        with self.driver.changes(id, parent.id) as changes, self.driver.open_tree(parent.id) as old:
            if changes is None:
                return None
            try:
                return rescan.scan_changes(
                    fd, old, paths=changes.paths, names=changes.names, sums=Sums(*noted[1]), num=num, form=self.driver.form,
                    base=parent.root, records=self.index, same=same, known=known,
                )  # fmt: skip
            except rescan.CannotTellError:
                return None

    # ------------------------------------------------------------------ removal

    @names_full
    def remove(self, name: str, *, chain: bool = False, mounted: bool = False, defer: bool = False) -> list[str]:
        """Remove a snapshot, or a tag.

        Args:
            name: a key, a name or a tag; of a tag only the tag goes.
            chain: also remove each ancestor that then has neither a tag nor a child.
            mounted: it may be mounted; the mount goes on, and its files are deleted by the first :meth:`cleanup` after it.
            defer: leave the deleting of files to :meth:`cleanup`: constant time.

        Returns:
            The names of the snapshots that were removed.

        Raises:
            NotFound: no such snapshot or tag.
            FailedPrecondition: it has children, a tag, or is mounted.
        """
        row = self.index.find(name)
        if row is None:
            tag = self.index.tag(name)
            if tag is None:
                raise NotFound(f"no snapshot or tag {name!r}", remedy="'cowfs ls' shows what there is")
            self.untag(name)
            row = self.index.find(tag.target) if chain else None
            if row is None or self.index.children(row.num) or self.index.tags_of(row.num):
                return []
        removed = []
        while True:
            parent = row.parent
            self._remove(row, mounted=mounted, defer=defer)
            removed.append(row.name)
            if not chain or parent is None:
                return removed
            row = self.index.by_num(parent)
            if self.index.children(row.num) or self.index.tags_of(row.num):
                return removed

    def _remove(self, row: Row, *, mounted: bool = False, defer: bool = False) -> None:
        with self._alone(row, "remove", mounted=mounted, missing_ok=True) as alone:
            self._freeing(lambda: self._remove_record(row))
            point("remove.committed")
            discard(self.driver, row.id, later=True)
        if (
            alone and not defer
        ):  # now that nobody has the tree open, ourselves included: not all drivers delete what is open
            finish(self.driver, row.id)

    def cleanup(self) -> list[str]:
        """Delete the files of snapshots that were removed, as far as no mount uses them any more.

        Also what killed processes left half made; the next :meth:`open` does the same.

        Returns:
            Paths of what was deleted, relative to the store.

        Raises:
            OSError: a file cannot be deleted.
        """
        return sweep(self.driver, self.index)

    def _remove_record(self, row: Row) -> None:
        with self.index.write() as change:
            now = self.index.get(row.name)
            if now.num != row.num:
                raise NotFound(f"no snapshot {row.name!r}: it was replaced meanwhile")
            children = self.index.children(row.num)
            if children:
                raise FailedPrecondition(
                    f"{row.name!r} has children: {', '.join(children)}", remedy="remove those first"
                )
            tags = self.index.tags_of(row.num)
            if tags:
                raise FailedPrecondition(
                    f"{row.name!r} is tagged {', '.join(tag.name for tag in tags)}",
                    remedy=f"cowfs rm {tags[0].name} drops the tag",
                )
            change.remove(row.num)
            point("remove.deleted")

    def _freeing(self, delete: Callable[[], _T]) -> _T:
        """Do what frees room, also on a file system without a free byte; ``delete`` may be called again."""
        return self.reserve.spend(delete, self.index.renew)

    @names_full
    def untag(self, name: str) -> None:
        """Drop a tag; the snapshot stays.

        Args:
            name: the tag.

        Raises:
            NotFound: no such tag.
        """

        def drop() -> None:
            with self.index.write() as change:
                if self.index.tag(name) is None:
                    raise NotFound(f"no tag {name!r}", remedy="'cowfs images' shows what there is")
                change.drop_tag(name)

        self._freeing(drop)

    # ------------------------------------------------------------------- mounts

    def mounts(self, key: str, *, mount_type: str | None = None) -> tuple[Mount, ...]:
        """How to mount an active snapshot or a view: records, nothing is mounted.

        Args:
            mount_type: ``kernel`` or ``fuse``; None: the kernel's where host and user may and no
                limit was asked for, else FUSE.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot.
            Unsupported: the type asked for is not possible.
        """
        return self._mounts(self._keyed(key), mount_type)

    @staticmethod
    def _mountable(row: Row) -> None:
        """Refuse what cannot be mounted, however it is asked for."""
        if row.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"{row.name!r} is committed", remedy="mount a view of it, or mount it read-only")
        _sound(row)

    def _mounts(self, row: Row, mount_type: str | None) -> tuple[Mount, ...]:
        self._at_rest(row)
        if type(self.driver).mounts is Driver.mounts:
            record = self._plan(row).record(mount_type)
            self._hand_limit(row, by_server=record.type.startswith("fuse."))
            return (record,)
        # A driver of before plans describes its mounts itself, and is given the parent for a view of a whole layer.
        self._mountable(row)
        id, *parents = [id for _, id in self.index.chain(row.num)]
        readonly = row.kind is Kind.VIEW
        if readonly and self.driver.capabilities.whole and parents:
            id, *parents = parents
        limit = row.limit.over(row.base)
        return self.driver.mounts(id, parents, readonly=readonly, limit=limit, mount_type=mount_type)

    def _at_rest(self, row: Row) -> None:
        """Bring into its directory what a limit engine keeps of an active snapshot's tree elsewhere.

        Raises:
            FailedPrecondition: it is mounted so.
        """
        if row.kind is Kind.ACTIVE and limit_loop.has_image(self.driver, row.id):
            with layers.hold(self.driver, row, "use"):
                pass

    def _hand_limit(self, row: Row, *, by_server: bool) -> None:
        """Have a snapshot's limit held by whoever will: our server, or else the driver. A mount of the kernel keeps its limit."""
        if not self.driver.capabilities.own_limit or row.kind is not Kind.ACTIVE or self.index.refused:
            return
        if not by_server or layers.kernel_mount_of(self.driver.tree(row.id)) is None:
            self.driver.limit(row.id, Limit() if by_server else row.limit)

    def _plan(self, row: Row, *, committed: bool = False) -> MountPlan:
        """How the driver has a snapshot mounted, by whichever engine; a committed one only where that is allowed."""
        if not committed or row.kind is not Kind.COMMITTED:
            self._mountable(row)
        _sound(row)
        id, *parents = [id for _, id in self.index.chain(row.num)]
        if row.kind is Kind.ACTIVE:
            layers.not_plain(self.driver, id)
        return self.driver.plan(id, parents, readonly=row.kind is Kind.VIEW, limit=row.limit.over(row.base))


# -------------------------------------------------------------------- helpers


def _sound(row: Row) -> None:
    if row.damage is not None:
        raise Corrupt(
            f"{row.name!r} is in quarantine: {row.damage}", remedy="restore the layer, then 'cowfs check --repair'"
        )


def _a(kind: Kind) -> str:
    return {Kind.ACTIVE: "active", Kind.VIEW: "a view", Kind.COMMITTED: "committed"}[kind]
