"""The btrfs driver passes the conformance suite on a loop-mounted btrfs, and keeps what only it promises."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support import users
from support.hostfs import HostFs

from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.store import Store
from cowfs.sys import btrfs
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


def test_constant_time_says_the_layers_of_one_tree_share_all_extents(fs: HostFs) -> None:
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
        walked = []
        store.driver.usage = lambda id: walked.append(id)  # type: ignore[method-assign]
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
