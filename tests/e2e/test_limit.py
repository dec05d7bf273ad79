"""The size limit holds: for every operation, on every host filesystem, for root and for a user.

Counted twice: what the mount says (``usage()``, statfs) against ``support.limits.measure``, an
independent scan of the upper.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from support import hostfs, layers, limits, mounts, posix, stacks, trees, users
from support.equality import Equality, Failure, Run, concrete, existing, run_machine
from support.posix import fails, read, write

MIB = 1 << 20
UNIT = limits.UNIT


def lower_with(base: Path, **files: bytes) -> layers.Layer:
    layer = layers.Layer(base / "lower")
    for name, data in files.items():
        layer.file(name, data)
    return layer


def settled_usage(handle: Any, expected: Callable[[], tuple[int, int]], seconds: float = 5.0) -> tuple[int, int]:
    """Usage once forgotten files are given back: polled until it is what is expected, or time is up."""
    end = time.monotonic() + seconds
    while True:
        usage = handle.usage()
        if (usage.bytes, usage.inodes) == expected() or time.monotonic() > end:
            return usage.bytes, usage.inodes
        time.sleep(0.02)


def fill(path: Path, block: int = 65536) -> int:
    """Write until ENOSPC; returns the bytes that were taken."""
    total = 0
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    try:
        while True:
            total += os.write(fd, b"\xa5" * block)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        os.close(fd)
    return total


def test_the_space_of_a_removed_file_is_there_at_once(space: Path) -> None:
    """As the limit sees it, as df sees it and as usage() sees it, each time."""
    with mounts.mounted("kernel", [lower_with(space, old=b"x")], space, size=2 * MIB, inodes=3) as m:
        for turn in range(60):
            with open(m.path / "big", "wb", buffering=0) as file:
                assert file.write(bytes(2 * MIB)) == 2 * MIB
            os.unlink(m.path / "big")
            if turn % 3 == 1:
                assert os.statvfs(m.path).f_bavail * UNIT == 2 * MIB
            elif turn % 3 == 2:
                assert (m.handle.usage().bytes, m.handle.usage().inodes) == (0, 0)


def test_dd_gets_enospc_at_the_limit_within_a_block(fs: hostfs.HostFs) -> None:
    """64 MiB: dd is stopped there, df shows it full, the scan agrees, du too on tmpfs."""
    base = fs.fresh("dd")
    lower = lower_with(base, old=b"x" * 10_000)
    with mounts.mounted("kernel", [lower], base, size=64 * MIB) as m:
        before = os.statvfs(m.path)
        assert before.f_blocks * before.f_frsize == 64 * MIB
        assert before.f_bavail * before.f_frsize == 64 * MIB
        done = subprocess.run(
            ["dd", "if=/dev/zero", f"of={m.path}/big", "bs=1M", "count=100"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert "No space left on device" in done.stderr
        assert os.stat(m.path / "big").st_size == 64 * MIB
        after = os.statvfs(m.path)
        assert after.f_bavail == 0
        assert m.handle.usage().bytes == 64 * MIB
        assert limits.measure(m.changes) == (64 * MIB, 1)
        if fs.name == "tmpfs":
            assert limits.disk_usage(m.changes) == 64 * MIB
        assert read(m.path / "old") == b"x" * 10_000
        os.unlink(m.path / "big")
        assert settled_usage(m.handle, lambda: (0, 0)) == (0, 0)
        assert os.statvfs(m.path).f_bavail * after.f_frsize == 64 * MIB
    shutil.rmtree(base)


def test_df_agrees_with_a_scan_throughout(fs: hostfs.HostFs) -> None:
    base = fs.fresh("df")
    lower = lower_with(base, a=b"a" * 50_000, b=b"b" * 5_000, c=b"c" * 100)
    (lower.path / "dir").mkdir()
    write(lower.path / "dir" / "d", b"d" * 30_000)
    with mounts.mounted("kernel", [lower], base, size=8 * MIB) as m:
        p = m.path
        steps: list[Callable[[], Any]] = [
            lambda: write(p / "new", b"n" * 100_000),
            lambda: os.mkdir(p / "sub"),
            lambda: write(p / "a", b"A" * 10),
            lambda: os.chmod(p / "b", 0o600),
            lambda: os.truncate(p / "new", 5000),
            lambda: os.truncate(p / "new", 3_000_000),
            lambda: os.setxattr(p / "new", "user.big", b"v" * 2000),
            lambda: os.link(p / "new", p / "newer"),
            lambda: os.unlink(p / "new"),
            lambda: os.rename(p / "dir", p / "sub" / "dir"),
            lambda: write(p / "sub" / "dir" / "d", b"short"),
            lambda: os.unlink(p / "c"),
            lambda: os.symlink("x", p / "c"),
            lambda: os.removexattr(p / "newer", "user.big"),
            lambda: os.unlink(p / "newer"),
            lambda: shutil.rmtree(p / "sub"),
        ]
        for number, step in enumerate(steps):
            step()
            expected = limits.measure(m.changes)
            assert settled_usage(m.handle, lambda: limits.measure(m.changes)) == expected, f"after step {number}"
            status = os.statvfs(p)
            assert (status.f_blocks - status.f_bfree) * status.f_frsize == expected[0], f"after step {number}"
    shutil.rmtree(base)


def test_a_write_that_fits_in_part_is_short_then_enospc(space: Path) -> None:
    with mounts.mounted("kernel", [lower_with(space)], space, size=10 * UNIT) as m:
        fd = os.open(m.path / "f", os.O_CREAT | os.O_WRONLY)
        assert os.write(fd, b"x" * 15 * UNIT) == 10 * UNIT
        fails(errno.ENOSPC, os.write, fd, b"x")
        assert os.pwrite(fd, b"yyy", 100) == 3, "what is allocated can be overwritten"
        os.close(fd)
        assert read(m.path / "f") == b"x" * 100 + b"yyy" + b"x" * (10 * UNIT - 103)


def full_mount(stack: ExitStack, space: Path, **more: Any) -> mounts.Mounted:
    """A mount with every byte used, over a layer with something of everything."""
    lower = lower_with(space, small=b"s" * 100, big=b"b" * 20_000, empty=b"")
    lower.dir("dir").file("dir/in", b"i" * 5000).link("small", "twin")
    options: dict[str, Any] = {"size": 4 * MIB} | more
    m = stack.enter_context(mounts.mounted("kernel", [lower], space, **options))
    write(m.path / "own", b"o" * 4096)
    os.mkdir(m.path / "owndir")
    fill(m.path / "filler")
    return m


BEYOND: dict[str, Callable[[Path], Any]] = {
    "mkdir": lambda p: os.mkdir(p / "new"),
    "write": lambda p: os.pwrite(os.open(p / "own", os.O_WRONLY), b"x", 4096),
    "copy-up-by-write": lambda p: os.pwrite(os.open(p / "big", os.O_WRONLY), b"x", 0),
    "copy-up-by-truncate": lambda p: os.truncate(p / "big", 8192),
    "copy-up-of-a-parent": lambda p: os.chmod(p / "dir" / "in", 0o600),
    "xattr": lambda p: os.setxattr(p / "own", "user.x", b"v" * 3000),
    "fallocate": lambda p: posix.fallocate(os.open(p / "own", os.O_WRONLY), 0, 0, 100_000),
    "fallocate-keep-size": lambda p: posix.fallocate(os.open(p / "own", os.O_WRONLY), 1, 0, 100_000),
    "copy_file_range": lambda p: os.copy_file_range(os.open(p / "big", os.O_RDONLY), os.open(p / "own", os.O_WRONLY), 8192, 0, 4096),
    "rename-of-a-lower-directory": lambda p: os.rename(p / "dir", p / "elsewhere"),
    "create-in-a-lower-directory": lambda p: write(p / "dir" / "new", b""),
}  # fmt: skip


@pytest.mark.parametrize("what", BEYOND)
def test_what_would_pass_the_limit_is_enospc_and_changes_nothing(space: Path, what: str) -> None:
    with ExitStack() as stack:
        m = full_mount(stack, space)
        before = trees.snapshot(m.path)
        used = m.handle.usage()
        fails(errno.ENOSPC, BEYOND[what], m.path)
        trees.assert_same(before, trees.snapshot(m.path))
        assert m.handle.usage() == used
        for fd in range(3, 200):  # what the table opened
            try:
                if os.readlink(f"/proc/self/fd/{fd}").startswith(str(m.path)):
                    os.close(fd)
            except OSError:
                continue


INODES_BEYOND: dict[str, Callable[[Path], Any]] = {
    "create": lambda p: write(p / "new", b""),
    "mkdir": lambda p: os.mkdir(p / "new"),
    "symlink": lambda p: os.symlink("x", p / "new"),
    "mkfifo": lambda p: os.mkfifo(p / "new"),
    "copy-up-by-write": lambda p: write(p / "big", b""),
    "copy-up-by-chmod": lambda p: os.chmod(p / "empty", 0o600),
    "copy-up-by-link": lambda p: os.link(p / "empty", p / "new"),
    "copy-up-by-rename": lambda p: os.rename(p / "empty", p / "new"),
    "rename-of-a-lower-directory": lambda p: os.rename(p / "dir", p / "new"),
}


@pytest.mark.parametrize("what", INODES_BEYOND)
def test_the_inode_limit_stops_what_makes_one(space: Path, what: str) -> None:
    with ExitStack() as stack:
        m = full_mount(stack, space, inodes=3)
        status = os.statvfs(m.path)
        assert (status.f_files, status.f_ffree) == (3, 0)
        before = trees.snapshot(m.path)
        fails(errno.ENOSPC, INODES_BEYOND[what], m.path)
        trees.assert_same(before, trees.snapshot(m.path))
        os.link(m.path / "own", m.path / "another name")  # no new inode


def test_deleting_truncating_and_reading_always_work_at_the_limit(space: Path) -> None:
    with ExitStack() as stack:
        m = full_mount(stack, space, inodes=3)
        p = m.path
        assert len(read(p / "big")) == 20_000
        os.unlink(p / "big")
        os.unlink(p / "dir" / "in")
        os.rmdir(p / "dir")
        os.unlink(p / "twin")
        assert os.stat(p / "small").st_nlink in (1, 2)
        os.truncate(p / "filler", 100)
        os.truncate(p / "own", 0)
        os.rmdir(p / "owndir")
        os.mkdir(p / "again")
        assert m.handle.usage().bytes == 2 * UNIT
        assert sorted(os.listdir(p)) == ["again", "empty", "filler", "own", "small"]


def test_space_of_a_deleted_open_file_comes_back_when_it_is_closed(space: Path) -> None:
    with mounts.mounted("kernel", [lower_with(space)], space, size=1 * MIB) as m:
        fd = os.open(m.path / "f", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"x" * 900_000)
        os.unlink(m.path / "f")
        assert m.handle.usage().bytes >= 900_000
        assert os.pread(fd, 3, 0) == b"xxx"
        os.close(fd)
        assert settled_usage(m.handle, lambda: (0, 0)) == (0, 0)
        write(m.path / "g", b"y" * 900_000)


def test_a_store_through_a_map_never_passes_the_limit(space: Path) -> None:
    """The file is longer than the limit and all holes: msync fails, earlier data stays."""
    with mounts.mounted("kernel", [lower_with(space)], space, size=1 * MIB) as m:
        write(m.path / "safe", b"s" * 500_000)
        fd = os.open(m.path / "sparse", os.O_CREAT | os.O_RDWR)
        os.ftruncate(fd, 4 * MIB)
        view = mmap.mmap(fd, 4 * MIB)
        for offset in range(0, 4 * MIB, UNIT):
            view[offset] = 1
        errors = []
        for flush in (view.flush, lambda: os.fsync(fd)):
            try:
                flush()
            except OSError as error:
                errors.append(error.errno)
        assert errno.ENOSPC in errors or errno.EIO in errors
        view.close()
        os.close(fd)
        assert m.handle.usage().bytes <= 1 * MIB
        assert limits.measure(m.changes)[0] <= 1 * MIB
        assert read(m.path / "safe") == b"s" * 500_000
        assert m.handle.usage().bytes == limits.measure(m.changes)[0]


def test_the_limit_can_be_changed_while_mounted(space: Path) -> None:
    with mounts.mounted("kernel", [lower_with(space)], space, size=1 * MIB) as m:
        assert fill(m.path / "f") == 1 * MIB
        m.handle.limit(size="2M", inodes=10)
        assert fill(m.path / "f") == 1 * MIB
        m.handle.limit(size=100_000)
        fails(errno.ENOSPC, os.mkdir, m.path / "d")
        status = os.statvfs(m.path)
        assert status.f_bavail == 0
        os.unlink(m.path / "f")
        assert settled_usage(m.handle, lambda: (0, 0)) == (0, 0)
        assert fill(m.path / "f") == 100_000 // UNIT * UNIT
        m.handle.limit(size=None, inodes=None)
        write(m.path / "g", b"x" * 3 * MIB)


WRITER = """
import os, sys, errno
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
total = 0
try:
    while True:
        total += os.write(fd, b'w' * int(sys.argv[2]))
except OSError as error:
    assert error.errno == errno.ENOSPC, error
print(total)
"""


def test_parallel_writers_share_exactly_the_limit(fs: hostfs.HostFs) -> None:
    base = fs.fresh("parallel")
    with mounts.mounted("kernel", [lower_with(base)], base, size=16 * MIB) as m:
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(m.path / f"f{i}"), str(4096 * (i + 1))],
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(4)
        ]
        outputs = [writer.communicate()[0] for writer in writers]
        assert [writer.returncode for writer in writers] == [0] * 4
        assert sum(int(text) for text in outputs) == 16 * MIB
        assert m.handle.usage().bytes == 16 * MIB == limits.measure(m.changes)[0]
        assert sum(os.stat(m.path / f"f{i}").st_size for i in range(4)) == 16 * MIB
    shutil.rmtree(base)


def test_the_count_is_right_after_kill_and_remount(fs: hostfs.HostFs) -> None:
    base = fs.fresh("kill")
    lower = lower_with(base, a=b"a" * 100_000, b=b"b" * 100)
    target = base / "mnt"
    target.mkdir()
    cowfs = pytest.importorskip("cowfs")
    handle = cowfs.mount([str(lower.path)], str(target), upper=base / "upper", work=base / "work", size="4M")
    write(target / "new", b"n" * 1_000_000)
    with open(target / "sparse", "wb") as file:
        file.truncate(3_000_000)
        os.pwrite(file.fileno(), b"x" * 5000, 1_000_000)
    write(target / "a", b"short")
    os.mkdir(target / "dir")
    os.unlink(target / "b")
    os.chmod(target / "new", 0o600)
    used = handle.usage()
    os.kill(handle.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while posix.error_of(os.statvfs, target) != "ENOTCONN" and time.monotonic() < deadline:
        time.sleep(0.01)
    cowfs.umount(str(target))
    with cowfs.mount([str(lower.path)], str(target), upper=base / "upper", work=base / "work", size="4M") as again:
        assert again.usage() == used
        assert (used.bytes, used.inodes) == limits.measure(base / "upper")
        assert fill(target / "filler") == 4 * MIB - used.bytes
    shutil.rmtree(base)


def test_the_limit_holds_for_a_mount_by_an_ordinary_user(scratch: Path, ordinary_user: int) -> None:
    """fusermount3, userxattr layers, no privilege anywhere."""
    base = scratch / f"user-{time.monotonic_ns()}"
    base.mkdir()
    lower_with(base, old=b"o" * 10_000)
    (base / "mnt").mkdir()
    for path in (base, base / "mnt", base / "lower"):
        os.chown(path, ordinary_user, users.GID)
    script = f"""
import cowfs, errno, os
with cowfs.mount(["{base}/lower"], "{base}/mnt", upper="{base}/upper", work="{base}/work", size="1M") as m:
    fd = os.open("{base}/mnt/f", os.O_CREAT | os.O_WRONLY)
    total = 0
    try:
        while True:
            total += os.write(fd, b"x" * 30000)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    os.close(fd)
    assert total == 1 << 20, total
    assert m.usage().bytes == 1 << 20
    os.unlink("{base}/mnt/old")
    assert os.listdir("{base}/mnt") == ["f"]
    os.truncate("{base}/mnt/f", 0)
    os.mkdir("{base}/mnt/dir")
    assert m.usage().bytes == 4096, m.usage()
"""
    (base / "run").mkdir(mode=0o700)
    os.chown(base / "run", ordinary_user, users.GID)
    done = users.run_python(script, HOME=str(base), TMPDIR=str(base), XDG_RUNTIME_DIR=str(base / "run"))
    assert done.returncode == 0, done.stderr
    assert limits.measure(base / "upper", form="user") == (4096, 2)


class LimitMachine(Equality):
    """Random operations under a small limit: never passed, ENOSPC changes nothing, the count equals a scan."""

    compared = False
    size, inodes = 12 * UNIT, 10
    refused = 0

    @classmethod
    def again(cls, failure: Failure, base: Path) -> str:
        (_, seed, weight, _), operations = failure
        run = LimitRun(base, seed, weight, cls.size, cls.inodes)
        try:
            for op, as_user in operations:
                run.limited(op, as_user)
            run.compare()
            run.remount()
        except AssertionError as error:
            return str(error) or "assertion"
        finally:
            run.close()
            shutil.rmtree(base, ignore_errors=True)
        return ""

    @initialize(seed=st.integers(0, 2**20), weight=st.integers(0, 20))
    def start(self, seed: int, weight: int) -> None:
        number = next(Equality._count)
        self.run = LimitRun(type(self).base / f"run{number}", seed, weight, self.size, self.inodes)
        self.done = 0

    def _step(self, op: Any, as_user: bool) -> None:
        run = self.run
        assert isinstance(run, LimitRun)
        type(self).steps += 1
        self.done += 1
        paths = existing(str(run.mounted.path))
        dirs = [""] + [
            p for p in paths[1:] if (run.mounted.path / p).is_dir() and not (run.mounted.path / p).is_symlink()
        ]
        result = run.limited(concrete(op, paths, [p for p in dirs if p.count("/") < 3]), as_user)
        type(self).refused += result == "!ENOSPC"
        if self.done % 20 == 0:
            run.compare()

    def teardown(self) -> None:
        run = self.run
        if run is None:
            return
        assert isinstance(run, LimitRun)
        try:
            if not self.failed:
                run.compare()
                run.remount()
        except BaseException:
            self._blame()
            raise
        finally:
            run.close()
            shutil.rmtree(run.base, ignore_errors=True)


#: operations that may have done a part before the space ran out
PARTIAL = frozenset({"write", "fwrite", "map_store", "copy_range", "tmpfile", "rmtree", "open", "fsync"})


class LimitRun(Run):
    def __init__(self, base: Path, seed: int, weight: int, size: int, inodes: int) -> None:
        self.size, self.inodes = size, inodes
        self.recipe = ("kernel", seed, weight, "trusted")
        self.base, self.impl, self.form = base, "kernel", "trusted"
        self.started = time.time_ns() - 10**9
        base.mkdir()
        base.chmod(0o755)
        self.lowers = stacks.random_stack(seed, weight, base)
        self.stack = ExitStack()
        self.mounted = self.stack.enter_context(mounts.mounted("kernel", self.lowers, base, size=size, inodes=inodes))
        from support.ops import Actor

        self.ours = self.theirs = Actor(str(self.mounted.path), self.started)
        self.log = []
        os.chmod(self.mounted.path, 0o777)

    def limited(self, op: Any, as_user: bool) -> Any:
        before = trees.snapshot(self.mounted.path) if op[0] not in PARTIAL else None
        result = self.ours.do(op, as_user)
        self.log.append((op, as_user, result))
        usage = self.mounted.handle.usage()
        assert usage.bytes <= self.size, f"{usage} passes the limit\n{self.story()}"
        assert usage.inodes <= self.inodes, f"{usage} passes the limit\n{self.story()}"
        if result == "!ENOSPC" and before is not None:
            found = trees.differences(before, trees.snapshot(self.mounted.path))
            assert not found, "ENOSPC, and yet: " + "\n".join(found[:5]) + self.story()
        return result

    def compare(self) -> None:
        self.ours.close()
        os.sync()
        expected = limits.measure(self.mounted.changes, allocated=True)
        found = settled_usage(self.mounted.handle, lambda: expected, 1.0)
        assert found == expected, f"the mount counts {found}, the scan {expected}\n{self.story()}"
        status = os.statvfs(self.mounted.path)
        assert (status.f_blocks - status.f_bfree) * status.f_frsize == expected[0]
        assert status.f_files - status.f_ffree == expected[1]

    def remount(self) -> None:
        expected = limits.measure(self.mounted.changes, allocated=True)
        self.stack.close()
        with mounts.mounted("kernel", self.lowers, self.base, size=self.size, inodes=self.inodes) as again:
            usage = again.handle.usage()
            assert (usage.bytes, usage.inodes) == expected, f"remounted: {usage}, scan {expected}\n{self.story()}"


@pytest.mark.slow
def test_random_operations_never_pass_the_limit(space: Path, request: pytest.FixtureRequest) -> None:
    class Machine(LimitMachine):
        base = space

    run_machine(Machine, request.config.getoption("--steps") // 10, request.config.getoption("--seed") + 10)
    assert Machine.refused >= 5, "the limit was hardly ever reached"
