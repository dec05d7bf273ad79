"""The btrfs driver passes the conformance suite on a loop-mounted btrfs, and keeps what only it promises."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import hostfs, users
from support.command import run_module
from support.hostfs import HostFs

from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.model import Usage
from cowfs.store import Store
from cowfs.sys import btrfs, faults
from cowfs.testing import DriverSuite

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="subvolumes are deleted by root"),
    pytest.mark.parametrize("fs", ["btrfs"], indirect=True),
]


class TestBtrfs(DriverSuite):
    driver = "btrfs"

    @pytest.fixture
    def place(self, fs: HostFs) -> Path:
        return fs.fresh("store")


@pytest.mark.parametrize("driver", ["vfs", "btrfs"])
@pytest.mark.parametrize("way", ["direct", "subvolume", "bind"])
def test_a_kernel_mount_is_seen_wherever_the_store_is(driver: str, way: str, fs: HostFs) -> None:
    """mountinfo has another device than stat(2) there, and paths from the root of the file system or subvolume."""
    place = fs.fresh("seen")
    home = place / "home"
    if way == "subvolume":
        fd = os.open(place, os.O_RDONLY)
        btrfs.create(fd, b"home")
        os.close(fd)
    home.mkdir(exist_ok=True)
    if way == "bind":
        (place / "other").mkdir()
        subprocess.run(["mount", "--bind", home, place / "other"], check=True)
        home = place / "other"
    try:
        with Store.open(home / "store", driver=driver, fsync=False) as store:
            store.prepare("a")
            (place / "mnt").mkdir()
            with store.mount("a", place / "mnt", mount_type="kernel"):
                assert store.mounted_at("a") == str(place / "mnt")
                for verb in (lambda: store.commit("a", "A"), lambda: store.remove("a")):
                    with pytest.raises(FailedPrecondition, match="mounted by the kernel"):
                        verb()
            assert store.mounted_at("a") is None
            store.commit("a", "A")
    finally:
        if way == "bind":
            subprocess.run(["umount", home], check=True)


def test_an_ordinary_user_gets_one_line(ordinary_user: int, fs: HostFs) -> None:
    place = fs.fresh("user")
    os.chown(place, ordinary_user, ordinary_user)
    for above in place.parents:
        if "pytest-" in str(above) and not os.stat(above).st_mode & 0o001:
            above.chmod(0o755)
    python, environment = users.interpreter()
    command = users.command_as([python, "-m", "cowfs", "init", "--root", str(place / "store"), "--driver", "btrfs"])
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "only root may delete subvolumes" in done.stderr
    again = subprocess.run([*command[:-1], "overlay"], cwd="/", env=environment, capture_output=True, check=False)
    assert again.returncode == 0


def test_another_file_system_is_refused_in_one_line(space: Path, fs: HostFs) -> None:
    with pytest.raises(Unsupported, match="not on btrfs"):
        Store.open(space / "store", driver="btrfs")
    with Store.open(space / "store", driver="overlay") as store:
        assert store.driver.name == "overlay"


def test_constant_time_says_the_layers_of_one_tree_share_all_extents(
    fs: HostFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent is walked once to know what it holds: never with a note of its commit."""
    with Store.open(fs.fresh("held") / "store", driver="btrfs", fsync=False) as store:
        store.prepare("a")
        tree = Path(store.driver.tree(store.index.get("a").id))
        for number in range(50):
            (tree / f"f{number}").write_bytes(b"x" * 5000)
        store.commit("a", "A")
        id = store.index.get("A").id
        noted = store.driver.held(id)
        assert noted == store.driver.usage(id)
        assert noted == store.usage("A")
        os.unlink(f"{store.driver.directory(id)}/cowfs-held")
        assert store.driver.held(id) == noted
        walked: list[str] = []

        def usage(id: str) -> Usage:
            walked.append(id)
            return Usage()

        monkeypatch.setattr(store.driver, "usage", usage)
        store.fork("A", "b", "c")
        assert walked == []


def test_subvolumes_inside_a_layer_go_with_it(fs: HostFs) -> None:
    with Store.open(fs.fresh("inner") / "store", driver="btrfs", fsync=False) as store:
        store.prepare("a")
        tree = Path(store.driver.tree(store.index.get("a").id))
        (tree / "dir").mkdir()
        for at, name in ((tree, b"one"), (tree / "dir", b"two"), (tree / "one", b"three")):
            fd = os.open(at, os.O_RDONLY)
            btrfs.create(fd, name)
            os.close(fd)
        (tree / "one" / "three" / "file").write_text("x")
        store.remove("a")
        assert os.listdir(f"{store.root}/layers") == []
        assert [name for name in os.listdir(store.root) if name.startswith("rm-")] == []


def test_a_copied_store_of_plain_directories_can_be_read_and_emptied(fs: HostFs) -> None:
    """cp -a makes directories of subvolumes: check says so, and remove deletes them all the same."""
    place = fs.fresh("copied")
    with Store.open(place / "store", driver="btrfs", fsync=False) as store:
        store.prepare("a")
        (Path(store.driver.tree(store.index.get("a").id)) / "file").write_text("x")
    subprocess.run(["cp", "-a", place / "store", place / "copy"], check=True)
    with Store.open(place / "copy", driver="btrfs", fsync=False) as store:
        assert ["no subvolume" in problem.what for problem in store.check().problems] == [True]
        store.remove("a")
        assert os.listdir(f"{store.root}/layers") == []


# -- limits


def write_until_full(path: Path, most: int) -> int:
    """Bytes that went into a file before the limit, which is synced: at most ``most`` are tried."""
    written = 0
    with path.open("wb", buffering=0) as file:
        try:
            while written < most:
                written += file.write(b"x" * 65536)
        except OSError as error:
            assert error.errno == errno.EDQUOT
    return written


def test_a_kernel_mount_holds_its_limit_without_the_parents_data(fs: HostFs) -> None:
    """Simple quotas: nothing of the base counts, what is overwritten does, and what is deleted is free again."""
    place = fs.fresh("limit")
    target = place / "mnt"
    target.mkdir()
    with Store.open(place / "store", driver="btrfs", fsync=False) as store:
        store.prepare("a")
        (Path(store.driver.tree(store.index.get("a").id)) / "base").write_bytes(os.urandom(8 << 20))
        store.commit("a", "A")
        (record,) = store.prepare("work", "A", size="2M")
        assert record.type == "bind"
        with store.mount("work", target, mount_type="kernel"):
            for _ in range(3):
                assert (2 << 20) - (256 << 10) <= write_until_full(target / "big", 4 << 20) <= 2 << 20
                (target / "big").unlink()
            with (target / "base").open("r+b", buffering=0) as file, pytest.raises(OSError) as caught:
                for _ in range(64):
                    file.write(os.urandom(65536))
            assert caught.value.errno == errno.EDQUOT
            assert (target / "base").stat().st_size == 8 << 20
            assert store.limit("work", size="6M").bytes == 6 << 20  # under the mount
            assert write_until_full(target / "more", 3 << 20) >= 3 << 20
            with pytest.raises(FailedPrecondition, match="no inodes"):
                store.limit("work", inodes=5)
            assert store.limit("work", size=None).bytes is None
            assert write_until_full(target / "most", 8 << 20) == 8 << 20
        assert store.usage("work").bytes >= 11 << 20
        store.commit("work", "done")
        assert store.check(content=True).problems == []


def test_whoever_mounts_holds_the_limit(fs: HostFs) -> None:
    """The server has its own measure and ENOSPC; the kernel mount after it has the quota again."""
    place = fs.fresh("both")
    target = place / "mnt"
    target.mkdir()
    with Store.open(place / "store", driver="btrfs", fsync=False) as store:
        store.prepare("a", size="1M")
        for _ in range(2):
            with store.mount("a", target):
                host = os.statvfs(target)
                assert host.f_blocks * host.f_frsize == 1 << 20
                (target / "exact").write_bytes(b"x" * (1 << 20))
                with pytest.raises(OSError) as caught:
                    (target / "more").write_bytes(b"x" * 4096)
                assert caught.value.errno == errno.ENOSPC
                for name in ("exact", "more"):
                    (target / name).unlink(missing_ok=True)
            with store.mount("a", target, mount_type="kernel"):
                assert store.mounts("a", mount_type="fuse")[0].type.startswith("fuse.")  # takes no limit away
                assert write_until_full(target / "big", 2 << 20) < 1 << 20
                (target / "big").unlink()


def test_what_a_quota_cannot_hold_is_served(fs: HostFs) -> None:
    with Store.open(fs.fresh("small") / "store", driver="btrfs", fsync=False) as store:
        for key, words in (("few", {"inodes": 10}), ("tiny", {"size": "64K"})):
            (record,) = store.prepare(key, **words)
            assert record.type == "fuse.cowfs-overlayfs"
            with pytest.raises(Unsupported, match="quotas count"):
                store.mounts(key, mount_type="kernel")


def test_info_says_who_holds_limits_and_what_else_could_be_had(fs: HostFs) -> None:
    with Store.open(fs.fresh("info") / "store", driver="btrfs", fsync=False) as store:
        told = store.describe()
        assert "quotas" in told["limits"]
        assert "subvolumes" in told["why"]
        assert {"overlay", "vfs"} <= set(store.alternatives())
        done = run_module("cowfs", "info", "--root", store.root)
        assert "btrfs's quotas" in done.stdout
        assert "other driver:  overlay" in done.stdout


def test_classic_quotas_bound_what_a_layer_holds_alone(tmp_path: Path, fs: HostFs) -> None:
    """Of a file system that somebody else counts the classic way, as kernels before 6.7 do."""
    where = hostfs.make_image("btrfs", tmp_path)
    try:
        if subprocess.run(["btrfs", "quota", "enable", where], check=False, capture_output=True).returncode:
            pytest.skip("no btrfs command")
        with Store.open(where / "store", driver="btrfs", fsync=False) as store:
            assert "classic" in store.describe()["limits"]
            store.prepare("a")
            (Path(store.driver.tree(store.index.get("a").id)) / "base").write_bytes(os.urandom(8 << 20))
            store.commit("a", "A")
            store.prepare("work", "A", size="2M")
            (where / "mnt").mkdir()
            with store.mount("work", where / "mnt", mount_type="kernel"):
                assert (1 << 20) < write_until_full(where / "mnt" / "big", 4 << 20) <= 2 << 20
    finally:
        subprocess.run(["umount", "-l", where], check=False)


# -- live snapshots


@pytest.mark.parametrize("mount_type", ["kernel", "fuse", None])
def test_a_snapshot_under_a_writer_holds_all_that_was_written_before_it(mount_type: str | None, fs: HostFs) -> None:
    """Mounted by the kernel, by the server, or not at all; the mount goes on in its own layer."""
    place = fs.fresh("live")
    target = place / "mnt"
    target.mkdir()
    with Store.open(place / "store", driver="btrfs", fsync=False) as store, ExitStack() as held:
        store.prepare("k")
        tree = Path(store.driver.tree(store.index.get("k").id))
        if mount_type is not None:
            held.enter_context(store.mount("k", target, mount_type=mount_type))
            tree = target
        with (tree / "log").open("w+") as log, (tree / "map").open("w+b") as mapped:
            mapped.truncate(8192)
            memory = mmap.mmap(mapped.fileno(), 8192)
            for number in range(4):
                log.write(f"{number}\n")
                log.flush()
                memory[:5] = b"map-%d" % number
                (tree / f"file-{number}").write_text("x" * 5000)
                store.snapshot("k", f"s{number}")
            memory.close()
        id = store.index.get("k").id
        for number in range(4):
            seen = Path(store.driver.tree(store.index.get(f"s{number}").id))
            assert (seen / "log").read_text() == "".join(f"{each}\n" for each in range(number + 1))
            assert (seen / "map").read_bytes()[:5] == b"map-%d" % number
            assert sorted(os.listdir(seen)) == sorted(["log", "map", *(f"file-{each}" for each in range(number + 1))])
            assert [change.path for change in store.diff(f"s{number}") if change.kind == "added"][-1:] != []
            assert store.index.get(f"s{number}").id != id
        assert [info.name for info in store.chain("k")] == ["k", "s3", "s2", "s1", "s0"]
        assert store.usage("s3").inodes == 1
        assert store.usage("k").inodes == 0
        held.close()
        (Path(store.driver.tree(id)) / "after").touch()
        assert [change.path for change in store.diff("k") if change.type != "dir"] == [b"after"]
        store.commit("k", "done")
        assert store.check(content=True).problems == []


def test_the_limit_counts_what_live_snapshots_hold(fs: HostFs) -> None:
    place = fs.fresh("held")
    target = place / "mnt"
    target.mkdir()
    with Store.open(place / "store", driver="btrfs", fsync=False) as store:
        store.prepare("k", size="2M")
        with store.mount("k", target):
            (target / "first").write_bytes(b"x" * (1 << 20))
            store.snapshot("k", "one")
            (target / "second").write_bytes(b"x" * (512 << 10))
            with pytest.raises(OSError) as caught:
                (target / "third").write_bytes(b"x" * (1 << 20))
            assert caught.value.errno == errno.ENOSPC
            (target / "third").unlink(missing_ok=True)
            assert store.usage("k").bytes == 512 << 10
        with store.mount("k", target, mount_type="kernel"):
            assert write_until_full(target / "third", 2 << 20) <= 512 << 10


def test_a_kernel_mount_is_not_rolled_back(fs: HostFs) -> None:
    place = fs.fresh("back")
    (place / "mnt").mkdir()
    with Store.open(place / "store", driver="btrfs", fsync=False) as store:
        store.prepare("k")
        store.snapshot("k", "one")
        with (
            store.mount("k", place / "mnt", mount_type="kernel"),
            pytest.raises(FailedPrecondition, match="a mount of the kernel goes on"),
        ):
            store.rollback("k", "one")
        store.rollback("k", "one")


def test_a_rollback_under_a_mount_shows_the_old_tree_and_nothing_else(fs: HostFs) -> None:
    """Descriptors and directories of before are stale, never other data; the mount, its limit and live snapshots go on."""
    place = fs.fresh("under")
    top = place / "mnt"
    top.mkdir()
    with Store.open(place / "store", driver="btrfs", fsync=False) as store:
        store.prepare("k")
        with store.mount("k", top):
            (top / "base").write_bytes(b"b" * (1 << 20))
        store.commit("k", "base")
        store.prepare("k", "base", size="2M")
        with store.mount("k", top):
            (top / "dir").mkdir()
            (top / "dir" / "file").write_text("old")
            os.setxattr(top / "dir" / "file", "user.one", b"1")
            os.chmod(top, 0o750)
            store.snapshot("k", "one")
            former = store.index.get("k").id
            (top / "dir" / "file").write_text("newer, and longer")
            (top / "dir").rename(top / "moved")
            (top / "more").write_bytes(b"m" * (1 << 20))
            (top / "base").unlink()
            os.chmod(top, 0o700)
            assert not (top / "never").exists()  # the kernel remembers that
            held = os.open(top / "moved" / "file", os.O_RDWR | os.O_APPEND)
            inside = os.open(top / "moved", os.O_RDONLY | os.O_DIRECTORY)
            for _ in range(2):
                store.rollback("k", "one")
                assert sorted(os.listdir(top)) == ["base", "dir"]
                assert stat.S_IMODE(top.stat().st_mode) == 0o750
                assert (top / "dir" / "file").read_text() == "old"
                assert os.getxattr(top / "dir" / "file", "user.one") == b"1"
                assert (top / "base").read_bytes() == b"b" * (1 << 20)
                assert not (top / "more").exists() and not (top / "moved").exists()
                for use in (lambda: os.write(held, b"x"), lambda: os.stat("file", dir_fd=inside)):
                    with pytest.raises(OSError) as caught:
                        use()
                    assert caught.value.errno == errno.ESTALE
                assert store.usage("k").bytes == 0
                (top / "dir" / "after").write_text("after")
                with pytest.raises(OSError) as caught:
                    (top / "big").write_bytes(b"x" * (3 << 20))
                assert caught.value.errno == errno.ENOSPC
            os.close(held)
            os.close(inside)
            assert not os.path.exists(store.driver.directory(former))
            store.rollback("k", "base", keep="kept")
            assert os.listdir(top) == ["base"]
            (top / "last").write_text("last")
            store.snapshot("k", "two")
        store.commit("k", "done")
        assert [change.path for change in store.diff("base", "done") if change.path] == [b"last"]
        assert {change.path for change in store.diff("one", "kept")} >= {b"big", b"dir/after"}
        assert store.check(content=True).problems == []


LIVE_VERBS: dict[str, Callable[[Store], object]] = {
    "snapshot": lambda store: store.snapshot("k", "new"),
    "rollback": lambda store: store.rollback("k", "base"),
}


@pytest.mark.parametrize("verb", LIVE_VERBS)
def test_a_killed_live_verb_leaves_the_state_before_or_after(verb: str, fs: HostFs) -> None:
    killed = 0
    for at in range(20):
        root = fs.fresh("kill") / "store"
        with Store.open(root, driver="btrfs", fsync=False) as store:
            store.prepare("k")
            (Path(store.driver.tree(store.index.get("k").id)) / "file").write_text("base")
            store.commit("k", "base")
            store.prepare("k", "base")
            (Path(store.driver.tree(store.index.get("k").id)) / "file").write_text("later")
        pid = os.fork()
        if pid == 0:
            passed = 0

            def kill(name: str, at: int = at) -> None:
                nonlocal passed
                if passed == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1

            with Store.open(root, fsync=False) as child:
                faults.hook = kill
                LIVE_VERBS[verb](child)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        with Store.open(root, fsync=False) as store:
            file = Path(store.driver.tree(store.index.get("k").id)) / "file"
            if verb == "snapshot":
                assert file.read_text() == "later"
                assert store.stat("k").parent == ("new" if store.exists("new") else "base")
            else:
                assert file.read_text() in ("base", "later")
                assert store.stat("k").parent == "base"
            store.gc()
            assert store.check(content=True).problems == []
            assert len(os.listdir(root / "layers")) == len(list(store.walk()))
            assert not [name for name in os.listdir(root) if name.startswith(("new-", "rm-", "live-"))]
            file.write_text("goes on")
            store.commit("k", "done")
            assert store.check(content=True).problems == []
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    else:
        pytest.fail("it never came to its end")
    assert killed >= 4
