"""Files and directories that lost their last name while in use.

An unlinked file stays usable while its node is held. A descriptor stands for it; beyond the share of descriptors for such files
(:mod:`cowfs.sys.descriptors`), and where no descriptor can (a metacopy, whose data is elsewhere), it keeps a
name in the work directory, which goes with the node. A removed directory is held the same way.

Only the descriptor of a removed directory leads to it, since another directory may have the path by now. So either the
descriptor is kept, or the directory is moved; it is never opened by its old name again.
"""

from __future__ import annotations

import errno
import os

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import files
from cowfs.union.layers import Source
from cowfs.union.node import DT_DIR, DT_REG, PLAIN, Dir, Node

if TYPE_CHECKING:
    from cowfs.union.core import Core
    from cowfs.union.workdir import WorkDir

_SHORT = (errno.EMFILE, errno.ENFILE)
#: errors of link(2) after which a descriptor does as well
_NO_LINK = (errno.EMLINK, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def hold(view: Core, node: Node) -> bytes | None:
    """Make sure, before the loss of the last known name of an upper inode, that the inode can still be reached.

    Returns:
        A name in the work directory, or ``None`` when a descriptor stands for the inode.
    """
    by_descriptor = node.data is PLAIN or node.data.writable  # else ``fd`` is for data elsewhere
    if by_descriptor and not view.open_files.full and _open(view, node):
        return None
    work, where = view.stack.workdir, node.where
    assert work is not None and where is not None
    temp = work.temp()
    try:
        os.link(node.name, temp, src_dir_fd=where.open(), dst_dir_fd=work.fd, follow_symlinks=False)
    except OSError as failure:
        if failure.errno not in _NO_LINK or not by_descriptor or not _open(view, node):
            raise
        return None
    return temp


def _open(view: Core, node: Node) -> bool:
    """Open a descriptor that can stand for an inode. Returns False if there is none left."""
    if node.fd >= 0 and (node.wfd or node.type != DT_REG):
        return True
    assert node.where is not None
    try:
        if node.type == DT_REG:
            fd = view.open_own(node)
        else:
            fd = os.open(node.name, files.O_PATH_ANY, dir_fd=node.where.open())
    except OSError as failure:
        if failure.errno not in _SHORT:
            raise
        return False
    view.open_files.use(node, fd, writable=node.type == DT_REG)
    return True


def is_nameless(view: Core, node: Node) -> bool:
    """Whether a node is a file of the upper layer that no name leads to any more."""
    if node.parent is not None or node.type == DT_DIR or node in view.table.astray:
        return False
    return node.where is None or (view.stack.workdir is not None and node.where is view.stack.workdir.source)


def held(view: Core, node: Node, name: bytes | None) -> None:
    """Record the loss of the last known name; ``name`` is the result of :func:`hold`."""
    work = view.stack.workdir
    if name is not None:
        assert work is not None
        _stand_in(node, work, name)
    else:
        node.where = None
    if node.fd >= 0:
        view.open_files.add(node)


def _stand_in(node: Node, work: WorkDir, name: bytes) -> None:
    node.where, node.name = work.source, name
    work.held.add(node)


def hold_tmpfile(view: Core, node: Node, fd: int) -> None:
    """Set up the node of a file that never had a name, open as ``fd``."""
    if view.open_files.full:
        work = view.stack.workdir
        assert work is not None
        temp = work.temp()
        os.link(b"/proc/self/fd/%d" % fd, temp, dst_dir_fd=work.fd, follow_symlinks=True)
        _stand_in(node, work, temp)
    view.open_files.use(node, fd, writable=True)


def carry_over(old: WorkDir, new: WorkDir) -> None:
    """After a freeze: move the held names from the frozen layer's work directory to that of the new upper layer."""
    for node in old.held:
        if node.where is old.source:
            temp = new.temp()
            os.rename(node.name, temp, src_dir_fd=old.fd, dst_dir_fd=new.fd)
            _stand_in(node, new, temp)
    old.held.clear()


def hold_copy(view: Core, node: Node, work: WorkDir, temp: bytes, fd: int, *, writable: bool) -> None:
    """Switch a node without a name to a copy in a work directory, open as ``fd``."""
    hold_made(view, node, work, temp)
    view.open_files.use(node, fd, writable=writable)


def hold_made(view: Core, node: Node, work: WorkDir, temp: bytes) -> None:
    """The same for one whose descriptor the node has already."""
    if view.open_files.full and work is view.stack.workdir:
        _stand_in(node, work, temp)
    else:
        os.unlink(temp, dir_fd=work.fd)
        node.where = None
    if node.fd >= 0:
        view.open_files.add(node)


def unhold(view: Core, node: Node) -> None:
    """Remove the held name of a node that is unused, or has a name again."""
    work = view.stack.workdir
    if work is None:
        return
    if node.__class__ is Dir:
        own = node.sources[0]
        if own.parent is work.source:
            own.close()
            work.discard(own.name)
    elif node.where is work.source:
        work.held.discard(node)
        work.discard(node.name)
        node.where = None


def must_move(view: Core, node: Dir) -> bool:
    """Whether a directory that is about to be removed has to move to the work directory instead."""
    return node.nlookup > 0 and view.descriptors.full


def keep(view: Core, own: Source) -> None:
    """Let a descriptor stand for the upper part of a directory in use, before it loses its name."""
    view.descriptors.keep(own)


def moved(view: Core, own: Source, temp: bytes) -> None:
    """Record that the upper part of a removed or replaced directory is in the work directory now."""
    work = view.stack.workdir
    assert work is not None
    own.parent, own.name = work.source, temp
