"""Files whose content is known: every way in which data gets into a file, drawn at random, with the bytes kept beside it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cowfs
from support import limits, posix

UNIT = limits.UNIT
LIMIT = 96 * UNIT
NAMES = 7
SIZE = 40 * UNIT
KEEP, PUNCH, ZERO = 1, 2, 16


class Files:
    """The files as bytes in memory, kept beside the mount by the result of each operation."""

    def __init__(self, where: Callable[[], Path], seed: int) -> None:
        self.where = where
        self.random = random.Random(seed)
        self.data: dict[str, bytearray] = {}
        self.log: list[Any] = []
        self.full = 0
        self.lost: set[str] = set()  # the kernel tells the next O_DIRECT what a map lost

    # -- operations; each returns what it did ------------------------------------------------------

    def place(self) -> tuple[int, int]:
        r = self.random
        offset = r.choice((0, r.randrange(SIZE), r.randrange(SIZE) // UNIT * UNIT))
        length = r.choice((1, r.randrange(1, 3 * UNIT), UNIT, r.randrange(1, 12) * UNIT, 20 * UNIT))
        self.log[-1] += (offset, length)
        return offset, length

    def filled(self, length: int) -> bytes:
        return bytes([self.random.randrange(1, 256)]) * length

    def stored(self, name: str, offset: int, data: bytes) -> None:
        file = self.data[name]
        if data and len(file) < offset + len(data):
            file.extend(bytes(offset + len(data) - len(file)))
        file[offset : offset + len(data)] = data

    def write(self, name: str) -> None:
        offset, length = self.place()
        data = self.filled(length)
        with opened(self.where() / name) as fd:
            self.stored(name, offset, data[: os.pwrite(fd, data, offset)])

    def append(self, name: str) -> None:
        data = self.filled(self.place()[1])
        with opened(self.where() / name, os.O_APPEND) as fd:
            if len(self.data[name]) + len(data) <= 2 * SIZE:
                self.stored(name, len(self.data[name]), data[: os.write(fd, data)])

    def direct(self, name: str) -> None:
        offset, length = self.place()
        offset, length = offset // UNIT * UNIT, -(-length // UNIT) * UNIT
        with opened(self.where() / name, os.O_DIRECT) as fd, mmap.mmap(-1, length) as buffer:
            buffer[:] = self.filled(length)
            self.stored(name, offset, bytes(buffer[: os.pwrite(fd, buffer, offset)]))

    def map(self, name: str) -> None:
        """A store through a map that cannot be written back is lost, wholly or in part: any page may be old or new."""
        size = len(self.data[name])
        if not size:
            return
        offset, length = self.place()
        offset = min(offset, size - 1)
        data = self.filled(min(length, size - offset))
        before = bytes(self.data[name])
        failed = False
        with opened(self.where() / name) as fd:
            view = mmap.mmap(fd, size)
            view[offset : offset + len(data)] = data
            for flush in (view.flush, lambda: os.fsync(fd)):
                try:
                    flush()
                except OSError as error:
                    assert error.errno in (errno.ENOSPC, errno.EIO), error
                    failed = True
            view.close()
        self.stored(name, offset, data)
        if failed:
            self.full += 1
            self.lost.add(name)
            drop_pages(self.where() / name)
            now = (self.where() / name).read_bytes()
            after = bytes(self.data[name])
            assert len(now) == size
            for at in range(0, size, UNIT):
                page = now[at : at + UNIT]
                assert page in (before[at : at + UNIT], after[at : at + UNIT]), (
                    f"{name}: the page at {at} is neither old nor new"
                )
            self.data[name] = bytearray(now)

    def fallocate(self, name: str) -> None:
        offset, length = self.place()
        mode = self.random.choice((0, KEEP, KEEP | PUNCH, ZERO, ZERO | KEEP))
        self.log[-1] += (mode,)
        with opened(self.where() / name) as fd:
            try:
                posix.fallocate(fd, mode, offset, length)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    return
                raise
        file, end = self.data[name], offset + length
        if not mode & KEEP and end > len(file):
            file.extend(bytes(end - len(file)))
        if mode & (PUNCH | ZERO):
            end = min(end, len(file))
            file[offset:end] = bytes(max(0, end - offset))

    def copy_range(self, name: str) -> None:
        other = self.random.choice([n for n in self.data if n != name] or [""])
        if not other:
            return
        offset, length = self.place()
        start = self.random.randrange(len(self.data[other]) + 1)
        with opened(self.where() / other) as source, opened(self.where() / name) as fd:
            done = os.copy_file_range(source, fd, length, start, offset)
        self.stored(name, offset, bytes(self.data[other][start : start + done]))

    def splice(self, name: str) -> None:
        offset = self.place()[0]
        data = self.filled(self.random.randrange(1, 12 * UNIT))
        reading, writing = os.pipe()
        try:
            os.write(writing, data)
            with opened(self.where() / name) as fd:
                self.stored(name, offset, data[: os.splice(reading, fd, len(data), offset_dst=offset)])
        finally:
            os.close(reading)
            os.close(writing)

    def truncate(self, name: str) -> None:
        size = self.random.choice((0, self.random.randrange(SIZE), 2 * SIZE))
        os.truncate(self.where() / name, size)
        file = self.data[name]
        del file[size:]
        file.extend(bytes(size - len(file)))

    def sparse_then_filled(self, name: str) -> None:
        os.truncate(self.where() / name, 0)
        self.data[name] = bytearray()
        os.truncate(self.where() / name, SIZE)
        self.data[name] = bytearray(SIZE)
        with opened(self.where() / name) as fd:
            for offset in self.random.sample(range(0, SIZE, UNIT), 12):
                data = self.filled(UNIT)
                self.stored(name, offset, data[: os.pwrite(fd, data, offset)])

    def replace(self, name: str) -> None:
        """As editors do."""
        data = self.filled(self.random.randrange(1, 6 * UNIT))
        temp = self.where() / ".new"
        try:
            with opened(temp, os.O_CREAT | os.O_TRUNC) as fd:
                data = data[: os.write(fd, data)]
            os.rename(temp, self.where() / name)
        except OSError:
            temp.unlink(missing_ok=True)
            raise
        self.data[name] = bytearray(data)

    def unlink(self, name: str) -> None:
        os.unlink(self.where() / name)
        del self.data[name]

    STEPS = (
        write,
        write,
        write,
        append,
        direct,
        map,
        fallocate,
        fallocate,
        copy_range,
        splice,
        truncate,
        sparse_then_filled,
        replace,
        unlink,
    )

    def step(self) -> None:
        name = f"f{self.random.randrange(NAMES)}"
        if name not in self.data:
            try:
                (self.where() / name).touch()
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                self.full += 1
                return
            self.data[name] = bytearray()
        function = self.random.choice(self.STEPS)
        self.log.append((function.__name__, name, len(self.data[name])))
        try:
            function(self, name)
        except OSError as error:
            told = error.errno == errno.EIO and function is Files.direct and name in self.lost
            assert told or error.errno == errno.ENOSPC, f"{error!r} after {self.log[-5:]}"
            self.full += 1
            self.log[-1] += ("ENOSPC",)

    def compare(self) -> None:
        for name, data in self.data.items():
            found = (self.where() / name).read_bytes()
            if found != bytes(data):
                at = next(
                    (i for i, (a, b) in enumerate(zip(found, data, strict=False)) if a != b), min(len(found), len(data))
                )
                raise AssertionError(
                    f"{name}: {len(found)} bytes, wanted {len(data)}, other from {at}; {self.log[-8:]}"
                )
        assert sorted(os.listdir(self.where())) == sorted(self.data)


@contextlib.contextmanager
def opened(path: Path, flags: int = 0) -> Any:
    fd = os.open(path, os.O_RDWR | flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def drop_pages(path: Path) -> None:
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def kill(handle: Any, target: Path) -> None:
    os.kill(handle.pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while posix.error_of(os.statvfs, target) != "ENOTCONN" and time.monotonic() < end:
        time.sleep(0.01)
    cowfs.umount(str(target))
