"""btrfs: subvolumes, their quotas, and the changes between two of them. By ioctl(2) alone: no program, no library.

Source of numbers and structs: Linux ``include/uapi/linux/btrfs.h``, ``btrfs_tree.h``, and ``fs/btrfs/send.h`` for the stream.
All calls need CAP_SYS_ADMIN, except creating a subvolume or snapshot, and deleting one's own where the mount allows it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator

from cowfs._typed import BinaryIO, NamedTuple

__all__ = [
    "MAGIC",
    "Command",
    "Held",
    "create",
    "destroy",
    "enable_quota",
    "has_inner",
    "is_subvolume",
    "limit",
    "paths_of",
    "quota_kind",
    "read_stream",
    "readonly",
    "send",
    "set_readonly",
    "snapshot",
    "subvolume_id",
    "used",
]

MAGIC = 0x9123683E  # statfs(2), f_type
FIRST_INO = 256  # the root directory of every subvolume

_VOL_ARGS = struct.Struct("=q4088s")
_VOL_ARGS_V2 = struct.Struct("=qQQ32s4040s")
_QUOTA_CTL = struct.Struct("=QQ")
_QGROUP_LIMIT = struct.Struct("=QQQQQQ")
_SEARCH_KEY = struct.Struct("=QQQQQQQIIII32x")
_SEARCH_HEADER = struct.Struct("=QQQII")  # transid, objectid, offset, type, len
_QGROUP_INFO = struct.Struct("<QQQQQ")  # generation, referenced, its compressed size, exclusive, its compressed size
_QGROUP_STATUS = struct.Struct("<QQQ")  # version, generation, flags
_SEND_ARGS = struct.Struct("=qQQQQI28x")
_INO_PATH_ARGS = struct.Struct("=QQ32xQ")
_DATA_CONTAINER = struct.Struct("=IIII")  # bytes left, bytes missing, elements, elements missed
_U64 = struct.Struct("=Q")

_NAME_MAX = 4039


def _io(direction: int, number: int, size: int) -> int:
    """An ioctl number of the type 0x94 (``_IOC`` of asm-generic/ioctl.h); direction 1 writes, 2 reads."""
    return direction << 30 | size << 16 | 0x94 << 8 | number


_SNAP_DESTROY = _io(1, 15, _VOL_ARGS.size)
_TREE_SEARCH = _io(3, 17, 4096)
_SNAP_CREATE_V2 = _io(1, 23, _VOL_ARGS_V2.size)
_SUBVOL_CREATE_V2 = _io(1, 24, _VOL_ARGS_V2.size)
_GETFLAGS = _io(2, 25, 8)
_SETFLAGS = _io(1, 26, 8)
_SEND = _io(1, 38, _SEND_ARGS.size)
_QUOTA = _io(3, 40, _QUOTA_CTL.size)
_LIMIT = _io(2, 43, _QGROUP_LIMIT.size)
_INFO = _io(2, 60, 504)
_ROOTREFS = _io(3, 61, 4096)
_ROOTREFS_COUNT = 8 + 255 * 16
_INO_PATHS = _io(3, 35, _INO_PATH_ARGS.size)

_RDONLY = 1 << 1
_QUOTA_TREE = 8
_STATUS_KEY, _INFO_KEY = 240, 242
_ENABLE, _ENABLE_SIMPLE = 1, 4
_SIMPLE_MODE = 1 << 3  # BTRFS_QGROUP_STATUS_FLAG_SIMPLE_MODE
_MAX_REFERENCED, _MAX_EXCLUSIVE = 1, 2


def _ask(fd: int, number: int, data: bytes) -> bytearray:
    """ioctl(2) with a struct that the kernel may write to."""
    buffer = bytearray(data)
    fcntl.ioctl(fd, number, buffer, True)
    return buffer


def _name(name: bytes) -> bytes:
    if not 0 < len(name) <= _NAME_MAX or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
    return name


def is_subvolume(fd: int) -> bool:
    """Whether an open directory of btrfs is the root of a subvolume."""
    return os.fstat(fd).st_ino == FIRST_INO


def create(dirfd: int, name: bytes) -> None:
    """Make an empty subvolume. Raises OSError: EEXIST and so on."""
    _ask(dirfd, _SUBVOL_CREATE_V2, _VOL_ARGS_V2.pack(0, 0, 0, b"", _name(name)))


def snapshot(source: int, dirfd: int, name: bytes, *, readonly: bool = False) -> None:
    """Make a snapshot of the subvolume whose root ``source`` is, in constant time.

    Raises:
        OSError: EINVAL where ``source`` is no subvolume, EEXIST and so on.
    """
    args = _VOL_ARGS_V2.pack(source, 0, _RDONLY if readonly else 0, b"", _name(name))
    _ask(dirfd, _SNAP_CREATE_V2, args)


def destroy(dirfd: int, name: bytes) -> None:
    """Delete a subvolume: its name is gone at once, its space when the file system gets to it.

    Raises:
        OSError: ENOENT, EPERM, ENOTEMPTY where it holds another subvolume.
    """
    _ask(dirfd, _SNAP_DESTROY, _VOL_ARGS.pack(0, _name(name)))


def readonly(fd: int) -> bool:
    """Whether a subvolume is read-only."""
    return bool(_U64.unpack(_ask(fd, _GETFLAGS, bytes(8)))[0] & _RDONLY)


def has_inner(fd: int) -> bool:
    """Whether other subvolumes are in a subvolume (``BTRFS_IOC_GET_SUBVOL_ROOTREF``); a snapshot leaves them out."""
    return bool(_ask(fd, _ROOTREFS, bytes(4096))[_ROOTREFS_COUNT])


def set_readonly(fd: int, on: bool = True) -> None:
    """Make a subvolume read-only, or writable again."""
    (flags,) = _U64.unpack(_ask(fd, _GETFLAGS, bytes(8)))
    _ask(fd, _SETFLAGS, _U64.pack(flags | _RDONLY if on else flags & ~_RDONLY))


def subvolume_id(fd: int) -> int:
    """The number of the subvolume that an open object is in; also that of its quota group."""
    return int(_U64.unpack_from(_ask(fd, _INFO, bytes(504)))[0])


def paths_of(fd: int, inode: int) -> list[bytes]:
    """The names of an inode of a subvolume, as paths from the subvolume's root (``BTRFS_IOC_INO_PATHS``).

    Args:
        fd: any object of the subvolume.

    Raises:
        OSError: ENOENT: no such inode; EOVERFLOW: its names do not fit into 64 KiB.
    """
    buffer = ctypes.create_string_buffer(1 << 16)
    _ask(fd, _INO_PATHS, _INO_PATH_ARGS.pack(inode, len(buffer), ctypes.addressof(buffer)))
    data = buffer.raw
    _, missing, count, missed = _DATA_CONTAINER.unpack_from(data)
    if missing or missed:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    offsets = struct.unpack_from(f"={count}Q", data, _DATA_CONTAINER.size)
    start = _DATA_CONTAINER.size
    return [data[start + offset : data.index(b"\0", start + offset)] for offset in offsets]


# -- quotas ---------------------------------------------------------------------------------------


class Held(NamedTuple):
    """The space of a subvolume, bytes: including extents shared with others, and exclusively its own. Simple quotas
    count its own writes only, in both."""

    referenced: int
    exclusive: int


def enable_quota(fd: int) -> str:
    """Begin to count on a file system: ``simple`` (Linux 6.7: what each subvolume wrote) or ``classic`` (what each refers to).

    Returns:
        The kind that is in force, also if somebody else chose it before.

    Raises:
        OSError: EPERM, or the kernel has neither.
    """
    known = quota_kind(fd)
    if known is not None:
        return known
    try:
        _ask(fd, _QUOTA, _QUOTA_CTL.pack(_ENABLE_SIMPLE, 0))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        _ask(fd, _QUOTA, _QUOTA_CTL.pack(_ENABLE, 0))
    return quota_kind(fd) or "classic"


def quota_kind(fd: int) -> str | None:
    """``simple``, ``classic``, or None where nothing is counted."""
    for _, data in _search(fd, _STATUS_KEY, 0, 0):
        return "simple" if _QGROUP_STATUS.unpack_from(data)[2] & _SIMPLE_MODE else "classic"
    return None


def limit(fd: int, subvolume: int, size: int | None, *, exclusive: bool = False) -> None:
    """Bound a subvolume; writes past it get EDQUOT.

    Args:
        fd: any object of the file system.
        subvolume: its number.
        size: bytes; None takes the bound away.
        exclusive: bound its exclusive space instead of all that it refers to.

    Raises:
        OSError: EINVAL or ENOTCONN where quotas are off.
    """
    which = _MAX_EXCLUSIVE if exclusive else _MAX_REFERENCED
    value = (1 << 64) - 1 if size is None else size
    values = (which, value, 0) if not exclusive else (which, 0, value)
    _ask(fd, _LIMIT, _QGROUP_LIMIT.pack(subvolume, *values, 0, 0))


def used(fd: int, subvolume: int) -> Held | None:
    """The space of a subvolume as the quota counts it (up to date after a commit of the file system); None without a quota."""
    for offset, data in _search(fd, _INFO_KEY, subvolume, subvolume):
        if offset == subvolume:
            _, referenced, _, exclusive, _ = _QGROUP_INFO.unpack_from(data)
            return Held(referenced, exclusive)
    return None


def _search(fd: int, kind: int, first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """(offset, item) of one kind in the quota tree (``BTRFS_IOC_TREE_SEARCH``)."""
    while first <= last:
        key = _SEARCH_KEY.pack(_QUOTA_TREE, 0, 0, first, last, 0, (1 << 64) - 1, kind, kind, 64, 0)
        try:
            answer = _ask(fd, _TREE_SEARCH, key + bytes(4096 - len(key)))
        except OSError as error:
            if error.errno == errno.ENOENT:  # no quota tree
                return
            raise
        (count,) = struct.unpack_from("=I", answer, 64)
        if not count:
            return
        at = _SEARCH_KEY.size
        for _ in range(count):
            _, _, offset, type_, size = _SEARCH_HEADER.unpack_from(answer, at)
            at += _SEARCH_HEADER.size
            if type_ == kind:
                yield offset, bytes(answer[at : at + size])
            at += size
            first = offset + 1
        if first > last or kind == _STATUS_KEY:
            return


# -- what changed -----------------------------------------------------------------------------------

_STREAM = struct.Struct("<13sI")
_COMMAND = struct.Struct("<IHI")  # length, command, crc32c
_ATTRIBUTE = struct.Struct("<HH")  # type, length
_NO_FILE_DATA, _VERSION = 1, 8

COMMANDS = {
    1: "subvol", 2: "snapshot", 3: "mkfile", 4: "mkdir", 5: "mknod", 6: "mkfifo", 7: "mksock", 8: "symlink", 9: "rename",
    10: "link", 11: "unlink", 12: "rmdir", 13: "set_xattr", 14: "remove_xattr", 15: "write", 16: "clone", 17: "truncate",
    18: "chmod", 19: "chown", 20: "utimes", 21: "end", 22: "update_extent", 23: "fallocate", 24: "fileattr",
    25: "encoded_write", 26: "enable_verity",
}  # fmt: skip
"""Names of the commands of a stream, by number (enum btrfs_send_cmd)."""

ATTRIBUTES = {
    1: "uuid", 2: "ctransid", 3: "ino", 4: "size", 5: "mode", 6: "uid", 7: "gid", 8: "rdev", 9: "ctime", 10: "mtime",
    11: "atime", 12: "otime", 13: "xattr_name", 14: "xattr_data", 15: "path", 16: "path_to", 17: "path_link",
    18: "file_offset", 19: "data", 20: "clone_uuid", 21: "clone_ctransid", 22: "clone_path", 23: "clone_offset",
    24: "clone_len",
}  # fmt: skip
"""Names of a command's attributes, by number."""


class Command(NamedTuple):
    """One command of a send stream: its name, and its attributes as bytes (integers little-endian)."""

    name: str
    values: dict[str, bytes]

    def path(self, attribute: str = "path") -> bytes:
        """A path below the subvolume's root."""
        return self.values[attribute]

    def number(self, attribute: str) -> int:
        """An integer."""
        return int.from_bytes(self.values[attribute], "little")


def send(fd: int, parent: int) -> Iterator[Command]:
    """The commands that turn the subvolume numbered ``parent`` into the subvolume ``fd``: names, modes, owners, times,
    xattrs, and which ranges of which files were written, without their data. A renamed directory is a ``rename``, a
    renamed file a ``link`` and an ``unlink``.

    Both are read-only. The kernel compares the two trees: the cost is that of the difference.

    Raises:
        OSError: EPERM: one is not read-only, or this process has no CAP_SYS_ADMIN.
    """
    readable, writable = os.pipe2(os.O_CLOEXEC)
    failure: list[OSError] = []

    def run() -> None:
        try:
            args = _SEND_ARGS.pack(writable, 0, 0, parent, _NO_FILE_DATA, 0)
            _ask(fd, _SEND, args)
        except OSError as error:
            failure.append(error)
        finally:
            os.close(writable)

    thread = threading.Thread(target=run, name="cowfs-btrfs-send", daemon=True)
    thread.start()
    try:
        with open(readable, "rb") as stream:
            try:
                yield from read_stream(stream)
            except ValueError:
                if not failure:
                    raise
            while stream.read(1 << 16):  # so that the kernel's side ends in any case
                pass
    finally:
        thread.join()
    if failure:
        raise failure[0]


def read_stream(stream: BinaryIO) -> Iterator[Command]:
    """The commands of a send stream, up to its ``end``.

    Raises:
        ValueError: it is no such stream, or it breaks off.
    """
    head = stream.read(_STREAM.size)
    if len(head) != _STREAM.size or not head.startswith(b"btrfs-stream\0"):
        raise ValueError("this is no btrfs send stream")
    while True:
        head = stream.read(_COMMAND.size)
        if len(head) != _COMMAND.size:
            raise ValueError("the send stream breaks off")
        length, number, _ = _COMMAND.unpack(head)
        if length > 1 << 26:
            raise ValueError(f"a command of {length} bytes in a send stream")
        body = stream.read(length)
        if len(body) != length:
            raise ValueError("the send stream breaks off")
        values: dict[str, bytes] = {}
        at = 0
        while at + _ATTRIBUTE.size <= length:
            kind, size = _ATTRIBUTE.unpack_from(body, at)
            at += _ATTRIBUTE.size
            values[ATTRIBUTES.get(kind, str(kind))] = body[at : at + size]
            at += size
        name = COMMANDS.get(number, str(number))
        if name == "end":
            return
        yield Command(name, values)


assert _VOL_ARGS.size == _VOL_ARGS_V2.size == 4096
assert (_SEND_ARGS.size, _QGROUP_LIMIT.size, _SEARCH_KEY.size) == (72, 48, 104)
