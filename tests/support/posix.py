"""System calls that Python's ``os`` lacks, and the vocabulary of the POSIX tests."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
AT_EMPTY_PATH, AT_SYMLINK_FOLLOW = 0x1000, 0x400
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE, FALLOC_ZERO, FALLOC_INSERT = 1, 2, 8, 16, 32
MAX_HANDLE = 128


def _call(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def rename2(old: Any, new: Any, flags: int) -> None:
    """renameat2(2)."""
    _call(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _call(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def link_fd(fd: int, new: Any) -> None:
    """Give the file behind ``fd`` a name (linkat through /proc, as open(2) advises for O_TMPFILE)."""
    _call(_libc.linkat(AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW))


def file_handle(path: Any) -> tuple[int, bytes]:
    """name_to_handle_at(2): (type, handle)."""
    buffer = ctypes.create_string_buffer(8 + MAX_HANDLE)
    struct.pack_into("<Ii", buffer, 0, MAX_HANDLE, 0)
    mount_id = ctypes.c_int()
    _call(_libc.name_to_handle_at(AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(mount_id), 0))
    size, kind = struct.unpack_from("<Ii", buffer, 0)
    return kind, buffer.raw[8 : 8 + size]


def open_handle(mount_fd: int, handle: tuple[int, bytes], flags: int = os.O_RDONLY) -> int:
    """open_by_handle_at(2)."""
    kind, data = handle
    buffer = ctypes.create_string_buffer(struct.pack("<Ii", len(data), kind) + data)
    return _call(_libc.open_by_handle_at(mount_fd, buffer, flags))


class _Dirent(ctypes.Structure):
    _fields_ = [
        ("d_ino", ctypes.c_ulong),
        ("d_off", ctypes.c_long),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    ]


_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.restype = ctypes.POINTER(_Dirent)
_libc.telldir.restype = ctypes.c_long
for _name in ("readdir", "telldir", "seekdir", "rewinddir", "closedir", "dirfd"):
    getattr(_libc, _name).argtypes = [ctypes.c_void_p] + ([ctypes.c_long] if _name == "seekdir" else [])


class DirStream:
    """A DIR*: readdir, telldir, seekdir, rewinddir."""

    def __init__(self, path: Any) -> None:
        self._dir = _libc.opendir(os.fsencode(path))
        if not self._dir:
            raise OSError(ctypes.get_errno(), "opendir")

    def read(self) -> str | None:
        found = _libc.readdir(self._dir)
        return os.fsdecode(found.contents.d_name) if found else None

    def read_full(self) -> tuple[str, int, int] | None:
        """(name, inode number, type) of the next entry."""
        found = _libc.readdir(self._dir)
        if not found:
            return None
        return os.fsdecode(found.contents.d_name), found.contents.d_ino, found.contents.d_type

    def tell(self) -> int:
        return int(_libc.telldir(self._dir))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._dir, position)

    def rewind(self) -> None:
        _libc.rewinddir(self._dir)

    def close(self) -> None:
        _libc.closedir(self._dir)


NAMES_OF_ERRORS = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EAGAIN: "EAGAIN"}
"""One name for each number, the one that manual pages use."""


def error_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Name of the errno with which the call fails, '' when it does not."""
    try:
        call(*args, **kwargs)
    except OSError as error:
        return NAMES_OF_ERRORS.get(error.errno or 0, str(error.errno))
    return ""


def fails(code: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Assert that the call fails with exactly this errno."""
    expected = NAMES_OF_ERRORS[code]
    actual = error_of(call, *args, **kwargs)
    assert actual == expected, (
        f"{getattr(call, '__name__', call)}{args}: expected {expected}, got {actual or 'success'}"
    )


def kind_of(path: Any) -> int:
    return stat.S_IFMT(os.lstat(path).st_mode)


def mode_of(path: Any) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def tick() -> None:
    """Let the clock that stamps files move on (a jiffy at 100 Hz is 10 ms)."""
    time.sleep(0.021)


def touched(path: Any, change: Callable[[], Any]) -> set[str]:
    """Which of 'mtime' and 'ctime' of ``path`` the change moved; neither may go backwards."""
    before = os.lstat(path)
    tick()
    change()
    after = os.lstat(path)
    assert after.st_ctime_ns >= before.st_ctime_ns, "ctime went backwards"
    out = set()
    if after.st_mtime_ns != before.st_mtime_ns:
        out.add("mtime")
    if after.st_ctime_ns != before.st_ctime_ns:
        out.add("ctime")
    return out


def make(kind: str, path: Any) -> None:
    """Create an object of ``kind`` at ``path``: file, dir, symlink, fifo, socket, char, block."""
    path = os.fspath(path)
    if kind == "file":
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    elif kind == "dir":
        os.mkdir(path)
    elif kind == "symlink":
        os.symlink("nowhere", path)
    else:
        bits = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "char": stat.S_IFCHR, "block": stat.S_IFBLK}[kind]
        os.mknod(path, bits | 0o644, os.makedev(1, 7) if kind in ("char", "block") else 0)


KINDS = ("file", "dir", "symlink", "fifo", "socket", "char", "block")
"""Everything that has a name."""


def make_all(directory: Any) -> None:
    """One object of each kind, named after it."""
    for kind in KINDS:
        make(kind, os.path.join(os.fspath(directory), kind))


def write(path: Any, data: bytes = b"data") -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(data)


def read(path: Any) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def tree(build: Callable[..., Any]) -> pytest.MarkDecorator:
    """Mark a test with what its directory holds at the start; it then runs on lower and on upper files."""
    return pytest.mark.tree.with_args(build)
