"""The contract of a containerd snapshotter, through gRPC, with the mounts really mounted; by each driver, without a
limit and with one.

Where a test says "containerd", its conformance suite (core/snapshots/testsuite) or the comments of its interface say so.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.containerd import Snapshotter, check, layer, mounted, text, unmount_below
from support.daemon import wait_for

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

KINDS = {"view": 1, "active": 2, "committed": 3}
LIMIT = "containerd.io/snapshot/max-size"
REF = "containerd.io/snapshot.ref"


@pytest.fixture(params=["overlay-free", "overlay-limited", "vfs-free", "row-limited"])
def snapshotter(make_snapshotter: Callable[..., Snapshotter], request: pytest.FixtureRequest) -> Iterator[Snapshotter]:
    """A running snapshotter; its store is whole afterwards, and nothing is left of what was removed."""
    driver, limit = request.param.split("-")
    made = make_snapshotter("-s", driver, *(["--storage-opt", "size=64M"] if limit == "limited" else [])).start()
    yield made
    unmount_below(made.base / "m")
    for name in reversed(made.names()):
        made.call("Remove", key=name)
    unmount_below(made.run_dir)
    wait_for(lambda: not [each for each in os.listdir(made.root) if each.startswith("rm-")], "the files to go")
    assert os.listdir(made.run_dir / "held") == []
    assert made.stop() == 0
    assert check(made.root) == []


def tree(root: Path) -> dict[str, Any]:
    """Everything that a process in a container sees of a tree."""
    found: dict[str, Any] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        st = path.lstat()
        data = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (st.st_mode, st.st_uid, st.st_gid, data)
    return found


# -- states ------------------------------------------------------------------------------------------------------------


def test_prepare_write_commit_and_prepare_upon_it(snapshotter: Snapshotter) -> None:
    with mounted(snapshotter, snapshotter.call("Prepare", key="a")) as root:
        text("etc/f", "one")(root)
        os.chown(root / "etc", 5, 6)
        os.chmod(root / "etc", 0o750)
        snapshotter.call("Commit", key="a", name="one")  # containerd: while it is mounted
    assert snapshotter.code("Stat", key="a") == "NOT_FOUND"
    with mounted(snapshotter, snapshotter.call("Prepare", key="a", parent="one")) as root:
        assert (root / "etc/f").read_text() == "one"
        assert (root / "etc").stat().st_uid == 5
        assert (root / "etc").stat().st_mode & 0o7777 == 0o750
        text("etc/f", "two")(root)
    snapshotter.call("Commit", key="a", name="two")
    with mounted(snapshotter, snapshotter.call("View", key="v", parent="two")) as root:
        assert (root / "etc/f").read_text() == "two"
        with pytest.raises(OSError) as error:
            (root / "etc/g").touch()
        assert error.value.errno == errno.EROFS
    with mounted(snapshotter, snapshotter.call("View", key="w", parent="one")) as root:
        assert (root / "etc/f").read_text() == "one"


def test_states_and_codes(snapshotter: Snapshotter) -> None:
    snapshotter.call("Prepare", key="a")
    snapshotter.call("Commit", key="a", name="base")
    snapshotter.call("Prepare", key="act", parent="base")
    snapshotter.call("View", key="view", parent="base")
    for verb in ("Prepare", "View"):
        assert snapshotter.code(verb, key="act", parent="base") == "ALREADY_EXISTS"
        assert snapshotter.code(verb, key="base", parent="base") == "ALREADY_EXISTS"
        assert snapshotter.code(verb, key="new", parent="nobody") == "NOT_FOUND"
        assert snapshotter.code(verb, key="new", parent="act") == "INVALID_ARGUMENT"
        assert snapshotter.code(verb, key="new", parent="view") == "INVALID_ARGUMENT"
        assert snapshotter.code(verb, key="") == "INVALID_ARGUMENT"
    assert snapshotter.code("Commit", key="nobody", name="x") == "NOT_FOUND"
    assert snapshotter.code("Commit", key="act", name="base") == "ALREADY_EXISTS"
    assert snapshotter.code("Commit", key="view", name="x") == "FAILED_PRECONDITION"
    assert snapshotter.code("Commit", key="base", name="x") == "FAILED_PRECONDITION"
    assert snapshotter.code("Mounts", key="base") == "FAILED_PRECONDITION"
    for verb in ("Mounts", "Stat", "Usage", "Remove"):
        assert snapshotter.code(verb, key="nobody") == "NOT_FOUND"
    assert snapshotter.code("Update", info={"name": "nobody"}) == "NOT_FOUND"
    assert snapshotter.code("Remove", key="base") == "FAILED_PRECONDITION"
    kinds = {info.name: info.kind for info in snapshotter.call("List")}
    assert kinds == {"base": KINDS["committed"], "act": KINDS["active"], "view": KINDS["view"]}
    assert snapshotter.code("Cleanup") == "OK"


def test_an_intermediate_snapshot_goes_last(snapshotter: Snapshotter) -> None:
    layer(snapshotter, "base", "")
    layer(snapshotter, "middle", "base", text("f", "x"))
    snapshotter.call("Prepare", key="top", parent="middle")
    assert snapshotter.code("Remove", key="middle") == "FAILED_PRECONDITION"
    for key in ("top", "middle", "base"):
        snapshotter.call("Remove", key=key)
    assert snapshotter.names() == []


def test_what_is_removed_while_it_is_mounted_stays_until_it_is_unmounted(snapshotter: Snapshotter) -> None:
    layer(snapshotter, "base", "", text("f", "x"))
    with mounted(snapshotter, snapshotter.call("Prepare", key="a", parent="base")) as root:
        text("mine", "y")(root)
        snapshotter.call("Remove", key="a")
        assert snapshotter.names() == ["base"]
        assert (root / "f").read_text() == "x"
        snapshotter.call("Cleanup")
        assert (root / "mine").read_text() == "y"
        snapshotter.call("Prepare", key="a", parent="base")


@pytest.mark.parametrize("key", ["/an/absolute/path", "default/7/" + "k" * 500, "k8s.io/1/sha256:" + "0" * 64, " a\nb\t", "../../up", "-x", "é☃"])  # fmt: skip
def test_any_key(snapshotter: Snapshotter, key: str) -> None:
    with mounted(snapshotter, snapshotter.call("Prepare", key=key)) as root:
        text("f", "x")(root)
    assert snapshotter.call("Stat", key=key).info.name == key
    snapshotter.call("Commit", key=key, name=key + "'s")
    assert snapshotter.names() == [key + "'s"]
    snapshotter.call("View", key=key, parent=key + "'s")
    assert snapshotter.call("Stat", key=key).info.parent == key + "'s"


# -- labels and times ----------------------------------------------------------------------------------------------------


def test_labels_are_replaced_by_commit_and_changed_by_masks(snapshotter: Snapshotter) -> None:
    snapshotter.call("Prepare", key="a", labels={"one": "1", "two": "2", "none": ""})
    info = snapshotter.call("Stat", key="a").info
    assert dict(info.labels) == {"one": "1", "two": "2"}
    assert (info.created_at.seconds, info.created_at.nanos) == (info.updated_at.seconds, info.updated_at.nanos)

    def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
        answer = snapshotter.call("Update", info={"name": "a", "labels": labels}, update_mask={"paths": paths}).info
        assert dict(answer.labels) == dict(snapshotter.call("Stat", key="a").info.labels)
        return dict(answer.labels)

    assert update({"one": "I", "other": "x"}, "labels.one") == {"one": "I", "two": "2"}
    assert update({"containerd.io/gc.root": "now"}, "labels.containerd.io/gc.root")["containerd.io/gc.root"] == "now"
    assert update({}, "labels.two") == {"one": "I", "containerd.io/gc.root": "now"}
    assert update({"all": "new"}, "labels") == {"all": "new"}
    assert update({"x": "y"}) == {"x": "y"}
    after = snapshotter.call("Stat", key="a").info
    assert (after.updated_at.seconds, after.updated_at.nanos) > (info.updated_at.seconds, info.updated_at.nanos)
    assert after.created_at == info.created_at
    for path in ("name", "parent", "kind", "created_at", "x"):
        assert snapshotter.code("Update", info={"name": "a"}, update_mask={"paths": [path]}) == "INVALID_ARGUMENT"
    assert dict(snapshotter.call("Stat", key="a").info.labels) == {"x": "y"}
    snapshotter.call("Commit", key="a", name="base", labels={"c": "3"})
    info = snapshotter.call("Stat", key="base").info
    assert dict(info.labels) == {"c": "3"}
    assert info.created_at == info.updated_at
    assert dict(snapshotter.call("Update", info={"name": "base"}).info.labels) == {}


def test_a_snapshot_that_is_there_by_its_reference_already_exists(snapshotter: Snapshotter) -> None:
    layer(snapshotter, "base", "")
    labels = {REF: "sha256:chain"}
    snapshotter.call("Prepare", key="ns/1/extract-a", parent="base", labels=labels)
    snapshotter.call("Prepare", key="ns/2/extract-b", parent="base", labels=labels)  # nobody has it yet
    snapshotter.call("Commit", key="ns/1/extract-a", name="ns/3/sha256:chain", labels=labels)
    assert snapshotter.code("Prepare", key="ns/4/extract-c", parent="base", labels=labels) == "ALREADY_EXISTS"
    assert snapshotter.code("Prepare", key="ns/5/extract-d", labels=labels) == "OK"  # another parent is another tree
    assert "ns/4/extract-c" not in snapshotter.names()
    assert snapshotter.names(f'labels."{REF}"=="sha256:chain",kind==committed,parent==base') == ["ns/3/sha256:chain"]


# -- trees -----------------------------------------------------------------------------------------------------------------


def test_layers_hide_replace_and_bring_back(snapshotter: Snapshotter) -> None:
    layer(
        snapshotter,
        "one",
        "",
        text("d/a", "a"),
        text("d/b", "b"),
        text("e/x", "x"),
        lambda root: os.symlink("a", root / "d/l"),
    )
    layer(
        snapshotter, "two", "one", lambda root: (root / "d/a").unlink(), lambda root: (root / "e/x").unlink(),
        lambda root: (root / "e").rmdir(), text("d/b", "b again", 0o600),
    )  # fmt: skip
    layer(
        snapshotter,
        "three",
        "two",
        text("e/y", "y"),
        text("d/a/now", "a directory"),
        lambda root: os.chown(root / "d/b", 7, 8),
    )
    with mounted(snapshotter, snapshotter.call("View", key="v", parent="three")) as root:
        assert sorted(tree(root)) == [".", "d", "d/a", "d/a/now", "d/b", "d/l", "e", "e/y"]
        assert (root / "d/b").read_text() == "b again"
        assert ((root / "d/b").stat().st_uid, (root / "d/b").stat().st_mode & 0o777) == (7, 0o600)
    with mounted(snapshotter, snapshotter.call("View", key="w", parent="two")) as root:
        assert sorted(tree(root)) == [".", "d", "d/b", "d/l"]


def test_a_root_directorys_mode_and_owner_go_with_the_layers(snapshotter: Snapshotter) -> None:
    layer(snapshotter, "one", "", lambda root: os.chmod(root, 0o755), lambda root: os.chown(root, 3, 4))
    layer(snapshotter, "two", "one")
    for name, parent in (("v", "two"), ("w", "one")):
        with mounted(snapshotter, snapshotter.call("View", key=name, parent=parent)) as root:
            assert (root.stat().st_mode & 0o7777, root.stat().st_uid, root.stat().st_gid) == (0o755, 3, 4)
    with mounted(snapshotter, snapshotter.call("Prepare", key="a", parent="two")) as root:
        assert (root.stat().st_mode & 0o7777, root.stat().st_uid) == (0o755, 3)


@pytest.mark.parametrize("seed", range(2))
def test_random_layers_show_what_was_written(snapshotter: Snapshotter, seed: int) -> None:
    """Several layers of random changes, each checked as the next one's start, through its own view, and after a restart."""
    rng = random.Random(seed)
    trees: dict[str, dict[str, Any]] = {}
    parent = ""
    for number in range(4):
        key, name = f"ns/{number}/k", f"ns/{number}/sha256:{number}"
        with mounted(snapshotter, snapshotter.call("Prepare", key=key, parent=parent)) as root:
            if parent:
                assert tree(root) == trees[parent]
            _change(root, rng, 25)
            trees[name] = tree(root)
            if number % 2:
                snapshotter.call("Commit", key=key, name=name)
        if not number % 2:
            snapshotter.call("Commit", key=key, name=name)
        parent = name
        if number == 1:
            snapshotter.stop()
            snapshotter.start()
    for number, (name, shown) in enumerate(trees.items()):
        with mounted(snapshotter, snapshotter.call("View", key=f"v{number}", parent=name)) as root:
            assert tree(root) == shown


def _change(root: Path, rng: random.Random, steps: int) -> None:
    for _ in range(steps):
        names = [str(path.relative_to(root)) for path in sorted(root.rglob("*"))] or ["d"]
        one, two = root / rng.choice(names), root / (rng.choice(names) + rng.choice(["", "/x", "2", "/y"]))
        kind = rng.randrange(7)
        try:
            if kind == 0:
                two.write_bytes(rng.randbytes(rng.choice([0, 10, 9000])))
            elif kind == 1 and not one.is_dir():  # of a directory of a lower layer the kernel gives EXDEV
                os.rename(one, two)
            elif kind == 2:
                two.mkdir()
            elif kind == 3 and not one.is_dir():
                one.unlink()
            elif kind == 4:
                one.chmod(rng.choice([0o600, 0o755]))
            elif kind == 5:
                os.symlink("to", two)
            else:
                os.chown(one, rng.randrange(9), 0, follow_symlinks=False)
        except OSError:
            continue


def test_a_chain_of_128_layers(make_snapshotter: Callable[..., Snapshotter]) -> None:
    """containerd: the options of mount(2) have no room for so many paths."""
    snapshotter = make_snapshotter("-s", "overlay").start()
    parent = ""
    for number in range(128):
        key = f"k{number}"
        answer = snapshotter.call("Prepare", key=key, parent=parent)
        if number % 32 == 0 or number == 127:
            with mounted(snapshotter, answer) as root:
                text(f"f{number}", str(number))(root)
        snapshotter.call("Commit", key=key, name=str(number))
        parent = str(number)
    with mounted(snapshotter, snapshotter.call("View", key="v", parent=parent)) as root:
        assert sorted(os.listdir(root)) == ["f0", "f127", "f32", "f64", "f96"]


# -- usage and limits ------------------------------------------------------------------------------------------------------


def test_usage_is_of_the_snapshot_alone(snapshotter: Snapshotter) -> None:
    layer(snapshotter, "base", "", text("f", "x" * 100_000))
    usage = snapshotter.call("Usage", key="base")
    assert 100_000 <= usage.size < 200_000
    assert usage.inodes >= 1
    with mounted(snapshotter, snapshotter.call("Prepare", key="a", parent="base")) as root:
        assert snapshotter.call("Usage", key="a").size < 16384
        text("g", "y" * 300_000)(root)
        subprocess.run(["sync", "-f", root], check=True)
        assert 300_000 <= snapshotter.call("Usage", key="a").size < 400_000
    snapshotter.call("View", key="v", parent="base")
    assert snapshotter.call("Usage", key="v").size == 0


def test_a_limit_by_label_holds_is_changed_while_mounted_and_outlives_the_service(snapshotter: Snapshotter) -> None:
    layer(snapshotter, "base", "", text("f", "x" * 100_000))
    answer = snapshotter.call("Prepare", key="ns/1/c", parent="base", labels={LIMIT: "1048576"})
    with mounted(snapshotter, answer) as root:

        def fill(name: str) -> int:
            with pytest.raises(OSError) as error, (root / name).open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(65536))
            assert error.value.errno == errno.ENOSPC
            return (root / name).stat().st_size

        assert fill("one") <= 1048576
        df = os.statvfs(root)
        assert df.f_blocks * df.f_frsize == 1048576
        snapshotter.stop(9)
        with pytest.raises(OSError):
            (root / "two").write_bytes(bytes(65536))  # the mount has a server of its own
        snapshotter.start()
        snapshotter.call(
            "Update", info={"name": "ns/1/c", "labels": {LIMIT: "2097152"}}, update_mask={"paths": [f"labels.{LIMIT}"]}
        )
        assert fill("two") > 500_000
        assert snapshotter.call("Usage", key="ns/1/c").size <= 2097152
        again = snapshotter.call("Mounts", key="ns/1/c")
        assert [record.source for record in again.mounts] == [record.source for record in answer.mounts]
        with mounted(snapshotter, again, "again") as other:  # a diff of a running container
            assert sorted(os.listdir(other)) == sorted(os.listdir(root))
    for wrong in ("x", "-1", "0", "1.5.2G"):
        assert snapshotter.code("Prepare", key="wrong", parent="base", labels={LIMIT: wrong}) == "INVALID_ARGUMENT"
    assert "wrong" not in snapshotter.names()


def test_the_default_limit_is_for_containers_and_not_for_layers(make_snapshotter: Callable[..., Snapshotter]) -> None:
    snapshotter = make_snapshotter("-s", "overlay", "--storage-opt", "size=1M").start()
    layer(snapshotter, "base", "", text("f", "x" * 3_000_000))
    with mounted(snapshotter, snapshotter.call("Prepare", key="default/3/web", parent="base")) as root:
        assert os.statvfs(root).f_blocks * os.statvfs(root).f_frsize == 1 << 20
        with pytest.raises(OSError) as error:
            text("g", "x" * 3_000_000)(root)
        assert error.value.errno == errno.ENOSPC
    with mounted(
        snapshotter, snapshotter.call("Prepare", key="default/4/own", parent="base", labels={LIMIT: "2097152"})
    ) as root:
        assert os.statvfs(root).f_blocks * os.statvfs(root).f_frsize == 2 << 20


# -- the service ---------------------------------------------------------------------------------------------------------------


def test_a_killed_mount_server_is_replaced_by_the_next_mounts(make_snapshotter: Callable[..., Snapshotter]) -> None:
    snapshotter = make_snapshotter("-s", "overlay", "--storage-opt", "size=1M").start()
    layer(snapshotter, "base", "", text("f", "x"))
    snapshotter.call("Prepare", key="a", parent="base")
    (place,) = (snapshotter.run_dir / "held").iterdir()
    from cowfs.mounting import client, mountpoint

    os.kill(client.attach(place).pid, 9)
    wait_for(lambda: mountpoint.is_dead(str(place)), "the server to end")
    with mounted(snapshotter, snapshotter.call("Mounts", key="a")) as root:
        assert (root / "f").read_text() == "x"


def test_a_mount_that_nobody_uses_is_not_held_for_ever(make_snapshotter: Callable[..., Snapshotter]) -> None:
    from cowfs.service.containerd.held import Held
    from cowfs.store import Store

    snapshotter = make_snapshotter("-s", "overlay", "--storage-opt", "size=1M").start()
    layer(snapshotter, "base", "", text("f", "x"))
    used = snapshotter.call("Prepare", key="used", parent="base")
    idle = snapshotter.call("Prepare", key="idle", parent="base").mounts[0].source
    with mounted(snapshotter, used) as root, Store.open(snapshotter.root) as store:
        held = Held(store, str(snapshotter.run_dir / "held"))
        assert held.look() == []
        assert held.mount(store.index.get("containerd: idle").name) == idle
        assert held.look() == [], "it was asked for meanwhile"
        assert held.look() == []
        assert held.look() == [os.path.basename(idle)]
        assert not os.path.exists(idle), "what was told cannot be bound any more"
        assert (root / "f").read_text() == "x"
    with mounted(snapshotter, snapshotter.call("Mounts", key="idle")) as root:
        assert (root / "f").read_text() == "x"


def test_only_its_own_snapshots_are_seen(make_snapshotter: Callable[..., Snapshotter]) -> None:
    """containerd's garbage collector removes what it does not know."""
    from cowfs.store import Store

    snapshotter = make_snapshotter("-s", "overlay").start()
    with Store.open(snapshotter.root) as store:
        store.prepare("work")
        store.commit("work", "people's")
        store.tag("containerd", "people's")
        assert snapshotter.names() == []
        for verb in ("Stat", "Usage", "Remove", "Mounts"):
            for key in ("people's", "containerd"):
                assert snapshotter.code(verb, key=key) == "NOT_FOUND"
        assert snapshotter.code("Prepare", key="x", parent="people's") == "NOT_FOUND"
        snapshotter.call("Prepare", key="people's")
        assert [info.name for info in store.walk()] == ["people's", "containerd: people's"]


def test_calls_at_once(snapshotter: Snapshotter) -> None:
    """Many threads, one key each, and one key that all want."""
    from concurrent.futures import ThreadPoolExecutor

    layer(snapshotter, "base", "", text("f", "x"))

    def life(number: int) -> str:
        key = f"k{number}"
        snapshotter.call("Prepare", key=key, parent="base")
        assert len(snapshotter.call("Mounts", key=key).mounts) == 1
        snapshotter.call("Commit", key=key, name=f"n{number}") if number % 2 else snapshotter.call("Remove", key=key)
        return snapshotter.code("Prepare", key="wanted", parent="base")

    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(life, range(16)))
    assert sorted(codes) == ["ALREADY_EXISTS"] * 15 + ["OK"]
    assert sorted(snapshotter.names()) == sorted(["base", "wanted", *(f"n{number}" for number in range(1, 16, 2))])


def test_a_second_service_at_the_same_door_is_refused(make_snapshotter: Callable[..., Snapshotter]) -> None:
    import sys

    one = make_snapshotter("-s", "overlay").start()
    assert one.socket.stat().st_mode & 0o777 == 0o600
    for address, code in (
        (f"unix://{one.socket}", 5),
        ("unix://relative", 2),
        ("tcp://127.0.0.1:1", 2),
        ("unix:///" + "x" * 110, 2),
    ):
        words = ["serve", "--root", f"{one.base}/other", "--run-dir", f"{one.base}/r2", "--containerd", address]
        done = subprocess.run(
            [sys.executable, "-m", "cowfs", *words], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        assert done.stderr.splitlines()[-1].startswith("cowfs")
    assert one.names() == []
    assert one.stop() == 0
    assert not one.socket.exists()


def test_a_full_disk_is_told_and_removing_works(make_snapshotter: Callable[..., Snapshotter], scratch: Path) -> None:
    snapshotter = make_snapshotter("-s", "overlay")
    snapshotter.base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12M", "full", snapshotter.base], check=True)
    try:
        snapshotter.start()
        layer(snapshotter, "base", "")
        with pytest.raises(OSError) as error, (snapshotter.base / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert error.value.errno == errno.ENOSPC
        for verb in ("Prepare", "View"):
            assert snapshotter.code(verb, key="new", parent="base") == "RESOURCE_EXHAUSTED"
        assert snapshotter.names() == ["base"]
        assert snapshotter.code("Remove", key="base") == "OK"
        (snapshotter.base / "fill").unlink()
        assert snapshotter.code("Prepare", key="new") == "OK"
        assert snapshotter.names() == ["new"]
        assert snapshotter.stop() == 0
        assert check(snapshotter.root) == []
    finally:
        snapshotter.stop(9)
        subprocess.run(["umount", "-l", snapshotter.base], check=True)


# -- capabilities -----------------------------------------------------------------------------------------------------


def test_a_layer_is_put_upon_its_parent_at_commit(snapshotter: Snapshotter) -> None:
    """As containerd unpacks layers at once: whiteouts and opaque directories, made without a parent, hide what is beneath then."""
    files = [text("gone", "x"), text("dir/old", "x"), text("kept", "x"), lambda root: os.chmod(root, 0o711)]
    layer(snapshotter, "base", "", *files)
    labels = {"containerd.io/snapshot/parent-chain-id": "sha256:0"}
    (record,) = snapshotter.call("Prepare", key="n/1/extract-1", labels=labels).mounts
    if "vfs" in snapshotter.arguments:
        assert snapshotter.code("Commit", key="n/1/extract-1", name="top", parent="base") == "UNIMPLEMENTED"
        return
    assert record.type == "overlay"
    (option,) = record.options
    upper = Path(option.removeprefix("upperdir="))
    os.mknod(upper / "gone", 0o020000, 0)
    text("dir/new", "y")(upper)
    os.setxattr(upper / "dir", "trusted.overlay.opaque", b"y")
    snapshotter.call("Commit", key="n/1/extract-1", name="top", parent="base")
    assert snapshotter.call("Stat", key="top").info.parent == "base"
    assert snapshotter.code("Remove", key="base") == "FAILED_PRECONDITION"
    with mounted(snapshotter, snapshotter.call("View", key="v", parent="top")) as root:
        assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == ["dir", "dir/new", "kept"]
        assert root.stat().st_mode & 0o777 == 0o711
    snapshotter.call("Prepare", key="upon", parent="base")
    assert snapshotter.code("Commit", key="upon", name="other", parent="top") == "INVALID_ARGUMENT"
    snapshotter.call("Commit", key="upon", name="other", parent="base")
    snapshotter.call("Prepare", key="extract-2", labels=labels)
    assert snapshotter.code("Commit", key="extract-2", name="x", parent="nobody") == "NOT_FOUND"
    assert snapshotter.code("Commit", key="extract-2", name="x", parent="v") == "INVALID_ARGUMENT"
    assert snapshotter.code("Commit", key="extract-2", name="x", parent="base") == "OK"
    snapshotter.call("Prepare", key="extract-3")
    assert snapshotter.code("Commit", key="extract-3", name="y", parent="base") == "INVALID_ARGUMENT", (
        "whiteouts are lost"
    )
    assert snapshotter.cowfs("check").stdout


def test_mapped_owners_are_shown_and_not_stored(snapshotter: Snapshotter) -> None:
    layer(snapshotter, "base", "", text("f", "x"), lambda root: os.chown(root / "f", 5, 6))
    labels = {f"containerd.io/snapshot/{name}mapping": "0:100000:1000,1000:500000:10" for name in ("uid", "gid")}
    for verb, key in (("Prepare", "a"), ("View", "b")):
        with mounted(snapshotter, snapshotter.call(verb, key=key, parent="base", labels=labels)) as root:
            assert ((root / "f").stat().st_uid, (root / "f").stat().st_gid) == (100005, 100006)
            if verb == "Prepare":
                (root / "g").touch()
                os.chown(root / "g", 500001, 100000)
    snapshotter.call("Commit", key="a", name="top")
    with mounted(snapshotter, snapshotter.call("View", key="v", parent="top")) as root:
        assert ((root / "g").stat().st_uid, (root / "g").stat().st_gid) == (1001, 0)
    for text_of_map in ("0:1", "0:100000:x", "0:0:1,", "a", "-1:0:5"):
        bad = {"containerd.io/snapshot/uidmapping": text_of_map}
        assert snapshotter.code("Prepare", key="c", parent="base", labels=bad) == "INVALID_ARGUMENT", text_of_map
    assert snapshotter.code("Stat", key="c") == "NOT_FOUND"
