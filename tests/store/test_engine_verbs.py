"""The needs of container engines: verbs on snapshots that are mounted, any key, records that they may extend.

The judge is the tree that a mount shows, and the result of ``check`` afterwards.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import environment, run_module

from cowfs.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from cowfs.model import Kind
from cowfs.store import Store
from cowfs.store.kernel_mounts import mount_record
from cowfs.store.layers import PLAIN
from cowfs.sys import mounts as sys_mounts

from .test_live import change, tree_of

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

LAYERED = ["overlay", "row", "vfs"]


@pytest.fixture(params=LAYERED)
def store(space: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    """base < k; directories mnt and look to mount on."""
    for name in ("mnt", "look"):
        (space / name).mkdir()
    with Store.open(space / "store", driver=request.param, fsync=False) as made:
        made.prepare("seed")
        with made.mount("seed", space / "mnt"):
            for name in ("d/e", "g/h"):
                (space / "mnt" / name).mkdir(parents=True)
                (space / "mnt" / name / "f").write_bytes(name.encode() * 9000)
            os.link(space / "mnt/d/e/f", space / "mnt/hard")
        made.commit("seed", "base")
        made.prepare("k", "base", size="64M")
        yield made
        assert made.check().problems == []


def left_over(store: Store) -> list[str]:
    return [name for name in os.listdir(store.root) if name.startswith(("rm-", "new-", "live-"))]


# -- commit and remove while mounted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_mounted_key_is_committed_as_it_is_and_its_mount_goes_on_read_only(
    store: Store, space: Path, seed: int
) -> None:
    mnt = space / "mnt"
    handle = store.mount("k", mnt)
    change(mnt, random.Random(seed), 12)
    files = [path for path in sorted(mnt.rglob("*")) if path.is_file() and path.stat().st_size]
    (mnt / "another").write_bytes(b"x" * 9000)
    with (files or [mnt / "another"])[0].open("r+b") as patched, (mnt / "open").open("wb") as still:
        for file in (patched, still):
            file.write(b"before")
            file.flush()
        seen = tree_of(mnt)
        assert store.commit("k", "v2", mounted=True).kind is Kind.COMMITTED
        with pytest.raises(OSError) as error:
            os.write(
                still.fileno(), b"after"
            )  # as on a full disk: the kernel may keep it in a page that is refused later
            os.fsync(still.fileno())
        assert error.value.errno == errno.EROFS
    assert not store.exists("k")
    with store.mount("v2", space / "look", readonly=True):
        assert tree_of(space / "look") == seen
    for act in (lambda: (mnt / "new").touch(), lambda: (mnt / "open").unlink(), lambda: os.chmod(mnt / "open", 0o600)):
        with pytest.raises(OSError) as error:
            act()
        assert error.value.errno == errno.EROFS
    store.prepare("k", "v2")  # the key is free, and the layer can be a parent while it is mounted
    with store.mount("k", space / "look"):
        assert tree_of(space / "look") == seen
        (space / "look" / "open").write_bytes(b"elsewhere")
    assert store.mounted_at("v2") == str(mnt)
    handle.unmount()
    store.remove("k")
    store.remove("v2")
    assert left_over(store) == []


def test_a_page_stored_through_a_map_before_is_committed(store: Store, space: Path) -> None:
    import mmap

    mnt = space / "mnt"
    with store.mount("k", mnt):
        (mnt / "mapped").write_bytes(bytes(8192))
        with (mnt / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 8192) as pages:
            pages[4096:4100] = b"here"
            store.commit("k", "v2", mounted=True)
    store.view("look", "v2")
    with store.mount("look", space / "look"):
        assert (space / "look/mapped").read_bytes()[4096:4100] == b"here"


@pytest.mark.parametrize("verb", ["commit", "remove"])
def test_without_the_option_a_mounted_key_is_refused_with_its_mount_point(store: Store, space: Path, verb: str) -> None:
    with store.mount("k", space / "mnt"):
        with pytest.raises(FailedPrecondition, match=str(space / "mnt")):
            store.commit("k", "v2") if verb == "commit" else store.remove("k")
        assert store.stat("k").kind is Kind.ACTIVE


def test_a_mounted_key_is_removed_at_once_and_its_files_when_the_mount_has_ended(store: Store, space: Path) -> None:
    mnt = space / "mnt"
    handle = store.mount("k", mnt)
    (mnt / "mine").write_bytes(b"m" * 10000)
    assert store.remove("k", mounted=True) == ["k"]
    assert not store.exists("k")
    with pytest.raises(NotFound):
        store.usage("k")
    (mnt / "more").write_bytes(b"goes on")
    (mnt / "d/e/f").write_bytes(b"copied up, still")
    os.rename(mnt / "d/e", mnt / "moved")
    assert (mnt / "mine").read_bytes() == b"m" * 10000
    assert store.cleanup() == []
    (left,) = left_over(store)
    with Store.open(store.root) as other:  # another process's opening does not take it either
        assert left_over(other) == [left]
    assert (mnt / "more").read_bytes() == b"goes on"
    store.prepare("k", "base")  # the key is free
    handle.unmount()
    assert store.cleanup() == [left]
    assert left_over(store) == []


def test_removal_in_two_steps(store: Store) -> None:
    store.remove("k", defer=True)
    assert not store.exists("k")
    assert len(left_over(store)) == 1
    assert len(store.cleanup()) == 1
    assert store.cleanup() == []
    assert left_over(store) == []


def test_a_mount_of_the_kernel_is_made_read_only_by_a_commit_and_outlives_a_removal(space: Path) -> None:
    mnt = space / "mnt"
    mnt.mkdir()
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.prepare("seed")
        with store.mount("seed", mnt):
            (mnt / "f").write_bytes(b"base")
        store.commit("seed", "base")
        for name in ("base", None):  # an overlay, and a bind mount
            store.prepare("k", name)
            kernel = store.mount("k", mnt, mount_type="kernel")
            (mnt / "g").write_bytes(b"written")
            with (mnt / "g").open("ab"), pytest.raises(FailedPrecondition, match="read-only"):
                store.commit("k", "v2", mounted=True)
            assert store.stat("k").kind is Kind.ACTIVE
            store.commit("k", "v2", mounted=True)
            with pytest.raises(OSError) as error:
                (mnt / "h").touch()
            assert error.value.errno == errno.EROFS
            store.remove("v2", mounted=True)
            assert (mnt / "g").read_bytes() == b"written"
            assert store.cleanup() == []
            kernel.unmount()
            assert len(store.cleanup()) == 1
        assert store.check().problems == []


def test_a_verb_at_work_is_no_mount(store: Store) -> None:
    """Only a mount may go on: what another verb has in its hands is refused as ever."""
    from cowfs.sys import locks

    fd = locks.open_locked(store.driver.tree(store.index.get("k").id))
    assert fd is not None
    try:
        for act in (lambda: store.commit("k", "v2", mounted=True), lambda: store.remove("k", mounted=True)):
            with pytest.raises(FailedPrecondition):
                act()
    finally:
        os.close(fd)
    assert store.stat("k").kind is Kind.ACTIVE


def test_labels_are_replaced_in_the_commit(store: Store) -> None:
    store.update("k", {"old": "1", "both": "2"})
    assert store.commit("k", "v2", labels={"both": "3"}, replace_labels=True).labels == {"both": "3"}
    store.prepare("k", "v2", labels={"old": "1"})
    assert store.commit("k", "v3", labels={"new": "2"}).labels == {"old": "1", "new": "2"}
    store.prepare("k", "v3", labels={"old": "1"})
    assert store.commit("k", "v4", replace_labels=True).labels == {}


@pytest.mark.parametrize("verb", ["commit", "remove"])
def test_a_kill_between_two_steps_leaves_the_mount_and_a_whole_state(store: Store, space: Path, verb: str) -> None:
    """After a kill at any step the verb can be repeated, and the written data exists or is gone as a whole."""
    from cowfs.sys import faults

    def act(opened: Store) -> None:
        opened.commit("k", "v2", mounted=True) if verb == "commit" else opened.remove("k", mounted=True)

    number = 0
    while True:
        handle = store.mount("k", space / "mnt")
        (space / "mnt/written").write_bytes(b"w" * 9000)
        seen = tree_of(space / "mnt")
        pid = os.fork()
        if pid == 0:
            passed = 0

            def kill(name: str, last: int = number) -> None:
                nonlocal passed
                if passed == last:
                    os.kill(os.getpid(), 9)
                passed += 1

            code = 1
            try:
                with Store.open(store.root, fsync=False) as opened:
                    faults.hook = kill
                    act(opened)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        assert tree_of(space / "mnt") == seen, "the mount goes on"
        if store.exists("k"):
            act(store)
        store.gc()
        assert tree_of(space / "mnt") == seen, "its files are no garbage yet"
        assert not store.exists("k")
        if verb == "commit":
            with store.mount("v2", space / "look", readonly=True):
                assert tree_of(space / "look") == seen
        handle.unmount()
        if verb == "commit":
            store.remove("v2")
        store.cleanup()
        assert left_over(store) == []
        store.prepare("k", "base")
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            assert number > 2, "there were steps to die after"
            return
        number += 1


# -- keys ----------------------------------------------------------------------------------------------------------------


RAW = ["default/12/extract-345-abc sha256:" + "0" * 64, "/var/lib/x", "./x", "../../x", "-rf", "k8s.io/1/" + "x" * 3000, "a\nb", " a ", "\x1b[2J", "é" * 300]  # fmt: skip


@pytest.mark.parametrize("key", RAW, ids=range(len(RAW)))
def test_a_store_takes_any_key_and_name_of_an_engine(store: Store, space: Path, key: str) -> None:
    store.prepare(key, "base", size="1M")
    with store.mount(key, space / "mnt") as handle:
        (space / "mnt/f").write_bytes(b"x" * 5000)
        assert store.mounted_at(key) == str(space / "mnt")
        assert store.usage(key) == handle.usage() or store.driver.capabilities.whole
        assert store.at(space / "mnt").name == key
    store.commit(key, key + "!")
    assert [info.name for info in store.walk()][-1] == key + "!"
    store.view(key, key + "!")
    store.remove(key)
    store.remove(key + "!")
    assert sorted(os.listdir(space)) == ["look", "mnt", "store"]


@pytest.mark.parametrize("key", ["", "a\0b", "\ud800", "x" * 4097, "é" * 2049])
def test_what_no_index_can_keep_is_refused(store: Store, key: str) -> None:
    for act in (lambda: store.prepare(key, "base"), lambda: store.view(key, "base"), lambda: store.commit("k", key)):
        with pytest.raises(InvalidArgument) as error:
            act()
        assert len(str(error.value)) < 300


def test_the_command_makes_only_keys_that_it_can_be_given_again(store: Store) -> None:
    store.prepare("/an/engine's", "base")
    more = {"env": {**environment(), "COWFS_ROOT": store.root}}
    for words in (["prepare", "/x", "base"], ["view", "a\nb", "base"], ["commit", "k", "../v"], ["fork", "base", "ok", "./no"],
                  ["snapshot", "k", "/s"], ["run", "--key", "a\tb", "base", "--", "true"], ["run", "--commit", "/v", "base", "--", "true"]):  # fmt: skip
        done = run_module("cowfs", *words, **more)
        assert done.returncode == 2, (words, done)
        assert "cannot be a" in done.stderr
    assert run_module("cowfs", "ls", "-q", **more).stdout.splitlines() == ["base", "k", "/an/engine's"]
    assert run_module("cowfs", "rm", "--", "/an/engine's", **more).returncode == 0


# -- mounts beside a writer, and of what is committed -----------------------------------------------------------------------


def test_a_committed_snapshot_is_mounted_read_only_without_a_key(store: Store, space: Path) -> None:
    store.tag("latest", "base")
    with pytest.raises(FailedPrecondition, match="read-only"):
        store.mount("base", space / "look")
    shown = []
    for name in ("base", "latest"):
        with store.mount(name, space / "look", readonly=True):
            shown.append(tree_of(space / "look"))
            with pytest.raises(OSError) as error:
                (space / "look/new").touch()
            assert error.value.errno == errno.EROFS
            store.remove("k") if store.exists("k") else None
            with pytest.raises(FailedPrecondition, match="in use"):
                store.untag("latest") if name == "base" else None
                store.remove("base")
            if name == "base":
                store.tag("latest", "base")
    assert (space / "look").exists()
    assert shown[0] == shown[1]
    store.prepare("k", "base")
    with store.mount("k", space / "mnt"):
        assert tree_of(space / "mnt") == shown[0]


@pytest.mark.parametrize("seed", range(2))
def test_an_active_snapshot_that_is_mounted_is_mounted_again_read_only_and_shows_what_was_written(
    store: Store, space: Path, seed: int
) -> None:
    mnt, look = space / "mnt", space / "look"
    with store.mount("k", mnt) as writer:
        change(mnt, random.Random(seed), 40)
        with (mnt / "open").open("wb") as file:
            file.write(b"not synced")
            file.flush()
            with store.mount("k", look, readonly=True):
                assert tree_of(look) == tree_of(mnt)
                with pytest.raises(OSError) as error:
                    (look / "x").touch()
                assert error.value.errno == errno.EROFS
                assert store.mounted_at("k") == str(mnt), "the one that writes is the snapshot's mount"
                (mnt / "later").write_bytes(b"the writer goes on")
            assert store.usage("k") == store.usage("k")
            assert store.mounted_at("k") == str(mnt)
        with pytest.raises(FailedPrecondition, match="in use"):
            store.mount("k", look)
        assert (mnt / "later").read_bytes() == b"the writer goes on"
        assert writer.status().alive


def test_an_engines_read_only_mount_of_a_layer_in_use(space: Path) -> None:
    """containerd's diff service does so when a running container is committed: the same record, with ro."""
    for name in ("low", "up", "work", "mnt", "look"):
        (space / name).mkdir()
    (space / "low/f").write_bytes(b"low")
    program = "cowfs.cli.overlayfs"
    words = f"lowerdir={space}/low,upperdir={space}/up,workdir={space}/work"
    assert run_module(program, "-o", words + ",size=1M", space / "mnt").returncode == 0
    try:
        (space / "mnt/f").write_bytes(b"up")
        for options in (f"ro,{words}", f"lowerdir={space}/up:{space}/low"):
            done = run_module(program, "-o", options, space / "look")
            assert done.returncode == 0, done.stderr
            try:
                assert (space / "look/f").read_bytes() == b"up"
                with pytest.raises(OSError) as error:
                    (space / "look/g").touch()
                assert error.value.errno == errno.EROFS
            finally:
                subprocess.run(["umount", space / "look"], check=True)
        assert "in use" in run_module(program, "-o", words, space / "look").stderr, "two writers are still refused"
    finally:
        subprocess.run(["umount", space / "mnt"], check=True)


# -- records for engines -----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(space: Path) -> Iterator[Store]:
    """A store of overlays whose layers an engine filled: base (a bind mount), k upon it."""
    for name in ("mnt", "look"):
        (space / name).mkdir()
    with Store.open(space / "store", driver="overlay", fsync=False) as made:
        made.prepare("seed")
        (record,) = made.engine_mounts("seed")
        assert (record.type, record.options) == ("bind", ("rw", "rbind"))
        mount_record(record, str(space / "mnt"))
        (space / "mnt/d").mkdir()
        (space / "mnt/d/f").write_bytes(b"base" * 1000)
        sys_mounts.umount(str(space / "mnt"))
        made.commit("seed", "base")
        made.prepare("k", "base")
        yield made
        assert made.check().problems == []


def test_an_engines_record_may_be_extended_as_buildkit_does(plain: Store, space: Path) -> None:
    (record,) = plain.engine_mounts("k")
    assert record.type == "overlay"
    assert not any(word.startswith("metacopy") for word in record.options)
    done = [
        "mount",
        "-t",
        "overlay",
        "overlay",
        "-o",
        ",".join((*record.options, "redirect_dir=off")),
        str(space / "mnt"),
    ]
    subprocess.run(done, check=True)
    os.chmod(space / "mnt/d/f", 0o600)
    with pytest.raises(OSError) as error:
        os.rename(space / "mnt/d", space / "mnt/e")
    assert error.value.errno == errno.EXDEV, "the engine's word counts"
    subprocess.run(["umount", space / "mnt"], check=True)
    plain.commit("k", "v2")
    plain.view("look", "v2")
    (record,) = plain.engine_mounts("look")
    assert record.type == "overlay"
    mount_record(record, str(space / "look"))
    assert (space / "look/d/f").stat().st_mode & 0o777 == 0o600
    assert (space / "look/d/f").read_bytes() == b"base" * 1000
    sys_mounts.umount(str(space / "look"))


def test_a_directory_of_a_lower_layer_is_renamed_in_an_engines_mount(plain: Store, space: Path) -> None:
    """containerd's conformance suite does so."""
    (record,) = plain.engine_mounts("k")
    mount_record(record, str(space / "mnt"))
    os.rename(space / "mnt/d", space / "mnt/e")
    sys_mounts.umount(str(space / "mnt"))
    plain.commit("k", "v2")
    plain.prepare("k", "v2")
    (record,) = plain.engine_mounts("k")
    assert record.type == "overlay"
    mount_record(record, str(space / "mnt"))
    assert (space / "mnt/e/f").read_bytes() == b"base" * 1000
    assert not (space / "mnt/d").exists()
    sys_mounts.umount(str(space / "mnt"))


@pytest.mark.parametrize("how", ["our server", "kernel", "records"])
def test_what_a_mount_without_metacopy_could_not_read_is_no_kernel_mount_for_an_engine(
    plain: Store, space: Path, how: str
) -> None:
    plain.engine_mounts("k")
    if how == "records":  # somebody was told how, and may have done it
        (record,) = plain.mounts("k")
        mount_record(record, str(space / "mnt"))
    else:
        plain.mount("k", space / "mnt", mount_type="kernel" if how == "kernel" else None)
    os.chmod(space / "mnt/d/f", 0o600)  # a metacopy
    os.rename(space / "mnt/d", space / "mnt/e")  # a redirect
    plain.unmount("k")
    assert plain.engine_mounts("k")[0].type == "fuse.cowfs-overlayfs"
    plain.commit("k", "v2")
    plain.prepare("child", "v2")
    assert plain.engine_mounts("child")[0].type == "fuse.cowfs-overlayfs"
    plain.prepare("beside", "base")
    assert plain.engine_mounts("beside")[0].type == "overlay"


def test_a_limit_makes_an_engines_record_one_of_our_server(plain: Store) -> None:
    plain.prepare("limited", "base", size="1M")
    (record,) = plain.engine_mounts("limited")
    assert record.type == "fuse.cowfs-overlayfs"
    assert "size=1048576" in record.options


def test_a_layer_that_was_written_before_its_first_record_is_not_taken_for_plain(plain: Store) -> None:
    plain.prepare("other", "base")
    layer = plain.driver.directory(plain.index.get("other").id)
    Path(layer, "fs", "x").touch()
    assert plain.engine_mounts("other")[0].type == "fuse.cowfs-overlayfs"
    assert not os.path.exists(f"{layer}/{PLAIN}")


# -- look-up by directory ----------------------------------------------------------------------------------------------------


def test_a_directory_tells_its_snapshot(store: Store, space: Path) -> None:
    tree = store.driver.tree(store.index.get("k").id)
    for path in (tree, os.path.dirname(tree), store.driver.work(store.index.get("k").id)):
        assert store.at(path).name == "k"
    with store.mount("k", space / "mnt"):
        assert store.at(space / "mnt").name == "k"
    for other in (space, space / "mnt", store.root, f"{store.root}/layers", f"{store.root}/layers/nobody"):
        with pytest.raises(NotFound):
            store.at(other)


def test_a_taken_name_is_refused_before_the_mount_is_touched(store: Store, space: Path) -> None:
    with store.mount("k", space / "mnt"):
        with pytest.raises(AlreadyExists):
            store.commit("k", "base", mounted=True)
        (space / "mnt/still").write_bytes(b"writable")
