"""The verbs that look: stat, walk, usage, labels, diff, tags. None of them walks the tree of a committed snapshot."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from cowfs.errors import AlreadyExists, InvalidArgument
from cowfs.index import compare
from cowfs.index.database import Row, Tag
from cowfs.index.directory import Entry, Pair, Pending, encode
from cowfs.model import Change, Info, Kind, Usage
from cowfs.store import layers
from cowfs.store.names import check_labels, check_name
from cowfs.store.reserve import names_full
from cowfs.store.snapshots import StoreCore, _a, _sound
from cowfs.sys.faults import point

__all__ = ["LookVerbs"]


class LookVerbs(StoreCore):
    """What there is, and what changed."""

    # ------------------------------------------------------------------ looking

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
        from cowfs.store import limit_loop

        whole = self._live_usage(row) or limit_loop.used(self.driver, row.id) or self.driver.usage(row.id)
        base = self._copied(row)
        base = base if base.bytes >= 0 else Usage()  # a negative one is what live snapshots hold (cowfs.store.live)
        return Usage(bytes=max(0, whole.bytes - base.bytes), inodes=max(0, whole.inodes - base.inodes))

    def _live_usage(self, row: Row) -> Usage | None:
        return None

    @names_full
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
        with self.index.write() as change:
            row = self.resolve(name)
            merged = {**({} if replace else row.labels), **labels}
            kept = {key: value for key, value in merged.items() if value is not None}
            now = max(time.time_ns(), row.updated + 1)  # a clock that went backwards changes nothing
            change.set_labels(row.num, kept, now)
            point("update.recorded")
        return self.resolve(name).info()

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
        return compare.compare(pending, old, new, self.same_data)

    @property
    def same_data(self) -> compare.SameData:
        """Compares the bytes of two files in their layers."""
        return layers.SameData(self.driver, self.index)

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

    @names_full
    def tag(self, name: str, target: str, *, config: str | None = None, move: bool = True) -> Tag:
        """Name a committed snapshot (once more).

        Args:
            name: the tag.
            target: a committed snapshot, or a tag.
            config: the image's configuration, a JSON document kept with the tag as it is; by default the one of the
                image that ``target`` is or was made from.
            move: whether a tag of that name may be moved here.

        Raises:
            AlreadyExists: a snapshot of that name; or a tag, and it may not be moved.
            InvalidArgument: a bad name, or a target that is not committed.
        """
        check_name(name, "tag")
        row = self.resolve(target)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"{target!r} is {_a(row.kind)}, a tag names committed ones", remedy="commit it first")
        kept = self._config_at(target, row) if config is None else config
        with self.index.write() as change:
            self._free(name, for_tag=True)
            self._parent(row.name, row.num)
            had = self.index.tag(name)
            if had is not None and not move:
                raise AlreadyExists(f"the tag {name!r} exists", remedy=f"cowfs rm {name} drops it")
            if config is None and target == row.name and had is not None and had.target == row.name and had.config:
                kept = had.config  # the tag stays where it is
            change.set_tag(name, row.num, kept)
        tag = self.index.tag(name)
        assert tag is not None
        return tag

    def config(self, name: str) -> str:
        """The configuration of an image: a JSON document (OCI image-spec, config.md) byte for byte, "" for a plain tree.

        Args:
            name: a tag; or a snapshot, then the one of the image that it was made from.

        Raises:
            NotFound: no such key, name or tag.
        """
        row: Row | None = self.resolve(name)
        found = self._config_at(name, row)
        while not found and row is not None and row.parent is not None:
            row = self.index.by_num(row.parent)
            found = self._config_at(row.name, row)
        return found
