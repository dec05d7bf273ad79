"""File contents: read, write, holes, links' targets.

A node keeps one descriptor of its data, opened when first needed and closed when many others were
opened since. Reading never copies up; every change goes through
:func:`cowfs.union.copyup.writable` first.

A file with pieced data (:mod:`cowfs.union.filedata`) answers for itself.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from cowfs._typed import TYPE_CHECKING
from cowfs.sys import files, host, xattr
from cowfs.union import copyup, inode
from cowfs.union.attr import mode_of, size_of
from cowfs.union.blocks import UNIT
from cowfs.union.node import DT_DIR, DT_LNK, DT_REG, PLAIN, Dir, Node, at

if TYPE_CHECKING:
    from cowfs.union.core import Core

_KEEP, _PUNCH, _ZERO = (
    files.FALLOC_FL_KEEP_SIZE,
    files.FALLOC_FL_PUNCH_HOLE,
    files.FALLOC_FL_ZERO_RANGE,
)
_MODES = {0, _KEEP, _KEEP | _PUNCH, _ZERO, _ZERO | _KEEP}


def _no_data(node: Node) -> OSError:
    number = errno.EISDIR if node.type == DT_DIR else errno.EINVAL
    return OSError(number, os.strerror(number), node.name)


def readlink(view: Core, node: Node) -> bytes:
    """A symbolic link's target. Raises EINVAL for anything else."""
    if node.type != DT_LNK:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), node.name)
    if node.where is None:
        return os.readlink(b"", dir_fd=node.fd)
    return os.readlink(node.name, dir_fd=node.where.open())


def _open(view: Core, node: Node) -> int:
    """Open a regular file's data into ``node.fd``: also for writing if it is the upper layer's."""
    if node.type != DT_REG:
        raise _no_data(node)
    if node.data is PLAIN and view.in_upper(node) and not view.readonly:
        view.open_files.use(node, view.open_own(node), writable=True)
    elif node.fd < 0:
        view.open_files.use(node, view.open_data(node), writable=False)
    return node.fd


def pread(view: Core, node: Node, offset: int, buffer: memoryview, flags: int = 0) -> int:
    """Read into ``buffer``. Returns the number of bytes; fewer only at the end of the file.

    Raises:
        OSError: EISDIR, EINVAL; EAGAIN with ``flags`` RWF_NOWAIT if the read would wait for the disk.
    """
    if node.data is not PLAIN and node.data.pieced:
        return node.data.pread(offset, buffer, flags)
    fd = node.fd
    if fd < 0:
        view.trim()
        if node.type != DT_REG:
            raise _no_data(node)
        fd = view.open_data(node)
        view.open_files.use(node, fd, writable=False)
    return os.preadv(fd, [buffer], offset, flags)


def has_own_data(view: Core, node: Node) -> bool:
    """Whether the inode is in the upper layer and has its data itself."""
    where = node.where
    return node.data is PLAIN and (where is None or where.layer is view.stack.upper)


def data_fd(view: Core, node: Node, write: bool) -> int:
    """The node's own descriptor (do not close it). Raises EOPNOTSUPP for redirect files."""
    if node.data.pieced:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if write:
        make_writable(view, node)
        return node.fd if node.wfd else _open(view, node)
    return node.fd if node.fd >= 0 else _open(view, node)


def make_writable(view: Core, node: Node, keep: int | None = None) -> None:
    """Copy the data up at once if it is not in the upper layer."""
    if node.data is PLAIN and (node.where is None or node.where.layer is view.stack.upper):
        if view.readonly:
            view.need_upper()
        return
    stage = copyup.writable(view, node, keep)
    if stage is not None:
        stage.run()
        copyup.publish(view, stage)


def kill_privileges(view: Core, node: Node) -> bool:
    """Clear setuid, and setgid where the group may execute, as a write must (inode(7)). Returns whether there was any."""
    mode = mode_of(view.attr(node))
    clean = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        clean &= ~stat.S_ISGID
    if clean != mode:
        copyup.up_meta(view, node)
        inode.chmod(view, node, stat.S_IMODE(clean))
    return clean != mode


def write(view: Core, node: Node, offset: int, data: memoryview | bytes, kill: bool = False) -> int:
    """Write at ``offset``; short where the limit ends.

    Args:
        kill: clear setuid and setgid (the writer is not privileged).

    Raises:
        OSError: ENOSPC when nothing fits, EFBIG, EROFS, EISDIR.
    """
    if node.data is not PLAIN or (node.where is not None and node.where.layer is not view.stack.upper):
        make_writable(view, node)
    if kill:
        kill_privileges(view, node)
    if node.bare and not _sheds():
        return _write(view, node, offset, data)
    return _keeping(view, node, lambda: _write(view, node, offset, data))


def _keeping(view: Core, node: Node, change: Callable[[], int]) -> int:
    """Change data and keep set-id bits and a file capability, although the host removes them on a write of this process.

    The kernel has them removed before it sends the data of a write(2) that must remove them; bits that exist then
    belong to a file changed through a map, which keeps them.
    """
    capability = None
    if not node.bare and _may_give_capabilities():
        capability = xattr.try_get(*at(node), inode.CAPABILITY)
        node.bare = 1 if capability is None else 0
    mode = view.mode(node) if _sheds() else 0
    done = change()
    if mode & (stat.S_ISUID | stat.S_ISGID):
        inode.chmod(view, node, stat.S_IMODE(mode))
    if capability is not None:
        xattr.setx(*at(node), inode.CAPABILITY, capability)
    return done


@host.remembered
def _may_give_capabilities() -> bool:
    return host.has_cap(host.CAP_SETFCAP)


@host.remembered
def _sheds() -> bool:
    """Whether the host takes set-id bits away when this process writes."""
    return not host.has_cap(host.CAP_FSETID)


def _write(view: Core, node: Node, offset: int, data: memoryview | bytes) -> int:
    if node.data is not PLAIN:
        node.attr = None
        return node.data.pwrite(offset, data)
    if not node.wfd:
        view.trim()
        if view.readonly:
            view.need_upper()
        _open(view, node)
    space = view.space
    if space is None:
        node.attr = None
        return os.pwrite(node.fd, data, offset)
    length = len(data)
    before = space.stretch(node, node.fd, offset)
    allowed = space.grow(node, offset, length)
    node.attr = None
    try:
        done = os.pwrite(node.fd, data if allowed == length else memoryview(data)[:allowed], offset)
    except OSError:
        space.recount(node)
        raise
    if before >= 0:
        space.stretched(node, node.fd, before, offset)
    if done < allowed:
        space.recount(node)
    return done


def truncate(view: Core, node: Node, size: int) -> None:
    """Set the size. Data beyond it is gone; a longer file ends in a hole."""
    if node.type != DT_REG:
        raise _no_data(node)
    if not node.wfd:
        view.trim()
    make_writable(view, node, keep=size)
    node.attr = None
    if node.data is not PLAIN:
        node.data.truncate(size)
        return
    fd = node.fd if node.wfd else _open(view, node)
    space = view.space
    if space is None:
        os.ftruncate(fd, size)
        return
    space.count(node)
    before = os.fstat(fd).st_size
    longer = space.stretch(node, fd, size)
    os.ftruncate(fd, size)
    if longer >= 0:
        space.stretched(node, fd, before, size + UNIT - 1)
    space.cut(node, size, before)


def fallocate(view: Core, node: Node, mode: int, offset: int, length: int) -> None:
    """fallocate(2): allocate, keep the size, punch a hole, zero a range.

    Raises:
        OSError: EOPNOTSUPP for other modes or where the host has none, ENOSPC, EINVAL.
    """
    if mode not in _MODES:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if node.type != DT_REG:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), node.name)
    if offset < 0 or length <= 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    view.trim()
    make_writable(view, node)
    node.attr = None
    if node.data is not PLAIN:
        node.data.fallocate(mode, offset, length)
        return
    fd = node.fd if node.wfd else _open(view, node)
    space = view.space
    if space is None:
        files.fallocate(fd, mode, offset, length)
        return
    size = os.fstat(fd).st_size
    if mode & _PUNCH:
        space.count(node)
        files.fallocate(fd, mode, offset, length)
        space.punch(node, offset, length, size)
        return
    longer = space.stretch(node, fd, max(offset, size + 1))  # btrfs fills the last unit, wherever the range is
    space.allocate(node, offset, length)
    try:
        files.fallocate(fd, mode, offset, length)
        if longer >= 0:
            space.stretched(node, fd, size, offset)
        if mode & _KEEP and offset + length > size:
            xattr.setx(fd, b"", view.form.prealloc, b"y")
            space.reserved(node, fd)
    except OSError:
        space.recount(node)
        raise


def lseek(view: Core, node: Node, offset: int, whence: int) -> int:
    """SEEK_DATA or SEEK_HOLE. Raises ENXIO past the end."""
    view.trim()
    if node.data.pieced:
        return node.data.lseek(offset, whence)
    return os.lseek(data_fd(view, node, False), offset, whence)


def reader(view: Core, node: Node, offset: int, length: int, *, streams: bool) -> Callable[[memoryview], int] | None:
    """A read to run once in any thread, without concurrent writes; ``None``: by :func:`data_fd`.

    Args:
        streams: whether the read follows the last one.
    """
    return node.data.stream(offset, length) if streams else node.data.reader(offset, length)


def sync_job(view: Core, node: Node) -> Callable[[bool], None] | None:
    """fsync(2) of pieced data, to be run once in any thread (True: fdatasync(2) will do); ``None``: by :func:`fsync_fd`."""
    return node.data.sync_job()


def sync_all_job(view: Core) -> Callable[[], None] | None:
    """The part of syncfs(2) to be done before the host's, in any thread; ``None`` for nothing."""
    return view.rows.sync_job() if view.rows is not None else None


def data_ranges(view: Core, node: Node) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes, as (start, end)."""
    size, at = size_of(view.attr(node)), 0
    pread(view, node, 0, memoryview(bytearray(1)))  # it is open from here on
    while at < size:
        try:
            start = lseek(view, node, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        at = min(lseek(view, node, start, os.SEEK_HOLE), size)
        if start < at:
            yield start, at


def copy_range(view: Core, src: Node, soff: int, dst: Node, doff: int, length: int) -> int:
    """copy_file_range(2) between two files of the view. Returns the bytes copied (may be short)."""
    view.trim()
    make_writable(view, dst)
    if src.data.pieced or dst.data is not PLAIN:
        return _copy_through(view, src, soff, dst, doff, length)
    dfd = dst.fd if dst.wfd else _open(view, dst)
    sfd = data_fd(view, src, False)
    length = max(0, min(length, os.fstat(sfd).st_size - soff))
    if length == 0:
        return 0
    before = -1
    if view.space is not None:
        before = view.space.stretch(dst, dfd, doff)
        length = view.space.grow(dst, doff, length)
    dst.attr = None
    try:
        done = os.copy_file_range(sfd, dfd, length, soff, doff)
    except OSError as error:
        if view.space is not None:
            view.space.recount(dst)
        if error.errno in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS):
            return _copy_through(view, src, soff, dst, doff, length)
        raise
    if view.space is not None:
        if before >= 0:
            view.space.stretched(dst, dfd, before, doff)
        if done < length or view.space.can_clone():
            view.space.recount(dst)
    return done


def _copy_through(view: Core, src: Node, soff: int, dst: Node, doff: int, length: int) -> int:
    buffer = memoryview(bytearray(min(length, 1 << 20)))
    count = pread(view, src, soff, buffer)
    return write(view, dst, doff, buffer[:count]) if count else 0


def fsync_fd(view: Core, node: Node) -> int | None:
    """A new descriptor to fsync and close in any thread; ``None`` when there is nothing to do."""
    if view.options.volatile or view.readonly:
        return None
    if isinstance(node, Dir):
        upper = view.upper_of(node)
        if upper is None:
            return None
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper.open())
    if node.type != DT_REG:
        return None
    view.trim()
    if node.where is not None and node.where.layer is not view.stack.upper:
        # The data may be from before a live snapshot, and not yet on the disk.
        return view.open_data(node) if node.where.layer.index >= view.stack.lower_count and node.data is PLAIN else None
    job = node.data.sync_job()
    if job is not None:
        job(False)  # a caller that cannot wait runs the job elsewhere
        return None
    if node.data is not PLAIN:
        return view.open_own(node)
    return os.dup(node.fd if node.fd >= 0 else _open(view, node))
