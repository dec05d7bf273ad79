"""Kernel mounts with a limit: an ext4 image of the limit's size for an upper. How exact it is, and that nothing is lost with it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import trees
from support.hostfs import HostFs, make_image
from support.users import command_as, hand_over

from cowfs.cli import main
from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.model import Limit, Usage
from cowfs.mounting import client
from cowfs.store import Store, limit_loop
from cowfs.sys import faults, host, loop

from .test_faults import LIMITS, _in_child, _passed
from .test_kernel_image import step

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or bool(loop.why_not()), reason="needs root and loop devices")
MIB = 1 << 20


@pytest.fixture(params=["overlay", "row"])
def store(request: pytest.FixtureRequest, tmp_path: Path, can_mount: None) -> Iterator[Store]:
    """A store with a snapshot "base", and two mount points."""
    for name in ("fuse", "kernel"):
        (tmp_path / name).mkdir()
    with Store.open(tmp_path / "store", driver=request.param, fsync=False) as opened:
        opened.prepare("key")
        with opened.mount("key", tmp_path / "fuse"):
            for name in ("changed", "deleted", "kept"):
                (tmp_path / "fuse" / name).write_bytes(name.encode() * 5000)
        opened.commit("key", "base")
        yield opened


def at(store: Store, name: str) -> Path:
    return Path(store.root).parent / name


def image(store: Store, key: str) -> Path:
    return Path(limit_loop.image_of(store.driver, store.index.get(key).id))


def fill(path: Path, piece: int = 4096) -> int:
    """Write until it fails with ENOSPC; how much went in."""
    done = 0
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                done += file.write(b"f" * piece)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return done


def free(path: Path) -> int:
    told = os.statvfs(path)
    return told.f_bavail * told.f_frsize


@pytest.mark.parametrize("size", [MIB, 10 * MIB, 100 * MIB + 4096])
def test_a_limit_on_bytes_is_exact_to_the_block(store: Store, size: int) -> None:
    """The space of statvfs is exact; a file's own map of extents may take some blocks of it."""
    store.prepare("key", "base", size=size)
    with store.mount("key", at(store, "kernel"), mount_type="kernel"):
        top = at(store, "kernel")
        assert free(top) == size
        assert size - 8 * 4096 <= fill(top / "big") <= size
        assert free(top) == 0
        assert store.usage("key").bytes == size
        assert store.limit_engine("key") == "loop"
        (top / "big").unlink()
        assert free(top) == size
        os.truncate(top / "kept", 10)  # copied up: a block, and what ext4 sets aside for it until it is written
        assert size - 8 * 4096 <= free(top) < size


@pytest.mark.parametrize("inodes", [1, 100, 5000])
def test_a_limit_on_inodes_is_exact(store: Store, inodes: int) -> None:
    store.prepare("key", "base", size=8 * MIB, inodes=inodes)
    with store.mount("key", at(store, "kernel"), mount_type="kernel"):
        top = at(store, "kernel")
        assert os.statvfs(top).f_favail == inodes
        for number in range(inodes):
            (top / f"n{number}").touch()
        with pytest.raises(OSError) as caught:
            (top / "more").touch()
        assert caught.value.errno == errno.ENOSPC
        assert store.usage("key").inodes == inodes
        (top / "n0").unlink()
        (top / "more").touch()


def test_a_limit_is_changed_while_mounted(store: Store) -> None:
    """Down, below what is used, up again: at once. Beyond the file system it is grown, where this process may."""
    store.prepare("key", "base", size=16 * MIB, inodes=100)
    with store.mount("key", at(store, "kernel"), limit_engine="loop"):
        top = at(store, "kernel")
        store.limit("key", size=8 * MIB)
        assert free(top) == 8 * MIB
        assert fill(top / "big") == 8 * MIB
        store.limit("key", size=4 * MIB)
        assert free(top) == 0
        assert (top / "big").stat().st_size == 8 * MIB
        store.limit("key", size=10 * MIB, inodes=50)
        assert free(top) == 2 * MIB
        assert os.statvfs(top).f_favail == 49
        assert fill(top / "more") == 2 * MIB
        with pytest.raises(FailedPrecondition):
            store.limit("key", size=None)
        with pytest.raises(FailedPrecondition):
            store.limit("key", inodes=10**6)
        assert store.limit("key") == Limit(bytes=10 * MIB, inodes=50)
        if host.has_cap(host.CAP_SYS_RESOURCE):
            store.limit("key", size=64 * MIB)
            assert free(top) == 54 * MIB
        else:
            with pytest.raises(FailedPrecondition, match="CAP_SYS_RESOURCE"):
                store.limit("key", size=64 * MIB)
    store.limit("key", size=64 * MIB, inodes=10_000)  # unmounted there is no bound: what is there is moved
    with store.mount("key", at(store, "kernel"), limit_engine="loop"):
        assert free(top) == 54 * MIB
        assert os.statvfs(top).f_favail == 10_000 - 2
    store.limit("key", size=None, inodes=None)
    with store.mount("key", at(store, "kernel"), mount_type="kernel"):
        assert not image(store, "key").exists()
        assert (top / "big").stat().st_size == 8 * MIB


@pytest.mark.parametrize("seed", range(3))
def test_what_the_image_held_is_what_is_committed(store: Store, seed: int) -> None:
    """Random changes, mounted three times by turns with FUSE: each mount, the diff and the commit show one tree."""
    rng = random.Random(seed)
    store.prepare("key", "base", size=200 * MIB, inodes=3000)
    for number in range(3):
        with store.mount("key", at(store, "kernel"), mount_type="kernel"):
            for _ in range(60):
                step(rng, at(store, "kernel"))
            seen = trees.snapshot(str(at(store, "kernel")))
            paths = {change.path for change in store.diff("key")}
        assert {change.path for change in store.diff("key")} == paths
        if number == 1:
            with store.mount("key", at(store, "fuse")):
                assert trees.differences(seen, trees.snapshot(str(at(store, "fuse")))) == []
                assert not image(store, "key").exists()
    store.compact("key", share=0) if store.driver.capabilities.row else None
    store.commit("key", "next")
    assert not image(store, "next").exists()
    assert store.check(content=True).damage == []
    store.view("view", "next")
    with store.mount("view", at(store, "fuse")):
        assert trees.differences(seen, trees.snapshot(str(at(store, "fuse")))) == []
    assert {change.path for change in store.diff("next")} == paths


def test_a_commit_takes_out_what_changed(store: Store) -> None:
    """Not the image, and nothing of what is beneath."""
    store.prepare("key", "base", size=1 << 30)
    with store.mount("key", at(store, "kernel"), mount_type="kernel"):
        (at(store, "kernel") / "deleted").unlink()
        (at(store, "kernel") / "new").write_text("new")
    store.commit("key", "next")
    layer = Path(store.driver.directory(store.index.get("next").id))
    assert sorted(os.listdir(layer / "fs")) == ["deleted", "new"]
    assert sum(path.lstat().st_blocks for path in layer.rglob("*")) * 512 < 256 << 10
    assert store.usage("next") == Usage(bytes=4096, inodes=1)


def test_one_mount_at_a_time_whoever_made_it(store: Store) -> None:
    """Killed after the mount, in another mount namespace: verbs refuse; what is left after the unmount is nothing."""
    store.prepare("key", "base", size=16 * MIB)
    top = at(store, "kernel")
    run = (
        "import os, signal\nfrom cowfs.store import Store\n"
        f"store = Store.open({store.root!r})\nstore.mount('key', {str(top)!r}, mount_type='kernel')\n"
        f"open({str(top / 'written')!r}, 'w').write('w')\nprint('mounted', flush=True)\n"
        "input()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", run],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "mounted\n"
        for verb in (
            lambda: store.mount("key", top, mount_type="kernel"),
            lambda: store.mount("key", top),
            lambda: store.commit("key", "next"),
            lambda: store.remove("key"),
        ):
            with pytest.raises(FailedPrecondition, match="mounted by the kernel"):
                verb()
        assert b"written" in {change.path for change in store.diff("key")}
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.wait() == -signal.SIGKILL
    # With the last process of that namespace the mount went, and with it the loop device.
    store.commit("key", "next")
    store.view("view", "next")
    with store.mount("view", at(store, "fuse")):
        assert (at(store, "fuse") / "written").read_text() == "w"
    with open("/proc/mounts") as file:
        assert store.root not in file.read()
    for device in os.listdir("/sys/block"):
        backing = Path(f"/sys/block/{device}/loop/backing_file")
        assert not backing.exists() or store.root not in backing.read_text()


def test_killed_at_any_step_of_settling(tmp_path: Path, can_mount: None) -> None:
    """The tree is whole before and after, and what is left over goes with the next attempt."""
    (tmp_path / "m").mkdir()

    def make(root: Path) -> None:
        with Store.open(root, driver="overlay", fsync=False) as store:
            store.prepare("key", size=16 * MIB)
            with store.mount("key", tmp_path / "m", mount_type="kernel"):
                for number in range(20):
                    (tmp_path / "m" / f"f{number}").write_text(str(number))

    def commit(store: Store) -> None:
        store.commit("key", "next")

    make(tmp_path / "record")
    points = _passed(tmp_path / "record", commit)
    assert [name for name in points if name.startswith(LIMITS)] == [n for n in faults.POINTS if n.startswith(LIMITS)]
    for number in range(len(points)):
        root = tmp_path / f"kill-{number}"
        make(root)
        count = 0

        def kill(passed: str, number: int = number) -> None:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        assert os.WIFSIGNALED(_in_child(root, commit, kill)), points[number]
        with Store.open(root, fsync=False) as store:
            assert store.check().damage == []
            if store.exists("key"):
                store.commit("key", "next")
            assert store.check(content=True).problems == []
            with store.paths("key") if store.exists("key") else _view(store, "next") as paths:
                assert sorted(name for name in paths.listdir(b"")) == sorted(b"f%d" % n for n in range(20))
            layer = store.driver.directory(store.index.get("next").id)
            assert sorted(name for name in os.listdir(layer) if not name.startswith("cowfs-")) == ["fs", "work"]


def _view(store: Store, name: str):  # type: ignore[no-untyped-def]
    store.view("look", name)
    return store.paths("look")


def test_a_host_without_room_loses_nothing(tmp_path: Path, can_mount: None) -> None:
    """The copy out of the image does not fit: the commit says so, the image stays, and later it goes on."""
    small = make_image("ext4", tmp_path, size=64 * MIB)
    (tmp_path / "m").mkdir()
    try:
        with Store.open(small / "store", driver="overlay", fsync=False) as store:
            store.prepare("key", size=30 * MIB)
            with store.mount("key", tmp_path / "m", mount_type="kernel"):
                (tmp_path / "m" / "data").write_bytes(os.urandom(24 * MIB))
                before = trees.snapshot(str(tmp_path / "m"))
            (small / "ballast").write_bytes(bytes(free(small) - 6 * MIB))
            with pytest.raises(OSError) as caught:
                store.commit("key", "next")
            assert caught.value.errno == errno.ENOSPC
            with store.mount("key", tmp_path / "m", mount_type="kernel"):
                assert trees.differences(before, trees.snapshot(str(tmp_path / "m"))) == []
            (small / "ballast").unlink()
            store.commit("key", "next")
            assert store.check(content=True).damage == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_engines_are_asked_for_by_name(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.prepare("limited", "base", size=16 * MIB)
    store.prepare("free", "base")
    top = str(at(store, "kernel"))
    with pytest.raises(InvalidArgument, match="no limit"):
        store.mount("free", top, limit_engine="loop")
    with pytest.raises(InvalidArgument, match="not one of fuse mounts"):
        store.mount("limited", top, mount_type="fuse", limit_engine="loop")
    with pytest.raises(InvalidArgument, match="no limit engine"):
        store.mount("limited", top, limit_engine="quota")
    assert main(["mount", "--root", store.root, "--key", "limited", "--limit-engine", "auto", top]) == 0
    assert store.mounted_at("limited") == top
    assert main(["usage", "--root", store.root, "limited"]) == 0
    assert "held by loop" in capsys.readouterr().out
    assert main(["usage", top]) == 0  # the mount point does as well, whatever store is the default
    assert "held by loop" in capsys.readouterr().out
    assert main(["mounts"]) == 0
    assert str(image(store, "limited")) in capsys.readouterr().out
    with pytest.raises(FailedPrecondition, match="no server to ask"):
        client.attach(top)
    assert main(["info", "--root", store.root]) == 0
    told = capsys.readouterr().out
    assert "an image of the limit's size, ext4 (loop), xfs (" in told
    assert main(["umount", top]) == 0
    assert main(["mount", "--root", store.root, "--key", "limited", top, "--limit-engine", "fuse"]) == 0
    assert main(["usage", "--root", store.root, "limited"]) == 0
    assert "held by fuse" in capsys.readouterr().out
    assert main(["umount", top]) == 0


def test_an_ordinary_user_gets_the_fuse_way(ordinary_user: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """``auto`` is cowfs's own server for whoever may not mount; asked for by name, the engine says why not."""
    place = hand_over(tmp_path_factory.mktemp("theirs"), ordinary_user)
    code = (
        "import sys, os\nfrom cowfs.store import Store\nfrom cowfs.errors import Unsupported\n"
        "top = sys.argv[1]\nos.mkdir(top + '/m')\n"
        "with Store.open(top + '/store', fsync=False) as store:\n"
        "    store.prepare('key', size='1M')\n"
        "    try:\n        store.mount('key', top + '/m', limit_engine='loop')\n"
        "    except Unsupported as error:\n        print('refused:', error)\n"
        "    with store.mount('key', top + '/m', limit_engine='auto') as handle:\n"
        "        print('limit', os.statvfs(top + '/m').f_bavail * 4096, store.limit_engine('key'))\n"
    )
    done = subprocess.run(
        command_as([sys.executable, "-c", code, str(place)]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "refused: a kernel mount with a limit is not possible: only root" in done.stdout
    assert f"limit {MIB} fuse" in done.stdout


def test_a_limit_on_inodes_alone_is_not_the_images(store: Store) -> None:
    store.prepare("key", "base", inodes=100)
    with pytest.raises((Unsupported, InvalidArgument)):
        store.mount("key", at(store, "kernel"), mount_type="kernel")
    assert not os.path.ismount(at(store, "kernel"))
    assert limit_loop.why_not(store.driver) == ""


def test_on_every_host(fs: HostFs, can_mount: None) -> None:
    """The image is a sparse file of whatever file system the store is on; the limit is the same."""
    place = fs.fresh("loop")
    (place / "m").mkdir()
    with Store.open(place / "store", driver="overlay", fsync=False) as store:
        store.prepare("key", size=3 * MIB, inodes=10)
        with store.mount("key", place / "m", mount_type="kernel"):
            assert free(place / "m") == 3 * MIB
            assert fill(place / "m" / "big") == 3 * MIB
            (place / "m" / "big").unlink()
            (place / "m" / "kept").write_text("kept")
        store.commit("key", "next")
        assert store.check(content=True).damage == []
        store.view("view", "next")
        with store.paths("view") as paths:
            assert paths.read_bytes(b"kept") == b"kept"
