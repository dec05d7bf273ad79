"""setattr and extended attributes.

Every change first brings the inode (not its data, where the layer form knows metacopy) into the upper
layer. Names under the layer form's own prefix are escaped on the way in and out, as the kernel
does, so a user's ``trusted.overlay.x`` never becomes the overlay's own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import xattr
from cowfs.union import content, copyup, from_index
from cowfs.union.attr import ATTR, NS, mode_of, pack, unpack, with_nlink, with_size
from cowfs.union.inode import CAPABILITY, NOW, chmod, chown, now, utime
from cowfs.union.measure import NOTHING, sizes
from cowfs.union.node import DT_REG, PLAIN, Dir, Node, at

if TYPE_CHECKING:
    from cowfs.union.core import Core

_LIST_MAX = 65536 - 1024  # bytes of names; the rest is for the layer form's own marks
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")


def attr(view: Core, node: Node) -> bytes:
    """The packed attributes (:data:`~cowfs.union.attr.ATTR`), read again when stale."""
    return node.attr or _refresh(view, node)


def size(view: Core, node: Node) -> int:
    """st_size."""
    return int.from_bytes(view.attr(node)[8:16], "little")


def mode(view: Core, node: Node) -> int:
    """st_mode."""
    return mode_of(view.attr(node))


def _refresh(view: Core, node: Node) -> bytes:
    if node.__class__ is Dir:
        return _refresh_dir(view, node)
    where = node.where
    if view.stack.index is not None and where is not None and where.layer is not view.stack.upper:
        entry = from_index.entry_of(view, node)
        if entry is not None:  # the place of such a file is its data's, under the name that it has there
            node.attr = from_index.attr_of(view, node, entry)
            return node.attr
    if where is None or (node.wfd and node.fd >= 0 and node.data is PLAIN):
        fd, name = node.fd, b""
        st = os.fstat(fd)
    else:
        fd, name = where.fd if where.fd >= 0 else where.open(), node.name
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
    if view.owners is None:
        attr = pack(st, node.id, st.st_mode, st.st_uid, st.st_gid)
    else:
        attr = pack(st, node.id, *view.owners.show(st, fd, name))
    if node.data is not PLAIN:
        attr = with_size(attr, *node.data.shown(st))
    if node.parent is None and where is not None:  # a lower inode without names, or one held in the work directory
        attr = with_nlink(attr, st.st_nlink - 1 if node in view.table.astray else 0)
    node.attr = attr
    return attr


def _refresh_dir(view: Core, node: Dir) -> bytes:
    entry = from_index.entry_of(view, node)
    if entry is not None:
        node.attr = from_index.attr_of(view, node, entry)
        return node.attr
    fd = node.sources[0].open()
    st = os.fstat(fd)
    ino = view.root_ino if node is view.root else node.id
    if view.owners is None:
        attr = pack(st, ino, st.st_mode, st.st_uid, st.st_gid)
    else:
        attr = pack(st, ino, *view.owners.show(st, fd, b""))
    if node.parent is None:
        attr = with_nlink(attr, 0)
    elif len(node.sources) > 1 or node.record is not None:
        attr = with_nlink(attr, 1)
    node.attr = attr
    return attr


def _xattrs_at(node: Node) -> tuple[int, bytes | None]:
    """The arguments for :mod:`~cowfs.sys.xattr`, which is quicker with an ordinary descriptor."""
    return (node.fd, None) if node.wfd and node.data is PLAIN else at(node)


def setattr(
    view: Core,
    node: Node,
    *,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    size: int | None = None,
    atime: object = None,
    mtime: object = None,
    kill: bool = False,
) -> None:
    """Change attributes, in the order size, owner, mode, times.

    Args:
        mode: permission bits.
        uid, gid: as shown outside.
        size: bytes, regular files only.
        atime, mtime: ns since 1970, or :data:`NOW`.
        kill: the caller is not privileged: a change of size clears setuid and setgid.

    Raises:
        OSError: EROFS, ENOSPC, EISDIR, EINVAL, EOPNOTSUPP (mode of a symbolic link).
    """
    if view.readonly:
        view.need_upper()
    if size is not None:
        content.truncate(view, node, size)
        if kill:
            content.kill_privileges(view, node)
    where = node.where
    if node.__class__ is Dir or (where is not None and where.layer is not view.stack.upper):
        if node.__class__ is Dir and node.parent is None and not view.in_upper(node):
            _setattr_removed(view, node, mode, uid, gid, atime, mtime)
            return
        view.trim()
        copyup.up_meta(view, node)
    if uid is not None or gid is not None:
        chown(view, node, -1 if uid is None else uid, -1 if gid is None else gid)
    if mode is not None:
        chmod(view, node, mode & 0o7777)
    if atime is not None or mtime is not None:
        utime(view, node, atime, mtime)


def _setattr_removed(
    view: Core, node: Node, mode: int | None, uid: int | None, gid: int | None, atime: object, mtime: object
) -> None:
    """Set attributes of an open removed directory of lower layers: their only place is the node, which goes when it is closed."""
    old, stamp = unpack(view.attr(node)), now()
    times = [stamp if new is NOW else was if new is None else int(new)  # type: ignore[call-overload]
             for new, was in ((atime, old.atime_ns), (mtime, old.mtime_ns), (NOW, 0))]  # fmt: skip
    node.attr = ATTR.pack(
        old.ino, old.size, old.blocks, *(t // NS for t in times), *(t % NS for t in times),
        old.mode if mode is None else stat.S_IFDIR | mode & 0o7777, old.nlink,
        old.uid if uid in (None, -1) else uid, old.gid if gid in (None, -1) else gid, 0, 4096, 0,
    )  # fmt: skip


# -- extended attributes ------------------------------------------------------------------------


def _check(view: Core, name: bytes) -> bytes:
    """The stored name of a user's; ENOTSUP where there are none, ENODATA for hidden ones."""
    if view.options.noxattrs:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return view.form.store_name(name)


def _hidden(view: Core, stored: bytes) -> bool:
    override = view.options.override_xattr
    return override is not None and stored == override


def getxattr(view: Core, node: Node, name: bytes) -> bytes:
    """The value. Raises ENODATA, EOPNOTSUPP."""
    stored = _check(view, name)
    if node.bare and (node.bare > 1 or name == CAPABILITY):
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    if _hidden(view, stored):
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    entry = from_index.entry_of(view, node)
    if entry is not None:
        value = entry.xattrs.get(name)
        if value is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return bytes(value)
    fd, real = _xattrs_at(node)
    if name == CAPABILITY and real and node.type == DT_REG and xattr.has_none(fd, real):
        node.bare = 2  # programs that compare trees ask for all names next
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
    try:
        return xattr.get(fd, real, stored)
    except OSError as error:
        if name == CAPABILITY and error.errno == errno.ENODATA:
            node.bare = 1
        raise


def listxattr(view: Core, node: Node) -> list[bytes]:
    """The names a user may see."""
    if view.options.noxattrs:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if node.bare > 1:
        return []
    entry = from_index.entry_of(view, node)
    if entry is not None:
        return [name for name in entry.xattrs if not _hidden(view, view.form.store_name(name))]
    fd, real = _xattrs_at(node)
    stored = xattr.listx(fd, real)
    if not stored and node.type == DT_REG:
        node.bare = 2
    shown = (view.form.show_name(name) for name in stored if not _hidden(view, name))
    return [name for name in shown if name is not None]


def setxattr(view: Core, node: Node, name: bytes, value: bytes | memoryview, flags: int = 0) -> None:
    """Create or replace. Raises ENOSPC, EEXIST, ENODATA, EOPNOTSUPP, EPERM."""
    stored = _check(view, name)
    if _hidden(view, stored):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    view.need_upper()
    copyup.up_meta(view, node)
    fd, real = _xattrs_at(node)
    space = view.space
    if space is not None and isinstance(node, Dir):
        space.counts_now(node)
    found = sizes(fd, real) if space is not None else None
    _bound(found if found is not None else _names(fd, real), stored)
    node.bare = 0
    if space is None:
        xattr.setx(fd, real, stored, bytes(value), flags)
    else:
        space.set_xattr(fd, real, stored, bytes(value), flags, node=node, found=found)
    _changed(node, stored)


def _names(fd: int, real: bytes | None) -> list[bytes] | None:
    """The names of an inode's xattrs; ``None`` if they are too many to list."""
    try:
        return xattr.listx(fd, real)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        return None


def _bound(found: Collection[bytes] | None, stored: bytes) -> None:
    """Refuse a new xattr whose name would make the list too long to be read (listxattr(2): 64 KiB), as a full host does."""
    if found is None or (stored not in found and sum(map(len, found)) + len(found) + len(stored) + 1 > _LIST_MAX):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def removexattr(view: Core, node: Node, name: bytes) -> None:
    """Remove. Raises ENODATA, EOPNOTSUPP; a missing ACL is no error, as in Linux."""
    stored = _check(view, name)
    view.need_upper()
    try:
        getxattr(view, node, name)  # ENODATA before anything is copied up
    except OSError as failure:
        if failure.errno == errno.ENODATA and stored in _ACLS:
            return
        raise
    copyup.up_meta(view, node)
    fd, real = _xattrs_at(node)
    space = view.space
    before = space.xattrs(fd, real) if space is not None else NOTHING
    xattr.remove(fd, real, stored)
    if space is not None:
        space.xattrs_changed(node, space.xattrs(fd, real).over(before))
        if isinstance(node, Dir):
            space.grew_by_xattrs(fd, b"")
    _changed(node, stored)


def _changed(node: Node, stored: bytes) -> None:
    node.attr = None
    if stored in _ACLS and isinstance(node, Dir):
        node.sources[0].default_acl = None
