"""rename with its flags.

An object of the upper layer is moved always, so an object that only a lower layer has is copied up first:
a file as a metacopy with ``redirect``, a directory by itself with ``redirect`` naming its lower
path. The ``userxattr`` form has no redirects, so there a directory moves with its whole
subtree copied up, in the work directory, before one rename puts it in place.

The lower layers decide what the old place leaves behind: a whiteout if they have the name,
made by the same system call (RENAME_WHITEOUT). A directory that arrives over a lower name becomes opaque,
unless it has a ``redirect`` already.
"""

from __future__ import annotations

import contextlib
import errno
import os
from bisect import insort
from collections.abc import Iterator, Sequence

from cowfs._typed import TYPE_CHECKING
from cowfs.format.whiteout import WH_PREFIX
from cowfs.sys import files, xattr
from cowfs.union import copyup, create, hardlinks, holding, stored
from cowfs.union.attr import unpack
from cowfs.union.create import error
from cowfs.union.layers import Source
from cowfs.union.node import DT_REG, Dir, Node
from cowfs.union.workdir import clear

if TYPE_CHECKING:
    from cowfs.union.core import Core
    from cowfs.union.measure import Room

_NOREPLACE, _EXCHANGE, _WHITEOUT = (
    files.RENAME_NOREPLACE,
    files.RENAME_EXCHANGE,
    files.RENAME_WHITEOUT,
)


def rename(view: Core, parent: Dir, name: bytes, to: Dir, to_name: bytes, flags: int = 0) -> Sequence[int]:
    """Rename ``name`` in ``parent`` to ``to_name`` in ``to``.

    Args:
        flags: 0, RENAME_NOREPLACE or RENAME_EXCHANGE.

    Returns:
        ids of nodes beside these whose attributes changed: what is in a directory that had to be copied has another ctime.

    Raises:
        OSError: as renameat2(2); EXDEV only for a directory whose marks the host has no room for.
    """
    if flags & ~(_NOREPLACE | _EXCHANGE) or flags == _NOREPLACE | _EXCHANGE:
        raise error(errno.EINVAL, name)
    node = view.lookup(parent, name)
    other = view.child(to, to_name)
    if view.readonly:
        raise error(errno.EROFS, name)
    if flags & _NOREPLACE and other is not None:
        raise error(errno.EEXIST, to_name)
    if to.parent is None or parent.parent is None:
        raise error(errno.ENOENT, to_name)
    if view.form.dotwh and to_name.startswith(WH_PREFIX):
        raise error(errno.EINVAL, to_name)
    if len(to_name) > 255:
        raise error(errno.ENAMETOOLONG, to_name)
    if isinstance(node, Dir):
        _refuse_loop(view, node, to)
    if flags & _EXCHANGE:
        if other is None:
            raise error(errno.ENOENT, to_name)
        if isinstance(other, Dir):
            _refuse_loop(view, other, parent)
        return _exchange(view, parent, name, node, to, to_name, other) if node is not other else ()
    if other is node:  # two names of one inode: rename(2) says to do nothing
        return ()
    if other is not None:
        _refuse_mismatch(view, node, other, to_name)
    return _move(view, parent, name, node, to, to_name, other)


def _refuse_loop(view: Core, node: Dir, into: Dir) -> None:
    here = into
    while here is not view.root:
        if here is node:
            raise error(errno.EINVAL, node.name)
        here = here.parent or view.root


def _refuse_mismatch(view: Core, node: Node, other: Node, name: bytes) -> None:
    if isinstance(node, Dir):
        if not isinstance(other, Dir):
            raise error(errno.ENOTDIR, name)
        if other.children if other.children is not None else view.load(other):
            raise error(errno.ENOTEMPTY, name)
    elif isinstance(other, Dir):
        raise error(errno.EISDIR, name)


def _bring_up(view: Core, node: Node) -> Sequence[int]:
    """Bring the object into the upper layer, ready for another path; ids of all that was copied with it."""
    if isinstance(node, Dir):
        view.moves.renamed_directory()
        if view.form.redirects or (len(node.sources) == 1 and node.record is None and view.upper_of(node)):
            low = view.low_path(node)
            merged = len(node.sources) > 1 or view.upper_of(node) is None or node.record is not None
            source = copyup.up_dir(view, node)
            if merged:
                _mark(view, source, view.form.redirect, b"/" + low)
                if node.lowpath is None:
                    view.moves.moved[node] = None
                node.lowpath = low
            return ()
        return _copy_subtree(view, node)
    copyup.up_meta(view, node)
    copyup.note_place(view, node)
    return ()


def _mark(view: Core, own: Source, attribute: bytes, value: bytes) -> None:
    """Set an own xattr that a directory cannot move without. Raises EXDEV if there is no room for it: the moving
    program then copies the directory, as between file systems."""
    try:
        stored.set_mark(view, own.open(), b"", attribute, value)
    except OSError as failure:
        if not stored.no_room(failure):
            raise
        raise error(errno.EXDEV, own.name) from None


def _upper_dir(view: Core, node: Dir) -> Source:
    found = view.upper_of(node)
    assert found is not None
    return found


def _move(
    view: Core, parent: Dir, name: bytes, node: Node, to: Dir, to_name: bytes, other: Node | None
) -> Sequence[int]:
    destination = copyup.up_dir(view, to)
    if to.children is None:
        view.load(to)
    copied = _bring_up(view, node)
    source = _upper_dir(view, parent)
    space = view.space
    if space is not None:
        space.need(0, 0, space.entering(to_name))
    leaves = bool(source.shadow) and name in source.shadow  # type: ignore[operator]
    if space is not None and leaves:
        space.need_hidden((name,))
    lands = _lower_has(view, to, destination, to_name, other)
    if isinstance(node, Dir):
        if lands and node.lowpath is None:
            _mark(view, _upper_dir(view, node), view.form.opaque, b"y")
        _clear_way(view, destination, to_name, other)
    held, last, known, gone = _take_victim(view, other)
    replaces = other is not None and (
        view.upper_of(other) is not None if isinstance(other, Dir) else view.in_upper(other)
    )
    over_whiteout = destination.whiteouts is not None and to_name in destination.whiteouts
    src_fd, dst_fd = source.open(), destination.open()
    if isinstance(node, Dir) and over_whiteout:
        if leaves and view.stack.workdir is not None:
            view.stack.workdir.allow(src_fd)
        files.rename2(src_fd, name, dst_fd, to_name, _EXCHANGE)
        if not leaves:
            os.unlink(name, dir_fd=src_fd)
    else:
        _rename_or_whiteout(view, src_fd, name, dst_fd, to_name, leaves)
    if space is not None:
        if gone is not None:
            space.apply(gone)
        if over_whiteout:
            space.unhid((to_name,))
        space.moved(source, name, destination, to_name, leaves=leaves, over=replaces)
    _account_names(source, name, leaves, destination, to_name, lands)
    if other is not None:
        _bury_victim(view, to, to_name, other, held, last, known)
    _rebind(view, parent, name, node, to, to_name, destination)
    return copied


def _take_victim(
    view: Core, other: Node | None
) -> tuple[bytes | None, bool, bool, tuple[Room, int, int, int, int] | None]:
    """The state of the object that a rename is about to replace: its held descriptor, whether the name is the last one,
    whether that is known, and the room that a directory gives back."""
    if other is None:
        return None, False, False, None
    if isinstance(other, Dir):
        own = view.upper_of(other)
        if view.space is None or own is None:
            return None, False, False, None
        return None, False, False, view.space.directory_gone(own)
    if not view.in_upper(other) and hardlinks.complete(view, other) and view.form.redirects:
        copyup.up_meta(view, other)
    return *_prepare_victim(view, other), None


def _rename_or_whiteout(view: Core, src_fd: int, name: bytes, dst_fd: int, to_name: bytes, leaves: bool) -> None:
    if not leaves:
        os.rename(name, to_name, src_dir_fd=src_fd, dst_dir_fd=dst_fd)
        return
    try:
        files.rename2(src_fd, name, dst_fd, to_name, _WHITEOUT)
        return
    except OSError as failure:
        if failure.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
            raise
    work = view.stack.workdir
    assert work is not None
    os.rename(name, to_name, src_dir_fd=src_fd, dst_dir_fd=dst_fd)
    work.put_whiteout(src_fd, name)


def _lower_has(view: Core, to: Dir, destination: Source, name: bytes, other: Node | None) -> bool:
    """Whether removing an upper ``name`` there would uncover an object of a lower layer."""
    if destination.shadow and name in destination.shadow:
        return True
    if destination.whiteouts and name in destination.whiteouts:
        return True
    return other is not None and other.where is not None and other.where.layer is not view.stack.upper


def _clear_way(view: Core, destination: Source, name: bytes, other: Node | None) -> None:
    """Empty an upper directory on the host before it is replaced; it stays usable while it is held."""
    if not isinstance(other, Dir):
        return
    own = view.upper_of(other)
    if own is None:
        return
    stays = holding.must_move(view, other)
    if not stays:
        holding.keep(view, own)
        if not own.whiteouts:
            return
    work = view.stack.workdir
    assert work is not None
    temp = work.temp()
    os.mkdir(temp, 0o700, dir_fd=work.fd)
    xattr.setx(work.fd, temp, view.form.opaque, b"y")
    files.rename2(work.fd, temp, destination.open(), name, _EXCHANGE)
    if stays:
        holding.moved(view, own, temp)
        clear(own.open())
    else:
        work.discard(temp)


def _prepare_victim(view: Core, other: Node) -> tuple[bytes | None, bool, bool]:
    """Keep a replaced file usable after the loss of its name."""
    if not view.in_upper(other):
        return None, True, other in view.table.names
    last = unpack(view.attr(other)).nlink <= 1
    known = other in view.table.names
    held = None
    if view.space is not None and last:
        view.space.leaving(other)
    if other.nlookup > 0 and not known:
        held = holding.hold(view, other)
    return held, last, known


def _bury_victim(view: Core, to: Dir, to_name: bytes, other: Node, held: bytes | None, last: bool, known: bool) -> None:
    if isinstance(other, Dir):
        attr = view.attr(other) if other.nlookup > 0 else None
        view.unbind(to, to_name, other)
        if attr is not None:
            from cowfs.union.attr import with_nlink

            other.attr = with_nlink(attr, 0)
        else:
            view.drop(other)
        return
    upper = view.in_upper(other)
    view.unbind(to, to_name, other)
    other.attr = None if upper else other.attr
    if known:
        return
    if upper:
        create.unnamed(view, other, held, last)
    else:
        create.gone(view, other)


def _account_names(source: Source, name: bytes, leaves: bool, destination: Source, to_name: bytes, lands: bool) -> None:
    """Keep the upper directories' sets of whiteouts and shadows true after a move."""
    if source.shadow is not None and source.whiteouts is not None:
        source.shadow.discard(name)
        if leaves:
            source.whiteouts.add(name)
    if destination.whiteouts is not None and destination.shadow is not None:
        destination.whiteouts.discard(to_name)
        if lands:
            destination.shadow.add(to_name)


def _rebind(view: Core, parent: Dir, name: bytes, node: Node, to: Dir, to_name: bytes, up: Source) -> None:
    """Change the node's name."""
    _rename_name(view, parent, name, node, to, to_name, up)
    if not up.impure:
        stored.mark_impure(view, up)
    if to.order is not None:
        from cowfs.union.listing import cookie_of

        insort(to.order, to_name, key=cookie_of)
    parent.attr = to.attr = None
    node.attr = None


def _rename_name(view: Core, parent: Dir, name: bytes, node: Node, to: Dir, to_name: bytes, up: Source) -> None:
    if parent.children is not None:
        parent.children.pop(name, None)
    parent.live -= 1
    children = to.children
    assert children is not None
    children[to_name] = node
    to.live += 1
    if node.parent is parent and node.name == name:
        node.parent, node.name = to, to_name
    else:
        others = view.table.names[node]
        others[others.index((parent, name))] = (to, to_name)
    if isinstance(node, Dir):
        own = node.sources[0]
        own.parent, own.name = up, to_name
    elif node.parent is to and node.name == to_name:
        node.where = up
    if parent.nlookup <= 0 and parent.live == 0 and parent is not to:
        view.drop(parent)


def _exchange(view: Core, parent: Dir, name: bytes, node: Node, to: Dir, to_name: bytes, other: Node) -> Sequence[int]:
    copyup.up_dir(view, parent)
    copyup.up_dir(view, to)
    copied = [*_bring_up(view, node), *_bring_up(view, other)]
    source, destination = _upper_dir(view, parent), _upper_dir(view, to)
    for moved, place, at in ((node, destination, to_name), (other, source, name)):
        if isinstance(moved, Dir) and moved.lowpath is None and place.shadow and at in place.shadow:
            _mark(view, _upper_dir(view, moved), view.form.opaque, b"y")
    files.rename2(source.open(), name, destination.open(), to_name, _EXCHANGE)
    assert parent.children is not None and to.children is not None
    for directory, at, arrived, up, was in (
        (to, to_name, node, destination, (parent, name)),
        (parent, name, other, source, (to, to_name)),
    ):
        assert directory.children is not None
        directory.children[at] = arrived
        if arrived.parent is was[0] and arrived.name == was[1]:
            arrived.parent, arrived.name = directory, at
            if not isinstance(arrived, Dir):
                arrived.where = up
        else:
            others = view.table.names[arrived]
            others[others.index(was)] = (directory, at)
        if isinstance(arrived, Dir):
            own = arrived.sources[0]
            own.parent, own.name = up, at
        stored.mark_impure(view, up)
        directory.attr = arrived.attr = None
    return copied


# -- the userxattr form: no redirects -------------------------------------------------------------


def _copy_subtree(view: Core, node: Dir) -> list[int]:
    """Bring a whole merged directory into the upper layer, opaque; ids of what a front end knows of it.

    Checked against the limit first. A crash on the way leaves a part of it copied up, which shows
    the same tree as before.
    """
    if view.space is not None:
        need, inodes = _subtree_cost(view, node)
        view.space.need(need, inodes)
    copied: list[int] = []
    with _held_dirs(view, node) as directories:
        for directory in directories:
            copied += _up_all(view, directory)
        for directory in reversed(directories):  # the inner ones first
            _make_opaque(view, directory)
    return copied


@contextlib.contextmanager
def _held_dirs(view: Core, top: Dir) -> Iterator[list[Dir]]:
    """A directory and all below it, each before those inside it; they stay for the block, even if forgotten."""
    found = [top]
    top.nlookup += 1
    try:
        for directory in found:  # the list grows meanwhile
            for child in _children(view, directory):
                if isinstance(child, Dir):
                    child.nlookup += 1
                    found.append(child)
            view.descriptors.trim()
        yield found
    finally:
        for directory in reversed(found):
            directory.nlookup -= 1
            if directory.nlookup <= 0 and directory is not top:  # the caller goes on with that
                view.drop(directory)


def _children(view: Core, directory: Dir) -> Iterator[Node]:
    """The nodes of a directory's names."""
    children = directory.children if directory.children is not None else view.load(directory)
    for name in list(children):
        child = view.child(directory, name)
        if child is not None:
            yield child


def _subtree_cost(view: Core, top: Dir) -> tuple[int, int]:
    blocks = inodes = 0
    with _held_dirs(view, top) as directories:
        for directory in directories:
            if view.upper_of(directory) is None:
                blocks, inodes = blocks + 1, inodes + 1
            for child in _children(view, directory):
                if not isinstance(child, Dir) and not view.in_upper(child):
                    inodes += 1
                    if child.type == DT_REG:
                        blocks += (view.size(child) + 4095) // 4096
    return blocks, inodes


def _up_all(view: Core, directory: Dir) -> list[int]:
    """Copy a directory up, with every file in it; ids of those that a front end knows."""
    known = [directory.id]
    copyup.up_dir(view, directory)
    for child in _children(view, directory):
        if not isinstance(child, Dir):
            copyup.up_meta(view, child)
            if child.nlookup > 0:
                known.append(child.id)
            else:
                with contextlib.suppress(OSError):
                    view.drop(child)
    view.trim()
    return known


def _make_opaque(view: Core, node: Dir) -> None:
    """Cut a directory off from the lower layers; its whiteouts become needless."""
    own = _upper_dir(view, node)
    if len(node.sources) > 1 or node.record is not None:
        stored.mark_impure(view, own)  # merged, it was so without saying
        _mark(view, own, view.form.opaque, b"y")
    if own.whiteouts:
        with stored.kept_times(own):
            for name in own.whiteouts:
                os.unlink(name, dir_fd=own.open())
    if view.space is not None:
        view.space.unhid(own.whiteouts or ())
    own.whiteouts, own.shadow = set(), set()
    if len(node.sources) > 1 and node.children is not None:
        shift = len(node.sources) - 1
        node.sources[1:] = []
        for name, item in list(node.children.items()):
            if item.__class__ is int:
                node.children[name] = item - (shift << 4)
    node.record = None
