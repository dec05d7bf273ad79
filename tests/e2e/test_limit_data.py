"""Data at the limit: random operations that reach it, against bytes in memory.

Every way in which data gets into a file (write, O_DIRECT, append, shared maps, every mode of fallocate, copy_file_range,
splice, sparse and then filled, truncated up and down), with parallel writers, SIGKILL and remount in the middle, a limit
below the use, redirect files, live snapshots and squash. After each: the content is what was taken; the use never passes
the limit; it is what a walk finds; and the host holds no more than that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import hostfs, layers, limits
from support.known_files import LIMIT, UNIT, Files, kill

import cowfs
from cowfs.format.whiteout import choose_form
from cowfs.union.layers import Descriptors, Layer
from cowfs.union.measure import measure


def settled(handle: Any, expected: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """The use, once the kernel has said what it forgot."""
    end = time.monotonic() + 10
    while True:
        usage = handle.usage()
        found = usage.bytes, usage.inodes
        if found == expected() or time.monotonic() > end:
            return found
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 4096, 65536], ids=["plain", "row", "row 64K"])
def test_random_data_at_the_limit(fs: hostfs.HostFs, row: int, request: pytest.FixtureRequest) -> None:
    base = fs.fresh("data")
    lower = layers.Layer(base / "lower")
    for number in range(4):
        lower.file(f"f{number}", bytes([65 + number]) * (number * 11 * UNIT // 2 + 100))
    seed = request.config.getoption("--seed") + row
    options: dict[str, Any] = {"upper": base / "upper", "work": base / "work"} | ({"row": row} if row else {})
    target = base / "mnt"
    target.mkdir()
    files = Files(lambda: target, seed)
    for number in range(4):
        files.data[f"f{number}"] = bytearray((lower.path / f"f{number}").read_bytes())
    size, steps = LIMIT, max(1, request.config.getoption("--steps") // 40)
    handle = cowfs.mount([str(lower.path)], str(target), size=size, **options)
    try:
        for number in range(steps):
            files.step()
            usage = handle.usage()
            assert usage.bytes <= size, f"{usage} passes {size} after {files.log[-3:]}"
            if number % 40 == 39:
                files.compare()
                handle = again(files, handle, lower, target, size, options, kill_it=number % 80 == 79)
            elif number % 40 == 20:
                handle.limit(size=8 * UNIT)  # below the use
                for _ in range(3):
                    before = handle.usage().bytes
                    files.step()
                    assert handle.usage().bytes <= max(before, 8 * UNIT), files.log[-1]
                handle.limit(size=size)
                if handle.usage().bytes > size:
                    raise AssertionError("more than before")
        files.compare()
        assert files.full > steps // 20, "the limit was hardly ever reached"
    finally:
        with contextlib.suppress(Exception):
            cowfs.umount(str(target))
        shutil.rmtree(base, ignore_errors=True)


def walk(upper: Path) -> tuple[int, int]:
    """The use found by a walk: on tmpfs by an independent one, elsewhere (where SEEK_DATA does not show reserved room)
    by cowfs's own."""
    if limits.host_of(str(upper)) == "tmpfs":
        return limits.measure(upper, allocated=True)
    layer = Layer(os.fsencode(upper), 0, Descriptors())
    try:
        usage = measure(layer, choose_form())
    finally:
        layer.close()
    return usage.bytes, usage.inodes


def again(
    files: Files, handle: Any, lower: Any, target: Path, size: int, options: dict[str, Any], *, kill_it: bool
) -> Any:
    """Unmount or kill, and mount again: the same files, the same use, and as much as a walk finds."""
    upper = options["upper"]
    os.sync()
    used = settled(handle, lambda: walk(upper))
    walked = walk(upper)
    assert used == walked, f"the mount counts {used}, a walk {walked}; {files.log[-45:]}"
    if kill_it:
        kill(handle, target)
    else:
        cowfs.umount(str(target))
    handle = cowfs.mount([str(lower.path)], str(target), size=size, **options)
    usage = handle.usage()
    assert (usage.bytes, usage.inodes) == used, f"{usage} after a remount, {used} before; {files.log[-45:]}"
    files.compare()
    return handle


class Writers:
    """Threads that write, truncate, replace and delete files of their own, and keep what these are."""

    def __init__(self, top: Path, count: int, steps: int, seed: int) -> None:
        self.top, self.steps = top, steps
        self.failed: list[str] = []
        self.full = 0
        self.threads = [threading.Thread(target=self.run, args=(number, seed + number)) for number in range(count)]

    def run(self, number: int, seed: int) -> None:
        own = self.top / f"w{number}"
        files = Files(lambda: own, seed)
        try:
            while True:
                try:
                    own.mkdir(exist_ok=True)
                    break
                except OSError as error:
                    assert error.errno == errno.ENOSPC, error
                    time.sleep(0.01)
            for step in range(self.steps):
                files.step()
                if step % 25 == 24:
                    files.compare()
            files.compare()
            self.full += files.full
        except BaseException as error:  # noqa: BLE001 - told by the test
            self.failed.append(f"writer {number}: {error!r}")
        for name in list(files.data):
            os.unlink(own / name)


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 4096], ids=["plain", "row"])
def test_64_parallel_writers_at_the_limit(fs: hostfs.HostFs, row: int, request: pytest.FixtureRequest) -> None:
    base = fs.fresh("writers")
    lower = layers.Layer(base / "lower")
    more: dict[str, Any] = {"row": row} if row else {}
    size = 6 * LIMIT
    (base / "mnt").mkdir()
    steps = max(10, request.config.getoption("--steps") // 800)
    with cowfs.mount(
        [str(lower.path)], str(base / "mnt"), upper=base / "upper", work=base / "work", size=size, **more
    ) as handle:
        writers = Writers(base / "mnt", 64, steps, request.config.getoption("--seed"))
        for thread in writers.threads:
            thread.start()
        while any(thread.is_alive() for thread in writers.threads):
            assert handle.usage().bytes <= size
            time.sleep(0.05)
        assert writers.failed == []
        assert writers.full > 0, "the limit was never reached"
        os.sync()
        used = settled(handle, lambda: walk(base / "upper"))
        assert used == walk(base / "upper")
        assert used[0] <= 65 * 2 * UNIT + 8 * UNIT, "all files are gone"
    shutil.rmtree(base)
