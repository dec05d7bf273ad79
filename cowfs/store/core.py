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

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from cowfs import compare, registry, scan
from cowfs.driver import Driver, Probe
from cowfs.errors import (
    AlreadyExists,
    Corrupt,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from cowfs.faults import point
from cowfs.index import Index, Row, Tag
from cowfs.model import Change, Info, Kind, Limit, Mount, Usage, parse_count, parse_size
from cowfs.store import filters as filter_language, layers
from cowfs.store.names import check_labels, check_name, new_id
from cowfs.store.staging import discard, staged, sweep
from cowfs.sys import host, trees
from cowfs.tree import Entry, Pair, Pending, encode

__all__ = ["MAX_DEPTH", "StoreCore", "default_root"]

INDEX = "index.db"
MAX_DEPTH = 2000
"""Layers in a chain: what one mount opens at most."""


def default_root() -> str:
    """Where a store is when nobody says: ``/var/lib/cowfs`` as root, the user's data directory otherwise."""
    if host.is_root_here():
        return "/var/lib/cowfs"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "cowfs")


class StoreCore:
    """The verbs about snapshots. Made by :meth:`open`; users see it as :class:`cowfs.Store`.

    Attributes:
        root: the store's directory, absolute.
        driver: the backend.
        index: the index.
        why: why this driver: what each one that is installed said, by name; empty when the store
            had one already.
    """

    def __init__(self, root: str, index: Index, driver: Driver, why: Mapping[str, Probe]) -> None:
        self.root = root
        self.index = index
        self.driver = driver
        self.why = why

    # --------------------------------------------------------------- open, close

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        driver: str = "auto",
        create: bool = True,
        fsync: bool = True,
        **options: Any,
    ) -> Self:
        """Open the store in a directory, making it on first use.

        Args:
            root: the directory; default: :func:`default_root`.
            driver: ``auto`` takes the driver that the store has, else the best one for this host.
            create: whether to make a store that is not there.
            fsync: off: a power loss may undo the latest verbs (not damage the store).
            options: the driver's own.

        Raises:
            NotFound: no store there and ``create`` is off, or no such driver.
            InvalidArgument: the directory holds something else, or the store has another driver.
            Unsupported: no driver can run here, or a newer cowfs made the store.
            Corrupt: the index is damaged.
        """
        path = os.path.abspath(os.fspath(root) if root is not None else default_root())
        _make_root(path, create)
        index = Index(os.path.join(path, INDEX), create=create, fsync=fsync)
        try:
            had = index.meta("driver")
            why: Mapping[str, Probe] = {}
            if driver == "auto":
                if had is None:
                    best, why = registry.choose(path)
                    driver = best.name
                else:
                    driver = had
            elif had is None:
                _must_run(registry.load(driver), path)
            had = had or index.set_meta("driver", driver)
            if driver != had:
                raise InvalidArgument(
                    f"the store {path} has the driver {had}, not {driver}", remedy="another driver needs a store of its own"
                )
            form = index.meta("form") or index.set_meta("form", "trusted" if host.can_trusted_xattr() else "user")
            if form == "trusted" and not host.can_trusted_xattr():
                raise Unsupported(
                    f"the layers of {path} have trusted.overlay.* attributes, which this user cannot read",
                    remedy="run as root, or use a store of your own",
                )
            made = registry.load(had)(path, form=form, fsync=fsync, **options)
            for name in ("layers", "empty"):
                os.makedirs(os.path.join(path, name), mode=0o755 if name == "empty" else 0o700, exist_ok=True)
            sweep(made, index)
        except BaseException:
            index.close()
            raise
        return cls(path, index, made, why)

    def close(self) -> None:
        """Let go of the index and the driver. Idempotent."""
        self.driver.close()
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
            bytes=None if size is None else parse_size(size), inodes=None if inodes is None else parse_count(inodes)
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
        """Make a read-only snapshot; arguments and errors as for :meth:`prepare`."""
        return self._mounts(self._create(key, parent, Kind.VIEW, Limit(), labels or {}), mount_type)

    def _create(self, key: str, parent: str | None, kind: Kind, limit: Limit, labels: Mapping[str, str]) -> Row:
        check_name(key, "key")
        check_labels(labels)
        above = self._parent(parent) if parent is not None else None
        self._free(key)
        chain = [id for _, id in self.index.chain(above.num if above is not None else None)]
        if len(chain) >= MAX_DEPTH:
            raise InvalidArgument(f"{parent!r} has {len(chain)} layers, {MAX_DEPTH} are allowed", remedy="cowfs squash")
        now = time.time_ns()
        with staged(self.driver, new_id()) as layer:
            point("create.made")
            # A view of a whole layer is mounted from the parent itself: nothing is copied.
            copied = [] if kind is Kind.VIEW and self.driver.whole else chain
            try:
                base = self.driver.create(layer.staged, copied, limit)
            except FileNotFoundError:
                if above is not None:
                    self._gone(above)
                raise
            if self.driver.whole and chain:
                layers.mark_copied(self.driver, layer.staged, chain[0], only_root=not copied)
            point("create.filled")
            point("create.synced")
            try:
                with self.index.write() as connection:
                    if above is not None:
                        self._parent(above.name, above.num)
                    connection.execute(
                        "INSERT INTO snapshots (id, name, kind, parent, depth, labels, created, updated, limit_bytes,"
                        " limit_inodes, base_bytes, base_inodes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            layer.id,
                            key,
                            kind.value,
                            None if above is None else above.num,
                            len(chain),
                            json.dumps(labels, sort_keys=True),
                            now,
                            now,
                            limit.bytes,
                            limit.inodes,
                            base.bytes,
                            base.inodes,
                        ),
                    )
                    point("create.recorded")
                    layer.publish()
                    point("create.renamed")
            except sqlite3.IntegrityError:
                raise _taken(key) from None
        point("create.committed")
        return self.index.get(key)

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

    def _free(self, name: str) -> None:
        if self.index.find(name) is not None:
            raise _taken(name)

    def resolve(self, name: str) -> Row:
        """The row of a snapshot, or of the one that a tag names.

        Raises:
            NotFound: neither.
        """
        row = self.index.find(name)
        if row is not None:
            return row
        tag = self.index.tag(name)
        if tag is None:
            raise NotFound(f"no snapshot or tag {name!r}", remedy="'cowfs ls' and 'cowfs images' show what there is")
        return self.index.get(tag.target)

    # ------------------------------------------------------------------- commit

    def commit(
        self, key: str, name: str, *, labels: Mapping[str, str] | None = None, digests: bool = False
    ) -> Info:
        """Make an active snapshot immutable and give it a name; the key is free again.

        Costs what changed: only the layer is read.

        Args:
            key: an active snapshot that nobody has mounted.
            name: of the committed one.
            labels: added to those of the key.
            digests: also compute the digest of each file in the layer.

        Raises:
            NotFound: no such key.
            AlreadyExists: the name is taken.
            FailedPrecondition: a view, committed already, or mounted.
        """
        return self._commit(key, name, labels=labels or {}, digests=digests).info()

    def _commit(
        self,
        key: str,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        digests: bool = False,
    ) -> Row:
        check_name(name)
        check_labels(labels or {})
        row = self._active(key)
        if name != key:
            self._free(name)
        with layers.hold(self.driver, row, "commit"):
            row = self._active(key, row.num)
            self.driver.freeze(row.id)
            point("commit.frozen")
            scanned = self._scan(row, layers.KeptDigests.load(self.driver, row.id, compute=digests))
            diff_id, chain_id = self._archive_of(row, scanned)
            point("commit.scanned")
            if self.driver.fsync:
                trees.sync_tree(self.driver.tree(row.id))
            point("commit.synced")
            merged = {**row.labels, **(labels or {})}
            try:
                with self.index.write() as connection:
                    self._active(key, row.num)
                    Index.add_records(connection, scanned.pending.new)
                    connection.execute(
                        "UPDATE snapshots SET name = ?, kind = 'committed', labels = ?, created = ?, updated = ?, bytes = ?,"
                        " inodes = ?, root_content = ?, root_storage = ?, diff_id = ?, chain_id = ? WHERE num = ?",
                        (
                            name,
                            json.dumps(merged, sort_keys=True),
                            *[time.time_ns()] * 2,
                            scanned.usage.bytes,
                            scanned.usage.inodes,
                            *scanned.root,
                            diff_id,
                            chain_id,
                            row.num,
                        ),
                    )
                    point("commit.recorded")
            except sqlite3.IntegrityError:
                raise _taken(name) from None
        point("commit.committed")
        return self.index.get(name)

    def _archive_of(self, row: Row, scanned: scan.Scanned) -> tuple[str | None, str | None]:
        """(diff id, chain id) of a layer that is exactly what one archive made it."""
        return None, None

    def _active(self, key: str, num: int | None = None) -> Row:
        row = self.index.get(key)
        if num is not None and row.num != num:
            raise NotFound(f"no snapshot {key!r}: it was replaced meanwhile")
        if row.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"{key!r} is {_a(row.kind)}, not active")
        _sound(row)
        return row

    def _scan(self, row: Row, known: scan.KnownDigest | None = None) -> scan.Scanned:
        """Read a layer over its parent's tree."""
        parent = self.index.by_num(row.parent) if row.parent is not None else None
        return self._scan_at(row.id, row.num, parent, known, row.base)

    def _scan_at(
        self, id: str, num: int, parent: Row | None, known: scan.KnownDigest | None, copied: Usage
    ) -> scan.Scanned:
        base = parent.root if parent is not None else None
        form = self.driver.form
        fd = os.open(self.driver.tree(id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self.driver.whole:
                return scan.scan_delta(fd, num=num, form=form, base=base, records=self.index, known=known)
            same = layers.Unchanged(self.driver, self.index, id, fd)
            scanned = scan.scan_full(fd, num=num, form=form, base=base, records=self.index, same=same, known=known)
            whole = scanned.usage
            usage = Usage(bytes=max(0, whole.bytes - copied.bytes), inodes=max(0, whole.inodes - copied.inodes))
            return replace(scanned, usage=usage)
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ removal

    def remove(self, name: str, *, chain: bool = False) -> list[str]:
        """Remove a snapshot, or a tag.

        Args:
            name: a key, a name or a tag; of a tag only the tag goes.
            chain: also remove each ancestor that then has neither a tag nor a child.

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
            if row is None or self.index.children(row.num) or self._tags_of(row):
                return []
        removed = []
        while True:
            parent = row.parent
            self._remove(row)
            removed.append(row.name)
            if not chain or parent is None:
                return removed
            row = self.index.by_num(parent)
            if self.index.children(row.num) or self._tags_of(row):
                return removed

    def _remove(self, row: Row) -> None:
        with layers.hold(self.driver, row, "remove", missing_ok=True):
            with self.index.write() as connection:
                now = self.index.get(row.name)
                if now.num != row.num:
                    raise NotFound(f"no snapshot {row.name!r}: it was replaced meanwhile")
                children = self.index.children(row.num)
                if children:
                    raise FailedPrecondition(
                        f"{row.name!r} has children: {', '.join(children)}", remedy="remove those first"
                    )
                tags = self._tags_of(row)
                if tags:
                    raise FailedPrecondition(
                        f"{row.name!r} is tagged {', '.join(tags)}", remedy=f"cowfs rm {tags[0]} drops the tag"
                    )
                connection.execute("DELETE FROM snapshots WHERE num = ?", (row.num,))
                point("remove.deleted")
            point("remove.committed")
            discard(self.driver, row.id)

    def _tags_of(self, row: Row) -> list[str]:
        return [tag.name for tag in self.index.tags("t.target = ?", (row.num,))]

    # ------------------------------------------------------------------ looking

    def stat(self, name: str) -> Info:
        """One snapshot.

        Raises:
            NotFound: no such key, name or tag.
        """
        return self.resolve(name).info()

    def exists(self, name: str) -> bool:
        """Whether a key or name is taken."""
        return self.index.find(name) is not None

    def walk(self, filters: Iterable[str] = (), *, reverse: bool = False) -> Iterator[Info]:
        """All snapshots, in the order of their making.

        Snapshots made or removed meanwhile may be there or not; no lock is held in between.

        Args:
            filters: :mod:`cowfs.store.filters`; one of them must match.

        Raises:
            InvalidArgument: a filter cannot be read.
        """
        wanted = filter_language.parse(filters)
        return self._walk(wanted, reverse)

    def _walk(self, wanted: filter_language.Filter | None, reverse: bool) -> Iterator[Info]:
        infos: Iterable[Info] = self.index.infos()
        if reverse:
            infos = reversed(list(infos))
        for info in infos:
            if wanted is None or wanted(info):
                yield info

    def chain(self, name: str) -> list[Info]:
        """A snapshot and its ancestors, nearest first."""
        return [self.index.by_num(num).info() for num, _ in self.index.chain(self.resolve(name).num)]

    def limit(self, name: str) -> Limit:
        """The limit given to :meth:`prepare`."""
        return self.resolve(name).limit

    def usage(self, name: str) -> Usage:
        """What a snapshot holds itself; parents are not counted.

        Of a committed one it is recorded; of a mounted one its server is asked; only that of an
        active one that is not mounted is counted, in its own layer.

        Raises:
            NotFound: no such key, name or tag.
        """
        row = self.resolve(name)
        if row.usage is not None:
            return row.usage
        if row.kind is Kind.VIEW:
            return Usage()
        whole = self._live_usage(row) or self.driver.usage(row.id)
        base = row.base if row.base.bytes >= 0 else Usage()  # a negative one is what live snapshots hold (cowfs.store.live)
        return Usage(bytes=max(0, whole.bytes - base.bytes), inodes=max(0, whole.inodes - base.inodes))

    def _live_usage(self, row: Row) -> Usage | None:
        return None

    def update(self, name: str, labels: Mapping[str, str | None], *, replace: bool = False) -> Info:
        """Change labels; all else about a snapshot is immutable.

        Args:
            labels: set where a value is given, removed where it is None.
            replace: drop all labels that are not named.

        Raises:
            NotFound: no such key or name.
            InvalidArgument: a bad label.
        """
        check_labels(labels)
        with self.index.write() as connection:
            row = self.resolve(name)
            merged = {**({} if replace else row.labels), **labels}
            kept = {key: value for key, value in merged.items() if value is not None}
            now = max(time.time_ns(), row.updated + 1)  # a clock that went backwards changes nothing
            connection.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE num = ?",
                (json.dumps(kept, sort_keys=True), now, row.num),
            )
            point("update.recorded")
        return self.resolve(name).info()

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
        return self._mounts(self.index.get(key), mount_type)

    def _mounts(self, row: Row, mount_type: str | None) -> tuple[Mount, ...]:
        if row.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"{row.name!r} is committed", remedy="mount a view of it")
        _sound(row)
        id, *parents = [id for _, id in self.index.chain(row.num)]
        readonly = row.kind is Kind.VIEW
        if readonly and self.driver.whole and parents:
            id, *parents = parents
        limit = row.limit
        if limit and row.base.inodes:
            limit = Limit(
                bytes=None if limit.bytes is None else limit.bytes + row.base.bytes,
                inodes=None if limit.inodes is None else limit.inodes + row.base.inodes,
            )
        return self.driver.mounts(id, parents, readonly=readonly, limit=limit, mount_type=mount_type)

    # --------------------------------------------------------------------- diff

    def diff(self, a: str, b: str | None = None) -> Iterator[Change]:
        """What changed from one snapshot to another, in path order.

        Of two committed snapshots, related or not, only the index is read (and two files that agree
        in all it knows, but are different objects without a digest). An active one's own layer is
        read first.

        Args:
            a: a key, name or tag. Alone: what it changed against its parent.
            b: likewise.

        Raises:
            NotFound: no such snapshot.
            Corrupt: records or layers are missing.
        """
        after = self.resolve(b if b is not None else a)
        if b is not None:
            before: Row | None = self.resolve(a)
        else:
            before = self.index.by_num(after.parent) if after.parent is not None else None
        pending = Pending(self.index)
        old = self._tree(before, pending) if before is not None else None
        new = self._tree(after, pending)
        return compare.compare(pending, old, new, layers.SameData(self.driver, self.index))

    def _tree(self, row: Row, pending: Pending) -> Pair:
        """The root entry of a snapshot's tree; records that are not in the index go to ``pending``."""
        _sound(row)
        if row.root is not None:
            return row.root
        if row.kind is Kind.VIEW:
            if row.parent is None:
                return encode(b"", Entry(0o40755, ref=pending.empty()))
            return self._tree(self.index.by_num(row.parent), pending)
        scanned = self._scan(row, layers.KeptDigests.load(self.driver, row.id))
        pending.new.update(scanned.pending.new)
        return scanned.root

    # --------------------------------------------------------------------- tags

    def tag(self, name: str, target: str, *, config: str | None = None, move: bool = True) -> Tag:
        """Name a committed snapshot (once more).

        Args:
            name: the tag.
            target: a committed snapshot, or a tag.
            config: the image's configuration, a JSON document kept with the tag as it is.
            move: whether a tag of that name may be moved here.

        Raises:
            AlreadyExists: a snapshot of that name; or a tag, and it may not be moved.
            InvalidArgument: a bad name, or a target that is not committed.
        """
        check_name(name, "tag")
        row = self.resolve(target)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"{target!r} is {_a(row.kind)}, a tag names committed ones", remedy="commit it first")
        with self.index.write() as connection:
            self._free(name)
            self._parent(row.name, row.num)
            had = self.index.tag(name)
            if had is not None and not move:
                raise AlreadyExists(f"the tag {name!r} exists", remedy=f"cowfs rm {name} drops it")
            kept = config if config is not None else had.config if had is not None and had.target == row.name else ""
            connection.execute(
                "INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)",
                (name, row.num, kept, time.time_ns()),
            )
        tag = self.index.tag(name)
        assert tag is not None
        return tag

    def untag(self, name: str) -> None:
        """Drop a tag; the snapshot stays.

        Raises:
            NotFound: no such tag.
        """
        with self.index.write() as connection:
            if not connection.execute("DELETE FROM tags WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"no tag {name!r}", remedy="'cowfs images' shows what there is")

    def tags(self) -> list[Tag]:
        """All tags, by name."""
        return list(self.index.tags())


# -------------------------------------------------------------------- helpers


def _make_root(path: str, create: bool) -> None:
    index, layers_dir = os.path.join(path, INDEX), os.path.join(path, "layers")
    if os.path.exists(index):
        if not os.path.getsize(index) and os.path.isdir(layers_dir) and os.listdir(layers_dir):
            raise Corrupt(f"the index {index} is empty, but there are layers", remedy="restore it from a backup")
        return
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise InvalidArgument(f"{path} is not a directory", remedy="a store is a directory")
        if os.path.exists(layers_dir):
            raise Corrupt(f"the store {path} has lost its index ({INDEX})", remedy="restore it from a backup")
        if create and any(not name.startswith(("index.db", "layers", "empty", "new-")) for name in os.listdir(path)):
            raise InvalidArgument(f"{path} holds something that is not a store", remedy="choose an empty directory")
    if not create:
        raise NotFound(f"no store at {path}", remedy="make one with 'cowfs init'")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        os.chmod(path, 0o700)
    except PermissionError:
        raise Unsupported(f"{path} cannot be made by this user", remedy="choose a place with --root DIR") from None


def _must_run(driver: type[Driver], root: str) -> None:
    probe = driver.probe(root)
    if not probe.usable:
        raise Unsupported(f"the driver {driver.name} cannot run here: {', '.join(probe.reasons)}")


def _sound(row: Row) -> None:
    if row.damage is not None:
        raise Corrupt(f"{row.name!r} is in quarantine: {row.damage}", remedy="restore the layer, then 'cowfs check --repair'")


def _taken(name: str) -> AlreadyExists:
    return AlreadyExists(f"the name {name!r} is taken")


def _a(kind: Kind) -> str:
    return {Kind.ACTIVE: "active", Kind.VIEW: "a view", Kind.COMMITTED: "committed"}[kind]

