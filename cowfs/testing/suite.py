"""The conformance suite. Each method of :class:`DriverSuite` is one claim about any driver."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cowfs.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from cowfs.model import Change, Kind
from cowfs.store import Store
from cowfs.testing.bench import MIB
from cowfs.testing.promises import Promises
from cowfs.testing.trees import differences, tree_of

__all__ = ["DriverSuite"]


def _rows(changes: Iterator[Change]) -> list[tuple[str, str]]:
    """(kind, path) of changes, without directories that only have another time."""
    return [
        (change.kind, os.fsdecode(change.path))
        for change in changes
        if not (change.kind == "changed" and change.type == "dir" and change.what == {"mtime"})
    ]


class DriverSuite(Promises):
    """Claims about a driver; see the package for how to use it, and :class:`~cowfs.testing.bench.Bench` for its attributes."""

    # -- content

    def test_a_child_shows_its_parent_and_its_own_changes(self, store: Store) -> None:
        base = self.base(store)
        store.prepare("child", base)
        with self.at(store, "child") as tree:
            assert (tree / "file").read_text() == "content\n"
            assert os.readlink(tree / "link") == "file"
            assert stat.S_ISFIFO(os.lstat(tree / "fifo").st_mode)
            if store.driver.capabilities.xattrs:
                assert os.getxattr(tree / "file", "user.note") == b"kept"
            (tree / "new").write_text("mine")
        with self.at(store, "child") as tree:
            assert (tree / "new").read_text() == "mine"
        with self.seen(store, base) as tree:
            assert not (tree / "new").exists()

    def test_server_and_kernel_show_one_and_the_same_tree(self, store: Store) -> None:
        def change(tree: Path) -> None:
            os.rename(tree / "dir", tree / "moved")
            os.unlink(tree / "fifo")
            (tree / "file").write_text("other")

        second = self.layer(store, "second", self.base(store), change)
        with self.seen(store, second, by="fuse") as tree:
            one = tree_of(tree)
        with self.seen(store, second) as tree:
            assert differences(one, tree_of(tree)) == []

    def test_grandchildren_show_all_that_their_ancestors_did(self, store: Store) -> None:
        base = self.base(store)
        second = self.layer(store, "second", base, lambda tree: (tree / "second").write_text("2"))
        third = self.layer(store, "third", second, lambda tree: (tree / "file").write_text("changed"))
        with self.seen(store, third) as tree:
            assert (tree / "second").read_text() == "2"
            assert (tree / "file").read_text() == "changed"
            assert (tree / "dir" / "sub" / "deep").read_text() == "deep\n"
        with self.seen(store, second) as tree:
            assert (tree / "file").read_text() == "content\n"

    def test_siblings_do_not_see_each_other(self, store: Store) -> None:
        base = self.base(store)
        self.layer(store, "left", base, lambda tree: (tree / "file").write_text("left"))
        self.layer(store, "right", base, lambda tree: (tree / "file").unlink())
        with self.seen(store, "left") as tree:
            assert (tree / "file").read_text() == "left"
        with self.seen(store, "right") as tree:
            assert not (tree / "file").exists()

    def test_a_view_cannot_be_written(self, store: Store) -> None:
        store.view("look", self.base(store))
        with self.at(store, "look") as tree:
            for act in (lambda: (tree / "new").write_text("x"), lambda: os.unlink(tree / "file"),
                        lambda: os.chmod(tree / "file", 0o600), lambda: os.mkdir(tree / "d")):  # fmt: skip
                with pytest.raises(OSError) as caught:
                    act()
                assert caught.value.errno == errno.EROFS

    def test_a_view_without_parent_is_an_empty_tree(self, store: Store) -> None:
        store.view("nothing")
        with self.at(store, "nothing") as tree:
            assert os.listdir(tree) == []

    def test_deleted_files_stay_deleted_below_any_number_of_layers(self, store: Store) -> None:
        def delete(tree: Path) -> None:
            os.unlink(tree / "file")
            os.unlink(tree / "hard")

        # by the server: the kernel's overlayfs leaves the link count of the other name as it was
        second = self.layer(store, "second", self.base(store), delete, by="fuse")
        third = self.layer(store, "third", second, lambda tree: (tree / "other").write_text("x"))
        with self.seen(store, third) as tree:
            assert not os.path.lexists(tree / "file")
            if store.driver.capabilities.whole or store.driver.form.redirects:
                assert os.stat(tree / "dir" / "file").st_nlink == 1  # the user form cannot record that without the data
            assert sorted(os.listdir(tree)) == ["dir", "fifo", "link", "other"]

    def test_a_directory_removed_and_made_again_is_empty(self, store: Store) -> None:
        def again(tree: Path) -> None:
            for name in ("dir/sub/deep", "dir/file"):
                os.unlink(tree / name)
            os.rmdir(tree / "dir" / "sub")
            os.rmdir(tree / "dir")
            os.mkdir(tree / "dir")

        second = self.layer(store, "second", self.base(store), again)
        third = self.layer(store, "third", second, lambda tree: (tree / "dir" / "new").write_text("n"))
        with self.seen(store, third) as tree:
            assert os.listdir(tree / "dir") == ["new"]

    def test_renamed_files_and_directories_are_found_at_their_new_places(self, store: Store) -> None:
        def rename(tree: Path) -> None:
            os.rename(tree / "file", tree / "dir" / "renamed")
            os.rename(tree / "dir" / "sub", tree / "sub")
            os.rename(tree / "dir", tree / "elsewhere")

        second = self.layer(store, "second", self.base(store), rename)
        third = self.layer(store, "third", second, lambda tree: os.rename(tree / "elsewhere", tree / "dir"))
        with self.seen(store, third) as tree:
            assert (tree / "dir" / "renamed").read_text() == "content\n"
            assert (tree / "sub" / "deep").read_text() == "deep\n"
            assert sorted(os.listdir(tree / "dir")) == ["file", "renamed"]
            assert not os.path.lexists(tree / "elsewhere")

    def test_a_lower_file_moves_with_its_hard_link(self, store: Store) -> None:
        store.prepare("child", self.base(store))
        with self.at(store, "child", by="fuse") as tree:
            os.rename(tree / "hard", tree / "hard2")
            (tree / "hard2").write_text("through one name")
            assert (tree / "dir" / "file").read_text() == "through one name"
            assert os.stat(tree / "hard2").st_ino == os.stat(tree / "dir" / "file").st_ino
        store.commit("child", "second")
        with self.seen(store, "second", by="fuse") as tree:
            assert (tree / "dir" / "file").read_text() == "through one name"
            assert os.stat(tree / "hard2").st_ino == os.stat(tree / "dir" / "file").st_ino

    def test_each_of_many_layers_equals_a_flat_copy(self, store: Store, place: Path) -> None:
        flat = place / "flat"
        flat.mkdir()

        def step(number: int) -> Callable[[Path], None]:
            def change(tree: Path) -> None:
                (tree / f"d{number % 7}").mkdir(exist_ok=True)
                (tree / f"d{number % 7}" / f"f{number}").write_text(f"layer {number}")
                (tree / "counter").write_text(str(number))
                if number >= 10:
                    os.unlink(tree / f"d{(number - 10) % 7}" / f"f{number - 10}")
                if number % 25 == 24:
                    for name in os.listdir(tree / "d3"):
                        os.unlink(tree / "d3" / name)
                    os.rmdir(tree / "d3")
                    (tree / "d3").mkdir()
                    for late in range(max(0, number - 9), number + 1):
                        if late % 7 == 3:
                            (tree / "d3" / f"f{late}").write_text("again")

            return change

        parent = None
        for number in range(self.chain_length):
            step(number)(flat)
            parent = self.layer(store, f"l{number}", parent, step(number))
            if number % 16 == 15 or number < 4:
                with self.seen(store, parent) as tree:
                    assert differences(tree_of(flat, times=False), tree_of(tree, times=False)) == []
        with self.seen(store, f"l{self.chain_length - 1}", by="fuse") as tree:
            assert differences(tree_of(flat, times=False), tree_of(tree, times=False)) == []
        assert len(store.chain(f"l{self.chain_length - 1}")) == self.chain_length
        changed = {path for _, path in _rows(store.diff(f"l{self.chain_length - 2}", f"l{self.chain_length - 1}"))}
        assert "counter" in changed

    # -- attributes

    def test_the_root_keeps_mode_and_owner(self, store: Store) -> None:
        self.layer(store, "base", None, lambda tree: os.chmod(tree, 0o711))
        with self.seen(store, "base") as tree:
            assert stat.S_IMODE(os.stat(tree).st_mode) == 0o711
        store.prepare("child", "base")
        with self.at(store, "child") as tree:
            assert stat.S_IMODE(os.stat(tree).st_mode) == 0o711
            if os.geteuid() == 0:
                os.chown(tree, 12, 34)
        store.commit("child", "second")
        if os.geteuid() == 0:
            with self.seen(store, "second") as tree:
                assert (os.stat(tree).st_uid, os.stat(tree).st_gid) == (12, 34)

    def test_directories_keep_their_permissions(self, store: Store) -> None:
        def make(tree: Path) -> None:
            for mode in (0o700, 0o755, 0o1777, 0o2775):
                (tree / f"{mode:o}").mkdir()
                os.chmod(tree / f"{mode:o}", mode)

        base = self.layer(store, "base", None, make)
        second = self.layer(store, "second", base, lambda tree: (tree / "700" / "inside").write_text("x"))
        with self.seen(store, second) as tree:
            for name in ("700", "755", "1777", "2775"):
                assert stat.S_IMODE(os.stat(tree / name).st_mode) == int(name, 8)

    def test_a_tree_changes_owner_as_a_whole(self, store: Store) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")

        def give(tree: Path) -> None:
            for path in (tree / "dir", tree / "dir/file", tree / "dir/sub", tree / "dir/sub/deep", tree / "link"):
                os.chown(path, 1001, 1002, follow_symlinks=False)

        second = self.layer(store, "second", self.base(store), give)
        with self.seen(store, second) as tree:
            for name in ("dir", "dir/file", "dir/sub", "dir/sub/deep", "link"):
                assert (os.lstat(tree / name).st_uid, os.lstat(tree / name).st_gid) == (1001, 1002)
            assert (tree / "dir" / "sub" / "deep").read_text() == "deep\n"
            assert os.stat(tree / "file").st_uid == 0

    def test_times_are_kept_to_the_nanosecond(self, store: Store) -> None:
        stamp = 1_234_567_890_123_456_789
        if step := store.driver.capabilities.time_step:
            stamp -= stamp % step

        def stamped(tree: Path) -> None:
            (tree / "f").write_text("x")
            os.utime(tree / "f", ns=(stamp, stamp))
            os.utime(tree, ns=(stamp, stamp))

        base = self.layer(store, "base", None, stamped)
        for by in ("fuse", None):
            with self.seen(store, base, by=by) as tree:
                assert os.stat(tree / "f").st_mtime_ns == stamp
                assert os.stat(tree).st_mtime_ns == stamp

    def test_inode_numbers_do_not_change_with_content_or_remount(self, store: Store) -> None:
        store.prepare("child", self.base(store))
        with self.at(store, "child", by="fuse") as tree:
            before = {name: os.lstat(tree / name).st_ino for name in ("file", "dir", "dir/sub", "link", "hard")}
            (tree / "file").write_text("copied up")
            os.chmod(tree / "dir", 0o700)
            assert {name: os.lstat(tree / name).st_ino for name in before} == before
        with self.at(store, "child", by="fuse") as tree:
            assert {name: os.lstat(tree / name).st_ino for name in before} == before

    def test_unix_sockets_are_kept(self, store: Store) -> None:
        def make(tree: Path) -> None:
            with socket.socket(socket.AF_UNIX) as one:
                here = os.getcwd()
                os.chdir(tree)  # the path of a socket is short
                try:
                    one.bind("sock")
                finally:
                    os.chdir(here)

        base = self.layer(store, "base", None, make)
        second = self.layer(store, "second", base, lambda tree: os.chmod(tree / "sock", 0o600))
        with self.seen(store, second) as tree:
            assert stat.S_ISSOCK(os.lstat(tree / "sock").st_mode)
            assert stat.S_IMODE(os.lstat(tree / "sock").st_mode) == 0o600

    # -- changes

    def test_changes_are_listed_exactly(self, store: Store) -> None:
        def change(tree: Path) -> None:
            (tree / "new").mkdir()
            (tree / "new" / "file").write_text("n")
            os.unlink(tree / "dir" / "sub" / "deep")
            (tree / "file").write_text("longer content\n")
            os.unlink(tree / "link")
            os.symlink("dir", tree / "link")

        second = self.layer(store, "second", self.base(store), change)
        assert _rows(store.diff(second)) == [
            ("deleted", "dir/sub/deep"), ("changed", "file"), ("changed", "link"), ("added", "new"), ("added", "new/file"),
        ]  # fmt: skip
        assert _rows(store.diff(second, "base")) == [
            ("added", "dir/sub/deep"), ("changed", "file"), ("changed", "link"), ("deleted", "new"),
        ]  # fmt: skip

    def test_an_edit_of_the_same_size_and_a_chmod_are_changes(self, store: Store) -> None:
        base = self.layer(store, "base", None, lambda tree: (
            (tree / "a").write_text("aaaa"), (tree / "b").write_text("bbbb"), (tree / "c").write_text("cccc"),
        ))  # fmt: skip

        def change(tree: Path) -> None:
            before = os.stat(tree / "a")
            (tree / "a").write_text("AAAA")
            os.utime(tree / "a", ns=(before.st_atime_ns, before.st_mtime_ns))  # the change hides behind an old time
            os.chmod(tree / "b", 0o600)

        found = {
            change.path: change.what for change in store.diff(self.layer(store, "second", base, change)) if change.path
        }
        assert found == {b"a": {"content"}, b"b": {"mode"}}

    def test_a_deep_tree_deleted_and_made_again(self, store: Store) -> None:
        def make(tree: Path) -> None:
            (tree / "x" / "y" / "z").mkdir(parents=True)
            for name in ("x/1", "x/y/2", "x/y/z/3"):
                (tree / name).write_text(name)

        def again(tree: Path) -> None:
            for name in ("x/y/z/3", "x/y/2", "x/1"):
                os.unlink(tree / name)
            for name in ("x/y/z", "x/y", "x"):
                os.rmdir(tree / name)
            (tree / "x" / "y").mkdir(parents=True)
            (tree / "x" / "y" / "4").write_text("new")

        base = self.layer(store, "base", None, make)
        second = self.layer(store, "second", base, again)
        assert _rows(store.diff(second)) == [
            ("deleted", "x/1"),
            ("deleted", "x/y/2"),
            ("added", "x/y/4"),
            ("deleted", "x/y/z"),
        ]
        third = self.layer(store, "third", second, lambda tree: None)
        assert _rows(store.diff(base, third)) == _rows(store.diff(second))

    def test_the_changes_of_an_active_snapshot_are_seen_before_commit(self, store: Store) -> None:
        store.prepare("child", self.base(store))
        assert _rows(store.diff("child")) == []
        with self.at(store, "child") as tree:
            (tree / "dir" / "added").write_text("x")
            os.unlink(tree / "fifo")
        expected = [("added", "dir/added"), ("deleted", "fifo")]
        assert _rows(store.diff("child")) == expected
        store.commit("child", "second")
        assert _rows(store.diff("second")) == expected

    def test_equal_trees_differ_in_nothing_whatever_their_history(self, store: Store, place: Path) -> None:
        base = self.base(store)
        store.export(base, place / "whole.tar", format="tar")
        store.prepare("again")
        with (place / "whole.tar").open("rb") as file:
            store.apply("again", file)
        store.commit("again", "again")
        assert [change for change in store.diff(base, "again") if change.what != {"mtime"}] == []

    def test_changes_applied_elsewhere_give_the_same_tree(self, store: Store, place: Path) -> None:
        def change(tree: Path) -> None:
            os.rename(tree / "dir" / "sub", tree / "moved")
            (tree / "file").write_text("changed")
            os.chmod(tree / "file", 0o4755)
            os.unlink(tree / "fifo")

        second = self.layer(store, "second", self.base(store), change)
        store.export(second, place / "layer.tar", format="layer")
        store.prepare("copy", "base")
        with (place / "layer.tar").open("rb") as file:
            store.apply("copy", file)
        store.commit("copy", "copy")
        assert list(store.diff(second, "copy")) == []
        with self.seen(store, second) as tree:
            one = tree_of(tree)
        with self.seen(store, "copy") as tree:
            assert differences(one, tree_of(tree)) == []

    # -- usage and limits

    def test_usage_counts_a_layer_without_its_parents(self, store: Store) -> None:
        self.layer(store, "base", None, lambda tree: (tree / "big").write_bytes(bytes(range(256)) * 4096))
        self.layer(store, "second", "base", lambda tree: (tree / "small").write_bytes(b"x" * 5000))
        assert store.usage("base").bytes == MIB
        assert store.usage("base").inodes == 1
        assert (store.usage("second").bytes, store.usage("second").inodes) == (8192, 1)
        store.prepare("child", "second")
        assert store.usage("child").bytes == 0

    def test_half_of_the_limit_fits_and_what_passes_it_fails(self, store: Store) -> None:
        base = self.layer(store, "base", None, lambda tree: (tree / "lower").write_bytes(b"l" * MIB))
        store.prepare("child", base, size=4 * MIB)
        with self.at(store, "child", by="fuse") as tree:
            (tree / "half").write_bytes(b"h" * 2 * MIB)
            with pytest.raises(OSError) as caught:
                (tree / "rest").write_bytes(b"r" * 3 * MIB)
            assert caught.value.errno == errno.ENOSPC
            assert (tree / "half").read_bytes() == b"h" * 2 * MIB
            assert store.usage("child").bytes <= 4 * MIB
            df = os.statvfs(tree)
            assert df.f_blocks * df.f_frsize == 4 * MIB
            os.unlink(tree / "rest")
            (tree / "fits").write_bytes(b"f" * MIB)
        with self.at(store, "child", by="fuse") as tree, pytest.raises(OSError):
            (tree / "again").write_bytes(b"r" * 3 * MIB)

    def test_a_limit_on_inodes_holds(self, store: Store) -> None:
        store.prepare("child", self.base(store), inodes=5)
        with self.at(store, "child", by="fuse") as tree:
            for number in range(5):
                (tree / f"n{number}").touch()
            with pytest.raises(OSError) as caught:
                (tree / "n5").touch()
            assert caught.value.errno == errno.ENOSPC

    # -- verbs, states and errors

    def test_stat_tells_kind_parent_and_times(self, store: Store) -> None:
        start = time.time_ns()
        store.prepare("a", labels={"k": "v"})
        active = store.stat("a")
        assert (active.kind, active.parent, dict(active.labels)) == (Kind.ACTIVE, None, {"k": "v"})
        assert start <= active.created == active.updated
        committed = store.commit("a", "A")
        assert (committed.kind, committed.name, dict(committed.labels)) == (Kind.COMMITTED, "A", {"k": "v"})
        store.view("v", "A")
        assert (store.stat("v").kind, store.stat("v").parent) == (Kind.VIEW, "A")
        with pytest.raises(NotFound):
            store.stat("a")

    def test_labels_change_and_the_time_of_it_is_kept(self, store: Store) -> None:
        store.prepare("a", labels={"x": "1", "y": "2"})
        before = store.stat("a")
        after = store.update("a", {"x": None, "z": "3"})
        assert dict(after.labels) == {"y": "2", "z": "3"}
        assert after.updated > before.updated
        assert after.created == before.created
        assert dict(store.update("a", {"only": "one"}, replace=True).labels) == {"only": "one"}

    def test_a_key_can_be_used_again_after_removal(self, store: Store) -> None:
        store.prepare("a")
        with self.at(store, "a") as tree:
            (tree / "old").write_text("x")
        store.remove("a")
        store.prepare("a")
        with self.at(store, "a") as tree:
            assert os.listdir(tree) == []

    def test_a_key_can_be_used_again_after_commit(self, store: Store) -> None:
        store.prepare("a")
        store.commit("a", "A")
        store.prepare("a", "A")
        store.commit("a", "B")
        assert [info.name for info in store.chain("B")] == ["B", "A"]
        store.remove("B")
        store.remove("A")
        assert list(store.walk()) == []

    def test_keys_and_names_share_one_space(self, store: Store) -> None:
        store.prepare("a")
        store.prepare("b")
        store.commit("a", "A")
        for act in (lambda: store.prepare("b"), lambda: store.prepare("A"), lambda: store.view("b", "A"),
                    lambda: store.commit("b", "A")):  # fmt: skip
            with pytest.raises(AlreadyExists):
                act()
        assert store.stat("b").kind is Kind.ACTIVE

    def test_walk_filters(self, store: Store) -> None:
        store.prepare("a", labels={"team": "x"})
        store.commit("a", "A")
        store.prepare("b", "A", labels={"team": "y"})
        store.view("v", "A")

        def names(*filters: str) -> list[str]:
            return [info.name for info in store.walk(filters)]

        assert names() == ["A", "b", "v"]
        assert names("kind==active") == ["b"]
        assert names("parent==A") == ["b", "v"]
        assert names("kind==view", "kind==committed") == ["A", "v"]
        assert names('labels."team"==y') == ["b"]
        assert names("labels.team") == ["A", "b"]
        assert names("name~=^[ab]$,kind!=committed") == ["b"]

    def test_a_parent_cannot_be_removed(self, store: Store) -> None:
        base = self.base(store)
        store.prepare("child", base)
        with pytest.raises(FailedPrecondition, match="child"):
            store.remove(base)
        store.remove("child")
        store.remove(base)
        with pytest.raises(NotFound):
            store.stat(base)

    def test_only_committed_snapshots_are_parents(self, store: Store) -> None:
        store.prepare("a")
        store.view("v")
        for parent in ("a", "v"):
            with pytest.raises(InvalidArgument):
                store.prepare("child", parent)
        with pytest.raises(NotFound):
            store.prepare("child", "nowhere")

    def test_a_view_cannot_be_committed(self, store: Store) -> None:
        store.view("v", self.base(store))
        with pytest.raises(FailedPrecondition):
            store.commit("v", "V")
        with pytest.raises(FailedPrecondition):
            store.commit("base", "B")

    def test_committed_snapshots_have_no_mounts(self, store: Store) -> None:
        base = self.base(store)
        with pytest.raises(FailedPrecondition):
            store.mounts(base)
        with pytest.raises(NotFound):
            store.mounts("nowhere")

    def test_what_is_mounted_is_neither_committed_nor_removed(self, store: Store) -> None:
        store.prepare("a")
        with self.at(store, "a", by="fuse") as tree:
            with pytest.raises(FailedPrecondition):
                store.commit("a", "A")
            with pytest.raises(FailedPrecondition):
                store.remove("a")
            (tree / "still").write_text("works")
        store.commit("a", "A")

    def test_open_files_do_not_hinder_removal(self, store: Store) -> None:
        store.prepare("a")
        with self.at(store, "a") as tree:
            (tree / "f").write_text("x" * 100)
        path = Path(store.driver.tree(store.index.get("a").id)) / "f"
        with path.open() as file:
            store.remove("a")
            assert file.read() == "x" * 100
        assert not path.exists()

    def test_snapshots_are_removed_while_they_are_walked(self, store: Store) -> None:
        for number in range(20):
            store.prepare(f"k{number}")
        for info in store.walk():
            store.remove(info.name)
        assert list(store.walk()) == []

    def test_a_removed_layer_leaves_nothing_on_disk(self, store: Store) -> None:
        before = set(os.listdir(f"{store.root}/layers"))
        store.prepare("a", self.base(store))
        store.commit("a", "A")
        store.remove("A")
        store.remove("base")
        assert set(os.listdir(f"{store.root}/layers")) == before
        assert store.gc().directories == ()
        assert store.check().problems == []

    def test_a_store_opened_again_is_the_same(self, store: Store) -> None:
        base = self.base(store)
        with Store.open(store.root, fsync=False) as again:
            assert again.driver.name == self.driver
            assert again.stat(base) == store.stat(base)
            again.prepare("child", base)
        assert store.stat("child").parent == base

    def test_close_can_be_repeated(self, store: Store) -> None:
        store.prepare("a")
        store.close()
        store.close()

    def test_an_intact_store_passes_its_check(self, store: Store) -> None:
        self.layer(store, "second", self.base(store), lambda tree: os.rename(tree / "dir", tree / "moved"))
        report = store.check(content=True)
        assert report.problems == []
        assert report.snapshots == 2
