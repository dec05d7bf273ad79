"""Redirect-on-write: a written lower file gets a redirect file that stores only the blocks written.

Strategy. The rest of the view knows a redirect file as a node whose ``data`` answers for itself
(:class:`~cowfs.row.file.RowFile`). This module connects the two: finding redirect files when names are looked up,
following their chains down the layers, making one at the first change, and keeping maps in step with the disk.

A layer that may hold redirect files is marked on its root, so any options read a stack right; and changes over such a
layer are redirected, too.

Durability. fsync of a file brings its data to the disk, then marks the map, then brings the map there. For files
without fsync a thread does the same every few seconds, so that a file is as safe here as on a host with write-back. A
volatile view only marks, when it is closed.

Threads: the view's thread owns all of it but :class:`~cowfs.row.writeback.Syncer`, which gets descriptors and logs of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING
from cowfs.format.redirect import ROOT_MARK, Ref, check_block, is_marked
from cowfs.row import absorbing, map as row_map
from cowfs.row.chain import Chain, Level, lay
from cowfs.row.extents import Extents
from cowfs.row.file import RowFile
from cowfs.row.layer import open_maps
from cowfs.row.map import Loaded, Log
from cowfs.row.readahead import Pilot
from cowfs.row.writeback import Syncer
from cowfs.sys import xattr
from cowfs.union import copyup, holding, merge, stored
from cowfs.union.attr import unpack
from cowfs.union.filedata import Absorbing, Lower, Redirects
from cowfs.union.layers import MAP_DIR, Layer, Source, lstat
from cowfs.union.measure import NOTHING, Room
from cowfs.union.node import DT_REG, PLAIN, FileData, Node
from cowfs.union.quota import Blocks

if TYPE_CHECKING:
    from cowfs.union.core import Core

DEFAULT_BLOCK = 4096
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Rows(Redirects):
    """The redirect files of one view.

    Attributes:
        block: bytes a block in the redirect files made here.
        drop_synced: whether their data leaves the host's page cache once it is synced.
    """

    def __init__(self, view: Core) -> None:
        self.view = view
        self.block = view.options.row or DEFAULT_BLOCK
        self.drop_synced = view.options.drop_synced
        check_block(self.block)
        row_map.boot_id()  # read once, before a request needs it
        self._marked: dict[Layer, bool] = {}
        self._maps: dict[Layer, int] = {}
        self.syncer = Syncer(view.must_sync, view.share.maps)
        #: a read from more levels than this is not handed to another thread: that takes a descriptor of each
        self.copies = max(2, min(16, view.share.levels // 2))
        self.pilot = Pilot()
        self._levels: dict[Chain, int] = {}  # files with open levels -> how many, the oldest first
        self._open_levels = 0
        self._logs: dict[Chain, None] = {}  # files with an open map, the oldest first

    # -- layers -------------------------------------------------------------------------------

    def marked(self, layer: Layer) -> bool:
        """Whether a layer may hold redirect files."""
        found = self._marked.get(layer)
        if found is None:
            found = self._marked[layer] = is_marked(layer.root.open(), self.view.form)
        return found

    def map_dir(self, layer: Layer) -> int:
        found = self._maps.get(layer)
        if found is not None:
            return found
        root = layer.root.open()
        upper = layer is self.view.stack.upper and not self.view.readonly
        if upper and not self.marked(layer):
            with contextlib.suppress(FileExistsError):
                os.mkdir(MAP_DIR, 0o700, dir_fd=root)
            xattr.setx(root, b"", self.view.form.row, ROOT_MARK)
            self._marked[layer] = True
        try:
            fd = open_maps(root)
        except FileNotFoundError:
            raise OSError(errno.EIO, "the layer's map directory is missing", layer.path + b"/" + MAP_DIR) from None
        self._maps[layer] = fd
        return fd

    def forget(self, layer: Layer) -> None:
        self._marked.pop(layer, None)
        fd = self._maps.pop(layer, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        self.pilot.close()
        try:
            self.syncer.close()
        finally:
            for node in list(self.view.nodes.values()):
                if isinstance(node.data, RowFile):
                    node.data.close()
            for fd in self._maps.values():
                os.close(fd)
            self._maps.clear()

    # -- finding ------------------------------------------------------------------------------

    def ref_at(self, where: Source, name: bytes) -> Ref | None:
        """The reference of a file, or ``None`` for a plain one. Raises EIO when it is damaged."""
        if not self.marked(where.layer):
            return None
        value = xattr.try_get(where.open(), name, self.view.form.row)
        return Ref.unpack(value, name) if value is not None else None

    def load(self, where: Source, name: bytes) -> RowFile | None:
        """The redirect file of a name in a layer, or ``None``."""
        ref = self.ref_at(where, name)
        if ref is None:
            return None
        return RowFile(self, where.layer, None if where.layer is self.view.stack.upper else where, name, ref)

    def find(self, where: Source, name: bytes, data: FileData) -> FileData:
        if not isinstance(data, Lower):
            return self.load(where, name) or data
        ref = self.ref_at(data.where, data.name)
        if ref is None:
            return data
        file = RowFile(self, data.where.layer, data.where, data.name, ref)
        file.stand_for(data)
        return file

    def resolve(self, file: Chain) -> None:
        """Give a file its chain: the levels beneath and the owner of each extent."""
        assert file.ref is not None
        try:
            own = self._read_map(file.layer, file.ref)
        except FileNotFoundError:
            if not self._redirected(file):  # it was compacted since the look-up: all of it is its own
                file.stand_alone()
                return
            raise _no_map(file.ref, file.node.name) from None
        levels, extents = self._beneath(file.ref, file.layer)
        file.adopt(extents, levels, own)
        if own.end > own.synced and file.writable and not own.stale:
            file.resume()  # a killed server left records that are valid in this boot only

    def _redirected(self, file: Chain) -> bool:
        """Whether a file still is a redirect file on the disk."""
        if file.where is None and file.node.where is None:  # it has lost its last name
            return xattr.try_get(file.own_fd(), b"", self.view.form.row) is not None
        return self.ref_at(*file.place()) is not None

    def _read_map(self, layer: Layer, ref: Ref) -> Loaded:
        if not ref.has_map:
            return Loaded([], 0, 0, 0, True)
        return row_map.read(self.map_dir(layer), ref)

    def _beneath(self, ref: Ref, layer: Layer) -> tuple[list[Level], Extents]:
        """The chain under a reference in ``layer``, bottom first, merged."""
        found: list[tuple[Source, bytes, Ref, Loaded]] = []
        queue: list[Source] = []
        while True:
            queue, where, name = self._find(ref.path, layer, queue)
            below = self.ref_at(where, name)
            if below is None:
                break
            try:
                loaded = self._read_map(where.layer, below)
            except FileNotFoundError:
                if self.ref_at(where, name) is None:  # compacted just now
                    break
                raise _no_map(below, name) from None
            found.append((where, name, below, loaded))
            ref, layer = below, where.layer
        levels = [Level(where, name)]
        extents = Extents()
        for where, name, below, loaded in reversed(found):
            st = lstat(where, name)
            size = st.st_size if st is not None else 0
            lay(extents, loaded, below.shift, min(below.base_end, size), len(levels))
            levels.append(Level(where, name))
        return levels, extents

    def _find(self, path: bytes, layer: Layer, queue: list[Source]) -> tuple[list[Source], Source, bytes]:
        """The regular file at ``path`` in the layers beneath ``layer``.

        Args:
            queue: the directories that the last search had left, topmost first. Where they are simply the same path
                in the layers beneath, the search goes on in them, so that a chain costs one walk and not one a level.

        Returns:
            (the directories beneath the one that has it, that one, the name there).
        """
        view = self.view
        head, _, name = path.rpartition(b"/")
        below = [source for source in queue if source.layer.index < layer.index]
        if not below or below[0].path() != head:
            below = [root for root in view.stack.roots if root.layer.index < layer.index]
            if head:
                below = merge.merged_dirs(below, head, view.form, view.stack.roots)
        for number, source in enumerate(below):
            st = lstat(source, name)
            if st is None:
                continue
            if not stat.S_ISREG(st.st_mode):
                break
            rest = below[number + 1 :]
            data = merge.metacopy_data(rest, source, name, path, view.form, view.stack.roots)
            return (rest, source, name) if data is None else ([], data.where, data.name)
        raise OSError(errno.EIO, "the base of a redirect file is missing", path)

    # -- descriptors --------------------------------------------------------------------------

    def opening(self, file: Chain) -> None:
        """A level of ``file`` is about to be opened."""
        most = self.view.share.levels
        while self._open_levels >= most and self._levels:
            next(iter(self._levels)).release()  # at last its own: no operation holds one across two
        self._levels[file] = self._levels.get(file, 0) + 1
        self._open_levels += 1

    def released(self, file: Chain) -> None:
        """All levels of ``file`` were closed."""
        self._open_levels -= self._levels.pop(file, 0)

    def trim_logs(self) -> None:
        logs = self._logs
        while len(logs) > self.view.share.maps:
            next(iter(logs)).drop_log()

    def give_back(self) -> None:
        for chain in list(self._levels):
            chain.release()
        for file in list(self._logs):
            file.drop_log()

    # -- maps ---------------------------------------------------------------------------------

    def open_log(self, file: Chain, loaded: Loaded | None) -> Log:
        """The map of a file of the upper layer, made at the first need."""
        upper = self.view.need_upper()
        assert file.ref is not None
        space = self.view.space
        if not file.ref.has_map:
            if space is not None:
                space.need(0, 0, space.entering(file.ref.map_name), Room(0, 1))
            log = Log.create(self.map_dir(upper), file.ref)
            file.mapped()
            self._logs[file] = None
            if space is not None:
                space.map_written(log.name, log.end)
            return log
        left = self.syncer.take_back(file.ref.map_name)
        if left is not None:
            self._logs[file] = None
            return left
        if loaded is None:
            loaded = row_map.read(self.map_dir(upper), file.ref)
        log = Log.open(self.map_dir(upper), file.ref, loaded, durable=self.view.must_sync)
        self._logs[file] = None
        if log.dirty:
            self.wrote(file, log)
        return log

    def wrote(self, file: Chain, log: Log) -> None:
        """A record was appended."""
        if self.view.space is not None:
            self.view.space.map_written(log.name, log.end)
        if log not in self.syncer.dirty:
            self.syncer.add(log, file.own_fd())

    def close_log(self, file: Chain, log: Log) -> None:
        """Take over the map of a file."""
        self._logs.pop(file, None)
        if not self.syncer.leave(log):
            log.close()

    def sync_job(self) -> Callable[[], None]:
        return self.syncer.sync

    def drop_map(self, layer: Layer, ref: Ref) -> None:
        """Remove an unreferenced map; one left over is garbage."""
        if ref.has_map:
            with contextlib.suppress(OSError):
                os.unlink(ref.map_name, dir_fd=self.map_dir(layer))
                if self.view.space is not None and layer is self.view.stack.upper:
                    self.view.space.map_gone(ref.map_name)

    # -- making -------------------------------------------------------------------------------

    def redirect(self, node: Node, keep: int | None = None, *, data: bool = True) -> bool:
        view, old = self.view, node.data
        view.need_upper()
        if isinstance(old, RowFile) and old.writable:
            return True
        size = view.size(node)
        if node.type != DT_REG or size == 0 or (data and keep == 0 and not isinstance(old, RowFile)):
            return False
        if data and not isinstance(old, RowFile) and size <= self.block:
            return False
        if node.parent is None:
            return isinstance(old, RowFile) and self._anonymous(node)
        if view.in_upper(node):
            return self._convert(node, size)
        return self._make(node, size, data)

    def _make(self, node: Node, size: int, data: bool) -> bool:
        view, work, upper = self.view, self.view.stack.workdir, self.view.need_upper()
        assert work is not None and node.parent is not None
        maps = self.map_dir(upper)
        meta = stored.read_meta(view, node)
        blocks = unpack(view.attr(node)).blocks
        ref = Ref.make(self.block, size, blocks, view.low_child(node.parent, node.name), has_map=data)
        packed = ref.pack()
        space = view.space
        if space is not None:
            room = space.copy_cost(meta._replace(xattrs={**meta.xattrs, view.form.row: packed}))
            room = Room(room.large, room.small + (1 if data else 0))
            space.need(0, 1, space.entering(node.name, 1 + len(view.names_of(node))), room)
        levels, extents = self._as_levels(node)
        log = Log.create(maps, ref) if data else None
        temp = work.temp()
        fd = -1
        try:
            fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=work.fd)
            os.ftruncate(fd, size)
            xattr.setx(fd, b"", view.form.row, packed)
            copyup.place(view, node, temp, work, metacopy=False)
        except BaseException as failure:
            if fd >= 0:
                os.close(fd)
                work.discard(temp)
            if log is not None:
                log.close()
            self.drop_map(upper, ref)
            if stored.no_room(failure) and not isinstance(node.data, RowFile):
                return False  # no room for the reference: copy
            raise
        if space is not None:
            space.add(0, 1)
            if log is not None:
                space.map_written(log.name, log.end)
        self._take(node, RowFile(self, upper, None, b"", ref), fd, levels, extents, size, log)
        return True

    def _as_levels(self, node: Node) -> tuple[list[Level], Extents]:
        """The chain of a lower file's present data. Its descriptor goes along in :meth:`_take`."""
        old = node.data
        if isinstance(old, RowFile):
            extents = old.load().copy()
            return [*old.levels, Level(*old.place())], extents
        there = old.place()
        if there is None:
            assert node.where is not None
            there = node.where, node.name
        return [Level(*there)], Extents()

    def _take(
        self, node: Node, file: RowFile, fd: int, levels: list[Level], extents: Extents, size: int, log: Log | None
    ) -> None:
        """Make ``file`` the node's data."""
        view, old = self.view, node.data
        if isinstance(old, RowFile):
            old.release()  # they are the new file's levels, too
            file.follow(old)
        if node.fd >= 0:
            self.opening(file)
            levels[-1].fd = view.open_files.let_go(node)
        file.begin(node, levels, extents, size, log)
        if log is not None:
            self._logs[file] = None
        view.open_files.use(node, fd, writable=True)
        node.data, node.attr = file, None
        view.work.redirected()
        if view.space is not None:
            node.space = Blocks()

    def _convert(self, node: Node, size: int) -> bool:
        """Turn a metacopy of the upper layer into a redirect file in place."""
        view, old = self.view, node.data
        if isinstance(old, RowFile):
            old = old.behind or PLAIN
        if not isinstance(old, Lower):
            return False
        upper = view.need_upper()
        maps = self.map_dir(upper)
        fd = view.open_own(node)
        ref = Ref.make(self.block, size, old.blocks, old.path, has_map=True)
        levels, extents = self._as_levels(node)
        space = view.space
        try:
            if space is not None:
                space.need(0, 0, space.entering(ref.map_name), Room(0, 1))
            log = Log.create(maps, ref)
        except BaseException:
            os.close(fd)
            raise
        try:
            stored.set_mark(view, fd, b"", view.form.row, ref.pack())
            before = space.xattrs(fd, b"") if space is not None else NOTHING
            try:
                xattr.drop(fd, b"", view.form.metacopy)
            except BaseException:
                xattr.drop(fd, b"", view.form.row)  # if this fails, too, both marks and the map stay: they say the same
                if space is not None:
                    space.xattrs_changed(node, space.xattrs(fd, b"").over(before))
                raise
        except BaseException as failure:
            log.close()
            unmarked = xattr.try_get(fd, b"", view.form.row) is None
            if unmarked:
                self.drop_map(upper, ref)
            os.close(fd)
            if unmarked and stored.no_room(failure):
                return False  # no room for the reference: copy
            raise
        if space is not None:
            space.map_written(log.name, log.end)
        self._take(node, RowFile(self, upper, None, b"", ref), fd, levels, extents, size, log)
        try:  # the map is valid from here on, so a failure undoes nothing
            xattr.drop(fd, b"", view.form.redirect)
        finally:
            if space is not None:
                space.xattrs_changed(node, space.xattrs(fd, b"").over(before))
        return True

    def _anonymous(self, node: Node) -> bool:
        """Redirect a lower file that has lost its last name; it dies with the view, so it needs no record."""
        view, work = self.view, self.view.stack.workdir
        assert work is not None
        if view.space is not None:
            view.space.need(0, 1)
        size = view.size(node)
        levels, extents = self._as_levels(node)
        meta = stored.read_meta(view, node)
        temp = work.temp()
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=work.fd)
        try:
            os.ftruncate(fd, size)
            stored.write_meta(work.fd, temp, meta, view)
        except BaseException:
            os.close(fd)
            work.discard(temp)
            raise
        if view.space is not None:
            view.space.add(0, 1)
        self._take(node, RowFile(self, view.need_upper(), None, b"", None), fd, levels, extents, size, None)
        holding.hold_made(view, node, work, temp)
        return True

    def own_all(self, node: Node) -> bool:
        self.redirect(node)
        file = node.data
        if isinstance(file, RowFile):
            while file.missing():
                file.fill(1 << 20)
            file.sync_job()(False)
            self.make_plain(file)
        return True

    def stands_on(self, node: Node, layer: Layer) -> bool:
        return absorbing.stands_on(self, node, layer)

    def absorb(self, node: Node, layer: Layer, *, renames: bool) -> Absorbing:
        return absorbing.RowAbsorbing(self, node, layer, renames=renames)

    def make_plain(self, file: Chain) -> None:
        """Make a file that shows nothing of its base a plain one."""
        if file.ref is not None:
            space = self.view.space
            before = space.xattrs(file.own_fd(), None) if space is not None else NOTHING
            xattr.remove(file.own_fd(), b"", self.view.form.row)
            if space is not None:
                space.xattrs_changed(file.node, space.xattrs(file.own_fd(), None).over(before))
        self._plain(file)

    def replaced(self, file: Chain, fd: int) -> None:
        """Switch to the plain file with the same data, open as ``fd``, that has taken the place of a redirect file."""
        self.view.open_files.use(file.node, fd, writable=True)
        self._plain(file)

    def _plain(self, file: Chain) -> None:
        view, node = self.view, file.node
        if file.ref is not None:
            self.drop_map(view.need_upper(), file.ref)
        file.close()
        node.data, node.attr = PLAIN, None


def _no_map(ref: Ref, name: bytes) -> OSError:
    return OSError(errno.EIO, f"the map {ref.map_name.decode()} of a redirect file is missing", name)
