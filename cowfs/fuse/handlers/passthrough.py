"""Passthrough: the kernel reads and writes the file below by itself (Linux 6.9, root only).

Strategy: here OPEN is answered, since the descriptor of the file below ("backing") is registered with the connection at
open. The server sees no read and no write of such a file, so no limit can hold: it is for databases on unlimited
mounts.

Rule 1.  Only files of the upper layer, and all files of a read-only mount, are passed through: a file of a lower layer
may be copied up later, and a backing cannot be exchanged. Rule 2.  An inode is open in one mode at a time, "cached" or
"passthrough", with one backing; the kernel answers a
         second way with EIO. The first opener decides, and it stays so until the last RELEASE.
Rule 3.  An open for writing copies the file up first (a large one on a worker), so that it can be passed through.
Rule 4.  Attributes of a file that is passed through are asked of the file below each time, because writes to it are
         not seen here.
Rule 5.  Where the kernel refuses a backing (the file lies on a stacked file system, no privilege), the file is
         served through the page cache, as ever.

Source: Documentation/filesystems/fuse-passthrough.rst, fs/fuse/passthrough.c and iomode.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.errors import Unsupported
from cowfs.fuse import abi, codec, log
from cowfs.fuse.handlers.data import Data, Host
from cowfs.fuse.handlers.names import Handler

if TYPE_CHECKING:
    from cowfs.fuse.tree import Tree

_OPEN_REPLY = struct.Struct("<IiQQIi").pack


def probe(device: int) -> None:
    """Check that files may be passed through on this connection.

    Raises:
        Unsupported: the kernel refuses (it wants CAP_SYS_ADMIN outside of any user namespace).
    """
    fd = os.memfd_create("cowfs-passthrough", os.MFD_CLOEXEC)
    try:
        backing = _open_backing(device, fd)
    except OSError as error:
        raise Unsupported(
            f"passthrough is not permitted: {error.strerror}", remedy="run as root of the host, or use --io cached"
        ) from None
    finally:
        os.close(fd)
    _close_backing(device, backing)


def _open_backing(device: int, fd: int) -> int:
    # with a mutable buffer, fcntl.ioctl returns the result of ioctl(2): here the id
    return int(fcntl.ioctl(device, abi.DEV_IOC_BACKING_OPEN, bytearray(abi.BACKING_MAP.pack(fd, 0, 0))))


def _close_backing(device: int, backing: int) -> None:
    fcntl.ioctl(device, abi.DEV_IOC_BACKING_CLOSE, bytearray(struct.pack("<I", backing)))


class Opened:
    """The open state of one node: ``backing`` is its id with the kernel, 0 for the page cache; ``count`` of opens."""

    __slots__ = ("backing", "count", "fd")

    def __init__(self, backing: int, fd: int) -> None:
        self.backing = backing
        self.fd = fd  # the backing file, owned here, for attributes; -1 for the page cache
        self.count = 0


class Passthrough(Data):
    """The handlers of a session with opens. ``fd`` is the connection."""

    __slots__ = ("device", "opened", "refused")

    def __init__(self, view: Tree, host: Host, max_read: int, fd: int) -> None:
        super().__init__(view, host, max_read)
        self.device = fd
        self.opened: dict[int, Opened] = {}
        self.refused = False

    def table(self) -> dict[int, Handler]:
        return super().table() | {abi.OPEN: self.open}

    def open(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        flags, _ = abi.OPEN_IN.unpack_from(buf, 40)
        node = self.nodes.get(nodeid) or self.view.node(nodeid)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and self._later(node, buf[:n]):  # Rule 3
            return None
        state = self.opened.get(nodeid)
        if state is None:
            state = self.opened[nodeid] = self._first_open(node)
        state.count += 1
        if state.backing:
            return _OPEN_REPLY(32, 0, unique, 0, abi.FOPEN_PASSTHROUGH, state.backing)
        return _OPEN_REPLY(32, 0, unique, 0, abi.FOPEN_KEEP_CACHE | abi.FOPEN_NOFLUSH, 0)

    def _first_open(self, node: Any) -> Opened:
        view = self.view
        if self.refused or not (view.readonly or view.has_own_data(node)):
            return Opened(0, -1)
        try:
            fd = os.dup(view.data_fd(node, not view.readonly))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return Opened(0, -1)
        try:
            backing = _open_backing(self.device, fd)
        except OSError as error:
            os.close(fd)
            self.refused = True
            log.warning("passthrough: the kernel refused a backing file (%s): serving through the page cache", error)
            return Opened(0, -1)
        return Opened(backing, fd)

    def written_past_us(self, node: Any) -> bool:
        return node.id in self.opened

    def release(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        state = self.opened.get(nodeid)
        if state is not None:
            state.count -= 1
            if not state.count:
                del self.opened[nodeid]
                if state.backing:
                    self._refreshed(nodeid)
                    _close_backing(self.device, state.backing)
                    os.close(state.fd)
        return codec.ok(unique)

    # -- Rule 4 -------------------------------------------------------------------------------

    def _refreshed(self, nodeid: int) -> None:
        node = self.nodes.get(nodeid)
        if node is not None:
            node.attr = None

    def getattr(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        if nodeid in self.opened:
            self._refreshed(nodeid)
        return super().getattr(buf, n, unique, nodeid)

    def _fresh_entry(self, reply: codec.Reply) -> codec.Reply:
        assert isinstance(reply, bytes)
        nodeid = int.from_bytes(reply[16:24], "little")
        if nodeid in self.opened:
            self._refreshed(nodeid)
            return reply[:56] + self.view.attr(self.nodes[nodeid])
        return reply

    def lookup(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        return self._fresh_entry(super().lookup(buf, n, unique, nodeid))

    def link(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        return self._fresh_entry(super().link(buf, n, unique, nodeid))

    def readdirplus(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
        for opened in self.opened:
            self._refreshed(opened)
        return super().readdirplus(buf, n, unique, nodeid)
