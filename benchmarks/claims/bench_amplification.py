"""Claim: row hands at most 1.1 bytes to write calls for each byte the application wrote, its map included.

1 % of the 4 KiB blocks of a lower file are overwritten in random order, then fsync. File level: the server's wchar
(/proc/PID/io: all bytes given to write calls, copy_file_range included, minus the replies on /dev/fuse, at least 24
bytes a WRITE). Device: sectors written to the loop device, after sync. Stored: growth of the store for one write of 4
KiB.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, device_written, io_counters, used
from ..lab.peers import FO1, FO2, OVERLAY, UNIONFS, Stack, mounted, mounted_fresh
from ..lab.stores import BLOCK, COW, COW_XFS, ROW, VFS, opened, overwrite, some_blocks

STORES = (ROW, COW, COW_XFS, VFS)
FILESYSTEMS = (OVERLAY, FO1, FO2, UNIONFS)


def measure(lab: Lab) -> None:
    size = lab.profile.big
    room = 3 * size + (512 << 20)
    for _, subject in lab.rounds(lab.wanted((*STORES, *FILESYSTEMS)), 1):
        with lab.trying(subject):
            if subject in STORES:
                _store(lab, subject, size, room)
            else:
                _filesystem(lab, subject, size, room)


def _filesystem(lab: Lab, subject: str, size: int, room: int) -> None:
    lower = trees.big_file(lab, size)
    with lab.fresh("ext4", room) as disk:
        os.sync()
        before = device_written(disk)
        stack = Stack(lowers=(lower,), upper=disk / "upper", work=disk / "work")
        with mounted(lab, subject, stack) as mount:
            io_before = io_counters(mount.pid) if mount.pid else None
            written = overwrite(
                mount.path / "big", some_blocks(lab.rng("1 %"), size, 0.01), lab.rng("data"), fsync=True
            )
            if mount.pid and io_before:
                _file_level(lab, subject, io_before, io_counters(mount.pid), written)
        os.sync()
        lab.record("device", subject, (device_written(disk) - before) / written)
    with mounted_fresh(lab, subject, (lower,), "ext4", room) as mount:
        disk = (mount.stack.upper or mount.path).parent
        before = used(disk)
        overwrite(mount.path / "big", [BLOCK * 7], lab.rng("one"), fsync=True)
        lab.record("stored", subject, used(disk) - before)


def _store(lab: Lab, subject: str, size: int, room: int) -> None:
    source = trees.big_file(lab, size) / "big"
    with opened(lab, subject, room) as store:
        store.base("base", lambda at: shutil.copyfile(source, at / "big"))  # type: ignore[arg-type]
        os.sync()
        before = device_written(store.disk)
        store.store.prepare("many", "base")
        with store.mount("many") as (at, handle):
            io_before = io_counters(handle.pid)
            written = overwrite(at / "big", some_blocks(lab.rng("1 %"), size, 0.01), lab.rng("data"), fsync=True)
            _file_level(lab, subject, io_before, io_counters(handle.pid), written)
        os.sync()
        lab.record("device", subject, (device_written(store.disk) - before) / written)
        store.store.remove("many")
        stored = used(store.disk)
        store.store.prepare("one", "base")
        with store.mount("one") as (at, _):
            overwrite(at / "big", [BLOCK * 7], lab.rng("one"), fsync=True)
        lab.record("stored", subject, used(store.disk) - stored)


def _file_level(lab: Lab, subject: str, before: tuple[int, int], after: tuple[int, int], written: int) -> None:
    replies = written // BLOCK * 24
    lab.record("file level", subject, (after[1] - before[1] - replies) / written)
    lab.record("read", subject, max(0, after[0] - before[0] - written - written // BLOCK * 80) / written)


CLAIM = Claim(
    name="amplification",
    title="write amplification of random 4 KiB overwrites (1 % of a file)",
    why="Flash wears and disks are slow by what reaches them, not by what the application wrote.",
    topic="row",
    metrics=(
        Metric(name="file level", unit="x", title="bytes in the server's write calls, a byte written"),
        Metric(name="device", unit="x", title="bytes at the block device, a byte written"),
        Metric(name="read", unit="x", title="bytes the server read besides, a byte written"),
        Metric(name="stored", unit="B", title="storage for one write of 4 KiB"),
    ),
    subjects=(*STORES, *FILESYSTEMS),
    measure=measure,
    bars=(
        Bar(metric="file level", subject=ROW, at_most=1.1, says="write amplification of row, file level, map included"),
    ),
)


def test_amplification(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
