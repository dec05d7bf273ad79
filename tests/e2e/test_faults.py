"""Faults from outside: killed servers, full, read-only and failing hosts.

Promises tested: what was fsynced before a kill is there after it; a remount works and leaves nothing
in the work directory; a host that refuses gives its own errno, and nothing that was there is lost.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import hostfs, layers, mounts, namespace, posix, trees
from support.posix import error_of, read, write

cowfs = pytest.importorskip("cowfs")

# A load that journals what is durable: a line in the journal is written (outside the mount) only
# after the fsync of what it names returned.
LOAD = r"""
import os, random, sys
mount, journal, seed = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND), int(sys.argv[3])
rng = random.Random(seed)
number = 0
try:
    while True:
        number += 1
        kind = rng.random()
        name = f"f{rng.randrange(30)}"
        if kind < 0.5:
            data = b"%d:" % number + bytes([number % 251]) * rng.randrange(1, 60000)
            os.write(journal, b"begin %s\n" % name.encode())  # before the open: that truncates
            fd = os.open(f"{mount}/{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.write(fd, data)
            os.fsync(fd)
            os.close(fd)
            os.write(journal, b"sync %s %d %d\n" % (name.encode(), number, len(data)))
        elif kind < 0.6:
            old = f"low/d{rng.randrange(20)}"
            if os.path.exists(f"{mount}/low/tmp"):  # an earlier kill came between the two
                missing = [f"low/d{i}" for i in range(20) if not os.path.exists(f"{mount}/low/d{i}")]
                old = missing[0]
            else:
                os.rename(f"{mount}/{old}", f"{mount}/low/tmp")
            os.rename(f"{mount}/low/tmp", f"{mount}/{old}")
        elif kind < 0.7:
            os.chmod(f"{mount}/low/big{rng.randrange(10)}", rng.choice((0o600, 0o644)))
        elif kind < 0.8:
            fd = os.open(f"{mount}/low/big{rng.randrange(10)}", os.O_RDWR)
            os.pwrite(fd, b"x", rng.randrange(200000))
            os.close(fd)
        elif kind < 0.9:
            try:
                os.unlink(f"{mount}/low/s{rng.randrange(200)}")
            except FileNotFoundError:
                pass
        else:
            os.makedirs(f"{mount}/new/{rng.randrange(50)}", exist_ok=True)
except OSError as error:
    if error.errno not in (107, 103, 5):  # the server is gone: ENOTCONN, ECONNABORTED, EIO
        raise
except IndexError:
    pass  # exists() failed, because the server is gone
"""


def big_layer(base: Path) -> layers.Layer:
    layer = layers.Layer(base / "lower")
    for i in range(10):
        layer.file(f"low/big{i}", bytes([i]) * 300_000)
    for i in range(20):
        layer.file(f"low/d{i}/in", b"i")
    for i in range(200):
        layer.file(f"low/s{i}", b"s")
    return layer


def wait_dead(target: Path, pid: int) -> None:
    """Until the kernel answers ENOTCONN for the server that was killed."""
    end = time.monotonic() + 10
    while error_of(os.statvfs, target) != "ENOTCONN":
        assert time.monotonic() < end, f"server {pid} still answers"
        time.sleep(0.005)


def check_after_kill(target: Path, journal: Path) -> None:
    """Every file that the journal calls durable exists, whole."""
    durable: dict[str, tuple[int, int]] = {}
    for line in journal.read_bytes().splitlines():
        words = line.decode().split()
        if words[0] == "begin":
            durable.pop(words[1], None)
        else:
            durable[words[1]] = int(words[2]), int(words[3])
    for name, (number, length) in durable.items():
        head = b"%d:" % number
        assert read(target / name) == head + bytes([number % 251]) * (length - len(head)), name
    for i in range(20):
        assert (
            read(target / f"low/d{i}/in") == b"i"
            if (target / f"low/d{i}").exists()
            else (target / "low/tmp/in").exists()
        )
    for i in range(10):
        content = read(target / f"low/big{i}")
        assert len(content) == 300_000
        assert set(content) <= {i, ord("x")}


def left_in_work(work: Path) -> list[str]:
    found = [str(Path(at) / name) for at, dirs, files in os.walk(work) for name in (*dirs, *files)]
    return [path for path in found if path != str(work / "work") and "incompat" not in path]


@pytest.mark.slow
@pytest.mark.parametrize("row", [False, True], ids=["overlay", "row"])
def test_sigkill_at_random_moments(space: Path, row: bool, request: pytest.FixtureRequest) -> None:
    """Killed under load, remounted, checked, and on with the same upper; the kernel reads it in the end (or cowfs again)."""
    kills: int = request.config.getoption("--kills") // (5 if row else 1)
    rng = random.Random(request.config.getoption("--seed"))
    lower = big_layer(space)
    target, upper, work = space / "mnt", space / "upper", space / "work"
    target.mkdir()
    options = {"upper": upper, "work": work} | ({"row": 4096} if row else {})
    for number in range(kills):
        journal = space / "journal"
        journal.unlink(missing_ok=True)
        handle = cowfs.mount([str(lower.path)], str(target), **options)
        load = subprocess.Popen(
            [sys.executable, "-c", LOAD, str(target), str(journal), str(rng.random() * 1e9 // 1)[:-2]]
        )
        while not journal.exists() and load.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.15)
        os.kill(handle.pid, signal.SIGKILL)
        assert load.wait(20) == 0, f"kill {number}: the load failed otherwise"
        wait_dead(target, handle.pid)
        cowfs.umount(str(target))
        with cowfs.mount([str(lower.path)], str(target), **options):
            check_after_kill(target, journal)
            ours = trees.snapshot(target)
        assert left_in_work(work) == [], f"kill {number}"
    with mounts.mounted("row", [lower.path], space) if row else mounts.overlay([lower.path], target, upper, work):
        trees.assert_same(ours, trees.snapshot(target), names=("cowfs", "cowfs again" if row else "kernel"))


def test_sigkill_of_a_limited_mount_keeps_the_count(space: Path) -> None:
    from support import limits

    lower = big_layer(space)
    target, upper, work = space / "mnt", space / "upper", space / "work"
    target.mkdir()
    for number in range(5):
        handle = cowfs.mount([str(lower.path)], str(target), upper=upper, work=work, size="8M")
        load = subprocess.Popen([sys.executable, "-c", LOAD, str(target), str(space / "journal"), str(number)])
        time.sleep(0.3)
        os.kill(handle.pid, signal.SIGKILL)
        load.wait(20)
        wait_dead(target, handle.pid)
        cowfs.umount(str(target))
        with cowfs.mount([str(lower.path)], str(target), upper=upper, work=work, size="8M") as again:
            usage = again.usage()
            assert (usage.bytes, usage.inodes) == limits.measure(upper, allocated=True)


def test_sigterm_unmounts_cleanly(space: Path) -> None:
    lower = layers.Layer(space / "lower").file("f", b"x")
    target = space / "mnt"
    target.mkdir()
    handle = cowfs.mount([str(lower.path)], str(target), upper=space / "upper", work=space / "work")
    write(target / "g", b"new")
    os.kill(handle.pid, signal.SIGTERM)
    end = time.monotonic() + 10
    while namespace.fstype_of(str(target)) and time.monotonic() < end:
        time.sleep(0.01)
    assert namespace.fstype_of(str(target)) == ""
    assert os.listdir(target) == []
    assert (space / "upper" / "g").read_bytes() == b"new"


@contextmanager
def small_host(base: Path, size: str = "8m", inodes: str = "200") -> Iterator[Path]:
    """A tmpfs that is soon full."""
    root = hostfs.make_tmpfs(base, size, "small", inodes)
    try:
        yield root
    finally:
        mounts.umount_busy(str(root))


def test_a_full_host_gives_enospc_and_loses_nothing(space: Path) -> None:
    lower = layers.Layer(space / "lower").file("big", b"b" * 6_000_000).file("small", b"s")
    with (
        small_host(space) as host,
        mounts.mounted("kernel", [lower.path], space, upper=host / "u", work=host / "w") as m,
    ):
        write(m.path / "mine", b"m" * 4_000_000)
        before = trees.snapshot(m.path)
        assert error_of(lambda: os.pwrite(os.open(m.path / "big", os.O_WRONLY), b"x", 0)) == "ENOSPC", "copy-up"
        trees.assert_same(before, trees.snapshot(m.path))
        fd = os.open(m.path / "filler", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError, match="No space"):
            while True:
                os.write(fd, b"f" * 65536)
        os.close(fd)
        assert error_of(posix.make, "dir", m.path / "d") in ("", "ENOSPC")
        assert read(m.path / "mine") == b"m" * 4_000_000
        os.unlink(m.path / "filler")
        os.unlink(m.path / "mine")
        end = time.monotonic() + 5
        while os.statvfs(host).f_bavail * 4096 < 7_000_000 and time.monotonic() < end:
            time.sleep(0.01)
        write(m.path / "again", b"a" * 5_000_000)
        assert read(m.path / "again") == b"a" * 5_000_000
        for fd in range(3, 100):
            try:
                if os.readlink(f"/proc/self/fd/{fd}").startswith(str(m.path)):
                    os.close(fd)
            except OSError:
                continue


def test_a_host_without_inodes(space: Path) -> None:
    lower = layers.Layer(space / "lower").file("low", b"l")
    with (
        small_host(space, "8m", "60") as host,
        mounts.mounted("kernel", [lower.path], space, upper=host / "u", work=host / "w") as m,
    ):
        made = 0
        with pytest.raises(OSError, match="No space"):
            while True:
                write(m.path / f"f{made}", b"")
                made += 1
        assert error_of(os.chmod, m.path / "low", 0o600) == "ENOSPC"
        assert read(m.path / "low") == b"l"
        os.unlink(m.path / "f0")
        os.unlink(m.path / "f1")
        end = time.monotonic() + 5
        while (result := error_of(write, m.path / "again", b"")) == "ENOSPC" and time.monotonic() < end:
            time.sleep(0.01)
        assert result == ""
        assert len([n for n in os.listdir(m.path) if n.startswith("f")]) == made - 2


@contextmanager
def broken_host(base: Path, breaking: Callable[[Path], None]) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An ext4 image and the call that breaks it."""
    host = hostfs.make_image("ext4", base, 64 << 20, "errors=remount-ro")
    try:
        yield host, lambda: breaking(host)
    finally:
        mounts.umount_busy(str(host))


def abort(host: Path) -> None:
    """Make ext4 behave as after a fatal error: read-only from now on."""
    namespace.mount("none", str(host), None, namespace.MS_REMOUNT, "abort")


def shut_down(host: Path) -> None:
    """EXT4_IOC_SHUTDOWN, as when the device is gone: every access is an error."""
    fd = os.open(host, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
    finally:
        os.close(fd)


@pytest.mark.parametrize(("breaking", "expected"), [(abort, {"EROFS"}), (shut_down, {"EIO", "ESHUTDOWN"})])
def test_a_host_that_breaks(
    tmp_path: Path, space: Path, can_mount: None, breaking: Callable[[Path], None], expected: set[str]
) -> None:
    """The upper's host gives up: its errno for changes, lower files still read, the server lives, nothing hangs."""
    lower = layers.Layer(space / "lower").file("low", b"l" * 5000).dir("dir")
    with broken_host(tmp_path, breaking) as (host, give_up):
        handle = cowfs.mount([str(lower.path)], str(_made(space / "mnt")), upper=host / "u", work=host / "w")
        target = space / "mnt"
        write(target / "mine", b"m")
        os.sync()
        give_up()
        for call in (
            lambda: write(target / "new", b"n"),
            lambda: os.mkdir(target / "d"),
            lambda: os.unlink(target / "mine"),
            lambda: os.chmod(target / "low", 0o600),
            lambda: os.rename(target / "mine", target / "yours"),
            lambda: os.rename(target / "dir", target / "dir2"),
            lambda: os.truncate(target / "low", 0),
        ):
            assert error_of(call) in expected
        assert read(target / "low") == b"l" * 5000
        assert handle.counters()["LOOKUP"] >= 1
        handle.unmount()
    subprocess.run(["fsck.ext4", "-p", str(tmp_path / "ext4.img")], check=False, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(tmp_path / "ext4.img"), str(host)], check=True)
    try:
        with cowfs.mount([str(lower.path)], str(target), upper=host / "u", work=host / "w"):
            assert read(target / "mine") == b"m"
            write(target / "new", b"works again")
    finally:
        mounts.umount_busy(str(host))


def _made(path: Path) -> Path:
    path.mkdir()
    return path


FAILING = '''
import errno, os, sys
from fuse import FUSE, FuseOSError, Operations

class Failing(Operations):
    """Passes everything on, but data of files named like 'bad*' cannot be read or written."""
    def __init__(self, root): self.root = root
    def __call__(self, op, path, *args): return super().__call__(op, self.root + path, *args)
    def getattr(self, path, fh=None):
        s = os.lstat(path)
        return {k: getattr(s, k) for k in ("st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid", "st_ino", "st_blocks")}
    def readdir(self, path, fh): return [".", "..", *os.listdir(path)]
    def open(self, path, flags): return os.open(path, flags & ~os.O_TRUNC)
    def readlink(self, path): return os.readlink(path)
    def read(self, path, size, offset, fh):
        if os.path.basename(path).startswith("bad"):
            raise FuseOSError(errno.EIO)
        return os.pread(fh, size, offset)
    def release(self, path, fh): return os.close(fh)
    def statfs(self, path):
        s = os.statvfs(path)
        return {k: getattr(s, k) for k in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_flag", "f_frsize", "f_namemax")}

FUSE(Failing(sys.argv[1]), sys.argv[2], foreground=True, ro=True, allow_other=True, nothreads=True)
'''


def test_a_lower_layer_that_gives_eio(space: Path) -> None:
    """EIO reaches the reader; a copy-up of it fails with EIO and changes nothing; the rest works on."""
    pytest.importorskip("fuse", reason="fusepy is not installed", exc_type=ImportError)
    source = layers.Layer(space / "source").file("bad", b"b" * 100_000).file("good", b"g" * 100_000)
    failing = space / "failing"
    failing.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-c", FAILING, str(source.path), str(failing)], stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 10
        while not namespace.fstype_of(str(failing)):
            assert time.monotonic() < end
            assert server.poll() is None, "the failing file system did not start"
            time.sleep(0.01)
        with mounts.mounted("kernel", [failing], space) as m:
            assert error_of(read, m.path / "bad") == "EIO"
            assert error_of(lambda: os.pwrite(os.open(m.path / "bad", os.O_WRONLY), b"x", 5)) == "EIO"
            assert not (space / "upper" / "bad").exists()
            assert left_in_work(space / "work") == []
            assert read(m.path / "good") == b"g" * 100_000
            write(m.path / "good", b"changed")
            os.unlink(m.path / "bad")
            write(m.path / "bad", b"replaced")
            assert read(m.path / "bad") == b"replaced"
            for fd in range(3, 100):
                try:
                    if os.readlink(f"/proc/self/fd/{fd}").startswith(str(m.path)):
                        os.close(fd)
                except OSError:
                    continue
    finally:
        mounts.umount_busy(str(failing))
        server.wait(10)


def refused(*arguments: str, **environment: str) -> str:
    """Run ``cowfs mount`` that must fail; its one line of stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "cowfs", "mount", *arguments],
        capture_output=True, text=True, check=False, timeout=30, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode not in (0, 1) or done.returncode == 1, done
    assert done.returncode != 0, done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, f"one clear line, not {lines}"
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def bench(space: Path) -> Path:
    layers.Layer(space / "lower").file("f", b"x")
    (space / "mnt").mkdir()
    return space


def setup_missing(b: Path) -> list[str]:
    return ["--layer", str(b / "nothere"), str(b / "mnt")]


def setup_file(b: Path) -> list[str]:
    return ["--layer", str(b / "lower" / "f"), str(b / "mnt")]


def setup_twice(b: Path) -> list[str]:
    return ["--layer", str(b / "lower"), "--layer", str(b / "lower"), str(b / "mnt")]


def setup_upper_inside_lower(b: Path) -> list[str]:
    (b / "lower" / "up").mkdir()
    return ["--layer", str(b / "lower"), "--upper", str(b / "lower" / "up"), str(b / "mnt")]


def setup_no_mount_point(b: Path) -> list[str]:
    return ["--layer", str(b / "lower"), "--upper", str(b / "up"), str(b / "nowhere")]


def setup_mount_point_is_a_file(b: Path) -> list[str]:
    write(b / "file")
    return ["--layer", str(b / "lower"), "--upper", str(b / "up"), str(b / "file")]


REFUSED: dict[str, tuple[Any, str]] = {
    "layer-missing": (setup_missing, "nothere"),
    "layer-is-a-file": (setup_file, "lower/f"),
    "layer-twice": (setup_twice, "lower"),
    "upper-inside-a-lower": (setup_upper_inside_lower, "lower"),
    "mount-point-missing": (setup_no_mount_point, "nowhere"),
    "mount-point-is-a-file": (setup_mount_point_is_a_file, "file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_clear_line_and_changes_nothing(bench: Path, what: str) -> None:
    setup, named = REFUSED[what]
    arguments = setup(bench)
    before = trees.snapshot(bench)
    line = refused(*arguments)
    assert named in line, line
    trees.assert_same(before, trees.snapshot(bench))
    assert namespace.fstype_of(str(bench / "mnt")) == ""


def test_an_upper_in_use_names_the_holder(bench: Path) -> None:
    (bench / "mnt2").mkdir()
    options = {"upper": bench / "up", "work": bench / "work"}
    with cowfs.mount([str(bench / "lower")], str(bench / "mnt"), **options) as held:
        line = refused(
            "--layer",
            str(bench / "lower"),
            "--upper",
            str(bench / "up"),
            "--work",
            str(bench / "work"),
            str(bench / "mnt2"),
        )
        assert str(held.pid) in line, line


def test_an_upper_in_use_by_the_kernel_names_its_mount_point(bench: Path) -> None:
    (bench / "mnt2").mkdir()
    (bench / "up").mkdir()
    (bench / "work").mkdir()
    with mounts.overlay([bench / "lower"], bench / "mnt", bench / "up", bench / "work"):
        line = refused(
            "--layer",
            str(bench / "lower"),
            "--upper",
            str(bench / "up"),
            "--work",
            str(bench / "work"),
            str(bench / "mnt2"),
        )
        assert str(bench / "mnt") in line, line


def test_no_fuse_device(bench: Path) -> None:
    """A machine without /dev/fuse: one line that names it."""
    script = f"mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec {sys.executable} -m cowfs mount --layer {bench}/lower --upper {bench}/up {bench}/mnt"
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "/dev/fuse" in done.stderr


def test_a_dead_mount_is_cleared_by_the_next_mount(bench: Path) -> None:
    arguments = ([str(bench / "lower")], str(bench / "mnt"))
    handle = cowfs.mount(*arguments, upper=bench / "up", work=bench / "work")
    os.kill(handle.pid, signal.SIGKILL)
    wait_dead(bench / "mnt", handle.pid)
    with cowfs.mount(*arguments, upper=bench / "up", work=bench / "work"):
        assert read(bench / "mnt" / "f") == b"x"
    assert namespace.fstype_of(str(bench / "mnt")) == ""


def test_a_busy_mount_is_not_unmounted_and_says_why(bench: Path) -> None:
    with cowfs.mount([str(bench / "lower")], str(bench / "mnt"), upper=bench / "up", work=bench / "work") as handle:
        fd = os.open(bench / "mnt" / "f", os.O_RDONLY)
        with pytest.raises(cowfs.CowfsError, match=r"use|busy"):
            handle.unmount()
        assert os.read(fd, 1) == b"x"
        os.close(fd)
    shutil.rmtree(bench / "up")
