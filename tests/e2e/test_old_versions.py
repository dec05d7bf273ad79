"""Data of earlier versions of cowfs still opens: stores, active snapshots and uppers of ``tests/data``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import stat
import subprocess
from pathlib import Path

import pytest

import cowfs
from cowfs.store import Store

DATA = Path(__file__).resolve().parents[1] / "data" / "version-0.1.tar.zst"
DRIVERS = ("overlay", "row", "vfs")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="its layers have trusted.overlay xattrs: needs root")


@pytest.fixture
def old(space: Path, can_mount: None) -> Path:
    """The data of version 0.1, unpacked."""
    command = ["tar", "--zstd", "--xattrs", "--xattrs-include=*", "--acls", "-xf", str(DATA), "-C", str(space)]
    subprocess.run(command, check=True)
    (space / "mnt").mkdir()
    return space


def listing(top: Path) -> list[str]:
    """One line an object, as find's -printf of the README wrote it."""
    lines = []
    for directory, names, files in os.walk(top):
        for name in names + files:
            path = Path(directory, name)
            st = path.lstat()
            kind = {stat.S_IFDIR: "d", stat.S_IFREG: "f", stat.S_IFLNK: "l", stat.S_IFIFO: "p"}[stat.S_IFMT(st.st_mode)]
            line = f"{path.relative_to(top)} {kind} {stat.S_IMODE(st.st_mode):o}"
            if kind != "d":
                line += f" {st.st_size} {st.st_nlink} {os.readlink(path) if kind == 'l' else ''}"
            lines.append(line)
    return sorted(lines)


def digests(top: Path) -> list[str]:
    """As ``find . -type f | sort | xargs sha256sum`` prints them."""
    found = []
    for directory, _, files in os.walk(top):
        for name in files:
            path = Path(directory, name)
            if stat.S_ISREG(path.lstat().st_mode):
                where = f"./{path.relative_to(top)}"
                found.append((where, f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {where}"))
    return [line for _, line in sorted(found)]


def shows_what_it_showed(mnt: Path, out: Path) -> None:
    assert listing(mnt) == sorted(out.with_suffix(".list").read_text().splitlines())
    assert digests(mnt) == out.with_suffix(".sums").read_text().splitlines()


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_old_store_opens_and_shows_what_it_showed(old: Path, driver: str) -> None:
    """Its records and layers are sound, its active snapshot mounts, and all names and data are there."""
    with Store.open(old / f"store-{driver}", create=False) as store:
        assert store.check(content=True).damage == []
        with store.mount("work", old / "mnt"):
            shows_what_it_showed(old / "mnt", old / "out" / driver)


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_old_store_can_be_worked_with(old: Path, driver: str) -> None:
    """Write, commit, prepare on it: and what was there stays."""
    with Store.open(old / f"store-{driver}", create=False) as store:
        with store.mount("work", old / "mnt"):
            (old / "mnt" / "new").write_bytes(b"new")
        store.commit("work", "done")
        store.prepare("next", "done")
        with store.mount("next", old / "mnt"):
            assert (old / "mnt" / "new").read_bytes() == b"new"
            (old / "mnt" / "new").unlink()
            shows_what_it_showed(old / "mnt", old / "out" / driver)
        assert store.check(content=True).damage == []


@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_a_limit_over_old_live_snapshots_goes_on(old: Path, driver: str) -> None:
    """Format 1 had no column for who shares a limit: rollback still counts what the key's own snapshots hold."""
    with Store.open(old / f"store-{driver}", create=False) as store:
        held = [store.usage(name) for name in ("snap1", "snap2")]
        store.rollback("work", "snap1")
        with store.mount("work", old / "mnt") as handle:
            assert handle.usage().bytes == held[0].bytes
        store.rollback("work", store.stat("snap1").parent or "")
        with store.mount("work", old / "mnt") as handle:
            assert handle.usage().bytes == 0


def test_an_old_upper_mounts_and_shows_what_it_showed(old: Path) -> None:
    """Its layers and limit are recorded beside it, as they were."""
    with cowfs.mount(old / "layers", old / "mnt", upper=old / "upper") as handle:
        shows_what_it_showed(old / "mnt", old / "out" / "upper")
        assert handle.limit().bytes == 2 << 20


def test_what_an_old_version_copied_is_counted_by_the_measure_of_now(old: Path) -> None:
    """The driver vfs takes off what it copied; that was counted by a measure that knew less."""
    store_path = old / "store-vfs"
    with Store.open(old / "store-vfs", create=False) as store:
        used = store.usage("work")
    with contextlib.closing(sqlite3.connect(store_path / "index.db")) as index, index:
        index.execute("DELETE FROM meta WHERE key = 'measure'")
        index.execute("UPDATE snapshots SET base_bytes = base_bytes - 40960 WHERE name = 'work'")
    with Store.open(old / "store-vfs", create=False) as store:
        assert store.usage("work") == used
        with store.mount("work", old / "mnt") as handle:
            assert handle.usage() == used
