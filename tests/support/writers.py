"""Changing a file's data in every way there is, as processes with chosen ids and capabilities."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import posix

CAP_DAC_OVERRIDE, CAP_FSETID = 1, 4
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_KEEPCAPS = 8
_V3 = 0x20080522
BLOCK = 4096


def _set_effective(mask: int) -> None:
    """capset(2): the effective and permitted sets of this thread."""
    header = ctypes.create_string_buffer(struct.pack("<Ii", _V3, 0))
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = ctypes.create_string_buffer(struct.pack("<6I", low, low, 0, high, high, 0))
    if _libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _effective() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))


@dataclass(frozen=True)
class Who:
    """Somebody: ids, groups, and whether CAP_FSETID is held (``None``: as it comes with the ids)."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    fsetid: bool | None = None

    def become(self) -> None:
        """Turn this process into them."""
        os.setgroups(self.groups)
        if self.fsetid and self.uid:
            _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)
        if self.fsetid is not None:
            _set_effective(1 << CAP_FSETID if self.uid else _effective() & ~(1 << CAP_FSETID))


def in_child(who: Who, job: Callable[[], None]) -> int:
    """Run ``job`` in a process that is ``who``; the errno of an OSError, 0 when all went well."""
    pid = os.fork()
    if not pid:
        status = 255
        try:
            who.become()
            job()
            status = 0
        except OSError as error:
            status = error.errno or 255
        except BaseException:  # noqa: BLE001 - the parent sees the status, and this is what it means
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def output_of(who: Who, *command: str) -> str:
    """The output of a command, run as ``who``."""
    reader, writer = os.pipe()

    def job() -> None:
        os.dup2(writer, 1)
        os.execv(command[0], command)

    status = in_child(who, job)
    os.close(writer)
    with open(reader, encoding="ascii") as file:
        return f"{status}: {file.read()}"


# -- the ways; each keeps the first ``head`` bytes of the file as they are ------------------------


def _write(fd: int, head: int) -> None:
    os.pwrite(fd, b"x", head + 10)


def _append(fd: int, head: int) -> None:
    os.lseek(fd, 0, os.SEEK_END)
    os.write(fd, b"x" * 5000)


def _writev(fd: int, head: int) -> None:
    os.pwritev(fd, [b"x" * 10, b"y" * 10], head)


def _direct(fd: int, head: int) -> None:
    block = mmap.mmap(-1, BLOCK)
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT)
    os.pwrite(again, block, -(-head // BLOCK) * BLOCK)
    os.close(again)


def _fallocate(mode: int) -> Callable[[int, int], None]:
    def way(fd: int, head: int) -> None:
        posix.fallocate(fd, mode, -(-head // BLOCK) * BLOCK, 2 * BLOCK)

    return way


def _allocate_past_end(fd: int, head: int) -> None:
    posix.fallocate(fd, posix.FALLOC_KEEP_SIZE, os.fstat(fd).st_size, BLOCK)


def _copy_range(fd: int, head: int) -> None:
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.copy_file_range(other, fd, 100, 0, head)
    os.close(other)


def _splice(fd: int, head: int) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x" * 100)
    os.splice(reader, fd, 100, offset_dst=head)


def _sendfile(fd: int, head: int) -> None:
    other = os.open("/proc/self/exe", os.O_RDONLY)
    os.lseek(fd, head, os.SEEK_SET)
    os.sendfile(fd, other, 0, 100)
    os.close(other)


def _map(fd: int, head: int) -> None:
    with mmap.mmap(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), 0) as view:
        view[head + 1] = 66
        view.flush()


def _cut(fd: int, head: int) -> None:
    os.ftruncate(fd, head + BLOCK)


def _extend(fd: int, head: int) -> None:
    os.ftruncate(fd, os.fstat(fd).st_size + 100)


def _same_size(fd: int, head: int) -> None:
    os.ftruncate(fd, os.fstat(fd).st_size)


def _nothing(fd: int, head: int) -> None:
    os.write(fd, b"")


def _chown_nothing(fd: int, head: int) -> None:
    os.fchown(fd, -1, -1)


WAYS: dict[str, Callable[[int, int], None]] = {
    "write": _write,
    "append": _append,
    "writev": _writev,
    "direct": _direct,
    "fallocate": _fallocate(0),
    "allocate past the end": _allocate_past_end,
    "punch": _fallocate(posix.FALLOC_KEEP_SIZE | posix.FALLOC_PUNCH_HOLE),
    "zero": _fallocate(posix.FALLOC_ZERO),
    "copy_file_range": _copy_range,
    "splice": _splice,
    "sendfile": _sendfile,
    "map": _map,
    "cut": _cut,
    "extend": _extend,
    "same size": _same_size,
    "nothing": _nothing,
    "chown nothing": _chown_nothing,
}
"""Each program gets a descriptor open for writing and the number of bytes that must stay."""


def change(way: str, path: Path, head: int, fd: int = -1) -> None:
    """Do it through a descriptor of one's own, unless one was opened before."""
    WAYS[way](os.open(path, os.O_RDWR) if fd < 0 else fd, head)
