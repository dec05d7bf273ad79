"""The merged view: one tree made of read-only layers and, on top, a writable one.

Strategy. A view answers the questions of a file system (look up, list, stat, read) and makes its
changes (create, write, rename) in terms of *nodes*. It knows no FUSE word and asks nobody's
permission: a front end does both. It keeps all that it learned, so a second question costs no system
call: a directory's names from one scan of each of its layers, a file's attributes from one lstat.

===================  =====================================================================
:mod:`core`          the parts of a view, and what one operation asks of another
:mod:`layers`        layers and their directories
:mod:`openfiles`     the descriptors of file data
:mod:`holding`       files and directories that lost their last name
:mod:`lookup`        from a name to its node
:mod:`lifetime`      names of nodes, look-up counts, forgotten nodes
:mod:`listing`       directories that change while they are listed
:mod:`from_index`    a lower tree that an index knows
:mod:`merge`         how layers merge: whiteouts, opaque, redirect, metacopy (only reads)
:mod:`copyup`        the first change: directories, files, data
:mod:`create`        mknod, mkdir, symlink, link, tmpfile, unlink, rmdir
:mod:`rename`        rename with its flags
:mod:`content`       read, write, truncate, holes
:mod:`attributes`    setattr, xattrs
:mod:`hardlinks`     which names a lower inode has
:mod:`quota`         the limit
:mod:`live`          snapshots of a live view, and back
:mod:`restack`       other layers that show the same tree
:mod:`absorb`        the upper layer takes over the one beneath
===================  =====================================================================

Threading: one thread owns a view and makes every call, except :meth:`Stage.run
<cowfs.union.copyup.Stage.run>`. Errors are OSError with the errno that the system call of that
name documents.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cowfs._typed import TYPE_CHECKING
from cowfs.errors import InvalidArgument
from cowfs.format.whiteout import choose_form, opaque_value
from cowfs.model import Limit, Usage
from cowfs.sys import files
from cowfs.sys.descriptors import share_out
from cowfs.union import (
    attributes,
    content,
    copyup,
    create,
    from_index,
    holding,
    lifetime,
    listing as _listing,
    live,
    lookup as union_lookup,
    quota,
    rename as _rename,
)
from cowfs.union.core import Core
from cowfs.union.inode import NOW
from cowfs.union.inodes import Inodes
from cowfs.union.layers import Descriptors, Layer
from cowfs.union.moves import Moves
from cowfs.union.node import Dir, Node
from cowfs.union.openfiles import OpenFiles
from cowfs.union.options import Options
from cowfs.union.owners import make_owners
from cowfs.union.redirecting import redirects_of
from cowfs.union.stack import LayerStack
from cowfs.union.table import ROOT_ID, NodeTable
from cowfs.union.work import Work
from cowfs.union.workdir import WorkDir

if TYPE_CHECKING:
    from cowfs.union.redirecting import RedirectsMaker

__all__ = ["View"]

_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
#: hosts that never give an inode number twice
_MONOTONIC = ("tmpfs", "btrfs")


class View(Core):
    """One merged tree.

    Args:
        lowers: layer directories, topmost first (may be empty when there is an upper).
        upper: the writable layer's directory; ``None`` makes the view read-only.
        work: an empty directory on the same file system as ``upper``.
        options: see :class:`~cowfs.union.options.Options`.
        redirects: makes the view's redirect files, should its stack hold some (:class:`cowfs.row.view.View` hands it in).

    Raises:
        InvalidArgument: ``lowers`` is one path, not a sequence.
        OSError: a directory is missing or unreadable; ENOTDIR; EXDEV when ``work`` is on another
            file system than ``upper``; EOPNOTSUPP when layers hold redirect files and there is no ``redirects``.

    >>> import pathlib, tempfile
    >>> base = tempfile.mkdtemp()
    >>> pathlib.Path(base, "hello").write_bytes(b"world")
    5
    >>> view = View([base])
    >>> view.size(view.lookup(view.root, b"hello"))
    5
    >>> view.close()
    """

    NOW = NOW

    def __init__(
        self,
        lowers: Sequence[str | bytes | os.PathLike[str]],
        upper: str | bytes | os.PathLike[str] | None = None,
        work: str | bytes | os.PathLike[str] | None = None,
        *,
        options: Options | None = None,
        redirects: RedirectsMaker | None = None,
    ) -> None:
        if isinstance(lowers, str | bytes | os.PathLike):
            raise InvalidArgument(f"layers are a sequence of directories, not one path: {lowers!r}", remedy="[path]")
        self.options = options = options or Options()
        self.form = choose_form(options.form, dotwh=options.dotwh)
        self.share = share_out(options.max_fds)
        self.descriptors = Descriptors(self.share.directories, self.share.removed)
        self.open_files = OpenFiles(self.share)
        self.stack = LayerStack(len(lowers), options.index)
        self.table = NodeTable()
        self.moves = Moves()
        self.nodes = self.table.nodes
        self.space = None
        self.patient = False
        self.rows = None
        self.limit_reached = None
        self.work = Work()
        self._uuids: dict[int, bytes] = {}
        self._noatime = True
        self.readonly = options.readonly or upper is None
        self.inodes = Inodes(())  # until the layers are open
        try:
            for number, path in enumerate(reversed(lowers)):
                self.stack.add(Layer(os.fsencode(path), number, self.descriptors))
            if upper is not None:
                top = Layer(os.fsencode(upper), len(self.stack.layers), self.descriptors)
                self.stack.add(top, upper=True)
                if not self.readonly:
                    if work is None:
                        raise OSError(errno.EINVAL, "an upper directory needs a work directory")
                    self.stack.work_in(WorkDir(os.fsencode(work), top, self.form))
            if not self.stack.layers:
                raise OSError(errno.EINVAL, "no layers")
            self.owners = make_owners(options)
            self.inodes = Inodes(self.stack.layers)
            self.rows = redirects_of(self, redirects)
            self.monotonic = files.fs_name(self.stack.layers[-1].root.fd) in _MONOTONIC
            self.root = self._make_root()
            if options.limit and not self.readonly:
                self.set_limit(options.limit)
        except BaseException:
            self.close()
            raise

    def _make_root(self) -> Dir:
        sources = list(self.stack.roots)
        record = None
        if self.stack.index is not None:
            record = self.stack.index.root()
            sources = [self.stack.upper.root] if self.stack.upper is not None else [self.stack.layers[-1].root]
        for number, source in enumerate(sources):
            value = opaque_value(source.open(), self.form)
            if value == b"x":
                source.layer.xwhiteouts = True
            if value == b"y":
                del sources[number + 1 :]
                break
        root = Dir(ROOT_ID, b"", sources)
        root.parent = root
        root.record = record
        root.nlookup = 1
        bottom = self.stack.layers[0].root.fd
        st = os.fstat(bottom)
        self.root_ino = self.inodes.shown(st.st_dev, st.st_ino)
        self.nodes[ROOT_ID] = root
        return root

    def close(self) -> None:
        """Give back every descriptor. The view must not be used afterwards."""
        if self.rows is not None:
            self.rows.close()
        for node in list(self.nodes.values()):
            self.open_files.close(node)
        self.nodes.clear()
        self.descriptors.close_all()
        for removed in list(self.descriptors.kept):
            removed.close()
        self.stack.close()
        self.inodes.close()

    # -- the whole ----------------------------------------------------------------------------

    def statfs(self) -> os.statvfs_result:
        """statvfs(3) of the upper layer's host, bounded by the limit."""
        layer = self.stack.upper or self.stack.layers[-1]
        host = os.fstatvfs(layer.root.fd)
        return self.space.statfs(host) if self.space is not None else host

    def set_limit(self, limit: Limit | None) -> None:
        """Bound what the upper layer holds from now on. Counts it first if nobody has."""
        if self.stack.upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if self.space is None:
            if not limit:
                return
            self.space = quota.Space(self)
        self.space.set_limit(limit or Limit())

    @property
    def limit(self) -> Limit | None:
        """The bound in force."""
        return self.space.limit if self.space is not None else None

    def usage(self) -> Usage:
        """Use of the upper layer: kept when there is a limit, else counted now."""
        if self.space is not None:
            return self.space.usage()
        return quota.measure(self.stack.upper, self.form) if self.stack.upper is not None else Usage()

    def uuid_at(self, fd: int) -> bytes:
        """The uuid of the file system that an open object is on."""
        dev = os.fstat(fd).st_dev
        found = self._uuids.get(dev)
        if found is None:
            found = self._uuids[dev] = self.inodes.uuid_of(dev)
        return found

    def open_data(self, node: Node) -> int:
        """A new descriptor for reading a regular file's data, wherever it is. EOPNOTSUPP for redirect files."""
        flags = os.O_RDONLY | _FILE
        data = node.data
        if data.pieced:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), node.name)
        where, name = data.place() or (node.where, node.name)
        if where is None:
            return os.open(b"/proc/self/fd/%d" % node.fd, os.O_RDONLY | os.O_CLOEXEC)
        fd = where.fd if where.fd >= 0 else where.open()
        if self._noatime:
            try:
                return os.open(name, flags | os.O_NOATIME, dir_fd=fd)
            except PermissionError:
                self._noatime = False
        return os.open(name, flags, dir_fd=fd)

    def open_own(self, node: Node) -> int:
        """A new descriptor for writing the file that the upper layer has.

        An owner may write a file that its mode forbids to write (it was opened before); a server
        without privilege lifts the mode for the moment of opening.
        """
        flags = os.O_RDWR | _FILE
        where = node.where
        if where is None:
            path = b"/proc/self/fd/%d" % node.fd
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except PermissionError:
                mode = os.fstat(node.fd).st_mode & 0o7777
                os.chmod(path, mode | 0o600)
                try:
                    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
                finally:
                    os.chmod(path, mode)
        fd = where.fd if where.fd >= 0 else where.open()
        try:
            return os.open(node.name, flags, dir_fd=fd)
        except PermissionError:
            mode = os.stat(node.name, dir_fd=fd, follow_symlinks=False).st_mode & 0o7777
            os.chmod(node.name, mode | 0o600, dir_fd=fd)
            try:
                return os.open(node.name, flags, dir_fd=fd)
            finally:
                os.chmod(node.name, mode, dir_fd=fd)

    def trim(self) -> None:
        """Close the descriptors opened longest ago, above their shares. Only at the start of an operation."""
        self.descriptors.trim()
        self.open_files.trim()
        if self.rows is not None:
            self.rows.trim_logs()

    def give_back(self) -> None:
        """Close every descriptor that can be opened again. Only between operations."""
        self.descriptors.close_all()
        self.open_files.close_all()
        if self.rows is not None:
            self.rows.give_back()

    # -- the rest, one concept a module ---------------------------------------------------------

    node = union_lookup.node
    directory = union_lookup.directory
    lookup = union_lookup.lookup
    child = union_lookup.child
    parent = union_lookup.parent
    load = union_lookup.load
    new_dir = union_lookup.new_dir
    pack_into = union_lookup.pack_into
    source_at = from_index.source_at
    bind = lifetime.bind
    unbind = lifetime.unbind
    names_of = lifetime.names_of
    upper_of = lifetime.upper_of
    in_upper = lifetime.in_upper
    is_nameless = holding.is_nameless
    path = lifetime.path
    low_path = lifetime.low_path
    low_child = lifetime.low_child
    forget = lifetime.forget
    drop = lifetime.drop
    revive = lifetime.revive
    listing = _listing.listing
    entry = _listing.entry
    attr = attributes.attr
    size = attributes.size
    mode = attributes.mode
    mknod = create.mknod
    mkdir = create.mkdir
    symlink = create.symlink
    link = create.link
    tmpfile = create.tmpfile
    unlink = create.unlink
    rmdir = create.rmdir
    rename = _rename.rename
    readlink = content.readlink
    pread = content.pread
    write = content.write
    fallocate = content.fallocate
    lseek = content.lseek
    copy_range = content.copy_range
    kill_privileges = content.kill_privileges
    fsync_fd = content.fsync_fd
    reader = content.reader
    sync_job = content.sync_job
    sync_all_job = content.sync_all_job
    data_fd = content.data_fd
    has_own_data = content.has_own_data
    writable = copyup.writable
    publish = copyup.publish
    freeze = live.freeze
    replace = live.replace
    rollback = live.rollback
    setattr = attributes.setattr
    getxattr = attributes.getxattr
    listxattr = attributes.listxattr
    setxattr = attributes.setxattr
    removexattr = attributes.removexattr
