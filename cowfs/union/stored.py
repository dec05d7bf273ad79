"""Inodes as the layers store them: attributes and xattrs read from one object and given to another.

Rule: owner, xattrs, mode and times are set in the one order that keeps them all (:func:`write_meta`). A mark of the
overlay is set after the object's own xattrs, which need the room of the inode first; an optional mark may find no room
(:func:`marked`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import xattr
from cowfs.union import from_index
from cowfs.union.bound import LimitReached
from cowfs.union.inodes import make_origin
from cowfs.union.layers import Layer, Source
from cowfs.union.meta import Meta
from cowfs.union.node import Dir, Node

if TYPE_CHECKING:
    from cowfs.union.core import Core


# Xattrs that an ordinary user cannot copy: these belong to the host's policy, not to the tree.
_HOST_ONLY = (b"security.selinux", b"security.ima", b"security.evm")
# Errors of an xattr: the host has no room for it; the host does not take it.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE})
_NO_MARK = _NO_ROOM | {errno.EPERM, errno.EOPNOTSUPP}


class NoRoomForMark(OSError):
    """A metacopy is not possible: its mark has no room beside the file's own xattrs."""

    def __init__(self, name: bytes) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def read_meta(view: Core, node: Node) -> Meta:
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


def root_meta(view: Core, layer: Layer) -> Meta:
    """The attributes and xattrs of one layer's root."""
    fd = layer.root.open()
    return _meta_of(view, fd, b"", os.fstat(fd))


def _meta_of(view: Core, fd: int, name: bytes, st: os.stat_result) -> Meta:
    form = view.form
    kept = {k: v for k, v in xattr.read_all(fd, name).items() if form.show_name(k) is not None}
    return Meta(st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_rdev, st.st_atime_ns, st.st_mtime_ns, kept)


def write_meta(dirfd: int, name: bytes, meta: Meta, view: Core, marks: Callable[[], None] = lambda: None) -> None:
    """Give a new object owner, xattrs, mode and times, in the order that keeps them all.

    chown first (it clears setuid and capabilities), then xattrs, then the mode, then the times. A mode or an ACL without
    write permission forbids an owner to set user.*, so the other xattrs come before them.

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


def no_room(failure: BaseException) -> bool:
    """Whether an xattr was refused because the host has no room for it (not the limit)."""
    return isinstance(failure, OSError) and failure.errno in _NO_ROOM and not isinstance(failure, LimitReached)


def marked(dirfd: int, name: bytes, attribute: bytes, value: bytes) -> bool:
    """Set an optional own xattr. Returns whether there was room for it.

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


def set_mark(view: Core, dirfd: int, name: bytes, attribute: bytes, value: bytes) -> None:
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


def mark_impure(view: Core, source: Source) -> None:
    """Mark an upper directory whose entries may carry ``origin`` (kernel: ``impure``)."""
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


def set_origin(view: Core, dirfd: int, name: bytes, src_fd: int, src_name: bytes, ino: int) -> None:
    """Record which lower inode a copy came from, so that its number ``ino`` stays.

    If the lower inode is itself a copy, an index shows the number of its source, which is recorded then.
    """
    value = xattr.try_get(src_fd, src_name, view.form.origin)
    number = view.inodes.from_origin(value) if value else None
    if not value or not number or (number != ino and view.stack.index is None):
        value = make_origin(src_fd, src_name, view.uuid_at(src_fd))
    try:
        marked(dirfd, name, view.form.origin, value)
    except OSError as error:  # symbolic links and devices take no user.* xattrs
        if view.form.redirects or error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise


def make_like(dirfd: int, name: bytes, meta: Meta, node: Node) -> None:
    """An empty object of the same type: a file with a hole, a link, a device."""
    if stat.S_ISREG(meta.mode):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(name, flags, meta.mode & 0o777 | 0o600, dir_fd=dirfd)  # often the final mode
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
