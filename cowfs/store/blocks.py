"""Block-level differences of snapshots, out and in (:mod:`cowfs.diff.blocks`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from cowfs import union
from cowfs.errors import CowfsError, InvalidArgument
from cowfs.index import compare
from cowfs.index.database import Row
from cowfs.index.directory import Pending, decode, entries, join
from cowfs.model import Kind, Limit
from cowfs.row.view import View
from cowfs.store import layers
from cowfs.store.compacting import CompactionVerbs
from cowfs.store.reserve import names_full
from cowfs.sys import trees

if TYPE_CHECKING:
    from cowfs.diff import blocks

__all__ = ["BlockVerbs"]

_EMPTY = bytes(32)


class BlockVerbs(CompactionVerbs):
    """export_blocks and apply_blocks."""

    def export_blocks(
        self, name: str, target: BinaryIO, *, base: str | None = None, identity: bytes | None = None
    ) -> blocks.Counts:
        """Write what a committed snapshot changed, block by block.

        Args:
            name: a committed snapshot, or a tag.
            target: a stream; a pipe will do.
            base: the committed snapshot that it is for; default: the parent.
            identity: 32 bytes that tell the tree it is for; default: a digest of names, attributes, sizes and times.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: not committed.
            CowfsError: a file cannot be read.
        """
        from cowfs.diff import blocks

        after = self.resolve(name)
        before: Row | None = None
        if base is not None:
            before = self.resolve(base)
        elif after.parent is not None:
            before = self.index.by_num(after.parent)
        for row in (after, before):
            if row is not None and row.kind is not Kind.COMMITTED:
                raise InvalidArgument(f"{row.name!r} is not committed", remedy="use commit or snapshot first")
        pending = Pending(self.index)
        old = self._tree(before, pending) if before is not None else None
        same = layers.SameData(self.driver, self.index)
        changes = (change for change, _ in compare.changes_with_links(pending, old, self._tree(after, pending), same))
        with self._reading(before) as a, self._reading(after) as b:
            try:
                return blocks.produce(a, b, changes, target, base=identity or self._identity(before))
            except BrokenPipeError:
                raise
            except OSError as error:
                raise CowfsError(f"export of {name!r} stopped: {error.strerror}") from None

    @names_full
    def apply_blocks(self, key: str, stream: BinaryIO, *, identity: bytes | None = None) -> blocks.Counts:
        """Make the changes of a block-level difference in an active snapshot.

        Args:
            key: an active snapshot that nobody has mounted, fresh from the tree that the stream was made against.
            stream: what :meth:`export_blocks` wrote; a pipe will do.
            identity: as given there; default: the digest of the parent's tree.

        Raises:
            NotFound: no such key.
            FailedPrecondition: not active, mounted, or of another parent than the stream is for.
            Corrupt, InvalidArgument: the stream is damaged or hostile. Part of it may have been applied.
            LimitExceeded: the snapshot's limit; likewise.
        """
        from cowfs.diff import blocks

        row = self._active(key)
        with layers.hold(self.driver, row, "apply to"):
            row = self._active(key, row.num)
            parent = self.index.by_num(row.parent) if row.parent is not None else None
            below = (
                []
                if self.driver.capabilities.whole
                else [self.driver.tree(id) for _, id in self.index.chain(row.parent)]
            )
            view = View(
                below or [f"{self.root}/empty"],
                self.driver.tree(row.id),
                self.driver.work(row.id),
                options=self._options(row.limit if not self.driver.capabilities.whole else Limit()),
            )
            try:
                counts = blocks.apply(view, stream, base=identity or self._identity(parent))
            except OSError as error:
                raise CowfsError(f"the difference cannot be applied to {key!r}: {error.strerror}") from None
            finally:
                view.close()
            if self.driver.fsync:
                trees.sync_tree(self.driver.tree(row.id))
        return counts

    def _options(self, limit: Limit) -> union.Options:
        return union.Options(
            form=self.driver.form.name,
            row=self.driver.capabilities.row or None,
            volatile=not self.driver.fsync,
            limit=limit or None,
        )

    def _identity(self, row: Row | None) -> bytes:
        """What two stores agree on when they hold the same tree, as far as they know it: 32 bytes.

        Content digests are left out, since not every store has them: names, attributes, sizes and times decide.
        """
        if row is None:
            return _EMPTY
        import hashlib

        digest = hashlib.sha256()
        pending = Pending(self.index)
        todo = [(b"", self._tree(row, pending))]
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
    def _reading(self, row: Row | None) -> Iterator[View]:
        """The view of a committed tree; without one, of an empty directory."""
        stack = [self.driver.tree(id) for _, id in self.index.chain(row.num)] if row is not None else []
        if self.driver.capabilities.whole:
            stack = stack[:1]
        with contextlib.ExitStack() as held:
            if self.driver.capabilities.whole and row is not None:
                held.enter_context(self.driver.open_tree(row.id))
            view = View(
                stack or [f"{self.root}/empty"], options=union.Options(form=self.driver.form.name, readonly=True)
            )
            held.callback(view.close)
            yield view
