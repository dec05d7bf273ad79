"""Merging two layers into one, over the layers beneath both.

Strategy: the merged layer is built by writing the difference of two trees, which the index knows, into a merged view
over the lower layers. File data is copied only if need be:

* a plain file, link or device that one of the two layers has is *linked*: it keeps its inode, and so its number;
* a file with attributes only in the two layers gets those attributes;
* a redirect file whose base is the same file beneath gets the blocks that the two layers hold;
* anything else is copied.

So the two layers must not change, like committed ones, and link counts are right only once they are gone
(:attr:`Merged.names` has the final counts).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from cowfs._record import record
from cowfs.driver.interface import Driver
from cowfs.errors import Unsupported
from cowfs.index.compare import File
from cowfs.model import Change
from cowfs.row.file import RowFile
from cowfs.row.view import View
from cowfs.sys import files, xattr
from cowfs.union import Options, copyup, create, hardlinks, stored
from cowfs.union.attr import unpack
from cowfs.union.node import DT_LNK, DT_REG, PLAIN, Dir, Node
from cowfs.union.paths import find

__all__ = ["Merged", "copy_changes", "write_changes"]

_PUNCH, _KEEP = files.FALLOC_FL_PUNCH_HOLE, files.FALLOC_FL_KEEP_SIZE
_PIECE = 1 << 20


@record(frozen=True, slots=True)
class Merged:
    """The result of a merge.

    Attributes:
        names: inode -> the number of its names in the merged layer, for inodes that other layers have, too.
    """

    names: dict[int, int]


def write_changes(
    driver: Driver, changes: list[tuple[Change, File | None]], base: list[str], stack: list[str], target: str
) -> Merged:
    """Write the changes into the layer ``target`` over ``base`` that make it equal to ``stack`` (ids, topmost first).

    Args:
        changes: the differences, with all names of every file that has several (:func:`cowfs.index.compare.changes_with_links`).
        stack: the layers to be merged, then ``base``.
    """
    options = Options(form=driver.form.name, volatile=True, row=driver.capabilities.row or None)
    lowers = [driver.tree(id) for id in base] or [f"{driver.root}/empty"]
    with (
        _view(View([driver.tree(id) for id in stack], options=options)) as source,
        _view(View(lowers, driver.tree(target), driver.work(target), options=options)) as into,
    ):
        _Writer(source, into, len(stack) - len(base)).write(changes)
        assert into.upper is not None
        return Merged({ino: len(paths) for ino, paths in hardlinks.scan_groups(into.upper).items()})


def copy_changes(source: View, into: View, changes: list[tuple[Change, File | None]], *, time_step: int = 0) -> None:
    """Write the differences into a view of other layers, without links to the source; inode numbers are new.

    Args:
        changes: as for :func:`write_changes`.
        time_step: the precision of times there, nanoseconds; 0: exact, or not checked.

    Raises:
        Unsupported: a time would not be kept.
        OSError: of the other file system.
    """
    _Copier(source, into, time_step).write(changes)


@contextlib.contextmanager
def _view(view: View) -> Iterator[View]:
    try:
        yield view
    finally:
        view.close()


class _Writer:
    """Writes the changed paths of one view into another.

    Args:
        merged: the number of the source's topmost layers to merge.
    """

    def __init__(self, source: View, into: View, merged: int) -> None:
        self.source, self.into = source, into
        source.stack.own_numbers()  # the numbers in the store's mounts
        self.linked: dict[File, Node] = {}  # file with several names -> its copy
        self._merged = set(source.layers[len(source.layers) - merged :])

    def write(self, changes: list[tuple[Change, File | None]]) -> None:
        """Write all changes. Keeps no descriptor of either view."""
        directories = [b""]  # a comparison with nothing has no change of the root
        for change, file in changes:
            here = find(self.into, change.path)
            if change.kind == "deleted" or (here is not None and change.kind == "added") or "type" in change.what:
                if here is not None and change.path:
                    _remove(self.into, *_place(self.into, change.path))
                    here = None
                if change.kind == "deleted":
                    continue
            there = find(self.source, change.path)
            assert there is not None
            if isinstance(there, Dir):
                directories.append(change.path)
                if here is None:
                    parent, name = _place(self.into, change.path)
                    attr = unpack(self.source.attr(there))
                    made = self.into.mkdir(parent, name, 0o700, attr.uid, attr.gid)
                    self._keep_number(there, parent, made.sources[0].open(), b"")
            elif here is None or file is not None or not self._change(here, there):
                parent, name = _place(self.into, change.path)
                if here is not None:
                    self.into.unlink(parent, name)
                self._make(parent, name, there, file)
        above = {change.path.rpartition(b"/")[0] for change, _ in changes if change.path}
        for path in sorted({*directories, *above}, reverse=True):  # their times last, and from the bottom up
            there, here = find(self.source, path), find(self.into, path)
            if isinstance(there, Dir) and isinstance(here, Dir) and (path in directories or self.into.upper_of(here)):
                self._attributes(there, copyup.up_dir(self.into, here).open(), b"")

    # -- a file that is beneath, too ----------------------------------------------------------------

    def _change(self, here: Node, there: Node) -> bool:
        """Change the lower file, which has one name, in place. Returns whether that was possible."""
        if there.type != DT_REG or here.type != DT_REG or unpack(self.into.attr(here)).nlink != 1:
            return False
        if isinstance(there.data, RowFile) and there.data.layer in self._merged:
            if not self._change_blocks(here, there):
                return False
        elif there.data is PLAIN or not self._same_file(_physical(here), _physical(there)):
            return False
        else:
            copyup.up_meta(self.into, here)
        assert here.where is not None
        self._attributes(there, here.where.open(), here.name)
        here.attr = None
        return True

    @staticmethod
    def _same_file(one: tuple[int, bytes], other: tuple[int, bytes]) -> bool:
        a, b = (os.stat(name, dir_fd=fd, follow_symlinks=False) for fd, name in (one, other))
        return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)

    def _change_blocks(self, here: Node, there: Node) -> bool:
        """Give the lower file the blocks of a redirect file on it."""
        chain = there.data
        assert isinstance(chain, RowFile)
        extents = chain.load()
        places = [(level.where.open(), level.name) for level in chain.levels]
        keep = sum(level.where.layer not in self._merged for level in chain.levels)
        if not keep or not self._stands_on(here, places[:keep]):
            return False
        runs = list(extents.runs(0, chain.size))
        shown = max((stop for _, stop, owner in runs if 0 <= owner < keep), default=0)
        self.into.setattr(here, size=min(shown, self.into.size(here)))
        self.into.setattr(here, size=chain.size)
        copyup.up_meta(self.into, here)
        for start, stop, owner in runs:
            if not 0 <= owner < keep:
                self._copy_span(there, here, start, stop, punch=start < shown)
        return True

    def _stands_on(self, here: Node, places: list[tuple[int, bytes]]) -> bool:
        """Whether a file of the layers beneath is made of the files at ``places``, bottom first."""
        own = [_physical(here)]
        if isinstance(here.data, RowFile):
            here.data.load()
            own = [*((level.where.open(), level.name) for level in here.data.levels), _physical(here)]
        return len(own) == len(places) and all(self._same_file(a, b) for a, b in zip(own, places, strict=True))

    def _copy_span(self, there: Node, here: Node, start: int, stop: int, *, punch: bool) -> None:
        """Copy [start, stop); holes are punched over other data."""
        buffer = memoryview(bytearray(_PIECE))
        while start < stop:
            data = min(self._seek(there, start, os.SEEK_DATA, stop), stop)
            if data > start and punch:
                self.into.fallocate(here, _PUNCH | _KEEP, start, data - start)
            start = data
            end = min(self._seek(there, start, os.SEEK_HOLE, stop), stop) if start < stop else stop
            while start < end:
                count = self.source.pread(there, start, buffer[: min(end - start, _PIECE)])
                self.into.write(here, start, buffer[:count])
                start += count

    def _seek(self, node: Node, at: int, whence: int, end: int) -> int:
        try:
            return self.source.lseek(node, at, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return end

    # -- a file that is not -------------------------------------------------------------------------

    def _make(self, parent: Dir, name: bytes, there: Node, file: File | None) -> None:
        first = self.linked.get(file) if file is not None else None
        if first is not None:
            self.into.link(first, parent, name)
            return
        made = self._link(there, parent, name) if self._is_plain(there) else self._copy(there, parent, name)
        if file is not None:
            self.linked[file] = made

    def _is_plain(self, there: Node) -> bool:
        return there.data is PLAIN and there.where is not None and there.where.layer in self._merged

    def _link(self, there: Node, parent: Dir, name: bytes) -> Node:
        up = create.target(self.into, parent, name)
        stored.mark_impure(self.into, up)
        if up.whiteouts is not None and name in up.whiteouts:
            os.unlink(name, dir_fd=up.open())
        assert there.where is not None
        try:
            os.link(there.name, name, src_dir_fd=there.where.open(), dst_dir_fd=up.open(), follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EPERM):
                raise
            return self._copy(there, parent, name)
        return create.adopt(self.into, parent, up, name)

    def _copy(self, there: Node, parent: Dir, name: bytes) -> Node:
        meta = stored.read_meta(self.source, there)
        if there.type == DT_LNK:
            made = self.into.symlink(parent, name, self.source.readlink(there), meta.uid, meta.gid)
        else:
            made = self.into.mknod(parent, name, stat.S_IFMT(meta.mode) | 0o600, meta.rdev, meta.uid, meta.gid)
        if there.type == DT_REG and there.data.pieced:
            self._copy_span(there, made, 0, meta.size, punch=False)
            self.into.setattr(made, size=meta.size)
        elif there.type == DT_REG:
            src = self.source.open_data(there)
            try:
                files.copy_data(src, self.into.data_fd(made, True), meta.size)
            finally:
                os.close(src)
        assert made.where is not None
        self._keep_number(there, parent, made.where.open(), name)
        self._attributes(there, made.where.open(), name)
        return made

    def _keep_number(self, there: Node, parent: Dir, dirfd: int, name: bytes) -> None:
        """Give a copy the inode number of its source."""
        if isinstance(there, Dir):
            src, real = there.sources[-1].open(), b""
        elif there.where is not None:
            src, real = there.where.open(), there.name
        else:
            return
        stored.set_origin(self.into, dirfd, name, src, real, there.id)
        stored.mark_impure(self.into, copyup.up_dir(self.into, parent))

    def _attributes(self, there: Node, dirfd: int, name: bytes) -> None:
        meta = stored.read_meta(self.source, there)
        for attribute in xattr.listx(dirfd, name):
            if self.into.form.show_name(attribute) is not None and attribute not in meta.xattrs:
                xattr.remove(dirfd, name, attribute)
        stored.write_meta(dirfd, name or b".", meta, self.into)


class _Copier(_Writer):
    """Writes the changed paths of one view into another that shares nothing with it."""

    def __init__(self, source: View, into: View, time_step: int) -> None:
        super().__init__(source, into, 0)
        self._time_step = time_step

    def _keep_number(self, there: Node, parent: Dir, dirfd: int, name: bytes) -> None:
        pass

    def _attributes(self, there: Node, dirfd: int, name: bytes) -> None:
        mtime = unpack(self.source.attr(there)).mtime_ns
        if self._time_step and mtime % self._time_step:
            raise Unsupported(
                f"the new layers cannot hold fractions of seconds, as of the time of {os.fsdecode(name or b'/')!r}",
                remedy="--cut-times leaves them out",
            )
        super()._attributes(there, dirfd, name)


def _physical(node: Node) -> tuple[int, bytes]:
    """The file in a lower layer that has a node's data."""
    where, name = node.data.place() or (node.where, node.name)
    assert where is not None
    return where.open(), name


def _place(view: View, path: bytes) -> tuple[Dir, bytes]:
    head, _, name = path.rpartition(b"/")
    parent = find(view, head)
    assert isinstance(parent, Dir)
    return parent, name


def _remove(view: View, parent: Dir, name: bytes) -> None:
    """Remove a name and all beneath it; other names of its files stay."""
    node = view.lookup(parent, name)
    if not isinstance(node, Dir):
        view.unlink(parent, name)
        return
    pending: list[tuple[Dir, bytes, Dir, bool]] = [(parent, name, node, False)]
    while pending:
        above, called, directory, emptied = pending.pop()
        if emptied:
            view.rmdir(above, called)
            continue
        pending.append((above, called, directory, True))
        for inner in list(view.load(directory) if directory.children is None else directory.children):
            child = view.child(directory, inner)
            if isinstance(child, Dir):
                pending.append((directory, inner, child, False))
            elif child is not None:
                view.unlink(directory, inner)
