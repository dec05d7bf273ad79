"""A full disk fails the verb with ENOSPC and loses nothing; space freed makes it work again."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from support import hostfs, zpool
from support.drivers import ALL, HOSTS

from cowfs.errors import CowfsError
from cowfs.store import Store

from .conftest import BIG, content, overwrite, tree_path

BIGGER = BIG[:5000] + b"own" + BIG[5003:]

VERBS = {
    "prepare": lambda store: store.prepare("new", "base"),
    "commit": lambda store: store.commit("work", "done"),
    "apply": lambda store: store.apply("work", io.BytesIO(_tar())),
    "import": lambda store: store.import_image(io.BytesIO(_tar()), "image"),
    "label": lambda store: store.update("base", {f"label-{number}": "x" * 3000 for number in range(40)}),
}


@pytest.fixture(params=ALL)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(40):
            info = tarfile.TarInfo(f"d/file-{number}")
            info.size = 20_000
            tar.addfile(info, io.BytesIO(b"%05d" % number * 4000))
    return out.getvalue()


def _fill_disk(place: Path, leave: int) -> Path:
    """Leave about so many bytes free."""
    ballast = place / "ballast"
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        host = os.statvfs(place)
        os.posix_fallocate(fd, 0, max(1, host.f_bavail * host.f_frsize - leave))
        while True:
            host = os.statvfs(place)
            if host.f_bavail * host.f_frsize <= leave:
                break
            os.posix_fallocate(fd, 0, os.fstat(fd).st_size + 4096)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        os.close(fd)
    return ballast


@contextmanager
def _filled(place: Path, driver: str, leave: int) -> Iterator[None]:
    """Leave about so many bytes free until the block ends."""
    if driver != "zfs":
        ballast = _fill_disk(place, leave)
        yield
        ballast.unlink()
        return
    ballast = place.parent / "ballast"  # a dataset that takes its room at once, and gives it back at once
    dataset = f"{place.parent.name}/ballast"
    zpool.run("zfs", "create", "-o", f"mountpoint={ballast}", dataset)
    free = int(zpool.run("zfs", "get", "-Hp", "-o", "value", "available", dataset))
    zpool.run("zfs", "set", f"reservation={max(1, free - leave)}", dataset)
    yield
    zpool.run("zfs", "set", "reservation=none", dataset)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("leave", [0, 4096, 16_384, 65_536, 300_000])
def test_a_full_disk_loses_nothing(
    verb: str, leave: int, driver: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest,
    can_mount: None,
) -> None:  # fmt: skip
    small = tmp_path_factory.mktemp("small")
    if driver == "zfs":
        if (leave != 65_536 or verb in ("import", "label")) and not request.config.getoption("--thorough"):
            return  # a sample: its programs sync the entire machine
        place: Path = request.getfixturevalue("pool") / "place"
        place.mkdir()
    elif driver == "btrfs":
        place = hostfs.make_image("btrfs", small, size=40 << 20)
    else:
        place = hostfs.make_tmpfs(small, size="16m" if driver == "block" else "8m")
    _loses_nothing(place, driver, verb, lambda: _filled(place, driver, leave))


@contextmanager
def _without_inodes(place: Path, leave: int) -> Iterator[None]:
    """Leave so many inodes free until the block ends."""
    ballast = place / "ballast"
    ballast.mkdir()
    for number in range(os.statvfs(place).f_ffree - leave):
        (ballast / str(number)).touch()
    yield
    shutil.rmtree(ballast)


#: btrfs and zfs make inodes as long as there is room
COUNTED = [name for name in ALL if name not in HOSTS]


@pytest.mark.parametrize("driver", COUNTED, indirect=True)
@pytest.mark.parametrize("verb", ["prepare", "commit", "apply"])
@pytest.mark.parametrize("leave", [0, 3, 30])
def test_a_host_without_inodes_loses_nothing(
    verb: str, leave: int, driver: str, tmp_path_factory: pytest.TempPathFactory, can_mount: None
) -> None:
    place = hostfs.make_tmpfs(tmp_path_factory.mktemp("small"), size="64m", inodes="400")
    _loses_nothing(place, driver, verb, lambda: _without_inodes(place, leave))


def test_an_image_without_inodes_loses_nothing(tmp_path_factory: pytest.TempPathFactory, can_mount: None) -> None:
    """Of the driver block: its file system has an end of its own."""
    place = hostfs.make_tmpfs(tmp_path_factory.mktemp("small"), size="64m")
    with Store.open(place / "store", driver="block", fsync=False, size="16M") as store:
        store.prepare("work")
        with store.paths("work") as paths:
            paths.write_bytes(b"own", b"own")
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for number in range(20_000):
                tar.addfile(tarfile.TarInfo(f"d/{number}"))
        with pytest.raises(OSError) as caught:
            store.apply("work", io.BytesIO(out.getvalue()))
        assert caught.value.errno == errno.ENOSPC
        with store.paths("work") as paths:
            paths.rmtree(b"d")
            paths.write_bytes(b"more", b"more")
        store.commit("work", "done")
        assert sorted(change.path for change in store.diff("done")) == [b"more", b"own"]
        assert store.check(content=True).problems == []


def _loses_nothing(place: Path, driver: str, verb: str, full: Callable[[], AbstractContextManager[None]]) -> None:
    """A verb on a full host fails with ENOSPC or works; nothing is lost, and it works once there is room."""
    with Store.open(place / "store", driver=driver, fsync=False) as store:
        store.prepare("k")
        (tree_path(store, "k") / "file").write_text("base")
        (tree_path(store, "k") / "big").write_bytes(BIG)
        store.commit("k", "base")
        store.prepare("work", "base")
        (tree_path(store, "work") / "own").write_text("own")
        overwrite(store, "work", "big", 5000, b"own")
        before = {info.name for info in store.walk()}
        with full():
            try:
                VERBS[verb](store)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                done = False
            except CowfsError as error:
                pytest.fail(f"{verb}: {error}")
            else:
                done = True
        assert store.check().damage == []
        if not done and verb != "import":  # the layers of an image that are complete stay
            assert {info.name for info in store.walk()} == before
        assert [change.path for change in store.diff("base")] == [b"big", b"file"]
        store.gc()
        assert store.check(content=True).problems == []
        if not done:
            VERBS[verb](store)
        assert content(store, "done" if verb == "commit" else "work", "big") == BIGGER
        if verb == "apply":
            store.commit("work", "done")
            assert b"d/file-39" in {change.path for change in store.diff("done")}
        assert store.check(content=True).problems == []
