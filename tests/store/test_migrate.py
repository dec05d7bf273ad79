"""`Store.migrate`: a store with another driver is the same store; killed at any point, it goes on."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import hostfs, namespace, users
from support.hostfs import HostFs

from cowfs.errors import Corrupt, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.store import Store
from cowfs.store.migrating import SUFFIX
from cowfs.sys import faults
from cowfs.testing.trees import Seen, differences, tree_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes devices and trusted xattrs")

PAIRS = {
    "tmpfs": [("overlay", "vfs"), ("vfs", "overlay"), ("overlay", "aufs"), ("aufs", "vfs"), ("aufs", "row"), ("overlay", "row"), ("row", "overlay"), ("row", "vfs"), ("vfs", "row"), ("overlay", "block"), ("block", "row")],
    "btrfs": [("overlay", "btrfs"), ("btrfs", "row"), ("btrfs", "vfs"), ("row", "btrfs")],
    "xfs": [("vfs", "row")],
    "ext4": [("row", "overlay")],
}  # fmt: skip


def edit(rng: random.Random, tree: Path, names: list[str]) -> None:
    """One random change of a mounted tree, of any kind."""
    there = [path for path in tree.rglob("*") if not path.is_symlink()]
    at = rng.choice([tree, *(path for path in there if path.is_dir())])
    path = at / rng.choice(names)
    files = [one for one in there if one.is_file()]
    match rng.randrange(13):
        case 0 | 1 if not os.path.lexists(path):
            path.mkdir()
        case 2 | 3 if not os.path.lexists(path) or (path.is_file() and not path.is_symlink()):
            path.write_bytes(rng.randbytes(rng.randrange(30000)))
        case 4 if not os.path.lexists(path):
            path.symlink_to(rng.choice(["nowhere", "a"]))
        case 5 if there:
            os.chmod(rng.choice(there), rng.choice([0o600, 0o755, 0o4711]))
        case 6 if there:
            victim = rng.choice(there)
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        case 7 if there:
            source = rng.choice(there)
            if path != source and source not in path.parents and not os.path.lexists(path):
                source.rename(path)
        case 8 if files and not os.path.lexists(path):
            os.link(rng.choice(files), path)
        case 9 if files:
            os.setxattr(rng.choice([at, *files]), f"user.{rng.randrange(3)}", rng.randbytes(5))
        case 10 if not os.path.lexists(path):
            os.mkfifo(path)
        case 11 if not os.path.lexists(path) and len(os.fsencode(path)) < 100:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(str(path))
        case 12 if files:
            with rng.choice(files).open("r+b") as file:
                file.seek(rng.randrange(200_000))
                file.write(b"block")


def archive_of(rng: random.Random) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("from/archive", "from/.wh.gone" if rng.random() < 0.5 else "from/other"):
            info = tarfile.TarInfo(name)
            info.mtime = rng.randrange(10**9)
            data = rng.randbytes(rng.randrange(5000)) if ".wh." not in name else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


def fill(store: Store, rng: random.Random, mnt: Path, steps: int, *, plain: bool = False) -> None:
    """A random history of commits, live snapshots, archives, tags, limits."""
    names: list[str] = []
    names_of_files = ["a", "b", "c", "d" if plain else ".wh.d", "ü", "e e"]
    for step in range(steps):
        key = f"k{step}"
        limit: dict[str, Any] = {"size": "40M", "inodes": 5000} if rng.random() < 0.4 else {}
        store.prepare(key, rng.choice([None, *names]), labels={"step": str(step)}, **limit)
        if rng.random() < 0.3:
            store.apply(key, archive_of(rng))
        else:
            with store.mount(key, mnt):
                for _ in range(rng.randrange(12)):
                    edit(rng, mnt, names_of_files)
                if store.driver.capabilities.live and rng.random() < 0.4:
                    names.append(store.snapshot(key, f"live{step}").name)
                    for _ in range(rng.randrange(5)):
                        edit(rng, mnt, names_of_files)
        if rng.random() < 0.75:
            names.append(store.commit(key, f"n{step}", digests=rng.random() < 0.3).name)
        if names and rng.random() < 0.4:
            store.tag(f"tag{step}:latest", rng.choice(names), config='{"config": {"Cmd": ["sh"]}, "rootfs": {}}')
        if names and rng.random() < 0.3:
            store.view(f"v{step}", rng.choice(names))


def facts(store: Store) -> list[object]:
    rows = [
        (row.name, row.kind, row.parent_name, row.labels, row.created, row.updated, row.limit, row.shares_limit,
         row.diff_id, row.chain_id, store.index.config_of(row.num))
        for row in sorted(store.index.rows(), key=lambda row: row.name)
    ]  # fmt: skip
    return [rows, sorted((tag.name, tag.target, tag.config, tag.created) for tag in store.index.tags())]


def content(store: Store, mnt: Path) -> dict[str, Any]:
    found = {}
    for row in list(store.index.rows()):
        with store.mount(row.name, mnt, readonly=True):
            found[row.name] = counted(tree_of(mnt))
    return found


def counted(tree: dict[str, Seen]) -> dict[str, Seen]:
    """With as many links of each file as it has names: a delta keeps the count of a file whose other name an archive replaced."""
    names = Counter(one.twin for one in tree.values() if one.twin)
    return {
        path: one
        if stat.S_ISDIR(one.mode)
        else one._replace(nlink=max(1, names[one.twin]), twin=one.twin * (names[one.twin] > 1))
        for path, one in tree.items()
    }


def archives(store: Store) -> dict[str, str]:
    """The digest of each layer that leaves as an archive."""
    found = {}
    for row in store.index.rows():
        if row.root is not None:
            try:
                found[row.name] = store.export(row.name, io.BytesIO(), format="layer")
            except InvalidArgument as error:  # a name that no archive can have
                assert ".wh." in str(error)
    return found


@pytest.mark.parametrize("how", ["place", "target"])
@pytest.mark.parametrize(
    ("fs", "old", "new"), [(fs, old, new) for fs, pairs in PAIRS.items() for old, new in pairs], indirect=["fs"]
)
def test_the_store_is_the_same(fs: HostFs, old: str, new: str, how: str, request: pytest.FixtureRequest) -> None:
    rng = random.Random(f"{request.config.getoption('--seed')} {fs.name} {old} {new} {how}")
    place = fs.fresh("migrate")
    mnt = place / "mnt"
    mnt.mkdir()
    with Store.open(place / "store", driver=old, fsync=False) as store:
        fill(store, rng, mnt, 14, plain="aufs" in (old, new))  # aufs has no names that begin so
        (place / "store" / "containers").mkdir()
        (place / "store" / "containers" / "one").write_text("a service's")
        before, trees, layers = facts(store), content(store, mnt), archives(store)
        assert store.check(content=True).problems == []
        count = store.totals().count
    target = place / "new" if how == "target" else None
    made = Store.migrate(place / "store", new, target, fsync=False)
    assert (made.driver, made.root) == (new, str(target or place / "store"))
    with Store.open(made.root, fsync=False) as store:
        assert store.driver.name == new
        assert facts(store) == before
        assert store.totals().count == count
        now = content(store, mnt)
        assert {
            name: differences(tree, now[name]) for name, tree in trees.items() if differences(tree, now[name])
        } == {}
        assert archives(store) == layers
        assert store.check(content=True).problems == []
        assert store.gc().directories == ()
        for key in [info.name for info in store.walk(["kind==active"])]:
            with store.mount(key, mnt):
                (mnt / "written later").write_text("x")
            store.commit(key, f"{key}-later")
    if how == "place":
        assert sorted(os.listdir(place)) == ["mnt", "store"]
        assert (place / "store" / "containers" / "one").read_text() == "a service's"
    else:
        with Store.open(place / "store", fsync=False) as store:
            assert facts(store) == before


POINTS = [point for point in faults.POINTS if point.startswith(("migrate.", "create.", "apply.unpacked"))]


@pytest.mark.parametrize("where", POINTS)
@pytest.mark.parametrize("pair", [("overlay", "vfs"), ("row", "overlay")], ids="-".join)
def test_a_process_killed_anywhere_loses_nothing(
    where: str, pair: tuple[str, str], space: Path, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(f"{request.config.getoption('--seed')} {where} {pair}")
    (space / "mnt").mkdir()
    root = space / "store"
    with Store.open(root, driver=pair[0], fsync=False) as store:
        store.prepare("archived")
        store.apply("archived", archive_of(rng))
        store.commit("archived", "A")
        fill(store, rng, space / "mnt", 3)
        before, trees = facts(store), content(store, space / "mnt")
    for passed in (0, 2):  # the first time that the point is reached, the third
        pid = os.fork()
        if pid == 0:
            try:
                left = passed

                def hook(name: str) -> None:
                    nonlocal left
                    if name == where:
                        if not left:
                            os.kill(os.getpid(), signal.SIGKILL)
                        left -= 1

                faults.hook = hook
                Store.migrate(root, pair[1], fsync=False)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        with Store.open(root, fsync=False) as store:
            assert facts(store) == before
    with Store.open(root, fsync=False) as store:
        moved = store.driver.name == pair[1]
    if not moved or os.path.exists(f"{root}{SUFFIX}"):
        Store.migrate(root, pair[1], fsync=False)
    with Store.open(root, fsync=False) as store:
        assert store.driver.name == pair[1]
        assert facts(store) == before
        now = content(store, space / "mnt")
        assert [name for name, tree in trees.items() if differences(tree, now[name])] == []
        assert store.check(content=True).problems == []
    assert sorted(os.listdir(space)) == ["mnt", "store"]


def test_another_attempt_takes_what_is_whole_and_leaves_what_is_gone(space: Path) -> None:
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        for name in ("one", "two", "three"):
            store.prepare("k")
            (Path(store.driver.tree(store.index.get("k").id)) / name).write_text(name)
            store.commit("k", name)
        assert Store.migrate(space / "store", "vfs", space / "new", fsync=False).copied == 3
        store.remove("two")
        store.prepare("k")
        (Path(store.driver.tree(store.index.get("k").id)) / "again").write_text("again")
        store.commit("k", "two")
        store.update("one", {"label": "later"})
        store.tag("tagged", "three")
        assert Store.migrate(space / "store", "vfs", space / "new", fsync=False).copied == 1
        with Store.open(space / "new", fsync=False) as new:
            assert facts(new) == facts(store)
            assert os.listdir(new.driver.tree(new.index.get("two").id)) == ["again"]


def test_what_cannot_be_moved_is_told_in_one_line(space: Path) -> None:
    (space / "mnt").mkdir()
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.prepare("k")
        with (
            store.mount("k", space / "mnt"),
            pytest.raises(FailedPrecondition, match=r"'k' is in use .*cannot migrate"),
        ):
            Store.migrate(space / "store", "vfs")
        with pytest.raises(InvalidArgument, match="has the driver overlay already"):
            Store.migrate(space / "store", "overlay")
        with pytest.raises(Unsupported, match="btrfs"):
            Store.migrate(space / "store", "btrfs")
        store.commit("k", "A")
        with store.index.write() as change:
            change.set_damage(store.index.get("A").num, "tried")
        with pytest.raises(Corrupt, match="quarantine"):
            Store.migrate(space / "store", "vfs")
    subprocess.run(["mount", "--bind", space / "store", space / "store"], check=True)
    try:
        with pytest.raises(InvalidArgument, match="is a mount point"):
            Store.migrate(space / "store", "vfs")
    finally:
        subprocess.run(["umount", space / "store"], check=True)
    (space / "full").mkdir()
    (space / "full" / "something").write_text("x")
    with Store.open(space / "store", fsync=False) as store:
        with store.index.write() as change:
            change.set_damage(store.index.get("A").num, None)
        with pytest.raises(InvalidArgument, match="not a store"):
            Store.migrate(space / "store", "vfs", space / "full")
    assert sorted(os.listdir(space)) == ["full", "mnt", "store"]


def test_a_full_disk_leaves_the_old_store_and_goes_on_with_room(tmp_path: Path) -> None:
    if namespace.why_not:
        pytest.skip(namespace.why_not)
    host = hostfs.make_tmpfs(tmp_path, size="40m", name="small", inodes="3000")
    parent = None
    with Store.open(host / "store", driver="overlay", fsync=False) as store:
        for number in range(12):
            store.prepare("k", parent)
            (Path(store.driver.tree(store.index.get("k").id)) / f"f{number}").write_bytes(os.urandom(1 << 20))
            parent = store.commit("k", f"n{number}").name
        before = facts(store)
    run = [sys.executable, "-m", "cowfs", "migrate", "--root", str(host / "store"), "--to", "vfs"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("cowfs: ")
    assert f"{host}/store{SUFFIX}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with Store.open(host / "store", fsync=False) as store:
        assert store.driver.name == "overlay"
        assert facts(store) == before
        assert store.check(content=True).problems == []
    subprocess.run(["mount", "-o", "remount,size=400m,nr_inodes=0", host], check=True)
    several = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True) for _ in range(3)]  # one does it
    told = [one.communicate()[1] for one in several]
    assert sorted(one.returncode == 0 for one in several) == [False, False, True]
    for line in filter(None, told):
        assert "has the driver vfs already" in line or "another process is moving" in line or "changed" in line
    with Store.open(host / "store", fsync=False) as store:
        assert store.driver.name == "vfs"
        assert facts(store) == before
        assert store.check(content=True).problems == []
    assert os.listdir(host) == ["store"]
    subprocess.run(["umount", host], check=True)


def test_an_ordinary_user_moves_his_store(ordinary_user: int, space: Path) -> None:
    os.chown(space, ordinary_user, ordinary_user)
    python, environment = users.interpreter()
    script = """
import os, sys
from cowfs import Store
with Store.open("store", driver=sys.argv[1]) as store:
    for name, parent in (("one", None), ("two", "one")):
        store.prepare("k", parent)
        with store.paths("k") as paths:
            with paths.open(name, "w") as file:
                file.write(name)
            if parent:
                paths.unlink("one")
        store.commit("k", name)
Store.migrate("store", sys.argv[2])
with Store.open("store") as store:
    assert store.driver.name == sys.argv[2]
    assert store.check(content=True).problems == []
    print([(change.kind, change.path) for change in store.diff("two") if change.path])
"""
    for number, (old, new) in enumerate((("overlay", "vfs"), ("vfs", "overlay"), ("overlay", "row"))):
        home = space / str(number)
        home.mkdir()
        os.chown(home, ordinary_user, ordinary_user)
        done = subprocess.run(
            users.command_as([python, "-c", script, old, new]),
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        assert done.stdout == "[('deleted', b'one'), ('added', b'two')]\n"


def test_the_command(space: Path) -> None:
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        store.prepare("k")
        store.commit("k", "A")
    run = [sys.executable, "-m", "cowfs", "migrate", "--root", str(space / "store"), "--to"]
    done = subprocess.run([*run, "vfs"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{space}/store: driver vfs, 1 snapshots (1 copied now)\n"
    again = subprocess.run([*run, "vfs"], capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "has the driver vfs already" in again.stderr
    there = subprocess.run([*run, "row", str(space / "new"), "--json"], capture_output=True, text=True, check=True)
    assert '"driver": "row"' in there.stdout
