"""The zfs driver passes the conformance suite on a pool of zfs-fuse, and keeps what only it promises."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import users, zpool

from cowfs.driver import registry
from cowfs.errors import CowfsError, FailedPrecondition, Unsupported
from cowfs.store import Store
from cowfs.testing import DriverSuite
from cowfs.testing.trees import differences, tree_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="datasets are mounted by root")
MIB = 1 << 20


@pytest.fixture
def place(pool: Path) -> Path:
    """A fresh directory on the pool."""
    path = pool / "place"
    path.mkdir()
    return path


@pytest.fixture
def store(place: Path) -> Iterator[Store]:
    with Store.open(place / "store", driver="zfs", fsync=False) as store:
        yield store


class TestZfs(DriverSuite):
    driver = "zfs"
    chain_length = 16

    @pytest.fixture
    def place(self, place: Path) -> Path:
        return place


def datasets(pool: Path) -> set[str]:
    """The layers that there are datasets of."""
    names = zpool.run("zfs", "list", "-H", "-o", "name", "-r", pool.name).split()
    return {name.rpartition("/cowfs-")[2] for name in names if "/" in name}


def tree_path(store: Store, key: str) -> Path:
    id = store.index.get(key).id
    store.driver.plan(id, [])
    return Path(store.driver.tree(id))


def test_another_file_system_is_refused_in_one_line(space: Path) -> None:
    with pytest.raises(Unsupported, match="is on no zfs dataset"):
        Store.open(space / "store", driver="zfs")


def test_an_ordinary_user_gets_one_line(ordinary_user: int, place: Path) -> None:
    os.chown(place, ordinary_user, ordinary_user)
    for above in place.parents:
        if "pytest-" in str(above) and not os.stat(above).st_mode & 0o001:
            above.chmod(0o755)
    python, environment = users.interpreter()
    command = users.command_as([python, "-m", "cowfs", "init", "--root", str(place / "store"), "--driver", "zfs"])
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "only root may mount datasets" in done.stderr


def test_a_store_without_its_daemon_gets_one_line(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "zfs").write_text("#!/bin/sh\necho 'connect: No such file or directory' >&2\nexit 1\n")
    (tmp_path / "zfs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="connect: No such file"):
        store.prepare("a")
    probe = registry.load("zfs").probe(store.root)
    assert not probe.usable
    assert "connect" in probe.reasons[0]


def test_features_are_probed(store: Store) -> None:
    """zfs-fuse 0.7 has neither; another version may."""
    try:
        os.setxattr(store.root, "user.probe", b"x")
        has = True
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        has = False
    assert store.driver.capabilities.xattrs == has
    os.utime(store.root, ns=(10**18 + 5, 10**18 + 7))
    assert bool(store.driver.capabilities.time_step) == (os.stat(store.root).st_mtime_ns % 10 == 0)
    assert ("xattrs" in store.driver.explain().get("files without", "")) != has


def test_what_the_pool_cannot_hold_is_refused_in_one_line(store: Store) -> None:
    if store.driver.capabilities.xattrs:
        pytest.skip("this zfs has xattrs")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("ping")
        info.pax_headers = {"SCHILY.xattr.security.capability": "\x01\0\0\x02\0 \0\0\0\0\0\0\0\0\0\0\0\0\0\0"}
        tar.addfile(info)
    store.prepare("a")
    with pytest.raises(CowfsError) as caught:
        store.apply("a", io.BytesIO(out.getvalue()))
    assert "security.capability" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [2 * MIB, 5 * MIB])
def test_a_quota_holds_what_a_kernel_mount_writes(store: Store, place: Path, size: int) -> None:
    store.prepare("base")
    (tree_path(store, "base") / "inherited").write_bytes(os.urandom(4 * MIB))
    store.commit("base", "B")
    store.prepare("a", "B", size=size)
    (place / "mnt").mkdir()
    with store.mount("a", place / "mnt", mount_type="kernel"):
        assert os.statvfs(place / "mnt").f_bavail * os.statvfs(place / "mnt").f_frsize <= size
        written = 0
        with (place / "mnt" / "big").open("wb", buffering=0) as file, pytest.raises(OSError) as caught:
            while written < 2 * size:
                written += file.write(os.urandom(65536))
        assert caught.value.errno in (errno.EDQUOT, errno.ENOSPC)
        assert size * 3 // 4 <= written <= size + MIB
        assert (place / "mnt" / "inherited").stat().st_size == 4 * MIB
        os.truncate(place / "mnt" / "big", 0)  # zfs may refuse to unlink at a full quota
        patiently(lambda: os.unlink(place / "mnt" / "big"))
        store.limit("a", size=3 * size)
        patiently(lambda: (place / "mnt" / "big").write_bytes(os.urandom(size)))
    with store.mount("a", place / "mnt"):  # by the server, which counts by itself
        assert os.statvfs(place / "mnt").f_blocks * os.statvfs(place / "mnt").f_frsize == 3 * size
    assert (
        zpool.run("zfs", "get", "-Hp", "-o", "value", "quota", f"{place.parent.name}/cowfs-{store.index.get('a').id}")
        == "0\n"
    )


def patiently(act: Callable[[], object]) -> None:
    """Again until the quota lets it pass: what was deleted is free after the pool's next transaction group."""
    end = time.monotonic() + 60
    while True:
        try:
            act()
            return
        except OSError as error:
            assert error.errno == errno.EDQUOT
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_limit_on_inodes_is_no_matter_for_a_quota(store: Store) -> None:
    store.prepare("a", inodes=10)
    with pytest.raises(Unsupported, match="count no inodes"):
        store.mounts("a", mount_type="kernel")
    assert store.mounts("a")[0].type == "fuse.cowfs-overlayfs"


def test_an_edit_within_the_second_of_the_clone_is_seen(store: Store) -> None:
    """Where times have no fractions, a file that was changed right after the clone has the time that it had before."""
    for number in range(6):
        store.prepare("base")
        (tree_path(store, "base") / "file").write_text("aaaa")
        os.utime(tree_path(store, "base") / "file", (1, 1))
        store.commit("base", f"base{number}")
        store.prepare("a", f"base{number}")
        path = tree_path(store, "a") / "file"
        path.write_text("bbbb")
        os.utime(path, (1, 1))
        time.sleep(0.15)
        store.commit("a", f"a{number}")
        assert [(change.path, change.what) for change in store.diff(f"a{number}") if change.path] == [
            (b"file", frozenset({"content"}))
        ]


def test_an_archive_that_was_changed_within_its_second_is_not_believed(store: Store) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"aaaa"))
    for number, edit in enumerate((False, True)):
        store.prepare("a")
        applied = store.apply("a", io.BytesIO(out.getvalue()))
        if edit:
            (tree_path(store, "a") / "file").write_text("bbbb")
            os.utime(tree_path(store, "a") / "file", (0, 0))
        made = store.commit("a", f"A{number}")
        assert (store.index.get(made.name).diff_id == applied.diff_id) != edit
    (change,) = (change for change in store.diff("A0", "A1") if change.path)
    assert (change.path, change.what) == (b"file", frozenset({"content"}))


def test_what_is_open_is_removed_by_a_later_sweep(store: Store, pool: Path) -> None:
    store.prepare("a")
    path = tree_path(store, "a") / "file"
    path.write_text("content")
    id = store.index.get("a").id
    with path.open() as file:
        store.remove("a")
        assert not store.exists("a")
        assert file.read() == "content"
        assert id in datasets(pool)
    store.gc()
    assert id not in datasets(pool)
    assert os.listdir(f"{store.root}/layers") == []
    assert [name for name in os.listdir(store.root) if name.startswith("rm-")] == []


def test_datasets_without_a_directory_are_garbage(store: Store, pool: Path, place: Path) -> None:
    """As a killed process leaves one whose program went on; those of another store on the dataset are not ours."""
    store.prepare("a")
    for name, root in (("stray", store.root), ("other", f"{place}/elsewhere")):
        where = f"mountpoint={root}/new-{name}/vol"
        zpool.run("zfs", "create", "-o", where, "-o", "canmount=noauto", f"{pool.name}/cowfs-{name}")
    store.gc()
    assert datasets(pool) == {store.index.get("a").id, "other"}
    assert [name for name in os.listdir(store.root) if name.startswith(("new-", "rm-"))] == []
    assert store.check().problems == []


def test_trees_that_nobody_uses_are_unmounted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import cowfs_drivers.zfs

    monkeypatch.setattr(cowfs_drivers.zfs, "_IDLE", 4)
    parent = None
    for number in range(12):
        store.prepare("a", parent)
        with store.driver.open_tree(store.index.get("a").id) as fd:
            os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        parent = store.commit("a", f"c{number}").name
    with open("/proc/self/mounts", encoding="utf-8") as file:
        assert sum(f"{store.root}/layers/" in line for line in file) <= 6
    assert store.check(content=True).problems == []
    with store.driver.open_tree(store.index.get("c11").id) as fd:
        assert len(os.listdir(fd)) == 12


def test_a_store_that_was_moved_mounts_where_it_is(place: Path) -> None:
    with Store.open(place / "store", driver="zfs", fsync=False) as store:
        store.prepare("a")
        (tree_path(store, "a") / "file").write_text("content")
        store.commit("a", "A")
        subprocess.run(["umount", Path(store.driver.tree(store.index.get("A").id)).parent], check=True)
    os.rename(place / "store", place / "moved")
    with Store.open(place / "moved", fsync=False) as store:
        store.prepare("b", "A")
        assert (tree_path(store, "b") / "file").read_text() == "content"
        assert str(tree_path(store, "A")).startswith(f"{place}/moved/")
        assert (tree_path(store, "A") / "file").read_text() == "content"


def test_another_mount_namespace_gets_one_line(store: Store, place: Path) -> None:
    store.prepare("a")
    (tree_path(store, "a") / "file").write_text("content")
    store.commit("a", "A")
    subprocess.run(["umount", Path(store.driver.tree(store.index.get("A").id)).parent], check=True)
    python, environment = users.interpreter()
    command = [
        "unshare",
        "-m",
        "--propagation",
        "private",
        python,
        "-m",
        "cowfs",
        "--root",
        store.root,
        "export",
        "A",
        "-",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"mount namespace" in done.stderr
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_processes_killed_at_any_moment_leave_what_gc_clears(
    place: Path, pool: Path, request: pytest.FixtureRequest
) -> None:
    """Also while a program of zfs is at work: the sweep waits for it."""
    rng = random.Random(request.config.getoption("--seed"))
    root = place / "store"
    with Store.open(root, driver="zfs", fsync=False) as store:
        store.prepare("a")
        (tree_path(store, "a") / "file").write_text("base")
        store.commit("a", "base")
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                with Store.open(root, fsync=False) as store:
                    for number in range(1000):
                        store.prepare("k", "base")
                        if number % 2:
                            store.commit("k", "k")
                        store.remove("k")
            finally:
                os._exit(1)
        time.sleep(0.05 + rng.random() * 0.3)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with Store.open(root, fsync=False) as store:
            if store.exists("k"):
                store.remove("k")
            store.gc()
            assert store.check().problems == []
            assert datasets(pool) == set(os.listdir(root / "layers")) == {store.index.get("base").id}
            assert [name for name in os.listdir(root) if name.startswith(("new-", "rm-"))] == []
            assert (tree_path(store, "base") / "file").read_text() == "base"


def test_random_histories_equal_plain_directories(place: Path, request: pytest.FixtureRequest, space: Path) -> None:
    """A model: for each snapshot a plain copy of what it must hold."""
    rng = random.Random(request.config.getoption("--seed"))
    (place / "mnt").mkdir()
    model: dict[str, Path] = {}
    with Store.open(place / "store", driver="zfs", fsync=False) as store:
        for step in range(25):
            parent = rng.choice([None, *model])
            store.prepare("a", parent)
            with store.mount("a", place / "mnt", mount_type=rng.choice(["kernel", None])):
                for _ in range(rng.randrange(8)):
                    _edit(rng, place / "mnt")
                plain = space / f"s{step}"
                subprocess.run(["cp", "-a", place / "mnt", plain], check=True)
            store.commit("a", f"s{step}")
            model[f"s{step}"] = plain
            if len(model) > 4 and rng.random() < 0.4:
                name = rng.choice(list(model))
                try:
                    store.remove(name)
                except FailedPrecondition:
                    continue
                shutil.rmtree(model.pop(name))
        for name, plain in model.items():
            with store.mount(name, place / "mnt", readonly=True):
                assert differences(tree_of(plain), tree_of(place / "mnt")) == []
        assert store.check(content=True).problems == []


def _edit(rng: random.Random, tree: Path) -> None:
    """One random change of a tree."""
    there = [path for path in tree.rglob("*") if not path.is_symlink()]
    at = rng.choice([tree, *(path for path in there if path.is_dir())])
    path = at / f"n{rng.randrange(6)}"
    match rng.randrange(7):
        case 0 if not os.path.lexists(path):
            path.mkdir()
        case 1 if not path.is_dir():
            path.write_bytes(os.urandom(rng.randrange(9000)))
        case 2 if not os.path.lexists(path):
            path.symlink_to("nowhere")
        case 3 if there:
            os.chmod(rng.choice(there), rng.choice([0o600, 0o755, 0o4711]))
        case 4 if there:
            victim = rng.choice(there)
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        case 5 if there:
            source = rng.choice(there)
            if path != source and source not in path.parents and not os.path.lexists(path):
                source.rename(path)
        case 6 if files := [one for one in there if one.is_file()]:
            if not os.path.lexists(path):
                os.link(rng.choice(files), path)


@pytest.mark.parametrize("driver", ["vfs", "overlay"])
def test_a_store_moves_to_zfs_and_back(place: Path, space: Path, driver: str) -> None:
    """Where the pool keeps no fractions of seconds, only if they may be cut; the old store stays in any case."""
    with Store.open(space / "old", driver=driver, fsync=False) as store:
        for name, parent in (("one", None), ("two", "one")):
            store.prepare("k", parent, labels={"a": name})
            tree = space / "tree"
            tree.mkdir(exist_ok=True)
            with store.mount("k", tree):
                (tree / name).write_text(name)
                (tree / "same").write_text(name)
                os.utime(tree / name, ns=(10**18, 10**18 + 5))
            store.commit("k", name)
        store.prepare("k", "two", size="10M")
        store.tag("t", "two", config="{}")
        before = [(row.name, row.kind, row.labels, row.created, row.updated, row.limit) for row in store.index.rows()]
    fine = True
    try:
        Store.migrate(space / "old", "zfs", place / "new", fsync=False)
    except Unsupported as error:
        fine = False
        assert "fractions of seconds" in str(error)
        assert "\n" not in str(error)
        Store.migrate(space / "old", "zfs", place / "new", cut_times=True, fsync=False)
    with Store.open(place / "new", fsync=False) as store:
        now = [(row.name, row.kind, row.labels, row.created, row.updated, row.limit) for row in store.index.rows()]
        assert sorted(now, key=str) == sorted(before, key=str)
        assert [tag.name for tag in store.tags()] == ["t"]
        assert (tree_path(store, "two") / "same").read_text() == "two"
        assert (tree_path(store, "one") / "same").read_text() == "one"
        assert os.stat(tree_path(store, "k") / "two").st_mtime_ns == 10**18 + (5 if fine else 0)
        assert store.check(content=True).problems == []
    Store.migrate(place / "new", driver, space / "back", fsync=False)
    with Store.open(space / "back", fsync=False) as store, store.mount("two", space / "tree", readonly=True):
        assert sorted(os.listdir(space / "tree")) == ["one", "same", "two"]
    try:
        Store.migrate(place / "new", "vfs", fsync=False)  # in place: the datasets go
    except Unsupported as error:  # zfs-fuse knows no RENAME_EXCHANGE
        assert "cannot exchange two directories" in str(error)
        assert [path.name for path in place.iterdir()] == ["new"]
    else:
        assert datasets(place.parent) == set()
