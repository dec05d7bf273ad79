"""Opening beneath a directory, renaming with flags, copying and counting space.

Rule 1: a path that came from a layer is only ever opened by :func:`open_beneath`.
Rule 2: a copy keeps holes, and shares extents where the host can.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable

from cowfs.sys._libc import check, libc, syscall

O_PATH_DIR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
O_PATH_ANY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000

# openat2(2), linux/openat2.h
_OPENAT2 = 437
_OPEN_HOW = struct.Struct("<QQQ")
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16
_SAFE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

# fallocate(2), linux/falloc.h
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_ZERO_RANGE, FALLOC_FL_INSERT_RANGE = 8, 16, 32

_FICLONE = 0x40049409
_SYS_CACHESTAT = 451
_CACHESTAT_RANGE, _CACHESTAT = struct.Struct("<QQ"), struct.Struct("<5Q")
_FS_IOC_FIEMAP = 0xC020660B
_FS_IOC_GETFSUUID = 0x80111500
_FIEMAP = struct.Struct("<QQIIII")
_FIEMAP_EXTENT = struct.Struct("<QQQQQIIII")
FIEMAP_EXTENT_LAST, FIEMAP_EXTENT_DELALLOC, FIEMAP_EXTENT_UNWRITTEN = 1, 4, 0x800
assert _FIEMAP.size == 32 and _FIEMAP_EXTENT.size == 56

# statfs(2) magics, linux/magic.h
MAGIC = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
    0x65735546: "fuse",
    0xE0F5E1E2: "erofs",
    0x6969: "nfs",
    0x2FC12FC1: "zfs",
}

_COPY_CHUNK = 8 << 20


def open_beneath(dirfd: int, path: bytes, flags: int = os.O_PATH, mode: int = 0, *, xdev: bool = True) -> int:
    """Open ``path`` relative to ``dirfd`` without leaving it and without following any link.

    Source: openat2(2), RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS; on kernels
    before 5.6 the components are walked one by one with O_NOFOLLOW.

    Raises:
        OSError: ELOOP for a symbolic link on the way, EXDEV for a way out, ENOENT and so on.
    """
    flags |= os.O_CLOEXEC
    how = _OPEN_HOW.pack(flags, mode, _SAFE if xdev else _SAFE | RESOLVE_NO_XDEV)
    while True:
        try:
            return syscall(_OPENAT2, dirfd, path or b".", how, len(how))
        except OSError as error:
            if error.errno == errno.EAGAIN:  # a rename raced with the walk: openat2(2) says retry
                continue
            if error.errno != errno.ENOSYS:
                raise
            return _open_by_components(dirfd, path, flags, mode)


def open_in_root(dirfd: int, path: bytes, flags: int = os.O_PATH) -> int:
    """Open ``path`` as if ``dirfd`` were the root directory: links are followed, and lead nowhere else.

    Source: openat2(2), RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS (Linux 5.6).

    Raises:
        OSError: ENOENT and so on; ENOSYS on an older kernel.
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    while True:
        try:
            return syscall(_OPENAT2, dirfd, path or b"/", how, len(how))
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise


def _open_by_components(dirfd: int, path: bytes, flags: int, mode: int) -> int:
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts or path.startswith(b"/"):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    held = os.open(".", O_PATH_DIR, dir_fd=dirfd)
    try:
        for part in parts[:-1]:
            deeper = os.open(part, O_PATH_DIR, dir_fd=held)
            os.close(held)
            held = deeper
        return os.open(parts[-1] if parts else b".", flags | os.O_NOFOLLOW, mode, dir_fd=held)
    finally:
        os.close(held)


_ACLS = ("system.posix_acl_default", "system.posix_acl_access")


def make_plain(fd: int, mode: int) -> None:
    """Remove the ACLs and the setgid bit that a directory inherited, and would hand on to its entries (acl(5)).

    Args:
        fd: of a directory that belongs to this process's user.
        mode: the permission bits that it gets.

    Raises:
        OSError: this process may not change it.
    """
    for name in _ACLS:
        try:
            os.removexattr(fd, name)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    os.fchmod(fd, mode)


def make_directory(path: str, mode: int = 0o700) -> None:
    """mkdir(2) of a directory with exactly this mode, whatever the umask, and the ACL and setgid bit of its parent.

    Raises:
        OSError: as mkdir(2).
    """
    os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        make_plain(fd, mode)
    finally:
        os.close(fd)


def rename2(src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
    """renameat2(2)."""
    if flags == 0:
        os.rename(src, dst, src_dir_fd=src_fd, dst_dir_fd=dst_fd)
    else:
        check(libc.renameat2(src_fd, src, dst_fd, dst, ctypes.c_uint(flags)), dst)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its mode."""
    check(libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


# utimensat(2), linux/stat.h
_TIMES = struct.Struct("<qqqq")
_UTIME_OMIT = (1 << 30) - 2
_futimens = libc.futimens
_futimens.argtypes = (ctypes.c_int, ctypes.c_char_p)
_NS = 1_000_000_000


def futimens(fd: int, atime: int | None, mtime: int | None) -> None:
    """Set a descriptor's times, in ns since 1970; ``None`` leaves one alone (which os.utime cannot say)."""
    a, b = (0, _UTIME_OMIT) if atime is None else divmod(atime, _NS)
    c, d = (0, _UTIME_OMIT) if mtime is None else divmod(mtime, _NS)
    if _futimens(fd, _TIMES.pack(a, b, c, d)):
        check(-1)


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def begin_writing(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write dirty pages of a range, without waiting for them; a hint that cannot fail.

    Source: sync_file_range(2), SYNC_FILE_RANGE_WRITE. fsync(2) reports errors of writing.
    """
    _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def why_no_room(directory: str, size: int = 1 << 16) -> int:
    """The errno that a new file of ``size`` bytes meets in a directory: ENOSPC, EDQUOT, EROFS, EACCES; 0 where it can be made."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def syncfs(fd: int) -> None:
    """syncfs(2): everything dirty on the file system of ``fd``."""
    check(libc.syncfs(fd))


def reflink(src_fd: int, dst_fd: int) -> bool:
    """Share all extents of ``src_fd`` with ``dst_fd`` (FICLONE); ``False`` where the host cannot."""
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


_NO_CLONE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}
_NO_CFR = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


def data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """The parts of ``[0, size)`` that hold data, as (start, end), by SEEK_DATA and SEEK_HOLE."""
    found: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            if error.errno == errno.EINVAL:  # a file system without holes: all of it is data
                return [(0, size)]
            raise
        if start >= size:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, position))
    return found


def copy_data(src_fd: int, dst_fd: int, size: int, *, stop: Callable[[], bool] | None = None) -> str:
    """Copy the first ``size`` bytes into the empty file ``dst_fd``; holes stay holes.

    Tries FICLONE, then copy_file_range(2), then read and write. ``stop`` is asked between
    chunks of 8 MiB and ends the copy with ECANCELED.

    Returns:
        ``"reflink"``, ``"range"`` or ``"copy"``: the way that worked.
    """
    if size and os.fstat(src_fd).st_size <= size and reflink(src_fd, dst_fd):
        return "reflink"
    way = "range"
    for start, end in data_ranges(src_fd, size):
        while start < end:
            if stop is not None and stop():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            count = min(end - start, _COPY_CHUNK)
            if way == "range":
                try:
                    done = os.copy_file_range(src_fd, dst_fd, count, start, start)
                except OSError as error:
                    if error.errno not in _NO_CFR:
                        raise
                    way = "copy"
                    continue
            else:
                done = _copy_chunk(src_fd, dst_fd, start, count)
            if done == 0:
                break
            start += done
    os.ftruncate(dst_fd, size)
    return way


def _copy_chunk(src_fd: int, dst_fd: int, start: int, count: int) -> int:
    data = memoryview(os.pread(src_fd, min(count, 1 << 20), start))
    done = 0
    while done < len(data):
        done += os.pwrite(dst_fd, data[done:], start + done)
    return done


def cached_pages(fd: int, start: int, end: int) -> int | None:
    """How many pages in the bytes [start, end) the page cache or swap has; ``None`` before Linux 6.5. On tmpfs every page counts.

    Source: mm/filemap.c, cachestat(2).
    """
    span = _CACHESTAT_RANGE.pack(start, end - start)
    counts = ctypes.create_string_buffer(_CACHESTAT.size)
    try:
        syscall(_SYS_CACHESTAT, fd, span, counts, 0)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EBADF):
            return None
        raise
    cached, _dirty, _writeback, evicted, _recently = _CACHESTAT.unpack(counts)
    return int(cached + evicted)


def extents(fd: int, *, sync: bool = False) -> list[tuple[int, int, int]] | None:
    """The allocated extents by FIEMAP: (start, end, flags) in bytes; ``None`` where the file system has no FIEMAP.

    Unless ``sync``, nothing is flushed, and delayed allocations are reported with FIEMAP_EXTENT_DELALLOC.
    Source: Documentation/filesystems/fiemap.rst.
    """
    found: list[tuple[int, int, int]] = []
    room = 256
    position = 0
    while True:
        request = bytearray(_FIEMAP.size + room * _FIEMAP_EXTENT.size)
        _FIEMAP.pack_into(request, 0, position, (1 << 64) - 1 - position, int(sync), 0, room, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                return None
            raise
        mapped = _FIEMAP.unpack_from(request)[3]
        last = mapped == 0
        for index in range(mapped):
            item = _FIEMAP_EXTENT.unpack_from(request, _FIEMAP.size + index * _FIEMAP_EXTENT.size)
            start, _, length, _, _, flags, *_ = item
            found.append((start, start + length, flags))
            position = start + length
            last = bool(flags & FIEMAP_EXTENT_LAST)
        if last:
            return found


# name_to_handle_at(2)
_HANDLE_HEAD = struct.Struct("<Ii")
_MAX_HANDLE = 128


def file_handle(dirfd: int, name: bytes) -> tuple[int, bytes]:
    """(type, opaque bytes) of a name's file handle; ``b""`` is the descriptor itself.

    Raises:
        OSError: EOPNOTSUPP where the file system has no handles.
    """
    buffer = ctypes.create_string_buffer(_HANDLE_HEAD.size + _MAX_HANDLE)
    _HANDLE_HEAD.pack_into(buffer, 0, _MAX_HANDLE, 0)
    mount_id = ctypes.c_int()
    flags = AT_EMPTY_PATH if not name else 0
    check(libc.name_to_handle_at(dirfd, name, buffer, ctypes.byref(mount_id), flags))
    size, kind = _HANDLE_HEAD.unpack_from(buffer)
    return kind, buffer.raw[_HANDLE_HEAD.size : _HANDLE_HEAD.size + size]


def open_handle(mount_fd: int, kind: int, handle: bytes, flags: int = os.O_PATH) -> int:
    """open_by_handle_at(2) on the file system of ``mount_fd``; needs CAP_DAC_READ_SEARCH."""
    buffer = ctypes.create_string_buffer(_HANDLE_HEAD.pack(len(handle), kind) + handle)
    return check(libc.open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC))


def fs_magic(fd: int) -> int:
    """f_type of statfs(2)."""
    buffer = ctypes.create_string_buffer(256)
    check(libc.fstatfs(fd, buffer))
    return int(struct.unpack_from("<q", buffer)[0]) & 0xFFFFFFFF


def fs_name(fd: int) -> str:
    """``"ext4"``, ``"tmpfs"``...; the magic in hexadecimal when it is not a known one."""
    magic = fs_magic(fd)
    return MAGIC.get(magic, hex(magic))


def fs_uuid(fd: int) -> bytes:
    """The file system's uuid as overlayfs stores it in ``origin``; zeros where it has none."""
    buffer = bytearray(17)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buffer)
    except OSError:
        return bytes(16)
    return bytes(buffer[1:17]) if buffer[0] == 16 else bytes(16)
