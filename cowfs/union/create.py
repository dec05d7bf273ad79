"""Creating and removing names.

A new object over a whiteout is made in the work directory and renamed over it, so that no crash
brings the deleted one back; a directory made there is opaque. Removing an object that a lower layer has leaves a
whiteout, put in place by one rename.

An unlinked file stays usable while its node is held (:mod:`cowfs.union.holding`).
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import insort

from cowfs._typed import TYPE_CHECKING
from cowfs.format import whiteout
from cowfs.sys import files, xattr
from cowfs.union import copyup, hardlinks, holding, lookup, stored
from cowfs.union.attr import mode_of, unpack, with_nlink
from cowfs.union.layers import Source, lstat
from cowfs.union.measure import NOTHING, link_units
from cowfs.union.node import DT_DIR, DT_LNK, DT_REG, Dir, Node
from cowfs.union.workdir import clear

if TYPE_CHECKING:
    from cowfs.union.core import Core

_NAME_MAX = 255
_PERM = 0o7777
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def error(number: int, name: bytes = b"") -> OSError:
    """An OSError of a number."""
    return OSError(number, os.strerror(number), name)


def target(view: Core, parent: Dir, name: bytes) -> Source:
    """The upper directory to create ``name`` in.

    Raises:
        OSError: EEXIST, ENAMETOOLONG, EROFS, ENOENT (the directory was removed), EINVAL.
    """
    children = parent.children
    if children is None:
        children = view.load(parent)
    if name in children or name in (b".", b".."):
        raise error(errno.EEXIST, name)
    if len(name) > _NAME_MAX:
        raise error(errno.ENAMETOOLONG, name)
    if not name or b"/" in name or b"\0" in name or (view.form.dotwh and name.startswith(whiteout.WH_PREFIX)):
        raise error(errno.EINVAL, name)
    if view.readonly:
        raise error(errno.EROFS, name)
    if parent.parent is None:
        raise error(errno.ENOENT, name)
    top = parent.sources[0]
    return top if top.layer is view.stack.upper else copyup.up_dir(view, parent)


def _inherits_acl(view: Core, up: Source) -> bool:
    """Whether entries made here get their mode from a default ACL instead of the umask."""
    known = up.default_acl
    if known is None:
        value = xattr.try_get(up.open(), b"", b"system.posix_acl_default")
        known = up.default_acl = value is not None
    return known


def _own(view: Core, parent: Dir, dirfd: int, name: bytes, mode: int, uid: int, gid: int) -> None:
    """Give a new object its owner; a setgid directory hands on its group."""
    if parent.attr is None:
        view.attr(parent)
    attr = parent.attr
    assert attr is not None
    inherits = mode_of(attr) & stat.S_ISGID
    owners = view.owners
    if inherits:
        gid = int.from_bytes(attr[72:76], "little")
    st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    mode = _final_mode(parent, st, mode)
    if owners is not None:
        if owners.record(dirfd, name, mode | (stat.S_ISGID if inherits and stat.S_ISDIR(mode) else 0), uid, gid):
            return
        uid, gid = owners.stored_new(uid, gid)
    wrong = bool((st.st_mode ^ mode) & _PERM)
    if uid not in (-1, st.st_uid) or gid not in (-1, st.st_gid):
        os.chown(name, uid, gid, dir_fd=dirfd, follow_symlinks=False)
        wrong = wrong or bool(mode & 0o6000)  # chown clears them
    if wrong and not stat.S_ISLNK(mode):
        os.chmod(name, stat.S_IMODE(mode), dir_fd=dirfd)


def _final_mode(parent: Dir, st: os.stat_result, mode: int) -> int:
    """The final mode of a new object: the host's result under a default ACL, else the requested one."""
    if parent.sources[0].default_acl:
        return stat.S_IFMT(mode) | (st.st_mode & 0o777) | (mode & 0o7000)
    return mode


def _added(view: Core, parent: Dir, up: Source, name: bytes) -> None:
    """Keep a running listing in order, and the directory's attributes true."""
    parent.attr = None
    order = parent.order
    if order is not None:
        from cowfs.union.listing import cookie_of

        insort(order, name, key=cookie_of)
    if up.whiteouts and name in up.whiteouts:
        up.whiteouts.discard(name)
        assert up.shadow is not None
        up.shadow.add(name)
        if view.space is not None:
            view.space.unhid((name,))


def adopt(view: Core, parent: Dir, up: Source, name: bytes, st: os.stat_result | None = None) -> Node:
    """The node of an object just made."""
    if st is None:
        st = os.stat(name, dir_fd=up.open(), follow_symlinks=False)
    _added(view, parent, up, name)
    ino = view.inodes.shown(st.st_dev, st.st_ino)
    if stat.S_ISDIR(st.st_mode):
        source = up.child(name)
        source.whiteouts, source.shadow = set(), set()
        made = view.new_dir(parent, name, [source], ino)
        made.children = {}
        return made
    node = lookup.bind_inode(view, parent, name, up, st, ino)
    view.pack_into(node, st, up, name)
    return node


def _count(view: Core, up: Source, name: bytes, blocks: int, *, directory: bool = False) -> None:
    """Refuse a new object that would pass the limit. Raises ENOSPC."""
    space = view.space
    if space is not None:
        room = space.inherited(up, directory=directory) if _inherits_acl(view, up) else NOTHING
        space.need(blocks, 1, space.entering(name), room)


def _counted(view: Core, up: Source, name: bytes, blocks: int, *, directory: bool = False) -> None:
    """Count a new object."""
    space = view.space
    if space is not None:
        space.named(up, name, blocks, 1)
        if up.default_acl:
            space.xattrs_changed(None, space.xattrs(up.open(), name))
            if directory:
                space.grew_by_xattrs(up.open(), name)


def _default_mode(view: Core, up: Source, mode: int, umask: int) -> int:
    return mode if _inherits_acl(view, up) else mode & ~umask


def mknod(view: Core, parent: Dir, name: bytes, mode: int, rdev: int, uid: int, gid: int, umask: int = 0) -> Node:
    """A regular file, FIFO, socket or device.

    Args:
        mode: type and permission bits.
        rdev: as :func:`os.makedev` gives it.
        uid, gid: the owner as shown outside (the group gives way to a setgid directory's).

    Raises:
        OSError: EPERM for device 0/0 (it would be a whiteout), else as mknod(2), ENOSPC.
    """
    if not stat.S_IFMT(mode):
        mode |= stat.S_IFREG
    if stat.S_ISCHR(mode) and rdev == 0:
        raise error(errno.EPERM, name)
    up = target(view, parent, name)
    _count(view, up, name, 0)
    mode = _default_mode(view, up, mode, umask)
    over = up.whiteouts is not None and name in up.whiteouts
    fd = -1
    st: os.stat_result | None = None
    if over:
        _over_whiteout(view, parent, up, name, mode, uid, gid, lambda d, n: _raw(d, n, mode, rdev))
    elif stat.S_ISREG(mode) and view.owners is None:
        fd = os.open(name, _CREATE, mode & _PERM, dir_fd=up.fd if up.fd >= 0 else up.open())
        try:
            st = _own_fd(view, parent, fd, mode, uid, gid)
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=up.open())
            raise
    else:
        _raw(up.open(), name, mode, rdev)
        try:
            _own(view, parent, up.open(), name, mode, uid, gid)
        except BaseException:
            os.unlink(name, dir_fd=up.open())
            raise
    _counted(view, up, name, 0)
    node = adopt(view, parent, up, name, st)
    if fd >= 0:
        node.fd, node.wfd, node.bare = fd, True, 1
        opened = view.open_files
        opened.opened[node] = None
        if len(opened.opened) > opened.most:
            opened.trim()
    node.space = 0
    return node


def _own_fd(view: Core, parent: Dir, fd: int, mode: int, uid: int, gid: int) -> os.stat_result:
    """Give a new file its owner and mode; returns its attributes afterwards."""
    attr = parent.attr or view.attr(parent)
    if mode_of(attr) & stat.S_ISGID:
        gid = int.from_bytes(attr[72:76], "little")
    st = os.fstat(fd)
    mode = _final_mode(parent, st, mode)
    wrong = bool((st.st_mode ^ mode) & _PERM)
    if st.st_uid != uid or st.st_gid != gid:
        os.fchown(fd, uid, gid)
        wrong = wrong or bool(mode & 0o6000)  # chown clears them
    elif not wrong:
        return st
    if wrong:
        os.fchmod(fd, stat.S_IMODE(mode))
    return os.fstat(fd)


def _raw(dirfd: int, name: bytes, mode: int, rdev: int) -> None:
    os.mknod(name, mode, rdev, dir_fd=dirfd)


def _over_whiteout(view, parent, up, name, mode, uid, gid, make) -> None:  # type: ignore[no-untyped-def]
    """Make an object in the work directory, complete, and put it over the whiteout ``name``."""
    work = view.stack.workdir
    temp = work.temp()
    try:
        make(work.fd, temp)
        if not stat.S_ISLNK(mode):
            _inherit_acl(view, up, work.fd, temp, mode)
        _own(view, parent, work.fd, temp, mode, uid, gid)
        if stat.S_ISDIR(mode):
            xattr.setx(work.fd, temp, view.form.opaque, b"y")
            files.rename2(work.fd, temp, up.open(), name, files.RENAME_EXCHANGE)
            os.unlink(temp, dir_fd=work.fd)
        else:
            os.rename(temp, name, src_dir_fd=work.fd, dst_dir_fd=up.open())
    except BaseException:
        work.discard(temp)
        raise


def _inherit_acl(view: Core, up: Source, dirfd: int, name: bytes, mode: int) -> None:
    """Do as the host does for an entry made in a directory with a default ACL (acl(5))."""
    if not _inherits_acl(view, up):
        return
    acl = xattr.get(up.open(), b"", b"system.posix_acl_default")
    if stat.S_ISDIR(mode):
        xattr.setx(dirfd, name, b"system.posix_acl_default", acl)
    from cowfs.format.acl import masked

    xattr.setx(dirfd, name, b"system.posix_acl_access", masked(acl, mode))


def mkdir(view: Core, parent: Dir, name: bytes, mode: int, uid: int, gid: int, umask: int = 0) -> Dir:
    """A directory. Raises OSError as mkdir(2)."""
    up = target(view, parent, name)
    _count(view, up, name, 1, directory=True)
    mode = stat.S_IFDIR | (_default_mode(view, up, mode, umask) & _PERM)
    if mode_of(view.attr(parent)) & stat.S_ISGID:
        mode |= stat.S_ISGID
    if up.whiteouts is not None and name in up.whiteouts:
        _over_whiteout(view, parent, up, name, mode, uid, gid, lambda d, n: _raw_dir(d, n, mode))
    else:
        fd = up.open()
        os.mkdir(name, mode & _PERM, dir_fd=fd)
        try:
            _own(view, parent, fd, name, mode, uid, gid)
        except BaseException:
            os.rmdir(name, dir_fd=fd)
            raise
    _counted(view, up, name, 1, directory=True)
    made = adopt(view, parent, up, name)
    assert isinstance(made, Dir)
    return made


def _raw_dir(dirfd: int, name: bytes, mode: int) -> None:
    os.mkdir(name, mode & _PERM, dir_fd=dirfd)
    if mode & 0o7000:
        os.chmod(name, mode & _PERM, dir_fd=dirfd)


def symlink(view: Core, parent: Dir, name: bytes, to: bytes, uid: int, gid: int) -> Node:
    """A symbolic link with target ``to``. Raises OSError as symlink(2)."""
    up = target(view, parent, name)
    cost = link_units(len(to))
    _count(view, up, name, cost)
    mode = stat.S_IFLNK | 0o777
    if up.whiteouts is not None and name in up.whiteouts:
        _over_whiteout(view, parent, up, name, mode, uid, gid, lambda d, n: os.symlink(to, n, dir_fd=d))
    else:
        fd = up.open()
        os.symlink(to, name, dir_fd=fd)
        try:
            _own(view, parent, fd, name, mode, uid, gid)
        except BaseException:
            os.unlink(name, dir_fd=fd)
            raise
    _counted(view, up, name, cost)
    return adopt(view, parent, up, name)


def tmpfile(view: Core, parent: Dir, mode: int, uid: int, gid: int, umask: int = 0) -> Node:
    """A regular file without a name (O_TMPFILE); :func:`link` may give it one.

    Raises:
        OSError: EOPNOTSUPP where the host has no O_TMPFILE, ENOSPC, EROFS.
    """
    if view.readonly:
        raise error(errno.EROFS)
    up = copyup.up_dir(view, parent)
    space = view.space
    if space is not None:
        space.need(0, 1, room=space.inherited(up, directory=False) if _inherits_acl(view, up) else NOTHING)
    mode = _default_mode(view, up, mode, umask)
    fd = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode & _PERM, dir_fd=up.open())
    if view.owners is None:
        _own_fd(view, parent, fd, mode, uid, gid)
    st = os.fstat(fd)
    ino = view.inodes.shown(st.st_dev, st.st_ino)
    if ino in view.nodes:
        ino = view.table.fresh_id()
    node = Node(ino, DT_REG, b"", None)
    node.space = 0
    holding.hold_tmpfile(view, node, fd)
    view.table.add(node)
    if space is not None:
        space.add(0, 1)
        space.xattrs_changed(node, space.xattrs(fd, b"") if up.default_acl else NOTHING)
    return node


def link(view: Core, node: Node, parent: Dir, name: bytes) -> Node:
    """One more name for a file. Raises OSError as link(2)."""
    if isinstance(node, Dir):
        raise error(errno.EPERM, name)
    up = target(view, parent, name)
    copyup.up_meta(view, node)
    work = view.stack.workdir
    assert work is not None
    if view.space is not None:
        view.space.need(0, 0, view.space.entering(name))
    copyup.note_place(view, node)
    over = up.whiteouts is not None and name in up.whiteouts
    dst_fd, dst = (work.fd, work.temp()) if over else (up.open(), name)
    if node.where is None:
        source: bytes = b"/proc/self/fd/%d" % node.fd
        os.link(source, dst, dst_dir_fd=dst_fd, follow_symlinks=True)
    else:
        os.link(node.name, dst, src_dir_fd=node.where.open(), dst_dir_fd=dst_fd, follow_symlinks=False)
    if over:
        os.rename(dst, name, src_dir_fd=dst_fd, dst_dir_fd=up.open())
    if view.space is not None:
        view.space.named(up, name)
    _added(view, parent, up, name)
    if node.where is not None and node.where.impure:
        stored.mark_impure(view, up)
    if node.parent is None:  # a tmpfile gets its first name, or a file whose known names are gone gets one more
        view.table.astray.discard(node)
        holding.unhold(view, node)
        node.where, node.name = up, name
        if node.fd >= 0:
            view.open_files.add(node)
    view.bind(parent, name, node)
    node.attr = None
    return node


def unlink(view: Core, parent: Dir, name: bytes) -> None:
    """Remove a name that is not a directory's. Raises OSError as unlink(2)."""
    node = view.lookup(parent, name)
    if isinstance(node, Dir):
        raise error(errno.EISDIR, name)
    if view.readonly:
        raise error(errno.EROFS, name)
    if not view.in_upper(node):
        nlink = unpack(view.attr(node)).nlink
        # Its other names are looked up in either form: through a descriptor it may be written later, under all of them.
        others = nlink > 1 and hardlinks.complete(view, node)
        if not others or not view.form.redirects or not _up_for_count(view, node):
            _hide(view, parent, name)
            view.unbind(parent, name, node)
            gone(view, node)
            parent.attr = None
            return
    up = view.upper_of(parent)
    assert up is not None
    attr = unpack(view.attr(node))
    last = attr.nlink <= 1
    held = None
    known = node in view.table.names
    if view.space is not None and last:
        view.space.leaving(node)  # given back when the node goes
    if node.nlookup > 0 and not known:
        held = holding.hold(view, node)
    remove_name(view, up, name)
    parent.attr = None
    view.unbind(parent, name, node)
    node.attr = None
    if not known:
        unnamed(view, node, held, last)


def unnamed(view: Core, node: Node, held: bytes | None, last: bool) -> None:
    """Handle the loss of the last known name of an upper inode; ``held`` is the result of :func:`hold`, ``last`` that
    it has no other name."""
    if node.nlookup > 0:
        holding.held(view, node, held)
    if last:
        gone(view, node)
    elif node.nlookup > 0:
        view.table.astray.add(node)
    elif view.nodes.pop(node.id, None) is not None:
        view.open_files.close(node)  # other names exist that were never looked up


def _up_for_count(view: Core, node: Node) -> bool:
    """Copy a lower hard link up under all its names, so that their count is right. Returns False if there is no room."""
    try:
        copyup.up_meta(view, node, whole=False)
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def gone(view: Core, node: Node) -> None:
    """Handle the loss of the last name; an unused node goes with it."""
    if node.parent is not None:
        return
    if node.nlookup <= 0:
        view.drop(node)
    elif not view.in_upper(node):
        node.attr = with_nlink(view.attr(node), 0)


def _hide(view: Core, parent: Dir, name: bytes) -> None:
    """Put a whiteout over a name that only lower layers have."""
    if view.space is not None:
        view.space.need_hidden((name,))
    up = copyup.up_dir(view, parent, exempt=True)
    work = view.stack.workdir
    assert work is not None
    work.put_whiteout(up.open(), name)
    if view.space is not None:
        view.space.hid(up, name)
    if up.whiteouts is not None:
        up.whiteouts.add(name)


def remove_name(view: Core, up: Source, name: bytes) -> None:
    """Remove an upper non-directory, leaving a whiteout where a lower layer has the name."""
    if up.shadow and name in up.shadow:
        work = view.stack.workdir
        assert work is not None
        work.cover(up.open(), name)
        up.shadow.discard(name)
        assert up.whiteouts is not None
        up.whiteouts.add(name)
        if view.space is not None:
            view.space.hid(up, name, instead=True)
    else:
        os.unlink(name, dir_fd=up.fd if up.fd >= 0 else up.open())
        if view.space is not None:
            view.space.unnamed(up, name)


def rmdir(view: Core, parent: Dir, name: bytes) -> None:
    """Remove an empty directory. Raises OSError as rmdir(2)."""
    node = view.lookup(parent, name)
    if not isinstance(node, Dir):
        raise error(errno.ENOTDIR, name)
    if view.readonly:
        raise error(errno.EROFS, name)
    children = node.children
    if children is None:
        children = view.load(node)
    if children:
        raise error(errno.ENOTEMPTY, name)
    own = view.upper_of(node)
    attr = view.attr(node)  # now: not all file systems answer fstat(2) for a removed directory
    if own is None:
        _hide(view, parent, name)
    else:
        freed = view.space.directory_gone(own) if view.space is not None else None
        remove_dir(view, node, own)
        if view.space is not None and freed is not None:
            view.space.apply(freed)
    view.unbind(parent, name, node)
    parent.attr = None
    node.attr = with_nlink(attr, 0)
    if node.nlookup <= 0:
        view.drop(node)


def remove_dir(view: Core, node: Dir, own: Source) -> None:
    """Remove a directory of the upper layer that holds at most whiteouts. Its attributes can be asked for while it is held."""
    work, up = view.stack.workdir, own.parent
    assert work is not None and up is not None
    name = own.name
    stays = holding.must_move(view, node)
    if not stays:
        holding.keep(view, own)
    covered = bool(up.shadow) and name in up.shadow  # type: ignore[operator]
    if not covered and not own.whiteouts and not stays:
        os.rmdir(name, dir_fd=up.open())
        if view.space is not None:
            view.space.unnamed(up, name)
        return
    temp = work.temp()
    if covered:
        work.put_whiteout(work.fd, temp)
        work.allow(up.open())
        files.rename2(work.fd, temp, up.open(), name, files.RENAME_EXCHANGE)
        assert up.shadow is not None and up.whiteouts is not None
        up.shadow.discard(name)
        up.whiteouts.add(name)
        if view.space is not None:
            view.space.hid(up, name, instead=True)
    else:
        os.rename(name, temp, src_dir_fd=up.open(), dst_dir_fd=work.fd)
        if view.space is not None:
            view.space.unnamed(up, name)
    if stays:
        holding.moved(view, own, temp)
        clear(own.open())
    else:
        work.discard(temp)


__all__ = [
    "DT_DIR",
    "DT_LNK",
    "adopt",
    "link",
    "lstat",
    "mkdir",
    "mknod",
    "remove_dir",
    "rmdir",
    "symlink",
    "tmpfile",
    "unlink",
    "whiteout",
]
