"""Copy-up: the first change of an object that only a lower layer has.

Parents first, then the object. It is built under a temporary name in the work directory, complete
with owner, mode, xattrs and times, and one rename puts it in place: a crash leaves the tree as
it was, and a leftover that the next mount removes.

* A directory is copied without its entries.
* A regular file whose data does not change becomes a *metacopy*: attributes, a hole of the right
  size, and ``overlay.metacopy``. The ``userxattr`` form has none, so there the data is copied.
* Data is copied by a :class:`Stage`, which any thread may run while the view goes on; the owner
  thread then publishes it. A metacopy receives its data in place: until its xattr is removed,
  after the data is on disk, readers still use the lower file.
* All names of a lower inode move up together (see :mod:`cowfs.union.hardlinks`).

The kernel's overlayfs reads and continues what is written here, and the reverse.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import files, xattr
from cowfs.union import from_index, hardlinks, holding
from cowfs.union.blocks import UNIT, total_of, units
from cowfs.union.filedata import Lower
from cowfs.union.layers import Source
from cowfs.union.measure import NOTHING
from cowfs.union.meta import Meta
from cowfs.union.node import DT_LNK, DT_REG, PLAIN, Dir, Node
from cowfs.union.stored import (
    NoRoomForMark,
    kept_times,
    make_like,
    mark_impure,
    marked,
    no_room,
    read_meta,
    set_mark,
    set_origin,
    write_meta,
)

if TYPE_CHECKING:
    from cowfs.union.core import Core
    from cowfs.union.workdir import WorkDir

__all__ = ["SMALL", "Stage", "note_place", "place", "publish", "up_dir", "up_meta", "writable"]

SMALL = 1 << 20  # bytes: a copy up to this size is made where it is needed


def up_dir(view: Core, directory: Dir, *, exempt: bool = False) -> Source:
    """The directory's source in the upper layer, copied up (parents first) if it has none.

    ``exempt``: it will hold only a whiteout, so it does not count for the limit.
    """
    top = directory.sources[0]
    if top.layer is view.stack.upper:
        return top
    view.need_upper()
    missing: list[Dir] = []
    while directory.sources[0].layer is not view.stack.upper:
        missing.append(directory)
        if directory.parent is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory.name)
        directory = directory.parent
    above = directory.sources[0]
    for below in reversed(missing):
        above = _up_one(view, below, above, exempt)
        view.descriptors.trim()  # no caller holds a descriptor of a Source
    return above


def _up_one(view: Core, directory: Dir, above: Source, exempt: bool) -> Source:
    """Copy one directory up, whose parent is in the upper layer."""
    work, space = view.stack.workdir, view.space
    assert work is not None
    attr = view.attr(directory)  # before its source changes
    meta = read_meta(view, directory)
    if space is not None and exempt:
        space.need_hidden((), 1 + sum(space.copy_cost(meta)))
    elif space is not None:
        space.need(1, 1, space.entering(directory.name), space.copy_cost(meta))
    temp = work.temp()

    def marks() -> None:
        nonlocal exempt
        if exempt:  # where the mark has no room the directory counts
            exempt = marked(work.fd, temp, view.form.exempt, b"y")
        set_origin(view, work.fd, temp, directory.sources[0].open(), b"", directory.id)

    try:
        os.mkdir(temp, 0o700, dir_fd=work.fd)
        write_meta(work.fd, temp, meta, view, marks)
        with kept_times(above):
            os.rename(temp, directory.name, src_dir_fd=work.fd, dst_dir_fd=above.open())
    except BaseException:
        work.discard(temp)
        raise
    source = above.child(directory.name)
    source.whiteouts, source.shadow, source.impure = set(), set(), True
    directory.sources.insert(0, source)
    directory.where = source
    directory.attr = attr
    if above.shadow is not None:
        above.shadow.add(directory.name)
    mark_impure(view, above)
    if space is not None:
        room = space.xattrs(source.open(), b"")
        if exempt:
            space.copied(above, directory.name, room)
        else:
            space.named(above, directory.name, 1, 1)
            space.xattrs_changed(None, room)
        space.grew_by_xattrs(source.open(), b"")
    return source


# -- files --------------------------------------------------------------------------------------


class Stage:
    """A copy of one file's data that is under way.

    Life: :func:`writable` makes it (owner thread), :meth:`run` copies (any thread),
    :func:`publish` puts it in place or raises its error (owner thread).
    """

    __slots__ = (
        "cancelled",
        "dst_fd",
        "error",
        "keep",
        "node",
        "reserved",
        "src_fd",
        "sync",
        "temp",
        "times",
        "where",
        "work",
    )

    def __init__(self, node: Node, keep: int, src_fd: int, dst_fd: int, temp: bytes, work: WorkDir, sync: bool) -> None:
        self.node = node
        self.work = work
        self.where = node.where
        self.keep = keep
        self.src_fd, self.dst_fd = src_fd, dst_fd
        self.temp = temp  # b"": into the metacopy itself
        self.sync = sync
        self.error: OSError | None = None
        self.cancelled = False
        self.times: tuple[int, int] | None = None  # of the metacopy, before its data came
        self.reserved = 0  # units counted when it was begun

    @property
    def small(self) -> bool:
        """Whether it is quick enough to run at once."""
        return self.keep <= SMALL and not (self.sync and self.keep)

    def fail(self, error: OSError) -> None:
        """Mark the copy as failed."""
        self.error = error

    def cancel(self) -> None:
        """Cancel the copy; any thread."""
        self.cancelled = True

    def run(self) -> None:
        """Copy, and sync when the mount is not volatile. Never raises."""
        try:
            files.copy_data(self.src_fd, self.dst_fd, self.keep, stop=lambda: self.cancelled)
            if self.sync and self.keep:
                os.fdatasync(self.dst_fd)
        except OSError as error:
            self.error = error


def writable(view: Core, node: Node, keep: int | None = None, *, plain: bool = False) -> Stage | None:
    """Make ready to change a file's data.

    Args:
        keep: the bytes of the present data that are still wanted (default: all).
        plain: make no redirect file.

    Returns:
        ``None`` when the data is in the upper layer; else the copy that has to be made first.

    Raises:
        OSError: EROFS, ENOSPC, EISDIR, EINVAL for an object without data.
    """
    if node.data is PLAIN and view.in_upper(node):
        return None
    view.need_upper()
    view.trim()
    if node.type != DT_REG:
        number = errno.EISDIR if node.type == 4 else errno.EINVAL
        raise OSError(number, os.strerror(number), node.name)
    if view.rows is not None and not plain and view.rows.redirect(node, keep):
        return None
    size = view.size(node)
    keep = size if keep is None else min(keep, size)
    work = view.stack.workdir
    assert work is not None
    src_fd = view.open_data(node)
    inplace = view.in_upper(node)
    temp = b"" if inplace else work.temp()
    try:
        reserved = _reserve(view, node, src_fd, keep, new_inode=not inplace)
        if inplace:
            dst_fd = view.open_own(node)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            dst_fd = os.open(temp, flags, 0o600, dir_fd=work.fd)
    except BaseException:
        os.close(src_fd)
        raise
    stage = Stage(node, keep, src_fd, dst_fd, temp, work, view.must_sync)
    stage.reserved = reserved
    if inplace:
        st = os.fstat(dst_fd)
        stage.times = st.st_atime_ns, st.st_mtime_ns
    return stage


def _reserve(view: Core, node: Node, src_fd: int, keep: int, *, new_inode: bool) -> int:
    """Count the copy's data before it is made; its xattrs and names only have to fit. Raises ENOSPC."""
    space = view.space
    if space is None:
        return 0
    need = sum(units(end) - start // UNIT for start, end in files.data_ranges(src_fd, keep))
    if new_inode:
        names = space.entering(node.name, len(view.names_of(node)))
        space.need(need, 1, names, space.copy_cost(read_meta(view, node)))
    else:
        space.need(need)
    space.add(need, 1 if new_inode else 0)
    return need


def publish(view: Core, stage: Stage) -> None:
    """Put a finished copy in place. Raises the error of the copy; then nothing has changed."""
    node = stage.node
    os.close(stage.src_fd)
    try:
        if stage.error is not None:
            raise stage.error
        if node.where is not stage.where or not (stage.temp or view.in_upper(node)):
            # its attributes were copied up meanwhile, or its layer was frozen
            again = writable(view, node, stage.keep)
            _abandon(view, stage)
            if again is not None:
                again.run()
                publish(view, again)
            return
        before = NOTHING
        if not stage.temp:
            if view.space is not None:
                before = view.space.xattrs(stage.dst_fd, None)
            _fill_metacopy(view, node, stage)
        elif node.parent is None:
            _adopt_orphan(view, node, stage)
        else:
            place(view, node, stage.temp, stage.work, metacopy=False)
    except BaseException:
        _abandon(view, stage)
        raise
    if stage.temp and node.parent is None:
        holding.hold_copy(view, node, stage.work, stage.temp, stage.dst_fd, writable=True)
    else:
        view.open_files.use(node, stage.dst_fd, writable=True)
    node.data, node.attr = PLAIN, None
    view.work.copied(stage.keep)
    if view.space is not None:
        node.space = None
        # the copy's xattrs are counted by :func:`place`, those of a metacopy were before
        view.space.add(total_of(view.space.count(node)) - stage.reserved)
    if not stage.temp:  # the data is the file's own from here on, so a failure undoes nothing
        try:
            xattr.drop(stage.dst_fd, b"", view.form.redirect)
        finally:
            if view.space is not None:
                view.space.xattrs_changed(node, view.space.xattrs(stage.dst_fd, None).over(before))


def _abandon(view: Core, stage: Stage) -> None:
    if not stage.temp:
        with contextlib.suppress(OSError):
            os.ftruncate(stage.dst_fd, 0)
            os.ftruncate(stage.dst_fd, view.size(stage.node))
    os.close(stage.dst_fd)
    if stage.temp:
        stage.work.discard(stage.temp)
    if view.space is not None:
        view.space.add(-stage.reserved, -1 if stage.temp else 0)


def _fill_metacopy(view: Core, node: Node, stage: Stage) -> None:
    fd, form = stage.dst_fd, view.form
    meta = read_meta(view, node)
    st = os.fstat(fd)
    if st.st_size != meta.size and stage.keep >= meta.size:
        os.ftruncate(fd, meta.size)
    for attribute, value in meta.xattrs.items():  # a write drops file capabilities
        if attribute == b"security.capability":
            xattr.setx(fd, b"", attribute, value)
    os.fchmod(fd, stat.S_IMODE(meta.mode))
    os.utime(fd, ns=stage.times or (meta.atime, meta.mtime))
    if view.must_sync:
        os.fsync(fd)
    # With this mark the data counts as the lower layer's, also at the next mount: the copy is valid only once the mark is gone.
    xattr.drop(fd, b"", form.metacopy)


def _adopt_orphan(view: Core, node: Node, stage: Stage) -> None:
    """Keep the copy of a file that lost its last name meanwhile, without a name."""
    meta = read_meta(view, node)
    write_meta(stage.work.fd, stage.temp, meta, view)
    if view.space is not None:
        view.space.xattrs_changed(node, view.space.xattrs(stage.dst_fd, None))


def place(view: Core, node: Node, temp: bytes, work: WorkDir, *, metacopy: bool, meta: Meta | None = None) -> None:
    """Give a built copy all its attributes (``meta``, if they were read) and put it under every name of the node."""
    assert node.parent is not None and node.where is not None
    where = node.where
    others = hardlinks.complete(view, node)
    ups = [(up_dir(view, directory), directory, name) for directory, name in view.names_of(node)]
    low = view.low_path(node.parent)
    low = low + b"/" + node.name if low else node.name
    if meta is None:
        meta = read_meta(view, node)
    blocks = int.from_bytes(view.attr(node)[16:24], "little")
    data = node.data if isinstance(node.data, Lower) else Lower(where, node.name, low, meta.size, blocks)
    source, real = physical(view, node, where)

    def marks() -> None:
        if metacopy and not (
            marked(work.fd, temp, view.form.metacopy, b"")
            and (not others or marked(work.fd, temp, view.form.redirect, b"/" + low))
        ):
            raise NoRoomForMark(node.name)
        set_origin(view, work.fd, temp, source.open(), real, node.id)

    write_meta(work.fd, temp, meta, view, marks)
    for above, _, name in ups[1:]:
        with kept_times(above):
            os.link(temp, name, src_dir_fd=work.fd, dst_dir_fd=above.open(), follow_symlinks=False)
    above, _, name = ups[0]
    with kept_times(above):
        os.rename(temp, name, src_dir_fd=work.fd, dst_dir_fd=above.open())
    for above, _, name in ups:
        if above.shadow is not None:
            above.shadow.add(name)
        mark_impure(view, above)
    if view.space is not None:
        for above, _, name in ups:
            view.space.named(above, name)
        view.space.xattrs_changed(None, view.space.xattrs(ups[0][0].open(), ups[0][2]))
    if metacopy:
        node.data = data.at(low)
    node.where = ups[0][0]
    if node.bare > 1:
        node.bare = 1  # the copy has marks
    node.attr = None


def physical(view: Core, node: Node, where: Source) -> tuple[Source, bytes]:
    """The place of a lower inode itself; an index has the place of the data."""
    there = node.data.place() if node.data.home is not None else None
    if there is not None and from_index.entry_of(view, node) is not None:
        return there
    return where, node.name


def up_meta(view: Core, node: Node, *, whole: bool = True) -> None:
    """Bring an inode into the upper layer because its attributes or names are about to change.

    Args:
        whole: where the host has no room for the mark of a metacopy, copy the data, too, instead of raising ENOSPC.
    """
    if isinstance(node, Dir):
        up_dir(view, node)
        return
    if view.moves.leaving is not None:
        view.moves.leaving.before_up(node)
    if view.in_upper(node):
        return
    view.need_upper()
    if view.rows is not None and view.rows.redirect(node, data=False):
        return
    if node.parent is None and node.type != DT_REG:
        _copy_nameless(view, node)
        return
    if node.parent is None or (node.type == DT_REG and view.size(node) and not view.form.redirects):
        stage = writable(view, node)
        if stage is not None:
            stage.run()
            publish(view, stage)
        return
    space = view.space
    work = view.stack.workdir
    assert work is not None and node.where is not None
    meta = read_meta(view, node)
    if space is not None:
        space.need(0, 1, space.entering(node.name, len(view.names_of(node))), space.copy_cost(meta))
    temp = work.temp()
    try:
        make_like(work.fd, temp, meta, node)
        is_meta = node.type == DT_REG and meta.size > 0
        view.open_files.close(node)
        place(view, node, temp, work, metacopy=is_meta, meta=meta)
    except BaseException as failure:
        work.discard(temp)
        if whole and isinstance(failure, NoRoomForMark):
            _up_whole(view, node)
            return
        raise
    view.work.copied_alone()
    if space is not None:
        node.space = None
        space.add(total_of(space.count(node)) if node.type == DT_LNK else 0, 1)


def _up_whole(view: Core, node: Node) -> None:
    """Copy a file up with its data, as an ordinary file."""
    stage = writable(view, node, plain=True)
    if stage is not None:
        stage.run()
        publish(view, stage)


def note_place(view: Core, node: Node) -> None:
    """Record the place of a metacopy's data before it gets another name; copy the data if the record has no room."""
    path = node.data.path
    if path is None or not view.form.redirects:
        return
    fd, real = (node.fd, b"") if node.where is None else (node.where.open(), node.name)
    try:
        set_mark(view, fd, real, view.form.redirect, b"/" + path)
    except OSError as failure:
        if not no_room(failure):
            raise
        if node.data.pieced:  # no copy in one piece
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), node.name) from None
        _up_whole(view, node)


def _copy_nameless(view: Core, node: Node) -> None:
    """Copy an unlinked link, FIFO, socket or device that is still in use; the copy has no name either."""
    work = view.stack.workdir
    assert work is not None
    meta = read_meta(view, node)
    space = view.space
    if space is not None:
        space.need(0, 1, room=space.copy_cost(meta))
    temp = work.temp()
    try:
        make_like(work.fd, temp, meta, node)
        write_meta(work.fd, temp, meta, view)
        fd = os.open(temp, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work.fd)
    except BaseException:
        work.discard(temp)
        raise
    holding.hold_copy(view, node, work, temp, fd, writable=False)
    node.attr = None
    if space is not None:
        node.space = None
        space.add(total_of(space.count(node)) if node.type == DT_LNK else 0, 1)
        space.xattrs_changed(node, space.xattrs(fd, b""))
