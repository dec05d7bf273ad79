"""The block driver passes the conformance suite, with images of ext4 and XFS, and keeps what only it promises."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support import users
from support.command import run_module
from support.hostfs import HostFs, unmount_below

from cowfs.errors import CowfsError, FailedPrecondition, Unsupported
from cowfs.model import Kind
from cowfs.store import Store
from cowfs.sys import blockfs, files, loop
from cowfs.testing import DriverSuite

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="images are mounted by root")


@pytest.fixture
def place(fs: HostFs, can_mount: None) -> Iterator[Path]:
    path = fs.fresh("store")
    yield path
    unmount_below(path)


class Suite(DriverSuite):
    driver = "block"
    chain_length = 12
    filesystem = "ext4"

    @pytest.fixture
    def place(self, place: Path) -> Path:
        if not shutil.which(f"mkfs.{self.filesystem}", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
            pytest.skip(f"mkfs.{self.filesystem} is not installed")
        return place


@pytest.mark.parametrize("fs", ["tmpfs", "ext4"], indirect=True)
class TestExt4(Suite):
    pass


@pytest.mark.parametrize("fs", ["tmpfs"], indirect=True)
class TestXfs(Suite):
    filesystem = "xfs"
    options: ClassVar[dict[str, Any]] = {"filesystem": "xfs", "size": "1g"}


MIB = 1 << 20


@pytest.fixture
def store(place: Path) -> Iterator[Store]:
    with Store.open(place / "store", driver="block", fsync=False) as store:
        yield store


@pytest.fixture
def mnt(place: Path) -> Path:
    path = place / "mnt"
    path.mkdir()
    return path


on_tmpfs = pytest.mark.parametrize("fs", ["tmpfs"], indirect=True)


def allocated(store: Store) -> int:
    """Bytes that the store takes of its host."""
    found = 0
    for directory, _, names in os.walk(store.root):
        if f"{directory}/".startswith(f"{store.root}/block/"):
            found += sum(os.lstat(os.path.join(directory, name)).st_blocks * 512 for name in names)
    return found


def attached(store: Store) -> list[str]:
    """Mounts and loop devices that there are of the store."""
    with open("/proc/self/mounts", encoding="utf-8") as file:
        mounts = [line.split()[1] for line in file if line.split()[1].startswith(f"{store.root}/")]
    ours = {f"{there.st_dev}:{there.st_ino}" for there in map(os.stat, Path(store.root, "layers").iterdir())}
    names = [loop.name_of(f"/dev/{path.name}") for path in Path("/sys/block").glob("loop*") if (path / "loop").exists()]
    return mounts + [name for name in names if name is not None and name.removeprefix("cowfs-block ") in ours]


def nothing_attached(store: Store) -> bool:
    """A device goes a moment after its mount."""
    end = time.monotonic() + 20
    while attached(store):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def server_of(store: Store, key: str) -> int:
    """The process that serves a layer's image."""
    from cowfs.mounting import protocol
    from cowfs_drivers.block_device import Served

    served = Served.of(store.driver.directory(store.index.get(key).id))
    assert served is not None
    return int(protocol.ask(served.socket, "info")["pid"])


@on_tmpfs
def test_nothing_is_attached_but_what_is_in_use(store: Store, mnt: Path) -> None:
    store.prepare("a")
    assert attached(store) == []  # neither prepare nor its records want the tree
    with store.mount("a", mnt, mount_type="kernel"):
        assert attached(store)
    with Store.open(store.root):  # whoever closes the store unmounts what is not in use any more
        pass
    store.gc()
    assert nothing_attached(store)
    store.commit("a", "A")
    store.view("v", "A")
    with store.mount("v", mnt):
        with Store.open(store.root) as other:
            other.gc()
        assert attached(store)
    store.gc()
    assert store.check(content=True).problems == []
    assert nothing_attached(store)


@on_tmpfs
def test_a_record_is_mounted_by_the_helper(store: Store, mnt: Path) -> None:
    """Its directories are there only once it is mounted."""
    (record,) = store.prepare("a")
    assert record.type == "fuse.cowfs-overlayfs"
    assert attached(store) == []
    subprocess.run(["cowfs-overlayfs", "-o", ",".join(record.options), str(mnt)], check=True, env=_path())
    try:
        (mnt / "file").write_text("by the helper")
    finally:
        subprocess.run(["umount", mnt], check=True)
    assert store.stat("a").kind is Kind.ACTIVE
    with store.mount("a", mnt, mount_type="kernel"):
        assert (mnt / "file").read_text() == "by the helper"


def _path() -> dict[str, str]:
    import sys

    return {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}


@on_tmpfs
def test_the_device_is_read_past_the_page_cache(store: Store, mnt: Path) -> None:
    store.prepare("a")
    with store.mount("a", mnt, mount_type="kernel"):
        assert loop.is_direct(loop.device_at(os.fspath(mnt)))


@pytest.mark.parametrize("fs", ["ext4"], indirect=True)
def test_own_blocks_are_cached_once(place: Path, mnt: Path) -> None:
    """By the layer's file system; the host's page cache has none of them once they are synced."""
    with Store.open(place / "store", driver="block") as store:
        store.prepare("a")
        with store.mount("a", mnt, mount_type="kernel"):
            fd = os.open(mnt / "big", os.O_RDWR | os.O_CREAT)
            os.pwrite(fd, os.urandom(8 * MIB), 0)
            os.fsync(fd)
            assert (files.cached_pages(fd, 0, 8 * MIB) or 0) >= 8 * MIB // 4096 - 1
            os.close(fd)
            pool = store.driver._pool  # type: ignore[attr-defined]
            delta = f"{pool.tree(pool.top(store.driver.directory(store.index.get('a').id)))}/disk"
            fd = os.open(delta, os.O_RDONLY)
            held = [files.cached_pages(fd, start, end) for start, end in files.data_ranges(fd, os.fstat(fd).st_size)]
            os.close(fd)
            assert sum(count or 0 for count in held) < MIB // 4096


@on_tmpfs
def test_only_changed_blocks_take_room(store: Store, mnt: Path) -> None:
    store.prepare("base")
    with store.mount("base", mnt, mount_type="kernel"):
        (mnt / "big").write_bytes(os.urandom(32 * MIB))
    store.commit("base", "B")
    before = allocated(store)
    store.prepare("a", "B")
    with store.mount("a", mnt, mount_type="kernel"):
        fd = os.open(mnt / "big", os.O_RDWR)
        os.pwrite(fd, b"x" * 4096, 16 * MIB)
        os.close(fd)
    store.commit("a", "A")
    assert allocated(store) - before < MIB
    assert [change.path for change in store.diff("A")] == [b"big"]


@on_tmpfs
def test_what_is_deleted_is_free_on_the_host(store: Store, mnt: Path) -> None:
    store.prepare("a")
    with store.mount("a", mnt, mount_type="kernel"):
        (mnt / "big").write_bytes(os.urandom(32 * MIB))
        os.sync()
        full = allocated(store)
        (mnt / "big").unlink()
    store.commit("a", "A")
    assert allocated(store) < full - 30 * MIB


@on_tmpfs
@pytest.mark.parametrize("mount_type", ["kernel", "fuse"])
def test_a_snapshot_under_writers_is_of_one_instant(store: Store, mnt: Path, mount_type: str) -> None:
    """Two files are written in turn; no snapshot shows the second ahead of the first, or far behind."""
    store.prepare("a")
    with store.mount("a", mnt, mount_type=mount_type):
        script = (
            "import os\n"
            "fds = [os.open(name, os.O_RDWR | os.O_CREAT) for name in ('one', 'two')]\n"
            "n = 0\n"
            "while True:\n"
            "    n += 1\n"
            "    for fd in fds: os.pwrite(fd, b'%08d' % n, 0)\n"
            "    os.fsync(fds[0])\n"
        )
        with subprocess.Popen(["python3", "-c", script], cwd=mnt) as writer:
            try:
                while not (mnt / "two").exists() or (mnt / "two").stat().st_size < 8:
                    time.sleep(0.01)
                for number in range(6):
                    store.snapshot("a", f"s{number}")
            finally:
                writer.kill()
        last = int((mnt / "one").read_text())
    seen = []
    for number in range(6):
        store.view(f"v{number}", f"s{number}")
        with store.mount(f"v{number}", mnt, mount_type="kernel"):
            one, two = (int((mnt / name).read_text()) for name in ("one", "two"))
            assert one - 1 <= two <= one
            seen.append(one)
    assert seen == sorted(seen)
    assert seen[-1] <= last
    assert store.check(content=True).problems == []


@on_tmpfs
def test_a_killed_server_loses_no_more_than_a_pulled_disk(store: Store, mnt: Path) -> None:
    store.prepare("a")
    made = store.mount("a", mnt, mount_type="kernel")
    (mnt / "synced").write_bytes(b"s" * MIB)
    fd = os.open(mnt / "synced", os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    os.kill(server_of(store, "a"), signal.SIGKILL)
    with pytest.raises(OSError):
        while True:
            (mnt / "later").write_bytes(os.urandom(MIB))
            os.sync()
            with (mnt / "later").open("rb") as file:
                os.fsync(file.fileno())
    made.unmount()
    with store.mount("a", mnt, mount_type="kernel"):
        assert (mnt / "synced").read_bytes() == b"s" * MIB
        (mnt / "goes").write_text("on")
    store.commit("a", "A")
    assert store.check(content=True).problems == []
    assert nothing_attached(store)


def snapshot_killed_at_its_switch(store: Store) -> None:
    """A snapshot of "a" by another process, which is killed when its file system is frozen."""
    pid = os.fork()
    if pid == 0:
        from cowfs_drivers.block_device import Served

        Served.switch = lambda self, upper, work: os.kill(os.getpid(), signal.SIGKILL)
        try:
            with Store.open(store.root, fsync=False) as child:
                child.snapshot("a", "never")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@on_tmpfs
def test_a_snapshot_killed_while_the_file_system_was_frozen_is_taken_back(store: Store, mnt: Path) -> None:
    """The next verb thaws it, and the next snapshot has the server switch."""
    store.prepare("a")
    with store.mount("a", mnt, mount_type="kernel"):
        (mnt / "before").write_text("1")
        os.sync()
        snapshot_killed_at_its_switch(store)
        assert store.usage("a").inodes >= 1
        (mnt / "after").write_text("2")
        assert not store.exists("never")
        store.snapshot("a", "first")
        (mnt / "last").write_text("3")
    store.gc()
    store.view("v", "first")
    with store.mount("v", mnt, mount_type="kernel"):
        assert sorted(os.listdir(mnt)) == ["after", "before"]
    with store.mount("a", mnt, mount_type="kernel"):
        assert sorted(os.listdir(mnt)) == ["after", "before", "last"]
    assert store.check(content=True).problems == []


@on_tmpfs
@pytest.mark.parametrize("size", [2 * MIB, 20 * MIB])
def test_the_size_of_a_kernel_mount_is_exact(store: Store, mnt: Path, size: int) -> None:
    store.prepare("base")
    with store.mount("base", mnt, mount_type="kernel"):
        (mnt / "inherited").write_bytes(b"i" * MIB)
    store.commit("base", "B")
    store.prepare("a", "B", size=size)
    with store.mount("a", mnt, mount_type="kernel"):
        told = os.statvfs(mnt)
        assert size - 64 * 4096 <= told.f_bavail * told.f_frsize <= size
        fd = os.open(mnt / "big", os.O_WRONLY | os.O_CREAT)
        written = 0
        with pytest.raises(OSError) as caught:
            while True:
                written += os.write(fd, b"b" * 65536)
        os.close(fd)
        assert caught.value.errno == errno.ENOSPC
        assert size - MIB // 2 <= written <= size
        store.limit("a", size=2 * size)
        (mnt / "more").write_bytes(b"m" * (size - MIB // 2))
        store.limit("a", size=size)
        with pytest.raises(OSError, match="No space left"):
            (mnt / "none").write_bytes(b"n" * MIB)
    with pytest.raises(FailedPrecondition), store.mount("a", mnt, mount_type="kernel"):
        store.limit("a", inodes=5)


@on_tmpfs
def test_a_size_beyond_the_file_system_makes_it_larger(place: Path, mnt: Path) -> None:
    with Store.open(place / "store", driver="block", fsync=False, size="64m") as store:
        store.prepare("base")
        store.commit("base", "B")
        store.prepare("a", "B", size="200m")
        with store.mount("a", mnt, mount_type="kernel"):
            told = os.statvfs(mnt)
            assert 199 * MIB <= told.f_bavail * told.f_frsize <= 200 * MIB
            (mnt / "big").write_bytes(b"b" * 150 * MIB)
        store.commit("a", "A")
        assert store.check(content=True).problems == []


@on_tmpfs
def test_a_frozen_file_system_is_thawed_when_its_snapshot_is_killed(store: Store, mnt: Path) -> None:
    """By a process of its own, so no program waits for the next verb."""
    store.prepare("a")
    with store.mount("a", mnt, mount_type="kernel"):
        snapshot_killed_at_its_switch(store)
        with subprocess.Popen(["sh", "-c", "echo 1 > file"], cwd=mnt) as writer:
            assert writer.wait(timeout=50) == 0
    store.remove("a")
    assert nothing_attached(store)


@on_tmpfs
def test_a_limit_that_the_server_holds_makes_the_file_system_larger(place: Path, mnt: Path) -> None:
    with Store.open(place / "store", driver="block", fsync=False, size="64m") as store:
        store.prepare("a", size="150m", inodes=1000)
        with store.mount("a", mnt):
            (mnt / "big").write_bytes(b"b" * 140 * MIB)
        store.commit("a", "A")
        assert store.check(content=True).problems == []


@on_tmpfs
def test_an_xfs_of_a_store_that_goes_on_with_ext4_holds_no_limit(place: Path) -> None:
    if not shutil.which("mkfs.xfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        pytest.skip("mkfs.xfs is not installed")
    with Store.open(place / "store", driver="block", fsync=False, filesystem="xfs", size="400m") as store:
        store.prepare("a")
        store.commit("a", "A")
    with Store.open(place / "store", fsync=False, filesystem="ext4") as store:
        store.prepare("b", "A", size="20m")
        with pytest.raises(Unsupported, match="images of xfs hold no limit"):
            store.mounts("b", mount_type="kernel")
        store.prepare("c", size="20m")
        assert store.mounts("c", mount_type="kernel")[0].type == "bind"


@on_tmpfs
def test_an_xfs_grows_while_it_is_mounted(place: Path, mnt: Path) -> None:
    if not shutil.which("mkfs.xfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        pytest.skip("mkfs.xfs is not installed")
    with Store.open(place / "store", driver="block", fsync=False, filesystem="xfs", size="400m") as store:
        store.prepare("a")
        with store.mount("a", mnt, mount_type="kernel"):
            root = os.open(mnt, os.O_RDONLY)
            before = os.fstatvfs(root).f_blocks
            blockfs.grow_xfs(root, (800 * MIB) // 4096)
            assert os.fstatvfs(root).f_blocks > before * 3 // 2
            os.close(root)
            (mnt / "file").write_text("x")
        store.commit("a", "A")
        assert store.check(content=True).problems == []


@on_tmpfs
def test_the_command_gives_options_and_shows_them(place: Path, mnt: Path) -> None:
    root = ("--root", str(place / "store"))
    words = ("--driver", "block", "--option", "size=100m", "--option", "discard=off")
    assert run_module("cowfs", "init", *root, *words).returncode == 0
    told = run_module("cowfs", "info", *root).stdout
    assert "images:        ext4 of 104857600 bytes, blocks of 4096, discard off\n" in told
    assert "limits:        kernel mounts by the file system's size, others by cowfs's server\n" in told
    run_module("cowfs", "prepare", "a", *root)
    assert run_module("cowfs", "mount", "--key", "a", mnt, "--mount-type", "kernel", *root).returncode == 0
    try:
        assert os.statvfs(mnt).f_blocks * os.statvfs(mnt).f_frsize < 100 * MIB
        assert f" {mnt}\n" in run_module("cowfs", "ls", *root).stdout
    finally:
        subprocess.run(["umount", mnt], check=True)
    assert f" {mnt}\n" not in run_module("cowfs", "ls", *root).stdout


@on_tmpfs
def test_a_mount_by_the_command_stands_on_the_image(place: Path, mnt: Path) -> None:
    """The command's process ends before the mount: the image stays mounted for the server that it leaves behind."""
    root = ("--root", str(place / "store"))
    assert run_module("cowfs", "init", *root, "--driver", "block").returncode == 0
    run_module("cowfs", "prepare", "a", *root)
    assert run_module("cowfs", "mount", "--key", "a", mnt, *root).returncode == 0
    (mnt / "file").write_text("x")
    assert run_module("cowfs", "umount", mnt).returncode == 0
    assert run_module("cowfs", "commit", "a", "A", *root).returncode == 0
    assert run_module("cowfs", "cat", "A:file", *root).stdout == "x"


@on_tmpfs
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["size=1k"], "no ext4 of 1024 bytes"),
        (["size=many"], "many"),
        (["filesystem=zfs"], "no images of 'zfs'"),
        (["filesystem=xfs", "size=20m"], "no xfs of 20971520 bytes"),
        (["discard=maybe"], "discard is on or off, not 'maybe'"),
        (["block=5"], "block"),
        (["colour=red"], "has no option colour"),
        (["size"], "no option of a driver: 'size'"),
    ],
)
def test_bad_options_get_one_line(place: Path, options: list[str], told: str) -> None:
    words = [word for option in options for word in ("--option", option)]
    done = run_module("cowfs", "init", "--root", place / "store", "--driver", "block", *words)
    assert done.returncode != 0
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


@on_tmpfs
def test_what_is_missing_is_told_in_one_line(place: Path, mnt: Path) -> None:
    with Store.open(place / "store", driver="block", fsync=False) as store:
        for name in ("one", "two"):
            store.prepare("a", "one" if name == "two" else None)
            with store.mount("a", mnt, mount_type="kernel"):
                (mnt / name).write_bytes(b"1" * MIB)
            store.commit("a", name)
        pool = store.driver._pool  # type: ignore[attr-defined]
        top = pool.top(store.driver.directory(store.index.get("two").id))
        (entry,) = Path(pool.directory(top), "map").iterdir()
        kept = entry.read_bytes()
        entry.unlink()
        report = store.check()
        assert [problem.name for problem in report.damage] == ["two"]
        entry.write_bytes(kept)
        assert store.check(content=True).problems == []
        os.rename(pool.directory(top), f"{pool.path}/elsewhere")
        store.prepare("b", "one")
        assert [problem.name for problem in store.check().damage] == ["two"]
        with pytest.raises((CowfsError, OSError)):
            store.prepare("c", "two")
        os.rename(f"{pool.path}/elsewhere", pool.directory(top))
        assert store.check(content=True).problems == []
        store.prepare("c", "two")


def test_an_ordinary_user_gets_one_line(ordinary_user: int, tmp_path: Path) -> None:
    for above in tmp_path.parents:
        if "pytest-" in str(above) and not os.stat(above).st_mode & 0o001:
            above.chmod(0o755)
    os.chown(tmp_path, ordinary_user, ordinary_user)
    python, environment = users.interpreter()
    command = users.command_as([python, "-m", "cowfs", "init", "--root", str(tmp_path / "store"), "--driver", "block"])
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "loop devices are root's" in done.stderr
