"""Hosts without a free byte, that cannot be written, or with servers that hang: what a store can still do there."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import users
from support.command import environment

import cowfs
from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.store import Store
from cowfs.sys import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop mounts, other users: needs root")


@pytest.fixture(params=["ext4", "xfs", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, can_mount: None) -> Iterator[Path]:
    """A small file system of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    if request.param == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", where], check=True)
    else:
        size, more = ("48M", ["-m", "0"]) if request.param == "ext4" else ("320M", [])
        subprocess.run(["truncate", "-s", size, tmp_path / "img"], check=True)
        if subprocess.run(["mkfs." + request.param, "-q", *more, tmp_path / "img"], check=False).returncode:
            pytest.skip(f"no mkfs.{request.param}")
        subprocess.run(["mount", "-o", "loop", tmp_path / "img", where], check=True)
    yield where
    subprocess.run(["umount", "-l", where], check=False)


def fill_up(disk: Path) -> Path:
    """Leave not a byte."""
    rest = disk / "rest"
    for piece in (1 << 20, 4096, 1):
        with open(rest, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * piece)
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return rest


@pytest.mark.parametrize("driver", ["overlay", "vfs"])
def test_a_store_on_a_full_disk_is_read_and_emptied(disk: Path, tmp_path: Path, driver: str) -> None:
    """Looking needs no room; removing works, and gives room back; what does not fit says what is full, and nothing is lost."""
    with Store.open(disk / "store", driver=driver) as store:
        store.prepare("key")
        with store.paths("key") as paths:
            paths.write_bytes(b"big", os.urandom(6 << 20))
        store.commit("key", "base")
        store.prepare("old", "base")
        store.prepare("big", "base")
        with store.paths("big") as paths:
            paths.write_bytes(b"fill", os.urandom(4 << 20))
    rest = fill_up(disk)
    with Store.open(disk / "store", create=False) as store:
        assert {info.name for info in store.walk()} == {"base", "old", "big"}
        assert store.stat("base").name == "base"
        assert list(store.diff("base"))
        store.totals()
        out = io.BytesIO()
        store.export("base", out, format="tar")
        assert len(out.getvalue()) > 6 << 20
        assert store.check(content=True).damage == []
        with pytest.raises((OSError, CowfsError)) as caught:
            for number in range(50):
                store.prepare(f"more{number}", "base")
        assert getattr(caught.value, "errno", None) == errno.ENOSPC
        store.gc()
        store.remove("old")
        store.remove("big")
        assert {info.name for info in store.walk()} >= {"base"}
        assert store.check(content=True).damage == []
    rest.unlink()
    with Store.open(disk / "store") as store:
        store.prepare("again", "base")
        assert store.check(content=True).damage == []


def test_a_store_on_a_readonly_bind_mount_is_read(space: Path, can_mount: None) -> None:
    """As on a read-only file system: looked at, not changed, and the error says why."""
    with Store.open(space / "store", driver="overlay") as store:
        store.prepare("key")
        with store.paths("key") as paths:
            paths.write_bytes(b"f", b"f")
        store.commit("key", "base")
        store.prepare("work", "base")
    (space / "bound").mkdir()
    mounts.mount(str(space / "store"), str(space / "bound"), "", mounts.MS_BIND)
    mounts.mount("", str(space / "bound"), "", mounts.MS_BIND | mounts.MS_REMOUNT | mounts.MS_RDONLY)
    try:
        with Store.open(space / "bound", create=False) as store:
            assert [info.name for info in store.walk()] == ["base", "work"]
            assert [change.path for change in store.diff("base")]
            store.export("base", io.BytesIO(), format="tar")
            assert store.check(content=True).damage == []
            with pytest.raises(OSError) as caught:
                store.prepare("more", "base")
            assert caught.value.errno == errno.EROFS
    finally:
        mounts.umount(str(space / "bound"), mounts.MNT_DETACH)


@pytest.fixture
def stores(space: Path, can_mount: None) -> Iterator[tuple[Store, Store]]:
    """Two stores, each with a mounted key; the first one's server is stopped."""
    opened = []
    for name in ("stuck", "well"):
        store = Store.open(space / name, driver="overlay", fsync=False)
        store.prepare("key")
        (space / f"mnt-{name}").mkdir()
        handle = store.mount("key", space / f"mnt-{name}")
        assert isinstance(handle, cowfs.MountHandle)
        opened.append((store, handle))
    os.kill(opened[0][1].pid, signal.SIGSTOP)
    try:
        yield opened[0][0], opened[1][0]
    finally:
        os.kill(opened[0][1].pid, signal.SIGCONT)
        for store, _ in opened:
            for key in ("key",):
                try:
                    store.unmount(key)
                except CowfsError:
                    pass
            store.close()


def test_a_server_that_hangs_stops_nobody_else(stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs on another store never ask it: counted by the sockets that are connected to."""
    from cowfs.mounting import protocol

    stuck, well = stores
    asked: list[str] = []
    real = protocol.connect

    def noted(path: str, timeout: float = protocol.TIMEOUT) -> object:
        asked.append(path)
        return real(path, timeout)

    monkeypatch.setattr(protocol, "connect", noted)
    assert well.mounted_at("key")
    well.usage("key")
    well.snapshot("key", "s1")
    well.prepare("more", "s1")
    well.remove("more")
    well.unmount("key")
    assert len(set(asked)) <= 1
    with pytest.raises(FailedPrecondition, match="does not answer"):
        stuck.snapshot("key", "s1")


def test_a_list_says_which_server_does_not_answer(stores: tuple[Store, Store], space: Path) -> None:
    found = {status.mountpoint: status for status in cowfs.mounts()}
    assert not found[str(space / "mnt-stuck")].answers
    assert found[str(space / "mnt-well")].answers


@pytest.mark.parametrize("verb", ["commit", "remove"])
def test_a_verb_waits_for_a_server_that_is_ending(space: Path, can_mount: None, verb: str) -> None:
    """umount(8) returns before the server has let go; engines commit or remove at once."""
    (space / "mnt").mkdir()
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        for number in range(5):
            store.prepare("key")
            store.mount("key", space / "mnt")
            (space / "mnt" / "f").write_bytes(os.urandom(1 << 20))
            subprocess.run(["umount", space / "mnt"], check=True)
            if verb == "commit":
                store.commit("key", f"c{number}")
            else:
                store.remove("key")


@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_an_ordinary_user_follows_the_readme(public_directory: Path, ordinary_user: int, driver: str) -> None:
    """Import of files of his own, a snapshot, a mount, a commit, a diff: by the commands of the README."""
    python, base = users.interpreter()
    home = public_directory / f"user-{driver}-{time.monotonic_ns():x}"
    home.mkdir()
    os.chown(home, users.UID, users.GID)
    script = f"""
set -e
cd {home}
export COWFS_ROOT=$PWD/store HOME=$PWD XDG_RUNTIME_DIR=$PWD
cowfs() {{ {python} -m cowfs "$@"; }}
mkdir -p layers/00-base/etc rootfs
echo one > layers/00-base/etc/motd
tar -C layers/00-base -cf base.tar .
cowfs init --driver {driver}
cowfs import layers/00-base base > /dev/null
cowfs import base.tar again > /dev/null
cowfs prepare sandbox base --size 1G > /dev/null
cowfs mount --key sandbox rootfs
echo hello > rootfs/greeting
cat rootfs/etc/motd
cowfs umount rootfs
cowfs commit sandbox v2
cowfs diff base v2
cowfs tree | tail -n 1
"""
    done = subprocess.run(
        users.command_as(["bash", "-c", script]),
        env={**environment(), **base},
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "one\n" in done.stdout
    assert "A greeting" in done.stdout or "A /greeting" in done.stdout
