"""The handlers of data requests: reads, writes, space and fsync, partly on workers.

Strategy: the loop thread does quick work. A read of 64 KiB or more is tried with RWF_NOWAIT first; a read that is not
in the page cache goes to a worker, on a descriptor of its own. So does a read that goes on where the last one ended:
two threads copy more than one (reading and writing release the interpreter's lock). A change of data asks
``view.writable`` first; when that says "copy up" and the file is large, the copy runs on a worker and the request comes
back when it is published.

Buffers: one read buffer belongs to the loop thread, and one to each worker (a thread-local); a reply that points
into it is written before the buffer is used again. WRITE hands the view a slice of the request itself.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from time import perf_counter_ns as _clock

from cowfs._typed import TYPE_CHECKING, Any, Final, Protocol
from cowfs.fuse import abi, buffers, codec
from cowfs.fuse.handlers.names import Adapter, Handler
from cowfs.sys import files
from cowfs.sys.host import CAP_FSETID, has_cap
from cowfs.union.prefetch import COLD_NS, ReadAhead

if TYPE_CHECKING:
    from cowfs.fuse.tree import Tree

#: Reads from this size on are tried without waiting first, bytes.
LARGE_READ: Final = 64 << 10
#: Writes from this size on may be of a long file.
LARGE_WRITE: Final = 64 << 10
#: Bytes written in sequence after which the host is told to begin writing them to the disk.
EARLY: Final = 16 << 20
#: One COPY_FILE_RANGE moves at most this much, so that others are served in between; a short count is allowed.
COPY_STEP: Final = 32 << 20

_OK = abi.OUT_HEADER.pack
_ATTR = codec.ATTR_HEAD.pack
_FOREVER = codec.FOREVER
_READ = abi.READ_IN.unpack_from
_WRITE = abi.WRITE_IN.unpack_from
_SETATTR = abi.SETATTR_IN.unpack_from
_WRITTEN = codec.WRITE_REPLY.pack
_CACHE, _KILL = abi.WRITE_CACHE, abi.WRITE_KILL_SUIDGID
_pwrite = os.pwrite
_REGULAR = 8  # DT_REG
_NOWAIT = getattr(os, "RWF_NOWAIT", 8)


class Host(Protocol):
    """The part of the session that the data handlers need (:class:`cowfs.fuse.deferred.Errands`): work done elsewhere."""

    def copy_up(self, nodeid: int, request: bytes, stage: Any) -> None:
        """Run a stage on a worker, publish it, then serve ``request`` again; loop thread."""

    def look(self, nodeid: int, unique: int, job: Any) -> None:
        """Run ``job() -> Reply`` on a worker as a shared job and send its result; loop thread."""

    def wait_behind(self, nodeid: int, request: memoryview) -> bool:
        """Queue ``request`` behind the node's copy-up, if one is under way; loop thread."""

    def aside(self, unique: int, job: Any) -> None:
        """Run ``job() -> Reply`` on a worker without holding anything back; loop thread."""

    def meanwhile(self, job: Any) -> None:
        """Run ``job()`` on a worker, without a reply; loop thread."""

    def attributes_changed(self, nodeid: int) -> None:
        """Have the kernel drop a node's attributes before the request at hand is answered; loop thread."""


class Data(Adapter):
    """The handlers that touch data, on top of those for names and attributes."""

    __slots__ = (
        "_ahead",
        "_buffer",
        "_local",
        "_stream",
        "_writes",
        "host",
        "keeps_modes",
        "max_read",
        "metacopy",
        "nowait",
    )

    def __init__(self, view: Tree, host: Host, max_read: int) -> None:
        super().__init__(view)
        self.host = host
        self.max_read = max_read
        self.metacopy = view.form.redirects  # the form that knows redirects knows metacopies, too
        self.keeps_modes = has_cap(CAP_FSETID)  # else a write may clear set-id bits, which the view does
        self.nowait = True
        self._ahead = ReadAhead()
        self._writes = (0, 0, 0)  # of a writer in sequence: node id, its end, up to where the host was told to begin
        self._stream = (0, 0)  # node id and offset at which a reader in sequence will go on
        self._buffer = memoryview(buffers.lazy(max_read))
        self._local = threading.local()

    def outdated(self, nodeid: int) -> None:
        self.host.attributes_changed(nodeid)

    def table(self) -> dict[int, Handler]:
        table = super().table() | {
            abi.READ: self.read,
            abi.WRITE: self.write,
            abi.SETATTR: self.setattr,
            abi.FSYNC: self.fsync,
            abi.FSYNCDIR: self.fsync,
            abi.SYNCFS: self.syncfs,
            abi.FALLOCATE: self.fallocate,
            abi.LSEEK: self.lseek,
            abi.COPY_FILE_RANGE: self.copy_file_range,
            abi.COPY_FILE_RANGE_64: self.copy_file_range_64,
            abi.RELEASE: self.release,
        }
        if not self.metacopy:
            table |= {abi.LINK: self._linked, abi.RENAME: self._renamed, abi.RENAME2: self._renamed}
            for opcode in (abi.SETXATTR, abi.REMOVEXATTR):
                if opcode in table:
                    table[opcode] = self._of_node(table[opcode])
        return table

    # -- reading ------------------------------------------------------------------------------

    def read(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        _fh, offset, size, _, _, _, _ = _READ(buf, 40)
        node = self.nodes.get(nodeid) or self.view.node(nodeid)
        if size > self.max_read:
            raise codec.invalid("read size")
        room = self._buffer[:size]
        if size >= LARGE_READ and self.nowait:
            return self._large_read(unique, node, offset, room)
        start = _clock()
        got = self.view.pread(node, offset, room)
        if _clock() - start > COLD_NS:
            self._ahead.cold(node)
        return _OK(16 + got, 0, unique), room[:got]

    def _large_read(self, unique: int, node: Any, offset: int, room: memoryview) -> codec.Reply | None:
        streams = self._stream == (node.id, offset)
        self._stream = node.id, offset + len(room)
        try:
            if streams:
                raise BlockingIOError  # the worker copies while the loop takes the next request
            got = self.view.pread(node, offset, room, _NOWAIT)
            end = abi.ATTR.unpack(node.attr or self.view.attr(node))[1]
            if got == len(room) or offset + got >= end:
                return _OK(16 + got, 0, unique), room[:got]
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.nowait = False  # the host below has no such reads
        size = len(room)
        read = self.view.reader(node, offset, size, streams=streams)
        if read is not None:  # its pieces, from many descriptors
            self._look_redirect(unique, node.id, read, size)
            return None
        try:
            fd = os.dup(self.view.data_fd(node, False))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            got = self.view.pread(node, offset, room)
            return _OK(16 + got, 0, unique), room[:got]

        def job() -> codec.Reply:
            try:
                mine = self._own_buffer()[:size]
                got = done = os.preadv(fd, [mine], offset)
                while done and got < size:
                    done = os.preadv(fd, [mine[got:]], offset + got)
                    got += done
                return _OK(16 + got, 0, unique), mine[:got]
            finally:
                os.close(fd)

        self.host.look(node.id, unique, job)
        return None

    def _look_redirect(self, unique: int, id: int, read: Callable[[memoryview], int], size: int) -> None:
        def job() -> codec.Reply:
            mine = self._own_buffer()[:size]
            got = read(mine)
            return _OK(16 + got, 0, unique), mine[:got]

        self.host.look(id, unique, job)

    def _own_buffer(self) -> memoryview:
        try:
            buffer: memoryview = self._local.buffer
        except AttributeError:
            buffer = self._local.buffer = memoryview(buffers.lazy(self.max_read))
        return buffer

    def lseek(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        _fh, offset, whence, _ = abi.LSEEK_IN.unpack_from(buf, 40)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise codec.invalid("whence")
        if offset >> 63:  # negative: the kernel leaves it to the server
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        where = self.view.lseek(self.view.node(nodeid), offset, whence)
        return codec.payload(unique, abi.LSEEK_OUT.pack(where))

    # -- writing ------------------------------------------------------------------------------

    def _later(self, node: Any, buf: memoryview, keep: int | None = None) -> bool:
        """Whether the request must wait for a large copy-up, which this starts."""
        stage = self.view.writable(node, keep)
        if stage is None:
            return False
        if stage.small:
            stage.run()
            self.view.publish(stage)
            return False
        self.host.copy_up(node.id, bytes(buf), stage)
        return True

    def _later_too(self, node: Any, buf: memoryview) -> bool:
        """The same for a change of attributes or names, where the layer form knows no metacopy: that copies data."""
        if self.metacopy or node.type != _REGULAR or self.view.in_upper(node):
            return False
        return self.host.wait_behind(node.id, buf) or self._later(node, buf)

    def write(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        _fh, offset, size, flags, _, _, _ = _WRITE(buf, 40)
        if size != n - 80:
            raise codec.invalid("write size")
        node = self.nodes.get(nodeid) or self.view.node(nodeid)
        view = self.view
        if view.has_own_data(node):
            if node.wfd and node.bare and view.space is None and self.keeps_modes and not flags & _KILL:  # most are so
                node.attr = None
                done = _pwrite(node.fd, buf[80:n], offset)
                if done < size and flags & _CACHE:
                    self._write_back(node, offset, buf[80:n], done)
                    done = size
                if size >= LARGE_WRITE:
                    self._written(node, offset, done)
                return _WRITTEN(24, 0, unique, done, 0)
        elif self._later(node, buf[:n]):
            return None
        if flags & _KILL:
            self.kill_privileges(node, buf)
        done = view.write(node, offset, buf[80:n])
        if done < size and flags & _CACHE:
            self._write_back(node, offset, buf[80:n], done)
            done = size
        if size >= LARGE_WRITE:
            self._written(node, offset, done)
        return _WRITTEN(24, 0, unique, done, 0)

    def _write_back(self, node: Any, offset: int, data: memoryview, done: int) -> None:
        """Write the rest of dirty pages, or raise the error that prevents it.

        They are not written again: the kernel takes a short answer for a whole one (fs/fuse/file.c,
        fuse_writepage_end), and stores through a map would be lost silently.
        """
        while done < len(data):
            more = self.view.write(node, offset + done, data[done:])
            if not more:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += more

    def _written(self, node: Any, offset: int, done: int) -> None:
        """Have the host begin to write back a file that is written in sequence, so that less is left for its fsync."""
        id, end, begun = self._writes
        if id != node.id or end != offset:
            begun = offset
        end = offset + done
        if end - begun >= EARLY and node.wfd and self.view.has_own_data(node) and self.view.must_sync:
            fd, start, begun = os.dup(node.fd), begun, end

            def job() -> None:
                try:
                    files.begin_writing(fd, start, end - start)
                finally:
                    os.close(fd)

            self.host.meanwhile(job)
        self._writes = node.id, end, begun

    def setattr(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        node = self.nodes.get(nodeid) or self.view.node(nodeid)
        fields = _SETATTR(buf, 40)
        if fields[0] & abi.FATTR_SIZE:
            if self._later(node, buf[:n], fields[3]):
                return None
        elif not self.metacopy and self._later_too(node, buf[:n]):
            return None
        if not fields[0] & ~abi.FATTR_CTIME:  # with writeback, chown(-1, -1) brings ctime along
            return self.without_fields(node, buf, unique)
        self.apply(node, buf, fields)
        return _ATTR(120, 0, unique, _FOREVER, 0, 0) + (node.attr or self.view.attr(node))

    def _of_node(self, handler: Handler) -> Handler:
        """A handler whose node is copied up first."""

        def first(buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
            if self._later_too(self.view.node(nodeid), buf[:n]):
                return None
            return handler(buf, n, unique, nodeid)

        return first

    def _linked(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        if self._later_too(self.view.node(abi.LINK_IN.unpack_from(buf, 40)[0]), buf[:n]):
            return None
        return self.link(buf, n, unique, nodeid)

    def _renamed(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        """RENAME and RENAME2: the object that gets a name in the upper layer is copied up first; for an exchange both are."""
        if abi.HEAD.unpack_from(buf)[1] == abi.RENAME:
            (target,), flags, start, rename = abi.RENAME_IN.unpack_from(buf, 40), 0, 48, self.rename
        else:
            target, flags, _ = abi.RENAME2_IN.unpack_from(buf, 40)
            start, rename = 56, self.rename2
        old, new = codec.two_names(buf, start, n)
        moved = [self.view.child(self.view.directory(nodeid), old)]
        if flags & files.RENAME_EXCHANGE:
            moved.append(self.view.child(self.view.directory(target), new))
        for node in moved:
            if node is not None and self._later_too(node, buf[:n]):
                return None
        return rename(buf, n, unique, nodeid)

    def fallocate(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        _fh, offset, length, mode, _ = abi.FALLOCATE_IN.unpack_from(buf, 40)
        node = self.view.node(nodeid)
        if self._later(node, buf[:n]):
            return None
        if not self.keeps(node, buf):  # no flag comes with this request
            self.kill_privileges(node, buf)
        self.view.fallocate(node, mode, offset, length)
        return _OK(16, 0, unique)

    def kill_privileges(self, node: Any, buf: memoryview) -> None:
        """Clear the set-id bits that a change of data by this caller clears, on the host and in the kernel's cache.

        Mostly they went before, when the kernel announced the change (:meth:`without_fields`). If bits came back since,
        or were unknown to the kernel, it forgets the mode before the change is answered: execve(2) believes its cache.
        """
        if self.view.kill_privileges(node) | self.strip(node, buf):
            self.host.attributes_changed(node.id)

    def _copied(self, buf: memoryview, n: int, nodeid: int) -> int | None:
        _fh, source_offset, target_id, _fh_out, target_offset, length, flags = abi.COPY_FILE_RANGE_IN.unpack_from(
            buf, 40
        )
        if flags:
            raise codec.invalid("copy flags")
        source, target = self.view.node(nodeid), self.view.node(target_id)
        if self._later(target, buf[:n]):
            return None
        if length and not self.keeps(target, buf):
            self.kill_privileges(target, buf)
        return self.view.copy_range(source, source_offset, target, target_offset, min(length, COPY_STEP))

    def copy_file_range(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        count = self._copied(buf, n, nodeid)
        return None if count is None else _WRITTEN(24, 0, unique, count, 0)

    def copy_file_range_64(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        count = self._copied(buf, n, nodeid)
        return None if count is None else codec.payload(unique, abi.COPY_FILE_RANGE_OUT.pack(count))

    # -- syncing ------------------------------------------------------------------------------

    def fsync(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        _fh, flags, _ = abi.FSYNC_IN.unpack_from(buf, 40)
        node = self.view.node(nodeid)
        sync_pieces = self.view.sync_job(node)
        if sync_pieces is not None:
            self._sync_redirect(unique, sync_pieces, bool(flags & abi.FSYNC_FDATASYNC))
            return None
        fd = self.view.fsync_fd(node)
        if fd is None:
            return _OK(16, 0, unique)
        sync = os.fdatasync if flags & abi.FSYNC_FDATASYNC else os.fsync

        def job() -> codec.Reply:
            try:
                sync(fd)
            finally:
                os.close(fd)
            return codec.ok(unique)

        self.host.aside(unique, job)
        return None

    def _sync_redirect(self, unique: int, sync: Callable[[bool], None], data_only: bool) -> None:
        def job() -> codec.Reply:
            sync(data_only)
            return codec.ok(unique)

        self.host.aside(unique, job)

    def syncfs(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        fd = self.view.fsync_fd(self.view.root)
        if fd is None:
            return _OK(16, 0, unique)
        sync_all = self.view.sync_all_job()

        def job() -> codec.Reply:
            try:
                if sync_all is not None:
                    sync_all()
                files.syncfs(fd)
            finally:
                os.close(fd)
            return codec.ok(unique)

        self.host.aside(unique, job)
        return None

    def release(self, buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply | None:
        """RELEASE, which comes without OPEN for files made by O_TMPFILE; there is no handle to close."""
        return _OK(16, 0, unique)
