"""Squash: merge a snapshot into its only child, so that chains of live snapshots do not grow without end.

Strategy: the child's new layer is built as any change is, by writing into a merged view over the snapshot's parent;
what to write is the difference of two trees that the index knows. Then the records of everything above are made again,
since files that were in the snapshot's layer are in the child's now. One transaction writes all that, and renames
the new layer; the two old ones are deleted after it. A kill leaves the state before or the state after.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from cowfs import compare, scan
from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.faults import point
from cowfs.index import Index, Row
from cowfs.model import Change, Info, Kind, Limit, Usage
from cowfs.store import layers
from cowfs.store.core import _sound
from cowfs.store.live import LABEL, LiveVerbs
from cowfs.store.names import new_id
from cowfs.store.staging import discard, staged
from cowfs.sys import files, trees
from cowfs.tree import Pair, Pending
from cowfs.union import Options, View, copyup
from cowfs.union.node import DT_LNK, DT_REG, Dir, Node

__all__ = ["SquashVerbs"]


class SquashVerbs(LiveVerbs):
    """squash."""

    def squash(self, name: str) -> Info:
        """Merge a committed snapshot into its only child, and remove it.

        Returns:
            The child.

        Raises:
            NotFound: no such snapshot.
            FailedPrecondition: it is not committed, has a tag, has no child or several, or something above it is
                mounted or in use; the message says what.
            Unsupported: the driver keeps whole trees (there is nothing to gain).
        """
        row = self.resolve(name)
        if self.driver.whole:
            raise Unsupported(f"the driver {self.driver.name} keeps whole trees: nothing to squash", remedy="cowfs rm")
        if row.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"{name!r} is not committed", remedy="commit it first")
        children = self.index.children(row.num)
        if len(children) != 1:
            what = f"has {len(children)} children" if children else "has no child"
            raise FailedPrecondition(
                f"{name!r} {what}: squash takes one with exactly one", remedy="cowfs tree shows them"
            )
        tags = self._tags_of(row)
        if tags:
            raise FailedPrecondition(
                f"{name!r} is tagged {', '.join(tags)}", remedy=f"cowfs rm {tags[0]} drops the tag"
            )
        _sound(row)
        child = self.index.get(children[0])
        above = self._above(child)
        with contextlib.ExitStack() as held:
            for one in (child, *above):
                if one.kind is not Kind.VIEW:
                    held.enter_context(layers.hold(self.driver, one, "squash"))
            self._squash(row, child, above)
        for id in (row.id, child.id):
            discard(self.driver, id)
        return self.index.get(child.name).info()

    def _above(self, row: Row) -> list[Row]:
        """Everything that has ``row`` as an ancestor, parents before children."""
        found: list[Row] = []
        pending = [row]
        while pending:
            one = pending.pop()
            below = [self.index.get(name) for name in self.index.children(one.num)]
            found += below
            pending += below
        return found

    def _squash(self, row: Row, child: Row, above: list[Row]) -> None:
        from cowfs.store.owners import carry

        parent = self.index.by_num(row.parent) if row.parent is not None else None
        base = [id for _, id in self.index.chain(row.parent)]
        with staged(self.driver, new_id()) as layer:
            self.driver.create(layer.staged, base, Limit())
            carry(self.driver, [child.id, row.id], layer.staged)
            pending = Pending(self.index)
            after = self._tree(child, pending)
            same = layers.SameData(self.driver, self.index)
            changes = list(compare.compare(pending, parent.root if parent else None, after, same))
            self._write_changes(changes, base, [child.id, row.id, *base], layer.staged)
            point("squash.built")
            if self.driver.fsync:
                trees.sync_tree(self.driver.tree(layer.staged))
            pending = Pending(self.index)
            roots: dict[int, Pair] = {}
            usage: dict[int, Usage] = {}
            if parent is not None and parent.root is not None:
                roots[parent.num] = parent.root
            for one in (child, *above):
                if one.kind is Kind.VIEW:
                    continue
                under = row.parent if one is child else one.parent
                id = layer.staged if one is child else one.id
                scanned = self._scan_over(id, one, roots.get(under) if under is not None else None, pending)
                pending.new.update(scanned.pending.new)
                roots[one.num], usage[one.num] = scanned.root, scanned.usage
            with self.index.write() as connection:
                Index.add_records(connection, pending.new)
                for one in (child, *above):
                    root = roots[one.num] if one.kind is Kind.COMMITTED else (None, None)
                    connection.execute(
                        "UPDATE snapshots SET depth = depth - 1, root_content = ?, root_storage = ? WHERE num = ?",
                        (*root, one.num),
                    )
                held = row.usage or Usage()
                back = held if child.kind is Kind.ACTIVE and LABEL in row.labels else Usage()
                committed = usage[child.num] if child.kind is Kind.COMMITTED else None
                connection.execute(
                    "UPDATE snapshots SET id = ?, parent = ?, bytes = ?, inodes = ?, base_bytes = base_bytes + ?,"
                    " base_inodes = base_inodes + ?, diff_id = NULL, chain_id = NULL WHERE num = ?",
                    (
                        layer.id,
                        row.parent,
                        committed.bytes if committed else None,
                        committed.inodes if committed else None,
                        back.bytes,
                        back.inodes,
                        child.num,
                    ),
                )
                connection.execute("DELETE FROM snapshots WHERE num = ?", (row.num,))
                point("squash.recorded")
                layer.publish()
                point("squash.renamed")
        point("squash.committed")

    def _scan_over(self, id: str, row: Row, base: Pair | None, records: Pending) -> scan.Scanned:
        known = layers.KeptDigests.load(self.driver, row.id)
        fd = os.open(self.driver.tree(id), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return scan.scan_delta(fd, num=row.num, form=self.driver.form, base=base, records=records, known=known)
        finally:
            os.close(fd)

    def _write_changes(self, changes: list[Change], base: list[str], stack: list[str], target: str) -> None:
        """Write into the layer ``target`` over ``base`` what makes it equal to ``stack`` (ids, topmost first)."""
        driver = self.driver
        options = Options(form=driver.form.name, volatile=True)
        lowers = [driver.tree(id) for id in base] or [f"{self.root}/empty"]
        with (
            _view(View([driver.tree(id) for id in stack], options=options)) as source,
            _view(View(lowers, driver.tree(target), driver.work(target), options=options)) as into,
        ):
            _Writer(source, into).write(changes)


@contextlib.contextmanager
def _view(view: View) -> Iterator[View]:
    try:
        yield view
    finally:
        view.close()


class _Writer:
    """Makes changed paths of one view in another."""

    def __init__(self, source: View, into: View) -> None:
        self.source, self.into = source, into
        self.linked: dict[int, Node] = {}  # node of the source with several names -> its copy

    def write(self, changes: list[Change]) -> None:
        directories = []
        for change in changes:
            here = _find(self.into, change.path)
            if change.kind == "deleted" or (here is not None and change.kind == "added") or "type" in change.what:
                if here is not None and change.path:
                    _remove(self.into, here)
                    here = None
                if change.kind == "deleted":
                    continue
            there = _find(self.source, change.path)
            assert there is not None
            if isinstance(there, Dir):
                directories.append(change.path)
                if here is None:
                    parent, name = _place(self.into, change.path)
                    self.into.mkdir(parent, name, 0o700, 0, 0)
            else:
                if here is not None:
                    parent, name = _place(self.into, change.path)
                    self.into.unlink(parent, name)
                self._copy(change.path, there)
        for path in reversed(directories):
            there, here = _find(self.source, path), _find(self.into, path)
            assert there is not None
            assert isinstance(here, Dir)
            self._attributes(there, copyup.up_dir(self.into, here).open(), b"")

    def _copy(self, path: bytes, there: Node) -> None:
        parent, name = _place(self.into, path)
        twin = self.linked.get(there.id)
        if twin is not None:
            self.into.link(twin, parent, name)
            return
        meta = copyup.read_meta(self.source, there)
        if there.type == DT_LNK:
            made = self.into.symlink(parent, name, self.source.readlink(there), meta.uid, meta.gid)
        else:
            made = self.into.mknod(parent, name, stat.S_IFMT(meta.mode) | 0o600, meta.rdev, meta.uid, meta.gid)
        if there.type == DT_REG and hasattr(there.data, "pread"):
            self._copy_redirected(there, made, meta.size)
        elif there.type == DT_REG:
            src = self.source.open_data(there)
            try:
                files.copy_data(src, self.into.data_fd(made, True), meta.size)
            finally:
                os.close(src)
        assert made.where is not None
        self._attributes(there, made.where.open(), name)
        self.linked[there.id] = made

    def _copy_redirected(self, there: Node, made: Node, size: int) -> None:
        """The bytes of a redirect file, which no single descriptor has; holes stay holes."""
        buffer = memoryview(bytearray(1 << 20))
        at = 0
        while at < size:
            try:
                at = self.source.lseek(there, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            end = self.source.lseek(there, at, os.SEEK_HOLE)
            while at < end:
                count = self.source.pread(there, at, buffer[: min(end - at, len(buffer))])
                self.into.write(made, at, buffer[:count])
                at += count
        self.into.setattr(made, size=size)

    def _attributes(self, there: Node, dirfd: int, name: bytes) -> None:
        meta = copyup.read_meta(self.source, there)
        copyup.write_meta(dirfd, name or b".", meta, self.into)


def _find(view: View, path: bytes) -> Node | None:
    here: Node | None = view.root
    for part in path.split(b"/") if path else ():
        if not isinstance(here, Dir):
            return None
        here = view.child(here, part)
    return here


def _place(view: View, path: bytes) -> tuple[Dir, bytes]:
    head, _, name = path.rpartition(b"/")
    parent = _find(view, head)
    assert isinstance(parent, Dir)
    return parent, name


def _remove(view: View, node: Node) -> None:
    assert node.parent is not None
    if isinstance(node, Dir):
        for name in list(view.load(node) if node.children is None else node.children):
            inner = view.child(node, name)
            if inner is not None:
                _remove_at(view, node, name, inner)
        view.rmdir(node.parent, node.name)
    else:
        view.unlink(node.parent, node.name)


def _remove_at(view: View, parent: Dir, name: bytes, node: Node) -> None:
    if isinstance(node, Dir):
        _remove(view, node)
    else:
        view.unlink(parent, name)
