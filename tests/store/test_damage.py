"""Damaged snapshots are named, intact ones stay usable, and nothing that a snapshot needs is ever removed."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from cowfs.errors import Corrupt, CowfsError, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.index import schema as index_module
from cowfs.store import Store
from cowfs.sys import mounts

from .conftest import tree_path


def fill(root: Path, driver: str = "overlay") -> None:
    """base < middle < top, and other, which is apart; an active snapshot on top."""
    with Store.open(root, driver=driver, fsync=False) as store:
        for name, parent in (("base", None), ("middle", "base"), ("top", "middle"), ("other", None)):
            store.prepare("k", parent)
            (tree_path(store, "k") / name).write_text(name * 10)
            (tree_path(store, "k") / "d").mkdir(exist_ok=True)
            (tree_path(store, "k") / "d" / name).write_text(name)
            store.commit("k", name, digests=True)
        store.prepare("work", "top")


def sql(root: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(root / "index.db")
    with connection:
        connection.execute(statement, values)
    connection.close()


def layer_of(root: Path, name: str) -> Path:
    with Store.open(root, fsync=False) as store:
        return Path(store.driver.directory(store.index.get(name).id))


def test_a_store_copied_while_it_is_open_and_written_is_whole(space: Path, driver: str) -> None:
    root = space / "store"
    fill(root, driver)
    with Store.open(root, fsync=False) as store:
        store.prepare("more", "top")
        subprocess.run(["cp", "-a", str(root), str(space / "copy")], check=True)
    with Store.open(space / "copy", fsync=False) as copy:
        assert copy.check(content=True).damage == []
        copy.gc()
        assert copy.check(content=True).problems == []
        assert {change.path for change in copy.diff("base", "top")} == {
            b"d/middle",
            b"d/top",
            b"middle",
            b"top",
            b"",
            b"d",
        }
        copy.prepare("again", "top")
        (tree_path(copy, "again") / "new").write_text("x")
        copy.commit("again", "new")
        assert [change.path for change in copy.diff("new") if change.kind == "added"] == [b"new"]


def test_a_truncated_index_is_said_to_be_damaged_and_layers_are_untouched(space: Path) -> None:
    root = space / "store"
    fill(root)
    layers = sorted(os.listdir(root / "layers"))
    for size in (0, 100, 4096, 3 * 4096 + 17):
        copy = space / f"cut-{size}"
        shutil.copytree(root, copy, symlinks=True)
        for extra in ("index.db-wal", "index.db-shm"):
            if (copy / extra).exists():
                (copy / extra).unlink()
        os.truncate(copy / "index.db", size)
        with pytest.raises(CowfsError) as caught, Store.open(copy, fsync=False) as store:
            list(store.walk())
            store.check()
            store.diff("base", "top")
            store.commit("work", "done")
            raise Corrupt("nothing was noticed")
        assert "index" in str(caught.value)
        assert sorted(os.listdir(copy / "layers")) == layers


def test_a_store_without_its_index_is_not_made_anew(space: Path) -> None:
    root = space / "store"
    fill(root)
    for name in os.listdir(root):
        if name.startswith("index.db"):
            (root / name).unlink()
    with pytest.raises(Corrupt, match="index"):
        Store.open(root, fsync=False)


def test_a_missing_layer_is_named_quarantined_and_released_when_it_is_back(space: Path, driver: str) -> None:
    root = space / "store"
    fill(root, driver)
    layer = layer_of(root, "middle")
    os.rename(layer, space / "aside")
    with Store.open(root, fsync=False) as store:
        report = store.check()
        assert [(problem.kind, problem.name) for problem in report.damage] == [("layer", "middle")]
        assert layer.name in report.damage[0].what
        assert store.quarantined() == []
        store.check(repair=True)
        assert {name for name, _ in store.quarantined()} == {"middle", "top", "work"}
        for act in (lambda: store.prepare("x", "top"), lambda: store.commit("work", "done"), lambda: store.mounts("work"),
                    lambda: store.diff("top", "base")):  # fmt: skip
            with pytest.raises(Corrupt, match="quarantine"):
                act()
        store.prepare("fine", "base")
        (tree_path(store, "fine") / "f").write_text("f")
        store.commit("fine", "FINE")
        assert store.exists("middle")
        os.rename(space / "aside", layer)
        store.check(repair=True)
        assert store.quarantined() == []
        store.commit("work", "done")


def test_directories_that_no_record_knows_are_found_and_removed_by_repair_only(space: Path) -> None:
    root = space / "store"
    fill(root)
    (root / "layers" / "lost" / "fs").mkdir(parents=True)
    (root / "layers" / "lost" / "fs" / "file").write_text("x")
    (root / "new-gone").mkdir()
    os.chmod(root / "layers" / "lost" / "fs", 0)
    with Store.open(root, fsync=False) as store:
        assert not (root / "new-gone").exists()  # opening knows it for garbage
        assert [problem.what.split(":")[0] for problem in store.check().problems] == ["layers/lost"]
        assert store.check().damage == []
        assert (root / "layers" / "lost").exists()
        assert [problem.repaired for problem in store.check(repair=True).problems] == ["deleted"]
        assert not (root / "layers" / "lost").exists()
        assert store.check(content=True).problems == []


def test_a_layer_under_construction_is_nobodys_garbage(space: Path) -> None:
    from cowfs.store.staging import Staged

    root = space / "store"
    fill(root)
    with Store.open(root, fsync=False) as store:
        building = Staged(store.driver, store.index, "buildingxx")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with Store.open(root, fsync=False) as other:
                    other.gc()
                    other.check(repair=True)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert (root / "new-buildingxx").is_dir()
        building.close(keep=False)
        assert not (root / "new-buildingxx").exists()


def test_lost_records_are_rebuilt_from_an_intact_layer(space: Path, driver: str) -> None:
    root = space / "store"
    fill(root, driver)
    with Store.open(root, fsync=False) as store:
        before = [str(change) for change in store.diff("base", "top")]
        digest = store.index.get("other").root[1][-32:]  # type: ignore[index]
    sql(root, "DELETE FROM records WHERE digest = ?", digest)
    with Store.open(root, fsync=False) as store:
        assert [(problem.kind, problem.name) for problem in store.check().damage] == [("records", "other")]
        with pytest.raises(Corrupt):
            list(store.diff("other"))
        assert [str(change) for change in store.diff("base", "top")] == before
        store.check(repair=True)
        # digests of files are only known from the archive or the commit that made them: without them, quarantine
        healed = not store.quarantined()
        if healed:
            assert {change.path for change in store.diff("other")} >= {b"other"}
        else:
            assert [name for name, _ in store.quarantined()] == ["other"]


def test_a_record_that_was_tampered_with_is_noticed(space: Path) -> None:
    root = space / "store"
    fill(root)
    sql(root, "UPDATE records SET data = CAST(data || x'00' AS BLOB) WHERE rowid = (SELECT max(rowid) FROM records)")
    with Store.open(root, fsync=False) as store:
        assert [problem.kind for problem in store.check().damage] == ["records"]


def test_a_file_that_rotted_is_found_by_its_digest(space: Path, driver: str) -> None:
    root = space / "store"
    fill(root, driver)
    path = layer_of(root, "middle") / "fs" / "d" / "middle"
    data = path.read_text()
    path.write_text(data.swapcase())
    with Store.open(root, fsync=False) as store:
        assert store.check().problems == []
        (problem,) = store.check(content=True).problems
        assert (problem.kind, problem.name) == ("content", "middle")
        assert "d/middle" in problem.what
        path.write_text(data)
        assert store.check(content=True).problems == []
        os.unlink(path)
        (problem,) = store.check(content=True).problems
        assert (problem.kind, problem.name) == ("content", "middle")


def test_another_time_stamp_is_no_damage(space: Path, driver: str) -> None:
    root = space / "store"
    fill(root, driver)
    layer = layer_of(root, "middle")
    os.utime(layer / "fs" / "d" / "middle", (1, 1))
    os.utime(layer, (1, 1))
    with Store.open(root, fsync=False) as store:
        assert store.check(content=True).problems == []


def test_a_newer_format_is_refused_clearly(space: Path) -> None:
    root = space / "store"
    fill(root)
    sql(root, "PRAGMA user_version = 999")
    with pytest.raises(Unsupported, match=r"999.*upgrade"):
        Store.open(root, fsync=False)


def test_an_older_format_is_migrated_in_one_transaction(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = space / "store"
    fill(root)
    monkeypatch.setattr(index_module, "FORMAT", index_module.FORMAT + 1)
    steps = {
        index_module.FORMAT
        - 1: "CREATE TABLE later (x INTEGER);\nINSERT INTO later VALUES (7);\nSELECT nothing FROM nowhere;"
    }
    monkeypatch.setattr(index_module, "MIGRATIONS", steps)
    with pytest.raises(CowfsError):
        Store.open(root, fsync=False)
    steps[index_module.FORMAT - 1] = "CREATE TABLE later (x INTEGER);\nINSERT INTO later VALUES (7);\n"
    with Store.open(root, fsync=False) as store:
        with sqlite3.connect(root / "index.db") as connection:
            assert connection.execute("SELECT x FROM later").fetchall() == [(7,)]
        connection.close()
        assert store.check().problems == []


def test_a_file_that_is_no_index_is_refused(space: Path) -> None:
    (space / "store").mkdir()
    (space / "store" / "index.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Corrupt):
        Store.open(space / "store", fsync=False)
    connection = sqlite3.connect(space / "other.db")
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    (space / "second").mkdir()
    os.rename(space / "other.db", space / "second" / "index.db")
    with pytest.raises(Corrupt, match="not the index"):
        Store.open(space / "second", fsync=False)


def test_a_store_keeps_its_driver_and_refuses_another(space: Path) -> None:
    fill(space / "store", "vfs")
    with Store.open(space / "store") as store:
        assert store.driver.name == "vfs"
    with pytest.raises(InvalidArgument, match="vfs"):
        Store.open(space / "store", driver="overlay")
    with pytest.raises(NotFound):
        Store.open(space / "new", driver="nosuch")


def test_a_directory_with_something_else_in_it_is_no_store(space: Path) -> None:
    (space / "mine").mkdir()
    (space / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InvalidArgument):
        Store.open(space / "mine")
    with pytest.raises(NotFound):
        Store.open(space / "nowhere", create=False)
    assert os.listdir(space / "mine") == ["thesis.txt"]


def test_a_store_is_private_whatever_the_umask(space: Path) -> None:
    old = os.umask(0)
    try:
        Store.open(space / "store", fsync=False).close()
    finally:
        os.umask(old)
    assert os.stat(space / "store").st_mode & 0o777 == 0o700


def test_an_active_snapshot_in_use_is_told_with_its_holder(space: Path) -> None:
    fill(space / "store")
    with (
        Store.open(space / "store", fsync=False) as store,
        store.paths("work"),
        pytest.raises(FailedPrecondition, match=str(os.getpid())),
    ):
        store.commit("work", "done")


def test_a_store_on_a_readonly_file_system_is_read(space: Path, can_mount: None) -> None:
    """Everything that only looks works; what would write says that it cannot."""
    disk = space / "disk"
    disk.mkdir()
    mounts.mount("tmpfs", str(disk), "tmpfs", 0, "size=16m")
    try:
        fill(disk / "store")
        mounts.mount("", str(disk), "", mounts.MS_REMOUNT | mounts.MS_RDONLY)
        with Store.open(disk / "store", create=False) as store:
            assert [info.name for info in store.walk()] == ["base", "middle", "top", "other", "work"]
            assert [change.path for change in store.diff("top")] == [b"", b"d", b"d/top", b"top"]
            assert store.check(content=True).problems == []
            assert store.usage("work").inodes == 0
            store.export("top", space / "top.tar")
            with pytest.raises(OSError, match="read-only") as refused:
                store.prepare("more", "top")
            assert refused.value.errno == errno.EROFS
    finally:
        mounts.umount(str(disk), mounts.MNT_DETACH)


def test_a_readonly_store_with_a_log_beside_it_is_refused(space: Path, can_mount: None) -> None:
    """The last writes are in the log, which cannot be used there."""
    disk = space / "disk"
    disk.mkdir()
    mounts.mount("tmpfs", str(disk), "tmpfs", 0, "size=16m")
    try:
        fill(disk / "store")
        (disk / "store" / "index.db-wal").write_bytes(b"x" * 100)
        mounts.mount("", str(disk), "", mounts.MS_REMOUNT | mounts.MS_RDONLY)
        with pytest.raises(FailedPrecondition, match="make it writable once"):
            Store.open(disk / "store", create=False)
    finally:
        mounts.umount(str(disk), mounts.MNT_DETACH)
