"""The limit of an active snapshot can be changed, mounted or not, and stays what it was changed to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cowfs.cli import main
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.model import Limit
from cowfs.mounting.client import attach
from cowfs.store import Store

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")

MIB = 1 << 20


@pytest.fixture(params=["overlay", "row", "vfs"])
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def mnt(space: Path, store: Store) -> Path:
    """A mount point, and base < k with a limit of 1 MiB."""
    store.prepare("seed")
    store.commit("seed", "base")
    store.prepare("k", "base", size="1M")
    (space / "mnt").mkdir()
    return space / "mnt"


def fits(mnt: Path, size: int) -> bool:
    """Whether a file of so many bytes may be there; it is gone afterwards."""
    try:
        (mnt / "data").write_bytes(bytes(range(256)) * (size // 256))
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return False
    finally:
        (mnt / "data").unlink()
    return True


@pytest.mark.parametrize("how", ["store", "handle", "mount point", "cli mount point", "cli key"])
def test_a_limit_raised_while_mounted_holds_at_the_next_mount(store: Store, mnt: Path, space: Path, how: str) -> None:
    with store.mount("k", mnt) as handle:
        assert not fits(mnt, 2 * MIB)
        if how == "store":
            assert store.limit("k", size="8M", inodes=100) == Limit(bytes=8 * MIB, inodes=100)
        elif how == "handle":
            handle.limit(size="8M", inodes=100)
        elif how == "mount point":
            attach(str(mnt)).limit(size="8M", inodes=100)
        else:
            where = str(mnt) if how == "cli mount point" else "k"
            assert main(["limit", where, "--root", str(space / "store"), "--size", "8M", "--inodes", "100"]) == 0
        assert fits(mnt, 2 * MIB)
    assert store.limit("k") == Limit(bytes=8 * MIB, inodes=100)
    with store.mount("k", mnt) as handle:
        assert handle.limit() == Limit(bytes=8 * MIB, inodes=100)
        assert fits(mnt, 2 * MIB)
        assert not fits(mnt, 9 * MIB)


def test_a_limit_is_changed_where_nothing_is_mounted(store: Store, mnt: Path, space: Path) -> None:
    assert store.limit("k", size=None) == Limit()
    assert store.limit("k", inodes="3") == Limit(inodes=3)
    assert main(["limit", "k", "--root", str(space / "store"), "--size", "4M", "--inodes", "none"]) == 0
    assert store.limit("k") == Limit(bytes=4 * MIB)
    with store.mount("k", mnt):
        assert fits(mnt, 2 * MIB)
        assert not fits(mnt, 5 * MIB)


@pytest.mark.parametrize("driver", ["overlay", "row"], indirect=True)
def test_a_limit_set_late_counts_what_live_snapshots_hold(store: Store, mnt: Path) -> None:
    store.limit("k", size=None)
    with store.mount("k", mnt) as handle:
        (mnt / "held").write_bytes(bytes(range(256)) * (3 * MIB // 256))
        store.snapshot("k", "s1")
        store.limit("k", size="4M")
        before = handle.usage()
        assert before.bytes >= 3 * MIB
        assert not fits(mnt, 2 * MIB)
    with store.mount("k", mnt) as handle:
        assert handle.usage() == before
        assert not fits(mnt, 2 * MIB)
    assert store.limit("k") == Limit(bytes=4 * MIB)


@pytest.mark.parametrize("driver", ["overlay", "row"], indirect=True)
def test_snapshot_and_rollback_keep_a_changed_limit(store: Store, mnt: Path) -> None:
    with store.mount("k", mnt):
        store.limit("k", size="8M")
        store.snapshot("k", "s1")
        store.snapshot("k", "s2")
        assert store.limit("k") == Limit(bytes=8 * MIB)
        store.rollback("k", "s1")
        assert store.limit("k") == Limit(bytes=8 * MIB)
        assert fits(mnt, 4 * MIB)


def test_only_active_snapshots_have_a_limit_that_can_change(store: Store, mnt: Path, space: Path) -> None:
    with pytest.raises(FailedPrecondition, match="committed"):
        store.limit("base", size="1M")
    with pytest.raises(NotFound):
        store.limit("nothing", size="1M")
    with pytest.raises(InvalidArgument):
        store.limit("k", size="lots")
    with store.paths("k"), pytest.raises(FailedPrecondition, match="in use"):
        store.limit("k", size="2M")
    assert store.limit("k") == Limit(bytes=MIB)
