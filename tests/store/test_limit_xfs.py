"""The limit engine ``loop-xfs``: an XFS image for the upper, which any root makes larger while it is mounted. Its exactness, and that nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostfs import known_to_kernel

from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.model import Limit
from cowfs.store import Store, limit_loop
from cowfs.store.limit_image import KINDS, kind_of
from cowfs.sys import files, loop

from .test_limit_loop import at, fill, free, image

MIB = 1 << 20
XFS = "loop-xfs"

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or bool(loop.why_not()), reason="needs root and loop devices")


@pytest.fixture
def store(tmp_path: Path, can_mount: None) -> Iterator[Store]:
    if not shutil.which("mkfs.xfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or not known_to_kernel("xfs"):
        pytest.skip("mkfs.xfs, or xfs in the kernel, is missing")
    for name in ("fuse", "kernel"):
        (tmp_path / name).mkdir()
    with Store.open(tmp_path / "store", driver="overlay", fsync=False) as opened:
        opened.prepare("key")
        with opened.mount("key", tmp_path / "fuse"):
            (tmp_path / "fuse" / "kept").write_bytes(b"kept" * 5000)
        opened.commit("key", "base")
        yield opened


def wait_until_free(path: Path, wanted: int) -> None:
    """XFS frees the blocks of a deleted file a moment later."""
    end = time.monotonic() + 60
    while free(path) != wanted:
        assert time.monotonic() < end, (free(path), wanted)
        time.sleep(0.01)


def settle(path: Path) -> None:
    """Have what was written allocated."""
    fd = os.open(path, os.O_RDONLY)
    try:
        files.syncfs(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [MIB, 100 * MIB + 4096, 400 * MIB])
def test_a_limit_on_bytes_is_exact_to_the_block(store: Store, size: int) -> None:
    store.prepare("key", "base", size=size)
    with store.mount("key", at(store, "kernel"), limit_engine=XFS):
        top = at(store, "kernel")
        assert store.limit_engine("key") == XFS
        assert kind_of(str(image(store, "key"))).name == "xfs"
        assert free(top) == size
        if size < 200 * MIB:
            assert size - MIB // 4 <= fill(top / "big") <= size  # a map of extents, and what XFS keeps at a full one
            (top / "big").unlink()
            wait_until_free(top, size)
        with (top / "held").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size // 2)
            assert free(top) >= size // 2 - 16 * 4096
        assert size // 2 <= store.usage("key").bytes <= size // 2 + 64 * 4096
        if size != 100 * MIB + 4096:  # what is withheld takes no room on the host
            assert image(store, "key").stat().st_blocks * 512 < 80 * MIB


def test_it_grows_and_shrinks_while_mounted_and_holds_no_inodes(store: Store) -> None:
    """The ext4 of ``loop`` does so for processes with CAP_SYS_RESOURCE only."""
    store.prepare("key", "base", size=16 * MIB)
    with store.mount("key", at(store, "kernel"), limit_engine=XFS):
        top = at(store, "kernel")
        (top / "file").write_bytes(b"x" * MIB)
        settle(top)
        used = 16 * MIB - free(top)
        for size in (8 * MIB, 64 * MIB, 900 * MIB, 2048 * MIB, 4 * MIB):
            store.limit("key", size=size)
            assert free(top) == size - used, size
        assert (top / "file").read_bytes() == b"x" * MIB
        with pytest.raises(FailedPrecondition, match="inodes"):
            store.limit("key", inodes=10)
        with pytest.raises(FailedPrecondition):
            store.limit("key", size=None)
        assert store.limit("key") == Limit(bytes=4 * MIB)
        store.limit("key", size=MIB // 2)  # below the use: nothing is lost, and nothing more is taken
        assert free(top) <= 16 * 4096  # XFS keeps some for itself
        with pytest.raises(OSError) as caught:
            (top / "more").write_bytes(b"x" * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert (top / "file").read_bytes() == b"x" * MIB


def test_it_is_committed_and_given_another_kind_at_the_next_mount(store: Store) -> None:
    store.prepare("key", "base", size=16 * MIB)
    top = at(store, "kernel")
    for number, engine in enumerate((XFS, "loop", XFS, None, "fuse")):
        with store.mount("key", top, limit_engine=engine, mount_type=None if engine else "kernel"):
            (top / f"n{number}").write_text(str(number))
            os.link(top / f"n{number}", top / f"linked{number}")
            assert store.limit_engine("key") == (engine or XFS)  # without a word the image stays
            assert (top / "n0").stat().st_nlink == 2
    store.commit("key", "next")
    assert store.check(content=True).problems == []
    added = {change.path for change in store.diff("base", "next") if change.path}
    assert added == {name % number for number in range(5) for name in (b"n%d", b"linked%d")}


def test_a_limit_on_inodes_is_another_engines(store: Store) -> None:
    store.prepare("key", "base", size=16 * MIB, inodes=10)
    with pytest.raises(Unsupported, match="an XFS image holds no limit on inodes"):
        store.mount("key", at(store, "kernel"), limit_engine=XFS)
    assert not os.path.exists(image(store, "key"))
    store.prepare("alone", "base", inodes=10)
    with pytest.raises((InvalidArgument, Unsupported)):
        store.mount("alone", at(store, "kernel"), limit_engine=XFS)


def test_a_host_that_cannot_says_why(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe: the program, the kernel, loop devices. ``auto`` takes what there is."""
    monkeypatch.setattr("cowfs.sys.programs.find", lambda name: None if name == "mkfs.xfs" else f"/usr/sbin/{name}")
    assert "mkfs.xfs is not installed" in limit_loop.why_not(store.driver, KINDS[XFS])
    assert limit_loop.why_not(store.driver) == ""
    assert limit_loop.best(store.driver, Limit(bytes=MIB)).name == "ext4"
    store.prepare("key", "base", size=16 * MIB)
    with pytest.raises(Unsupported, match=r"mkfs\.xfs is not installed"):
        store.mount("key", at(store, "kernel"), limit_engine=XFS)
    monkeypatch.setattr("cowfs.sys.programs.find", lambda name: None if name == "mkfs.ext4" else f"/usr/sbin/{name}")
    assert "mkfs.ext4 is not installed" in limit_loop.why_not(store.driver)
