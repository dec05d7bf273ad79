"""A small tree in memory with the interface of ``cowfs.union.View``: what the FUSE front end is tested against alone.

It keeps file data in memfds, so that reads and writes are real system calls, and can be told to be slow or to fail:
``stages`` makes the next data change of a node wait for a copy-up, ``hooks`` run before any method by name.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cowfs.format.whiteout import TRUSTED
from cowfs.fuse import abi
from cowfs.model import Limit
from cowfs.union import Options


def fail(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class MemNode:
    """A node; ``children`` is None for everything but directories."""

    def __init__(self, id: int, mode: int, uid: int, gid: int, rdev: int = 0) -> None:
        self.id = id
        self.generation = 1
        self.nlookup = 0
        self.mode, self.uid, self.gid, self.rdev = mode, uid, gid, rdev
        self.type = stat.S_IFMT(mode) >> 12
        self.nlink = 2 if stat.S_ISDIR(mode) else 1
        self.times = [time.time_ns()] * 3
        self.children: dict[bytes, MemNode] | None = {} if stat.S_ISDIR(mode) else None
        self.cookies: dict[bytes, int] = {}
        self.parent: MemNode | None = None
        self.fd = os.memfd_create("node") if stat.S_ISREG(mode) else -1
        self.target = b""
        self.xattrs: dict[bytes, bytes] = {}
        self.attr: bytes | None = None
        self.bare, self.wfd, self.where = 0, False, None


class MemStage:
    """A copy-up that takes until ``gate`` is set or ``cancelled``."""

    def __init__(self, node: MemNode, error: int, *, small: bool) -> None:
        self.node, self.code, self.small = node, error, small
        self.gate = threading.Event()
        self.started = threading.Event()
        self.cancelled = False
        self.error: OSError | None = None
        self.thread = 0

    def fail(self, error: OSError) -> None:
        self.error = error

    def cancel(self) -> None:
        self.cancelled = True

    def run(self) -> None:
        self.thread = threading.get_ident()
        self.started.set()
        until = time.monotonic() + 20
        while not self.cancelled and not self.gate.wait(0.01) and time.monotonic() < until:
            pass
        if self.cancelled:
            self.code = errno.EINTR


class MemoryView:
    """See the module."""

    NOW = object()
    options = Options()
    form = TRUSTED
    limit: Limit | None = None
    patient = False

    def __init__(self) -> None:
        self._ids = itertools.count(2)
        self._cookie = itertools.count(3)
        self.root = MemNode(1, stat.S_IFDIR | 0o755, os.geteuid(), os.getegid())
        self.root.parent = self.root
        self.nodes: dict[int, MemNode] = {1: self.root}
        self.forgotten: dict[int, MemNode] = {}
        self.stages: dict[int, MemStage] = {}
        self.published: list[MemNode] = []
        self.hooks: dict[str, Callable[..., None]] = {}
        self.syncs = 0

    def __getattribute__(self, name: str) -> Any:
        hook = object.__getattribute__(self, "__dict__").get("hooks", {}).get(name)
        if hook is not None:
            hook()
        return object.__getattribute__(self, name)

    def trim(self) -> None:
        """Nothing is open."""

    give_back = trim

    # nodes

    def node(self, id: int) -> MemNode:
        try:
            return self.nodes[id]
        except KeyError:
            raise fail(errno.ESTALE) from None

    def directory(self, id: int) -> MemNode:
        node = self.node(id)
        self._children(node)
        return node

    def revive(self, id: int) -> MemNode:
        node = self.forgotten.pop(id, None)
        if node is None:
            raise fail(errno.ESTALE)
        self.nodes[id] = node
        return node

    def forget(self, id: int, n: int) -> None:
        node = self.nodes[id]
        node.nlookup -= n
        assert node.nlookup >= 0
        if not node.nlookup and id != 1:
            self.forgotten[id] = self.nodes.pop(id)

    def attr_now(self, node: MemNode) -> bytes:
        size = blocks = 0
        if node.fd >= 0:
            found = os.fstat(node.fd)
            size, blocks = found.st_size, found.st_blocks
        elif node.target:
            size = len(node.target)
        (asec, ans), (msec, mns), (csec, cns) = (divmod(t, 10**9) for t in node.times)
        return abi.ATTR.pack(
            node.id, size, blocks, asec % 2**64, msec % 2**64, csec % 2**64, ans, mns, cns,
            node.mode, node.nlink, node.uid, node.gid, node.rdev, 4096, 0,
        )  # fmt: skip

    def attr(self, node: MemNode) -> bytes:
        node.attr = self.attr_now(node)
        return node.attr

    def _touch(self, node: MemNode) -> None:
        node.times[1] = node.times[2] = time.time_ns()
        node.attr = None

    # names

    def _children(self, node: MemNode) -> dict[bytes, MemNode]:
        if node.children is None:
            raise fail(errno.ENOTDIR)
        return node.children

    def lookup(self, dir: MemNode, name: bytes) -> MemNode:
        try:
            node = self._children(dir)[name]
        except KeyError:
            raise fail(errno.ENOENT) from None
        self.forgotten.pop(node.id, None)
        self.nodes[node.id] = node
        return node

    def child(self, dir: MemNode, name: bytes) -> MemNode | None:
        return self.lookup(dir, name) if name in self._children(dir) else None

    def parent(self, dir: MemNode) -> MemNode:
        assert dir.parent is not None
        self.nodes[dir.parent.id] = dir.parent
        return dir.parent

    def listing(self, dir: MemNode, cookie: int = 0) -> Iterator[tuple[bytes, int]]:
        entries = [(1, b"."), (2, b"..")]
        entries += sorted((dir.cookies[name], name) for name in self._children(dir))
        for at, name in entries:
            if at > cookie:
                yield name, at

    def entry(self, dir: MemNode, name: bytes) -> tuple[int, int]:
        found = {b".": dir, b"..": dir.parent}.get(name) or self._children(dir)[name]
        return found.id, found.type

    def _add(self, dir: MemNode, name: bytes, node: MemNode) -> MemNode:
        if name in self._children(dir):
            raise fail(errno.EEXIST)
        self._children(dir)[name] = node
        dir.cookies[name] = next(self._cookie)
        self.nodes[node.id] = node
        self.forgotten.pop(node.id, None)
        if node.children is not None:
            node.parent = dir
            dir.nlink += 1
        self._touch(dir)
        return node

    def _make(self, mode: int, uid: int, gid: int, umask: int, rdev: int = 0) -> MemNode:
        return MemNode(next(self._ids), stat.S_IFMT(mode) | mode & 0o7777 & ~umask, uid, gid, rdev)

    def mknod(self, dir: MemNode, name: bytes, mode: int, rdev: int, uid: int, gid: int, umask: int = 0) -> MemNode:
        return self._add(dir, name, self._make(mode, uid, gid, umask, rdev))

    def mkdir(self, dir: MemNode, name: bytes, mode: int, uid: int, gid: int, umask: int = 0) -> MemNode:
        return self._add(dir, name, self._make(stat.S_IFDIR | mode, uid, gid, umask))

    def symlink(self, dir: MemNode, name: bytes, target: bytes, uid: int, gid: int) -> MemNode:
        node = self._make(stat.S_IFLNK | 0o777, uid, gid, 0)
        node.target = target
        return self._add(dir, name, node)

    def link(self, node: MemNode, dir: MemNode, name: bytes) -> MemNode:
        self._add(dir, name, node)
        node.nlink += 1
        node.attr = None
        return node

    def tmpfile(self, dir: MemNode, mode: int, uid: int, gid: int, umask: int = 0) -> MemNode:
        node = self._make(stat.S_IFREG | mode, uid, gid, umask)
        node.nlink = 0
        self.nodes[node.id] = node
        return node

    def unlink(self, dir: MemNode, name: bytes) -> None:
        node = self._children(dir).get(name)
        if node is None:
            raise fail(errno.ENOENT)
        del self._children(dir)[name]
        node.nlink -= 1
        self._touch(dir)
        node.attr = None

    def rmdir(self, dir: MemNode, name: bytes) -> None:
        node = self.lookup(dir, name)
        if self._children(node):
            raise fail(errno.ENOTEMPTY)
        del self._children(dir)[name]
        dir.nlink -= 1
        self._touch(dir)

    def rename(self, dir: MemNode, name: bytes, dir2: MemNode, name2: bytes, flags: int = 0) -> Sequence[int]:
        node = self.lookup(dir, name)
        if flags:
            raise fail(errno.EINVAL)
        del self._children(dir)[name]
        self._children(dir2).pop(name2, None)
        self._add(dir2, name2, node)
        self._touch(dir)
        return ()

    # attributes

    def setattr(self, node: MemNode, *, mode: int | None = None, uid: int | None = None, gid: int | None = None,
                size: int | None = None, atime: Any = None, mtime: Any = None, kill: bool = False) -> None:  # fmt: skip
        now = time.time_ns()
        if mode is not None:
            node.mode = stat.S_IFMT(node.mode) | mode
        if uid is not None and uid != -1:
            node.uid = uid
        if gid is not None:
            node.gid = gid
        if kill and node.fd >= 0:
            node.mode &= ~stat.S_ISUID
        if size is not None:
            os.ftruncate(node.fd, size)
            node.times[1] = now
        if atime is not None:
            node.times[0] = now if atime is self.NOW else atime
        if mtime is not None:
            node.times[1] = now if mtime is self.NOW else mtime
        node.times[2] = now
        node.attr = None

    def readlink(self, node: MemNode) -> bytes:
        return node.target

    def getxattr(self, node: MemNode, name: bytes) -> bytes:
        try:
            return node.xattrs[name]
        except KeyError:
            raise fail(errno.ENODATA) from None

    def listxattr(self, node: MemNode) -> list[bytes]:
        return list(node.xattrs)

    def setxattr(self, node: MemNode, name: bytes, value: bytes, flags: int = 0) -> None:
        if flags & os.XATTR_CREATE and name in node.xattrs:
            raise fail(errno.EEXIST)
        node.xattrs[name] = value

    def removexattr(self, node: MemNode, name: bytes) -> None:
        if node.xattrs.pop(name, None) is None:
            raise fail(errno.ENODATA)

    def statfs(self) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 1000, 500, 500, 100, 50, 50, 0, 255))

    # data

    def writable(self, node: MemNode, keep: int | None = None) -> MemStage | None:
        return self.stages.get(node.id)

    def delay(self, node: MemNode, error: int = 0, *, small: bool = False) -> MemStage:
        """Have the next data change of ``node`` wait for the stage returned."""
        stage = self.stages[node.id] = MemStage(node, error, small=small)
        return stage

    def publish(self, stage: MemStage) -> None:
        self.stages.pop(stage.node.id, None)
        if stage.error is not None or stage.code:
            raise stage.error or fail(stage.code)
        self.published.append(stage.node)

    def pread(self, node: MemNode, offset: int, buf: memoryview, flags: int = 0) -> int:
        return os.preadv(node.fd, [buf], offset)

    def mode(self, node: MemNode) -> int:
        return node.mode

    def write(self, node: MemNode, offset: int, data: memoryview, kill: bool = False) -> int:
        done = os.pwrite(node.fd, data, offset)
        self._touch(node)
        return done

    def kill_privileges(self, node: MemNode) -> bool:
        had = bool(node.mode & stat.S_ISUID)
        node.mode &= ~stat.S_ISUID
        node.attr = None
        return had

    def fallocate(self, node: MemNode, mode: int, offset: int, length: int) -> None:
        if mode:
            raise fail(errno.EOPNOTSUPP)
        os.posix_fallocate(node.fd, offset, length)
        node.attr = None

    def lseek(self, node: MemNode, offset: int, whence: int) -> int:
        return os.lseek(node.fd, offset, whence)

    def copy_range(self, src: MemNode, soff: int, dst: MemNode, doff: int, length: int) -> int:
        done = os.copy_file_range(src.fd, dst.fd, length, soff, doff)
        dst.attr = None
        return done

    def fsync_fd(self, node: MemNode) -> int | None:
        self.syncs += 1
        return os.dup(node.fd) if node.fd >= 0 else None

    def wait_for_forgets(self, on: bool) -> None:
        self.patient = on

    def has_own_data(self, node: MemNode) -> bool:
        return False  # each write asks writable() first

    def reader(self, node: MemNode, offset: int, length: int, *, streams: bool) -> None:
        return None

    def sync_job(self, node: MemNode) -> None:
        return None

    def sync_all_job(self) -> None:
        return None

    def data_fd(self, node: MemNode, write: bool) -> int:
        return node.fd

    def close(self) -> None:
        for node in list(self.nodes.values()) + list(self.forgotten.values()):
            if node.fd >= 0:
                os.close(node.fd)
                node.fd = -1
