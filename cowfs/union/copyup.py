"""Copy-up: the first change of something that only a lower layer has.

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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from cowfs.format.whiteout import Form, allow_nested, make as make_whiteout, make_nested
from cowfs.sys import files, trees, xattr
from cowfs.union import from_index, hardlinks, holding
from cowfs.union.attr import with_nlink
from cowfs.union.inodes import make_origin
from cowfs.union.layers import Layer, Source
from cowfs.union.measure import NOTHING
from cowfs.union.merge import Data
from cowfs.union.node import DT_LNK, DT_REG, Dir, Node
from cowfs.union.quota import UNIT, LimitReached, total_of, units

if TYPE_CHECKING:
    from cowfs.union.view import View

SMALL = 1 << 20  # bytes: a copy up to this size is made where it is needed
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What an ordinary user cannot copy: these belong to the host's policy, not to the tree.
_HOST_ONLY = (b"security.selinux", b"security.ima", b"security.evm")


# Of an xattr: the host has no room for it; the host does not take it.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE})
_NO_MARK = _NO_ROOM | {errno.EPERM, errno.EOPNOTSUPP}
_KEEP = (b"incompat",)  # the kernel's marks of volatile mounts; who mounts honours them (cowfs.mounting.volatile)


class NoRoomForMark(OSError):
    """A copy of attributes alone is not possible: the mark that says so has no room beside the file's own xattrs."""

    def __init__(self, name: bytes) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


class WorkDir:
    """The work directory: temporary names, and the one whiteout inode.

    Everything is kept in its sub-directory ``work``, as the kernel does, and what a killed
    process left there is removed when it is opened.

    On a host that is an overlay itself (a container's root) nobody may make a device 0/0. Whiteouts are then the
    kernel's nested ones: from the first on, the directories that get one and the upper's root are marked before.
    """

    def __init__(self, path: bytes, upper: Layer, form: Form) -> None:
        outer = os.open(path, _DIR_FLAGS & ~os.O_NOFOLLOW)
        try:
            if os.fstat(outer).st_dev != upper.dev:
                raise OSError(errno.EXDEV, "work and upper are on different file systems", path)
            with contextlib.suppress(FileExistsError):
                os.mkdir(b"work", 0o700, dir_fd=outer)
            fd = os.open(b"work", _DIR_FLAGS, dir_fd=outer)
        finally:
            os.close(outer)
        try:
            files.make_plain(fd, 0o700)
            clear(fd, keep=_KEEP)
        except BaseException:
            os.close(fd)
            raise
        self.source = Source(upper, None, b"", upper.root.descriptors)
        self.source.fd = fd
        self.fd = fd
        self.held: set[Node] = set()  # nodes without a name that one in here stands for (cowfs.union.holding)
        self._count = 0
        self._whiteout: bytes | None = None
        self._form = form
        self._nested = False

    def close(self) -> None:
        """Remove what is left and close."""
        with contextlib.suppress(OSError):
            clear(self.fd, keep=_KEEP)
        self.source.close()

    def temp(self) -> bytes:
        """A name that nobody has."""
        self._count += 1
        return b"#%x" % self._count

    def put_whiteout(self, dirfd: int, name: bytes) -> None:
        """Make ``name`` a whiteout: one more link of the shared inode. EEXIST when taken."""
        for _ in range(2):
            if self._whiteout is None:
                self._whiteout = self.temp()
                self._make(self.fd, self._whiteout)
            self.allow(dirfd)
            try:
                os.link(self._whiteout, name, src_dir_fd=self.fd, dst_dir_fd=dirfd, follow_symlinks=False)
                return
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT, errno.EPERM, errno.EXDEV):
                    raise
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._whiteout, dir_fd=self.fd)
                self._whiteout = None
        self._make(dirfd, name)

    def _make(self, dirfd: int, name: bytes) -> None:
        if not self._nested:
            try:
                make_whiteout(dirfd, name)
            except PermissionError:
                self._nested = True
        if self._nested:
            make_nested(dirfd, name, self._form)

    def allow(self, dirfd: int) -> None:
        """Before a whiteout moves into a directory of the upper layer."""
        if not self._nested or dirfd == self.fd:
            return
        layer = self.source.layer
        if not layer.xwhiteouts:
            allow_nested(layer.root.open(), self._form)
            layer.xwhiteouts = True
        allow_nested(dirfd, self._form)

    def cover(self, dirfd: int, name: bytes) -> None:
        """Replace the non-directory ``name`` by a whiteout, in one step."""
        temp = self.temp()
        self.put_whiteout(self.fd, temp)
        self.allow(dirfd)
        os.rename(temp, name, src_dir_fd=self.fd, dst_dir_fd=dirfd)

    def discard(self, name: bytes) -> None:
        """Remove a temporary name, whatever it is."""
        trees.remove_entry(self.fd, name)


def clear(fd: int, keep: tuple[bytes, ...] = ()) -> None:
    """Remove everything in an open directory but the names in ``keep``, never following a link."""
    for entry in os.listdir(b"/proc/self/fd/%d" % fd):
        if entry not in keep:
            trees.remove_entry(fd, entry)


class Meta(NamedTuple):
    """Everything about an inode but its data, as the layers store it (not as it is shown)."""

    mode: int
    uid: int
    gid: int
    size: int
    rdev: int
    atime: int
    mtime: int
    xattrs: dict[bytes, bytes]


def read_meta(view: View, node: Node) -> Meta:
    """The stored attributes and the user-visible xattrs of a node."""
    form = view.form
    entry = from_index.entry_of(view, node)
    if entry is not None:
        kept = {form.store_name(name): value for name, value in entry.xattrs.items()}  # an index has names as shown
        return Meta(entry.mode, entry.uid, entry.gid, entry.size, entry.rdev, entry.mtime_ns, entry.mtime_ns, kept)
    if isinstance(node, Dir):
        fd, name = node.sources[0].open(), b""
        st = os.fstat(fd)
    elif node.where is None:
        fd, name = node.fd, b""
        st = os.fstat(fd)
    else:
        fd, name = node.where.open(), node.name
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
    return _meta_of(view, fd, name, st)


def root_meta(view: View, layer: Layer) -> Meta:
    """The same of the root as one layer has it."""
    fd = layer.root.open()
    return _meta_of(view, fd, b"", os.fstat(fd))


def _meta_of(view: View, fd: int, name: bytes, st: os.stat_result) -> Meta:
    form = view.form
    kept = {k: v for k, v in xattr.read_all(fd, name).items() if form.show_name(k) is not None}
    return Meta(st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_rdev, st.st_atime_ns, st.st_mtime_ns, kept)


def write_meta(dirfd: int, name: bytes, meta: Meta, view: View, marks: Callable[[], None] = lambda: None) -> None:
    """Give a new object owner, xattrs, mode and times, in the order that keeps them all.

    chown first (it clears setuid and capabilities), then xattrs, then the mode, then the times. A mode or an ACL without
    write permission forbids an owner to set user.*, so what else is to be set comes before them.

    Args:
        marks: sets the overlay's own xattrs: after those of the object, which need the room first.
    """
    privileged = view.form.redirects
    st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    wrong = (st.st_mode ^ meta.mode) & 0o7777 or b"system.posix_acl_access" in meta.xattrs
    if (st.st_uid, st.st_gid) != (meta.uid, meta.gid):
        wrong = wrong or st.st_mode & 0o6000  # chown clears them
        try:
            os.chown(name, meta.uid, meta.gid, dir_fd=dirfd, follow_symlinks=False)
        except PermissionError:
            if view.owners is None or not view.owners.record(dirfd, name, meta.mode, meta.uid, meta.gid):
                raise
    acls = [attribute for attribute in meta.xattrs if attribute.startswith(b"system.")]
    for attribute in [*(attribute for attribute in meta.xattrs if attribute not in acls), None, *acls]:
        if attribute is None:
            marks()
            continue
        try:
            xattr.setx(dirfd, name, attribute, meta.xattrs[attribute])
        except OSError as error:
            if (
                error.errno in (errno.EPERM, errno.EOPNOTSUPP)
                and (not privileged or attribute in _HOST_ONLY)
                and attribute.startswith((b"security.", b"trusted."))
            ):
                continue
            raise
    if wrong and not stat.S_ISLNK(meta.mode):
        os.chmod(name, stat.S_IMODE(meta.mode), dir_fd=dirfd)
    os.utime(name, ns=(meta.atime, meta.mtime), dir_fd=dirfd, follow_symlinks=False)


def up_dir(view: View, directory: Dir, *, exempt: bool = False) -> Source:
    """The directory's part in the upper layer, copied up (parents first) when it has none.

    ``exempt``: only a whiteout is going to be put there, so it is not counted against the limit.
    """
    top = directory.sources[0]
    if top.layer is view.upper:
        return top
    view.need_upper()
    missing: list[Dir] = []
    while directory.sources[0].layer is not view.upper:
        missing.append(directory)
        if directory.parent is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory.name)
        directory = directory.parent
    above = directory.sources[0]
    for below in reversed(missing):
        above = _up_one(view, below, above, exempt)
        view.descriptors.trim()  # nobody who calls this holds a descriptor of a Source
    return above


def _up_one(view: View, directory: Dir, above: Source, exempt: bool) -> Source:
    """Copy one directory up, whose parent is there."""
    work, space = view.workdir, view.space
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


def no_room(failure: BaseException) -> bool:
    """Whether an xattr was refused because the host has no room for it (not the limit)."""
    return isinstance(failure, OSError) and failure.errno in _NO_ROOM and not isinstance(failure, LimitReached)


def marked(dirfd: int, name: bytes, attribute: bytes, value: bytes) -> bool:
    """Set an own xattr that can be done without; whether there was room for it.

    Hosts keep xattrs in little room (ext4: one block for all of an inode), which a file of a lower layer may fill with
    its own.
    """
    try:
        xattr.setx(dirfd, name, attribute, value)
    except OSError as failure:
        if not no_room(failure):
            raise
        return False
    return True


def set_mark(view: View, dirfd: int, name: bytes, attribute: bytes, value: bytes) -> None:
    """Set an own xattr of an object of the upper layer whose length is not bounded. Raises ENOSPC at the limit."""
    if view.space is None:
        xattr.setx(dirfd, name, attribute, value)
    else:
        view.space.set_xattr(dirfd, name, attribute, value)


@contextlib.contextmanager
def kept_times(source: Source) -> Iterator[None]:
    """Put a directory's times back after a change that users must not see."""
    st = os.fstat(source.open())
    yield
    os.utime(b".", ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=source.open(), follow_symlinks=False)


def mark_impure(view: View, source: Source) -> None:
    """Say that entries of an upper directory may carry ``origin`` (kernel: ``impure``)."""
    source.impure = True
    if source.marked:
        return
    source.marked = True
    fd = source.open()
    if xattr.try_get(fd, b"", view.form.impure) is None:
        try:
            xattr.setx(fd, b"", view.form.impure, b"y")
        except OSError as error:  # without it the numbers change at the next mount, and nothing else
            if error.errno not in _NO_MARK:
                raise


def set_origin(view: View, dirfd: int, name: bytes, src_fd: int, src_name: bytes, ino: int) -> None:
    """Record which lower inode a copy came from, so that its number ``ino`` stays.

    An index shows the number of the inode that the lower one is itself a copy of, if it is: that is recorded then.
    """
    value = xattr.try_get(src_fd, src_name, view.form.origin)
    number = view.inodes.from_origin(value) if value else None
    if not value or not number or (number != ino and view.index is None):
        value = make_origin(src_fd, src_name, view.uuid_at(src_fd))
    try:
        marked(dirfd, name, view.form.origin, value)
    except OSError as error:  # symbolic links and devices take no user.* xattrs
        if view.form.redirects or error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise


# -- files --------------------------------------------------------------------------------------


class Stage:
    """A copy of one file's data that is under way.

    Life: :func:`writable` makes it (owner thread), :meth:`run` copies (any thread),
    :func:`publish` puts it in place or raises what went wrong (owner thread).
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
        """Whether it is quick enough to be run where it is needed."""
        return self.keep <= SMALL and not (self.sync and self.keep)

    def run(self) -> None:
        """Copy, and sync when the mount is not volatile. Never raises."""
        try:
            files.copy_data(self.src_fd, self.dst_fd, self.keep, stop=lambda: self.cancelled)
            if self.sync and self.keep:
                os.fdatasync(self.dst_fd)
        except OSError as error:
            self.error = error


def writable(view: View, node: Node, keep: int | None = None, *, plain: bool = False) -> Stage | None:
    """Make ready to change a file's data.

    Args:
        keep: how many bytes of the present data are still wanted (default: all).
        plain: make no redirect file.

    Returns:
        ``None`` when the data is in the upper layer; else the copy that has to be made first.

    Raises:
        OSError: EROFS, ENOSPC, EISDIR, EINVAL for something that has no data.
    """
    if node.data is None and view.in_upper(node):
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
    work = view.workdir
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


def _reserve(view: View, node: Node, src_fd: int, keep: int, *, new_inode: bool) -> int:
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


def publish(view: View, stage: Stage) -> None:
    """Put a finished copy in place. Raises what the copy raised; then nothing has changed."""
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
    node.data = node.attr = None
    if view.space is not None:
        node.space = None
        # the copy's xattrs are counted by :func:`place`, those of a metacopy were before
        view.space.add(total_of(view.space.count(node)) - stage.reserved)
    if not stage.temp:  # the data is the file's own from here on, so a failure takes nothing back
        try:
            xattr.drop(stage.dst_fd, b"", view.form.redirect)
        finally:
            if view.space is not None:
                view.space.xattrs_changed(node, view.space.xattrs(stage.dst_fd, None).over(before))


def _abandon(view: View, stage: Stage) -> None:
    if not stage.temp:
        with contextlib.suppress(OSError):
            os.ftruncate(stage.dst_fd, 0)
            os.ftruncate(stage.dst_fd, view.size(stage.node))
    os.close(stage.dst_fd)
    if stage.temp:
        stage.work.discard(stage.temp)
    if view.space is not None:
        view.space.add(-stage.reserved, -1 if stage.temp else 0)


def _fill_metacopy(view: View, node: Node, stage: Stage) -> None:
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
    # With this mark the data counts as the lower layer's, also at the next mount: unless it goes, nothing was written.
    xattr.drop(fd, b"", form.metacopy)


def _adopt_orphan(view: View, node: Node, stage: Stage) -> None:
    """The file lost its last name meanwhile: its copy lives on without one."""
    meta = read_meta(view, node)
    write_meta(stage.work.fd, stage.temp, meta, view)
    if view.space is not None:
        view.space.xattrs_changed(node, view.space.xattrs(stage.dst_fd, None))


def place(view: View, node: Node, temp: bytes, work: WorkDir, *, metacopy: bool, meta: Meta | None = None) -> None:
    """Give a built copy all its attributes (``meta``, where they were read) and put it under every name the node has."""
    assert node.parent is not None and node.where is not None
    where = node.where
    others = hardlinks.complete(view, node)
    ups = [(up_dir(view, directory), directory, name) for directory, name in view.names_of(node)]
    low = view.low_path(node.parent)
    low = low + b"/" + node.name if low else node.name
    if meta is None:
        meta = read_meta(view, node)
    blocks = int.from_bytes(view.attr(node)[16:24], "little")
    data = node.data if isinstance(node.data, Data) else Data(where, node.name, low, meta.size, blocks)
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
    node.attr = None


def physical(view: View, node: Node, where: Source) -> tuple[Source, bytes]:
    """Where a lower inode itself is: an index knows files by where their data is."""
    data = node.data  # a Data, or a redirect file of a lower layer
    if data is not None and data.where is not None and from_index.entry_of(view, node) is not None:
        return data.where, data.name
    return where, node.name


def up_meta(view: View, node: Node, *, whole: bool = True) -> None:
    """Bring an inode into the upper layer because its attributes or names are about to change.

    Args:
        whole: where the host has no room for the mark of a metacopy, copy the data, too, instead of raising ENOSPC.
    """
    if isinstance(node, Dir):
        up_dir(view, node)
        return
    if view.leaving is not None:
        view.leaving.before_up(node)
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
    work = view.workdir
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
    if space is not None:
        node.space = None
        space.add(total_of(space.count(node)) if node.type == DT_LNK else 0, 1)


def _up_whole(view: View, node: Node) -> None:
    """Copy a file up with its data, as an ordinary file."""
    stage = writable(view, node, plain=True)
    if stage is not None:
        stage.run()
        publish(view, stage)


def note_place(view: View, node: Node) -> None:
    """Before a metacopy gets a name elsewhere: note where its data is found; have the data where that has no room."""
    data = node.data
    if data is None or not view.form.redirects or not hasattr(data, "path"):
        return
    fd, real = (node.fd, b"") if node.where is None else (node.where.open(), node.name)
    try:
        set_mark(view, fd, real, view.form.redirect, b"/" + data.path)
    except OSError as failure:
        if not no_room(failure):
            raise
        if hasattr(data, "pread"):  # a redirect file's data: no copy in one piece
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), node.name) from None
        _up_whole(view, node)


def _copy_nameless(view: View, node: Node) -> None:
    """Copy an unlinked link, FIFO, socket or device that somebody still holds; the copy has no name either."""
    work = view.workdir
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


def make_like(dirfd: int, name: bytes, meta: Meta, node: Node) -> None:
    """An empty object of the same type: a file with a hole, a link, a device."""
    if stat.S_ISREG(meta.mode):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(name, flags, meta.mode & 0o777 | 0o600, dir_fd=dirfd)  # often the mode it is to have
        try:
            os.ftruncate(fd, meta.size)
        finally:
            os.close(fd)
    elif stat.S_ISLNK(meta.mode):
        assert node.where is not None
        target = os.readlink(node.name, dir_fd=node.where.open())
        os.symlink(target, name, dir_fd=dirfd)
    else:
        os.mknod(name, meta.mode, meta.rdev, dir_fd=dirfd)


__all__ = [
    "SMALL", "Form", "Meta", "Stage", "WorkDir", "clear", "make_like", "mark_impure", "place",
    "publish", "read_meta", "root_meta", "up_dir", "up_meta", "with_nlink", "writable", "write_meta",
]  # fmt: skip
