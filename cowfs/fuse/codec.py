"""Bytes in, bytes out: the layout of requests and replies. No I/O, no state.

Strategy: a table has the layout behind the header for each opcode (one struct, then names, then data). It gives the
shortest and longest valid length, which the session checks before it calls a handler, and :func:`parse`, which reads
any request whole (the trace and the tests use it). The handlers of the hot operations unpack their one struct
themselves, since each call costs as much as the unpacking; they rely on the length check and on :func:`name`.

Requests of the kernel are checked all the same: a frame that contradicts its own length is a :class:`ProtocolError`
(the session ends, since no later byte can be trusted), a body that contradicts its opcode is ``EINVAL``.

Buffers: everything that takes ``buf`` takes a memoryview of one whole request and keeps nothing of it, except that
:attr:`Request.data` is a view into it. Replies are ``bytes``, or a tuple of buffers for ``writev``.
"""

from __future__ import annotations

import errno
import os
import struct

from cowfs._record import record
from cowfs._typed import Final
from cowfs.fuse import abi

Reply = bytes | tuple[bytes | memoryview, ...]

HEADER_SIZE: Final = abi.IN_HEADER.size
NAME_MAX: Final = 255
PATH_MAX: Final = 4096
XATTR_NAME_MAX: Final = 255
XATTR_SIZE_MAX: Final = 65536
#: Seconds that the kernel may keep names and attributes: 68 years. The kernel counts in jiffies and caps by itself.
FOREVER: Final = 0x7FFFFFFF


class ProtocolError(Exception):
    """The bytes are not a FUSE request at all; the session cannot go on."""


@record(frozen=True, slots=True)
class Shape:
    """The layout behind the header of one opcode's requests.

    ``body`` is the fixed part; then ``names`` NUL-terminated strings of at most ``longest`` bytes each (NUL not
    counted); then, if ``data``, any number of bytes.
    """

    body: struct.Struct | None = None
    names: int = 0
    longest: int = PATH_MAX
    data: bool = False

    @property
    def low(self) -> int:
        return HEADER_SIZE + (self.body.size if self.body else 0) + 2 * self.names


_NOTHING = Shape()
#: Opcode -> shape. A missing opcode is answered ENOSYS without being read.
SHAPES: Final[dict[int, Shape]] = {
    abi.LOOKUP: Shape(names=1),
    abi.FORGET: Shape(abi.FORGET_IN),
    abi.GETATTR: Shape(abi.GETATTR_IN),
    abi.SETATTR: Shape(abi.SETATTR_IN),
    abi.READLINK: _NOTHING,
    abi.SYMLINK: Shape(names=2),
    abi.MKNOD: Shape(abi.MKNOD_IN, names=1),
    abi.MKDIR: Shape(abi.MKDIR_IN, names=1),
    abi.UNLINK: Shape(names=1),
    abi.RMDIR: Shape(names=1),
    abi.RENAME: Shape(abi.RENAME_IN, names=2),
    abi.LINK: Shape(abi.LINK_IN, names=1),
    abi.OPEN: Shape(abi.OPEN_IN),
    abi.READ: Shape(abi.READ_IN),
    abi.WRITE: Shape(abi.WRITE_IN, data=True),
    abi.STATFS: _NOTHING,
    abi.RELEASE: Shape(abi.RELEASE_IN),
    abi.FSYNC: Shape(abi.FSYNC_IN),
    abi.SETXATTR: Shape(abi.SETXATTR_IN, names=1, data=True),
    abi.GETXATTR: Shape(abi.GETXATTR_IN, names=1),
    abi.LISTXATTR: Shape(abi.GETXATTR_IN),
    abi.REMOVEXATTR: Shape(names=1),
    abi.FLUSH: Shape(abi.FLUSH_IN),
    abi.INIT: Shape(abi.INIT_COMPAT_IN, data=True),
    abi.OPENDIR: Shape(abi.OPEN_IN),
    abi.READDIR: Shape(abi.READ_IN),
    abi.RELEASEDIR: Shape(abi.RELEASE_IN),
    abi.FSYNCDIR: Shape(abi.FSYNC_IN),
    abi.GETLK: Shape(abi.LK_IN),
    abi.SETLK: Shape(abi.LK_IN),
    abi.SETLKW: Shape(abi.LK_IN),
    abi.ACCESS: Shape(abi.ACCESS_IN),
    abi.CREATE: Shape(abi.CREATE_IN, names=1),
    abi.INTERRUPT: Shape(abi.INTERRUPT_IN),
    abi.BMAP: Shape(abi.BMAP_IN),
    abi.DESTROY: _NOTHING,
    abi.IOCTL: Shape(abi.IOCTL_IN, data=True),
    abi.POLL: Shape(abi.POLL_IN),
    abi.BATCH_FORGET: Shape(abi.BATCH_FORGET_IN, data=True),
    abi.FALLOCATE: Shape(abi.FALLOCATE_IN),
    abi.READDIRPLUS: Shape(abi.READ_IN),
    abi.RENAME2: Shape(abi.RENAME2_IN, names=2),
    abi.LSEEK: Shape(abi.LSEEK_IN),
    abi.COPY_FILE_RANGE: Shape(abi.COPY_FILE_RANGE_IN),
    abi.SYNCFS: Shape(abi.SYNCFS_IN),
    abi.TMPFILE: Shape(abi.CREATE_IN, names=1),
    abi.STATX: Shape(abi.STATX_IN),
    abi.COPY_FILE_RANGE_64: Shape(abi.COPY_FILE_RANGE_IN),
}


def bounds(max_write: int, *, setxattr_ext: bool = True) -> tuple[list[int], list[int]]:
    """Shortest and longest valid request length in bytes, header included, by opcode.

    ``max_write`` bounds data; ``setxattr_ext``: whether the long form of SETXATTR was negotiated.
    """
    low = [HEADER_SIZE] * abi.OPCODE_END
    high = [1 << 32] * abi.OPCODE_END
    for opcode, shape in SHAPES.items():
        low[opcode] = shape.low
        high[opcode] = shape.low if not shape.names else shape.low + shape.names * (shape.longest - 1)
        if shape.data:
            high[opcode] += max(max_write, XATTR_SIZE_MAX, 1 << 17)
    if not setxattr_ext:
        low[abi.SETXATTR] -= abi.SETXATTR_IN.size - abi.SETXATTR_COMPAT_IN.size
    return low, high


def invalid(what: str) -> OSError:
    return OSError(errno.EINVAL, f"invalid request: {what}")


def name(buf: memoryview, start: int, end: int) -> bytes:
    """The one directory entry name in ``buf[start:end]``, its NUL taken off.

    Raises:
        OSError: EINVAL for no NUL at the end, one inside, a slash or no bytes; ENAMETOOLONG past 255 bytes.
    """
    value = bytes(buf[start : end - 1])
    if buf[end - 1] or not value or 0 in value or 47 in value:
        raise invalid("name")
    if len(value) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return value


def text(buf: memoryview, start: int, end: int, longest: int) -> bytes:
    """The one NUL-terminated string in ``buf[start:end]`` (an xattr name): ERANGE past ``longest`` bytes."""
    value = bytes(buf[start : end - 1])
    if buf[end - 1] or not value or 0 in value:
        raise invalid("string")
    if len(value) > longest:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value


def two_names(buf: memoryview, start: int, end: int) -> tuple[bytes, bytes]:
    """Two entry names, one behind the other, as RENAME has them. Raises like :func:`name`."""
    first, nul, _ = bytes(buf[start:end]).partition(b"\0")
    middle = start + len(first) + 1
    if not nul or middle >= end:
        raise invalid("two names")
    return name(buf, start, middle), name(buf, middle, end)


def name_and_text(buf: memoryview, start: int, end: int, longest: int) -> tuple[bytes, bytes]:
    """An entry name and a string of 1 to ``longest`` bytes, as SYMLINK has them. ENAMETOOLONG past that."""
    first, nul, _ = bytes(buf[start:end]).partition(b"\0")
    middle = start + len(first) + 1
    if not nul or middle >= end:
        raise invalid("name and target")
    second = bytes(buf[middle : end - 1])
    if buf[end - 1] or not second or 0 in second:
        raise invalid("target")
    if len(second) > longest:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return name(buf, start, middle), second


def name_and_data(buf: memoryview, start: int, end: int, size: int) -> tuple[bytes, memoryview]:
    """A string and exactly ``size`` bytes behind it, as SETXATTR has them."""
    first, nul, _ = bytes(buf[start : min(end, start + XATTR_NAME_MAX + 1)]).partition(b"\0")
    middle = start + len(first) + 1
    if not nul and end - start > XATTR_NAME_MAX:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    if not nul or not first or end - middle != size:
        raise invalid("name and value")
    return first, buf[middle:end]


@record(frozen=True, slots=True)
class Request:
    """One request, whole. ``fields`` are those of the opcode's struct; ``data`` is a view of the buffer."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fields: tuple[int, ...]
    names: tuple[bytes, ...]
    data: memoryview


def parse(buf: memoryview, *, setxattr_ext: bool = True) -> Request:
    """Read one whole request.

    Raises:
        ProtocolError: shorter than a header, or of another length than the header says.
        OSError: ENOSYS for an opcode without a shape, EINVAL for a body that does not fit it.
    """
    if len(buf) < HEADER_SIZE:
        raise ProtocolError(f"{len(buf)} bytes are no request")
    length, opcode, unique, nodeid, uid, gid, pid, extensions, _ = abi.IN_HEADER.unpack_from(buf)
    if length != len(buf):
        raise ProtocolError(f"a request of {length} bytes arrived as {len(buf)}")
    shape = SHAPES.get(opcode)
    if shape is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if extensions:
        raise invalid("extensions were not negotiated")
    body = shape.body
    if opcode == abi.SETXATTR and not setxattr_ext:
        body = abi.SETXATTR_COMPAT_IN
    at = HEADER_SIZE + (body.size if body else 0)
    if length < at:
        raise invalid("too short")
    names = []
    for _ in range(shape.names):
        value, nul, _ = bytes(buf[at : at + shape.longest + 1]).partition(b"\0")
        if not nul or not value:
            raise invalid("name")
        names.append(value)
        at += len(value) + 1
    if not shape.data and at != length:
        raise invalid("trailing bytes")
    fields = body.unpack_from(buf, HEADER_SIZE) if body else ()
    return Request(opcode, unique, nodeid, uid, gid, pid, fields, tuple(names), buf[at:])


def describe(buf: memoryview, *, setxattr_ext: bool = True) -> str:
    """One request in a few words, for the trace: opcode, node, names, and where they matter offset and size."""
    try:
        request = parse(buf, setxattr_ext=setxattr_ext)
    except (OSError, ProtocolError) as error:
        opcode = abi.HEAD.unpack_from(buf)[1] if len(buf) >= abi.HEAD.size else -1
        known = abi.NAMES[opcode] if 0 <= opcode < abi.OPCODE_END else ""
        return f"{known or opcode} {error}"
    words = [abi.NAMES[request.opcode], str(request.nodeid)]
    words += [repr(value)[1:] for value in request.names]
    if request.opcode in _SPANS:
        words += [f"{label}={request.fields[index]}" for label, index in _SPANS[request.opcode]]
    return " ".join(words)


_SPANS: Final[dict[int, tuple[tuple[str, int], ...]]] = {
    abi.READ: (("offset", 1), ("size", 2)),
    abi.WRITE: (("offset", 1), ("size", 2)),
    abi.READDIR: (("offset", 1), ("size", 2)),
    abi.READDIRPLUS: (("offset", 1), ("size", 2)),
    abi.SETATTR: (("valid", 0),),
    abi.FALLOCATE: (("offset", 1), ("length", 2), ("mode", 3)),
    abi.MKNOD: (("mode", 0), ("rdev", 1)),
    abi.MKDIR: (("mode", 0),),
    abi.FORGET: (("nlookup", 0),),
    abi.LSEEK: (("offset", 1), ("whence", 2)),
    abi.INTERRUPT: (("unique", 0),),
}


# -- replies ----------------------------------------------------------------------------------

#: A whole reply's head up to the attributes: OUT_HEADER and ENTRY_OUT, OUT_HEADER and ATTR_OUT.
ENTRY_HEAD: Final = struct.Struct("<IiQQQQQII")
ATTR_HEAD: Final = struct.Struct("<IiQQII")
ENTRY_SIZE: Final = ENTRY_HEAD.size + abi.ATTR.size
ATTR_SIZE: Final = ATTR_HEAD.size + abi.ATTR.size
WRITE_REPLY: Final = struct.Struct("<IiQII")
NO_ATTR: Final = bytes(abi.ATTR.size)
assert (ENTRY_SIZE, ATTR_SIZE, WRITE_REPLY.size) == (16 + 128, 16 + 104, 16 + 8)


def ok(unique: int) -> bytes:
    """Success, nothing else."""
    return abi.OUT_HEADER.pack(16, 0, unique)


def error(unique: int, code: int) -> bytes:
    """Failure with errno ``code``; a number that is no errno becomes EIO, since the kernel would end the connection."""
    return abi.OUT_HEADER.pack(16, -code if 0 < code < 512 else -errno.EIO, unique)


def failure(unique: int, raised: OSError) -> bytes:
    """The reply for an OSError. ENOSYS becomes EOPNOTSUPP: the kernel would never send that opcode again, and take it
    as success for fsync."""
    code = raised.errno or errno.EIO
    return error(unique, errno.EOPNOTSUPP if code == errno.ENOSYS else code)


def payload(unique: int, data: bytes) -> bytes:
    """Success with ``data``; for small data, where one copy is cheaper than a second buffer."""
    return abi.OUT_HEADER.pack(16 + len(data), 0, unique) + data


def entry(unique: int, nodeid: int, generation: int, attr: bytes) -> bytes:
    """A found or made name: struct fuse_entry_out, kept for as long as the protocol allows."""
    return ENTRY_HEAD.pack(ENTRY_SIZE, 0, unique, nodeid, generation, FOREVER, FOREVER, 0, 0) + attr


def negative(unique: int) -> bytes:
    """A name that is not there, to be remembered: node id 0 with a time-out."""
    return ENTRY_HEAD.pack(ENTRY_SIZE, 0, unique, 0, 0, FOREVER, FOREVER, 0, 0) + NO_ATTR


def attributes(unique: int, attr: bytes) -> bytes:
    """struct fuse_attr_out."""
    return ATTR_HEAD.pack(ATTR_SIZE, 0, unique, FOREVER, 0, 0) + attr


def looked_up(opcode: int, reply: Reply) -> list[int]:
    """Node ids whose look-up count a reply raised: they are lowered again if the kernel did not get it."""
    whole = reply if isinstance(reply, bytes) else b"".join(reply)
    if len(whole) < 16 or abi.OUT_HEADER.unpack_from(whole)[1]:
        return []
    if opcode in ENTRY_OPCODES and len(whole) >= ENTRY_SIZE:
        node = abi.ENTRY_OUT.unpack_from(whole, 16)[0]
        return [node] if node else []
    found = []
    if opcode == abi.READDIRPLUS:
        at = 16
        while at < len(whole):
            node, *_, length, _kind = abi.DIRENTPLUS.unpack_from(whole, at)
            if node:
                found.append(node)
            at += abi.DIRENTPLUS.size + (length + 7 & ~7)
    return found


ENTRY_OPCODES: Final = frozenset((abi.LOOKUP, abi.MKNOD, abi.MKDIR, abi.SYMLINK, abi.LINK, abi.TMPFILE, abi.CREATE))


# -- notifications ----------------------------------------------------------------------------


def _notification(code: int, body: bytes) -> bytes:
    return abi.OUT_HEADER.pack(16 + len(body), code, 0) + body


def notify_inval_inode(nodeid: int, offset: int = 0, length: int = 0) -> bytes:
    """Drop attributes, and pages from ``offset`` on (``length`` 0: to the end; ``offset`` < 0: attributes only)."""
    return _notification(abi.NOTIFY_INVAL_INODE, abi.NOTIFY_INVAL_INODE_OUT.pack(nodeid, offset, length))


def notify_inval_entry(parent: int, entry_name: bytes) -> bytes:
    """Drop one name, negative or not."""
    return _notification(
        abi.NOTIFY_INVAL_ENTRY, abi.NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(entry_name), 0) + entry_name + b"\0"
    )


def notify_delete(parent: int, child: int, entry_name: bytes) -> bytes:
    """Drop one name as deleted: watchers (inotify) are notified, unlike with INVAL_ENTRY."""
    body = abi.NOTIFY_DELETE_OUT.pack(parent, child, len(entry_name), 0)
    return _notification(abi.NOTIFY_DELETE, body + entry_name + b"\0")


def notify_prune(nodeids: list[int]) -> bytes:
    """Ask the kernel to forget unused nodes (7.45)."""
    body = abi.NOTIFY_PRUNE_OUT.pack(len(nodeids), 0, 0)
    return _notification(abi.NOTIFY_PRUNE, body + struct.pack(f"<{len(nodeids)}Q", *nodeids))


def notify_inc_epoch() -> bytes:
    """Make every name that the kernel knows stale at once (7.44)."""
    return _notification(abi.NOTIFY_INC_EPOCH, b"")
