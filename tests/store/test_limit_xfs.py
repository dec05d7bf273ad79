"""The limit engine ``loop-xfs``: an XFS image for the upper, which any root makes larger while it is mounted. Its exactness, and that nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import random
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
        with pytest.raises(FailedPrecondition, match="are in use") as caught:
            store.limit("key", size=MIB // 2)
        assert "\n" not in str(caught.value)
        assert (store.limit("key"), free(top)) == (Limit(bytes=4 * MIB), 4 * MIB - used)
    store.limit("key", size=MIB // 2)  # unmounted anybody may say so
    with pytest.raises(FailedPrecondition, match="are in use"):
        store.mount("key", top, limit_engine=XFS)
    assert not os.path.ismount(top)
    with store.mount("key", top, limit_engine="fuse"):
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


@contextlib.contextmanager
def full() -> Iterator[None]:
    """It may fail for want of room."""
    try:
        yield
    except OSError as error:
        assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("seed", range(1))
def test_a_random_life_equals_a_plain_directory_within_its_limit(store: Store, seed: int) -> None:
    """Writes, deletions, renames, limits up and down under the mount, remounts by any engine, commits: the content is the plain one's, and the use is never beyond the limit by a write."""
    rng = random.Random(f"xfs {seed}")
    top, plain = at(store, "kernel"), {"kept": b"kept" * 5000}
    limit = 8 * MIB
    store.prepare("key", "base", size=limit)
    for round in range(3):
        engine = rng.choice([XFS, XFS, "loop", "fuse"])
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(store.mount("key", top, limit_engine=engine))
            except (
                FailedPrecondition,
                OSError,
            ):  # near the limit, what another engine held may be too much for this one
                limit = 64 * MIB
                store.limit("key", size=limit)
                held.enter_context(store.mount("key", top, limit_engine=engine))
            for _ in range(20):
                act = rng.choice(["write", "write", "write", "delete", "rename", "limit", "link"])
                name, other = f"f{rng.randrange(6)}", f"f{rng.randrange(6)}"
                if act == "write":
                    data = rng.randbytes(4096) * rng.choice([1, 30, 300, 900])
                    before = plain.get(name)
                    try:
                        (top / name).write_bytes(data)
                        plain[name] = data
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
                        if (top / name).exists():
                            plain[name] = (top / name).read_bytes()
                            assert data.startswith(plain[name]) or plain[name] == before
                elif act in ("delete", "rename") and name in plain:
                    with full():  # a whiteout, and what is copied up for it, may need room on a full one
                        (top / name).unlink() if act == "delete" else (top / name).rename(top / other)
                        moved = plain.pop(name)
                        if act == "rename":
                            plain[other] = moved
                elif act == "limit" and engine == XFS:
                    settle(top)
                    wanted = rng.choice([4, 16, 50, 500]) * MIB
                    with contextlib.suppress(FailedPrecondition):  # more is in use
                        store.limit("key", size=wanted)
                        limit = wanted
                    assert free(top) <= limit
                assert {path.name: path.read_bytes() for path in top.iterdir()} == plain
            settle(top)
            if store.stat("key").parent == "base":  # else data in the layers beneath does not count
                used = sum(-(-len(data) // 4096) * 4096 for name, data in plain.items() if data != b"kept" * 5000)
                assert free(top) <= max(0, limit - used)
        if rng.random() < 0.4:
            store.commit("key", f"c{round}")
            store.prepare("key", f"c{round}", size=limit)
            plain_before = dict(plain)
            store.view("look", f"c{round}")
            with store.paths("look") as paths:
                assert {name.decode(): paths.read_bytes(name) for name in paths.listdir(b"")} == plain_before
            store.remove("look")
    assert store.check(content=True).problems == []
