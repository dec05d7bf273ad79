"""The claims of the conformance suite that hold a driver to the invariants in :mod:`cowfs.driver.interface`."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from cowfs.errors import Unsupported
from cowfs.store import Store
from cowfs.sys import faults, files
from cowfs.testing.bench import MIB, Bench
from cowfs.testing.trees import differences, tree_of

__all__ = ["Promises"]


class Promises(Bench):
    """The invariants of the essay, one claim each."""

    def test_capabilities_are_true(self, store: Store, place: Path) -> None:
        can = store.driver.capabilities
        assert can.unprivileged or os.geteuid() == 0
        store.prepare("a", self.base(store))
        target = place / "mnt"
        target.mkdir(exist_ok=True)
        if can.kernel_mount:
            with store.mount("a", target, mount_type="kernel"):
                assert (target / "file").read_text() == "content\n"
        else:
            with pytest.raises((Unsupported, OSError)):
                store.mount("a", target, mount_type="kernel")
            assert not os.path.ismount(target)
        if can.live or can.snapshots:
            store.snapshot("a", "live")
            assert store.stat("a").parent == "live"
        else:
            with pytest.raises(Unsupported):
                store.snapshot("a", "live")
        (spec,) = store.mounts("a", mount_type="fuse")
        assert (f"row={can.row}" in spec.options) == bool(can.row)
        beneath = any("/layers/" in option for option in spec.options if option.startswith("lowerdir="))
        assert beneath != can.whole

    def test_copies_share_extents_where_the_driver_says_so(self, store: Store) -> None:
        self.layer(store, "base", None, lambda tree: (tree / "big").write_bytes(os.urandom(MIB)))
        store.prepare("child", "base")
        if not store.driver.capabilities.reflink:
            pytest.skip("this driver, or this host, copies data or nothing")
        where = []
        for name in ("base", "child"):
            with store.driver.open_tree(store.index.get(name).id) as tree:
                fd = os.open("big", os.O_RDONLY, dir_fd=tree)
                try:
                    where.append(files.extents(fd, sync=True))
                finally:
                    os.close(fd)
        if where[0] is None:
            pytest.skip("this file system does not tell where its data is")
        assert where[0]
        assert where[0] == where[1]

    def test_the_root_of_a_fresh_layer_is_its_parents(self, store: Store) -> None:
        def change(tree: Path) -> None:
            os.chmod(tree, 0o2751)
            if store.driver.capabilities.xattrs:
                os.setxattr(tree, "user.note", b"root")
            os.utime(tree, ns=(10**18 + 1, 10**18 + 2))

        self.layer(store, "base", None, change)
        with self.seen(store, "base", by="fuse") as tree:
            parent = tree_of(tree)["."]
        store.prepare("child", "base")
        with self.at(store, "child", by="fuse") as tree:
            assert tree_of(tree)["."] == parent

    @pytest.mark.parametrize("inodes", [100, None])
    def test_a_limit_holds_in_every_mount_that_is_described(
        self, store: Store, place: Path, inodes: int | None
    ) -> None:
        store.prepare("child", self.base(store), size=MIB, inodes=inodes)
        target = place / "mnt"
        target.mkdir(exist_ok=True)
        for mount_type in (None, "fuse", "kernel"):
            try:
                (record,) = store.mounts("child", mount_type=mount_type)
                made = store.mount("child", target, mount_type=mount_type)
            except Unsupported:
                assert mount_type == "kernel"
                assert not os.path.ismount(target)
                continue
            with made:
                with pytest.raises(OSError) as caught:
                    (target / "much").write_bytes(b"m" * 2 * MIB)
                assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
                os.unlink(target / "much")
            if not store.driver.capabilities.own_limit:
                assert record.type.startswith("fuse.")
                sizes = [int(option[5:]) for option in record.options if option.startswith("size=")]
                assert sizes
                assert sizes[0] >= MIB

    def test_freeze_can_be_repeated_and_changes_nothing_that_is_seen(self, store: Store) -> None:
        store.prepare("a", self.base(store))
        with self.at(store, "a") as tree:
            (tree / "dir" / "new").write_text("n")
            (tree / "file").write_text("changed")
        with self.at(store, "a", by="fuse") as tree:
            before = tree_of(tree)
        id = store.index.get("a").id
        store.driver.freeze(id)
        store.driver.freeze(id)
        with self.at(store, "a", by="fuse") as tree:
            assert differences(before, tree_of(tree)) == []
            (tree / "later").write_text("a crash in freeze leaves a layer that can be written")
        store.commit("a", "A")
        with self.seen(store, "A") as tree:
            assert (tree / "later").exists()

    def test_settle_leaves_a_mount_that_reads_and_writes_alone(self, store: Store) -> None:
        store.prepare("a", self.base(store))
        with self.at(store, "a", by="fuse") as tree, (tree / "file").open("r+") as file:
            file.write("CON")
            file.flush()
            os.fsync(file.fileno())
            id = store.index.get("a").id
            store.driver.settle(id)
            store.driver.settle(id)
            file.write("TENT")
            file.flush()
            assert (tree / "file").read_text() == "CONTENT\n"
        with self.at(store, "a", by="fuse") as tree:
            assert (tree / "file").read_text() == "CONTENT\n"

    def test_a_live_snapshot_holds_what_was_there_and_the_mount_goes_on(self, store: Store) -> None:
        if not (store.driver.capabilities.live or store.driver.capabilities.snapshots):
            pytest.skip("this driver's layers cannot be copied, or become lower ones, under a mount that goes on")
        store.prepare("a", self.base(store))
        with self.at(store, "a", by="fuse") as tree, (tree / "dir" / "file").open("r+") as file:
            (tree / "file").write_text("before")
            store.snapshot("a", "live")
            (tree / "file").write_text("after")
            file.write("ONE")
            file.flush()
            assert (tree / "hard").read_text() == "ONE\n"
            assert (tree / "file").read_text() == "after"
        with self.seen(store, "live") as seen:
            assert (seen / "file").read_text() == "before"
            assert (seen / "dir" / "file").read_text() == "one\n"
        assert store.check(content=True).problems == []

    def test_a_rollback_shows_the_ancestor_again(self, store: Store) -> None:
        if not store.driver.capabilities.live:
            pytest.skip("this driver's layers cannot become lower ones of a mount that goes on")
        store.prepare("a", self.base(store))
        with self.at(store, "a", by="fuse") as tree:
            before = tree_of(tree)
            (tree / "file").write_text("gone soon")
            os.unlink(tree / "fifo")
            os.chmod(tree, 0o711)
            os.setxattr(tree, "user.note", b"gone soon")
            store.rollback("a", "base")
            assert differences(before, tree_of(tree)) == []
            (tree / "file").write_text("goes on")
            assert (tree / "file").read_text() == "goes on"
        assert store.check(content=True).problems == []

    def test_a_rollback_of_what_is_not_mounted(self, store: Store) -> None:
        can = store.driver.capabilities
        if not (can.live or can.snapshots):
            pytest.skip("this driver has no rollback")
        store.prepare("a", self.base(store))
        with self.at(store, "a") as tree:
            (tree / "first").write_text("1")
        store.snapshot("a", "one")
        with self.at(store, "a") as tree:
            before = tree_of(tree)
            (tree / "file").write_text("gone soon")
            os.unlink(tree / "fifo")
        assert store.usage("a").inodes <= 1
        store.rollback("a", "one", keep="two")
        with self.at(store, "a") as tree:
            assert differences(before, tree_of(tree)) == []
            (tree / "goes").write_text("on")
        store.rollback("a", "base")
        with self.at(store, "a") as tree:
            assert not (tree / "first").exists()
        assert [info.name for info in store.chain("two")] == ["two", "one", "base"]
        store.commit("a", "done")
        assert store.check(content=True).problems == []

    @pytest.mark.parametrize("where", [point for point in faults.POINTS if point.startswith("create.")])
    def test_a_process_killed_in_create_leaves_all_or_nothing(self, store: Store, where: str) -> None:
        base = self.base(store)
        layers = set(os.listdir(f"{store.root}/layers"))
        store.close()
        pid = os.fork()
        if pid == 0:
            try:
                with Store.open(store.root, fsync=False) as child:
                    faults.hook = lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == where else None
                    child.prepare("child", base)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with Store.open(store.root, fsync=False) as again:
            if again.exists("child"):
                assert where == "create.committed"
                again.remove("child")
            assert [name for name in os.listdir(again.root) if name.startswith(("new-", "rm-"))] == []
            again.gc()  # of a layer whose record was lost
            assert set(os.listdir(f"{again.root}/layers")) == layers
            assert again.check().problems == []
            again.prepare("child", base)
            with self.at(again, "child") as tree:
                assert (tree / "file").read_text() == "content\n"

    def test_remove_can_be_repeated(self, store: Store) -> None:
        store.prepare("a", self.base(store))
        id = store.index.get("a").id
        store.remove("a")
        store.driver.remove(id)
        store.driver.remove(id)
        assert store.check().problems == []
