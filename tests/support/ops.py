"""Random operations with comparable results.

An operation is a tuple of plain data, ``("rename", "a/b", "c")``. ``Actor.do`` carries one out
below a root directory and returns what two trees that behave alike must both return: a value, or
the name of the errno. Anything that legitimately differs between two filesystems (inode numbers,
the very nanosecond of a change, directory sizes) is left out here, and here only.

Slots: descriptors stay open in numbered slots, so that files live on unlinked; a slot that is
empty makes the operation fail alike on both sides.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
from collections.abc import Callable
from typing import Any

from . import posix
from .users import acting_as

SLOTS = 4
Op = tuple[Any, ...]


def _fill(length: int, seed: int) -> bytes:
    """Bytes that tell where they came from."""
    unit = bytes((seed * 37 + i * 11 + 1) % 255 + 1 for i in range(61))
    return (unit * (length // 61 + 1))[:length]


class Actor:
    """Carries out operations below ``root``.

    ``started``: times before it (ns) are compared exactly. ``counts``: link counts are compared.
    """

    def __init__(self, root: str, started: int, counts: bool = True) -> None:
        self.root = root
        self.started = started
        self.counts = counts
        self.slots: dict[int, int] = {}
        self.numbers: dict[str, int] = {}

    def at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def do(self, op: Op, as_user: bool = False) -> Any:
        """The operation's value, or ``"!" + name of errno``."""
        method: Callable[..., Any] = getattr(self, "op_" + op[0])
        try:
            if as_user and op[0] != "rmtree":  # what it removes before it is refused depends on the listing's order
                with acting_as():
                    return method(*op[1:])
            return method(*op[1:])
        except OSError as error:
            return "!" + posix.NAMES_OF_ERRORS.get(error.errno or 0, str(error.errno))
        except shutil.Error as error:
            return "!" + str(error)

    def close(self) -> None:
        for fd in self.slots.values():
            os.close(fd)
        self.slots.clear()

    # -- what is compared of a stat -----------------------------------------------------

    def shown(self, status: os.stat_result) -> tuple[Any, ...]:
        directory = stat.S_ISDIR(status.st_mode)
        return (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            None if directory else status.st_size,
            None if directory or not self.counts else status.st_nlink,
            status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
            status.st_mtime_ns if status.st_mtime_ns < self.started else "now",
        )

    def _fd(self, slot: int) -> int:
        if slot not in self.slots:
            raise OSError(errno.EBADF, "no such slot")
        return self.slots[slot]

    # -- by path ------------------------------------------------------------------------

    def op_mkdir(self, path: str, mode: int) -> Any:
        os.mkdir(self.at(path), mode)

    def op_create(self, path: str, mode: int) -> Any:
        os.close(os.open(self.at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

    def op_symlink(self, target: str, path: str) -> Any:
        os.symlink(target, self.at(path))

    def op_mknod(self, path: str, kind: str) -> Any:
        posix.make(kind, self.at(path))

    def op_link(self, path: str, other: str) -> Any:
        os.link(self.at(path), self.at(other), follow_symlinks=False)

    def op_unlink(self, path: str) -> Any:
        os.unlink(self.at(path))

    def op_rmdir(self, path: str) -> Any:
        os.rmdir(self.at(path))

    def op_rmtree(self, path: str) -> Any:
        if path and stat.S_ISDIR(os.lstat(self.at(path)).st_mode):  # rmtree opens what it is given: a FIFO would block
            shutil.rmtree(self.at(path))

    def op_rename(self, path: str, other: str) -> Any:
        os.rename(self.at(path), self.at(other))

    def op_rename2(self, path: str, other: str, flags: int) -> Any:
        posix.rename2(self.at(path), self.at(other), flags)

    def op_stat(self, path: str) -> Any:
        return self.shown(os.lstat(self.at(path)))

    def op_follow(self, path: str) -> Any:
        return self.shown(os.stat(self.at(path)))

    def op_list(self, path: str) -> Any:
        with os.scandir(self.at(path)) as entries:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries)

    def op_readlink(self, path: str) -> Any:
        return os.readlink(self.at(path))

    def op_read(self, path: str, offset: int, length: int) -> Any:
        fd = os.open(self.at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def op_write(self, path: str, flags: int, offset: int, length: int, seed: int) -> Any:
        fd = os.open(self.at(path), os.O_WRONLY | os.O_NONBLOCK | flags, 0o644)
        try:
            return os.pwrite(fd, _fill(length, seed), offset)
        finally:
            os.close(fd)

    def op_truncate(self, path: str, size: int) -> Any:
        before = os.stat(self.at(path)).st_size
        os.truncate(self.at(path), size)
        if size == before:  # tmpfs then keeps mtime, and only with truncate(2); POSIX allows both
            os.utime(self.at(path))

    def op_chmod(self, path: str, mode: int) -> Any:
        os.chmod(self.at(path), mode)

    def op_chown(self, path: str, uid: int, gid: int) -> Any:
        os.chown(self.at(path), uid, gid, follow_symlinks=False)

    def op_utime(self, path: str, when: int) -> Any:
        os.utime(self.at(path), ns=(when, when), follow_symlinks=False)

    def op_access(self, path: str, mask: int) -> Any:
        return os.access(self.at(path), mask, effective_ids=True)

    def op_setxattr(self, path: str, name: str, length: int, seed: int, flags: int) -> Any:
        os.setxattr(self.at(path), name, _fill(length, seed), flags, follow_symlinks=False)

    def op_getxattr(self, path: str, name: str) -> Any:
        return os.getxattr(self.at(path), name, follow_symlinks=False)

    def op_listxattr(self, path: str) -> Any:
        return sorted(os.listxattr(self.at(path), follow_symlinks=False))

    def op_removexattr(self, path: str, name: str) -> Any:
        os.removexattr(self.at(path), name, follow_symlinks=False)

    def op_copy_range(self, path: str, other: str, source: int, target: int, length: int) -> Any:
        one = os.open(self.at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            two = os.open(self.at(other), os.O_WRONLY | os.O_NONBLOCK)
            try:
                return os.copy_file_range(one, two, length, source, target)
            finally:
                os.close(two)
        finally:
            os.close(one)

    def op_map_store(self, path: str, offset: int, length: int, seed: int) -> Any:
        """Store through a shared map and let the map go without msync."""
        fd = os.open(self.at(path), os.O_RDWR | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                return "nothing to map"
            data = _fill(length, seed)[: max(0, status.st_size - offset)]
            with mmap.mmap(fd, status.st_size) as view:
                before = view[offset : offset + 16]
                view[offset : offset + len(data)] = data
            os.utime(fd)  # stores through a map do not move tmpfs's mtime; POSIX leaves open when they do
            return before
        finally:
            os.close(fd)

    def op_tmpfile(self, path: str, other: str, length: int) -> Any:
        fd = os.open(self.at(path), os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            os.write(fd, _fill(length, 7))
            posix.link_fd(fd, self.at(other))
        finally:
            os.close(fd)

    # -- by descriptor ------------------------------------------------------------------

    def op_open(self, slot: int, path: str, flags: int) -> Any:
        if flags & os.O_CREAT and os.path.islink(self.at(path)):
            flags &= ~os.O_CREAT  # a link may lead out of the tree: nothing is to be made there
        fd = os.open(self.at(path), flags | os.O_NONBLOCK, 0o644)
        self.op_close(slot, quiet=True)
        self.slots[slot] = fd

    def op_close(self, slot: int, quiet: bool = False) -> Any:
        if slot in self.slots:
            os.close(self.slots.pop(slot))
        elif not quiet:
            raise OSError(errno.EBADF, "no such slot")

    def op_fread(self, slot: int, offset: int, length: int) -> Any:
        return os.pread(self._fd(slot), length, offset)

    def op_fwrite(self, slot: int, offset: int, length: int, seed: int) -> Any:
        return os.pwrite(self._fd(slot), _fill(length, seed), offset)

    def op_fstat(self, slot: int) -> Any:
        return self.shown(os.fstat(self._fd(slot)))

    def op_ftruncate(self, slot: int, size: int) -> Any:
        os.ftruncate(self._fd(slot), size)

    def op_fchmod(self, slot: int, mode: int) -> Any:
        os.fchmod(self._fd(slot), mode)

    def op_fchown(self, slot: int, uid: int, gid: int) -> Any:
        os.fchown(self._fd(slot), uid, gid)

    def op_fallocate(self, slot: int, mode: int, offset: int, length: int) -> Any:
        posix.fallocate(self._fd(slot), mode, offset, length)

    def op_fsetxattr(self, slot: int, name: str, length: int, seed: int) -> Any:
        os.setxattr(self._fd(slot), name, _fill(length, seed))

    def op_flist(self, slot: int) -> Any:
        return sorted(os.listdir(self._fd(slot)))

    def op_flink(self, slot: int, path: str) -> Any:
        posix.link_fd(self._fd(slot), self.at(path))

    def op_fsync(self, slot: int) -> Any:
        os.fsync(self._fd(slot))
