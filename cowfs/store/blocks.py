"""Block-level differences of snapshots, out and in (:mod:`cowfs.diff.blocks`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cowfs import union
from cowfs._typed import TYPE_CHECKING, BinaryIO
from cowfs.errors import CowfsError, InvalidArgument
from cowfs.index import compare
from cowfs.index.database import Row
from cowfs.index.directory import Pending, decode, entries, join
from cowfs.model import Kind, Limit
from cowfs.row.view import View
from cowfs.store import layers
from cowfs.store.reserve import names_full
from cowfs.sys import trees

if TYPE_CHECKING:
    from cowfs.diff import blocks
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.reading import Reading
    from cowfs.store.scanning import Scanning

__all__ = ["Blocks"]

_EMPTY = bytes(32)


class Blocks:
    """Block-level differences, written out and made."""

    def __init__(self, context: Context, reading: Reading, lookup: Lookup, scanning: Scanning) -> None:
        self.context = context
        self._reading = reading
        self._lookup = lookup
        self._scanning = scanning

    def export_blocks(
        self, name: str, target: BinaryIO, *, base: str | None = None, identity: bytes | None = None
    ) -> blocks.Counts:
        """As :meth:`cowfs.Store.export_blocks`."""
        from cowfs.diff import blocks

        after = self._reading.resolve(name)
        before: Row | None = None
        if base is not None:
            before = self._reading.resolve(base)
        elif after.parent is not None:
            before = self.context.index.by_num(after.parent)
        for row in (after, before):
            if row is not None and row.kind is not Kind.COMMITTED:
                raise InvalidArgument(f"{row.name!r} is not committed", remedy="use commit or snapshot first")
        pending = Pending(self.context.index)
        old = self._scanning.tree(before, pending) if before is not None else None
        same = layers.SameData(self.context.driver, self.context.index)
        changes = (
            change for change, _ in compare.changes_with_links(pending, old, self._scanning.tree(after, pending), same)
        )
        with self._view(before) as a, self._view(after) as b:
            try:
                return blocks.produce(a, b, changes, target, base=identity or self.identity(before))
            except BrokenPipeError:
                raise
            except OSError as error:
                raise CowfsError(f"export of {name!r} stopped: {error.strerror}") from None

    @names_full
    def apply_blocks(self, key: str, stream: BinaryIO, *, identity: bytes | None = None) -> blocks.Counts:
        """As :meth:`cowfs.Store.apply_blocks`."""
        from cowfs.diff import blocks

        row = self._lookup.active(key)
        with layers.hold(self.context.driver, self.context.index, row, "apply to"):
            row = self._lookup.active(key, row.num)
            parent = self.context.index.by_num(row.parent) if row.parent is not None else None
            below = (
                []
                if self.context.driver.capabilities.whole
                else [self.context.driver.tree(id) for _, id in self.context.index.chain(row.parent)]
            )
            view = View(
                below or [f"{self.context.root}/empty"],
                self.context.driver.tree(row.id),
                self.context.driver.work(row.id),
                options=self._options(row.limit if not self.context.driver.capabilities.whole else Limit()),
            )
            try:
                counts = blocks.apply(view, stream, base=identity or self.identity(parent))
            except OSError as error:
                raise CowfsError(f"the difference cannot be applied to {key!r}: {error.strerror}") from None
            finally:
                view.close()
            if self.context.driver.fsync:
                trees.sync_tree(self.context.driver.tree(row.id))
        return counts

    def _options(self, limit: Limit) -> union.Options:
        return union.Options(
            form=self.context.driver.form.name,
            row=self.context.driver.capabilities.row or None,
            volatile=not self.context.driver.fsync,
            limit=limit or None,
        )

    def identity(self, row: Row | None) -> bytes:
        """The identity of a tree, equal in two stores that hold the same tree: 32 bytes.

        Content digests are left out, since not every store has them: names, attributes, sizes and times decide.
        """
        if row is None:
            return _EMPTY
        import hashlib

        digest = hashlib.sha256()
        pending = Pending(self.context.index)
        todo = [(b"", self._scanning.tree(row, pending))]
        while todo:
            path, pair = todo.pop()
            entry = decode(pair)
            shape = (path, entry.mode, entry.uid, entry.gid, entry.rdev, entry.target, entry.xattrs)
            digest.update(repr((*shape, entry.mtime_ns, 0 if entry.is_dir else entry.size)).encode())
            if entry.ref is not None:
                below = entries(pending, entry.ref.storage)
                todo += [(join(path, name), below[name]) for name in sorted(below)]
        return digest.digest()

    @contextlib.contextmanager
    def _view(self, row: Row | None) -> Iterator[View]:
        """The view of a committed tree; without one, of an empty directory."""
        stack = [self.context.driver.tree(id) for _, id in self.context.index.chain(row.num)] if row is not None else []
        if self.context.driver.capabilities.whole:
            stack = stack[:1]
        with contextlib.ExitStack() as held:
            if self.context.driver.capabilities.whole and row is not None:
                held.enter_context(self.context.driver.open_tree(row.id))
            view = View(
                stack or [f"{self.context.root}/empty"],
                options=union.Options(form=self.context.driver.form.name, readonly=True),
            )
            held.callback(view.close)
            yield view
