"""Claim: the first 4 KiB written to a file of a lower layer costs the same whatever the file's size, with row.

Copy-on-write copies the file first. Timed: open for writing, one pwrite of 4 KiB at a seeded aligned offset, close;
fsync is left out everywhere. Twice: with the file's pages in the host's memory, the best case for a copy ("latency"),
and with all caches dropped before ("cold"), as when a sandbox starts on a host that did not just read its image. vfs
copies earlier, in prepare: another metric includes that.

Conditions: every union file system has its upper layer on an ext4 of its own and the lower layer on the work folder's
file system, so none can reflink. Reflinking hosts (xfs, btrfs) and a btrfs subvolume snapshot stand beside. The
kernel's overlayfs syncs its copy, fuse-overlayfs does not: its copy has not reached the disk yet.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, drop_caches, run, timed
from ..lab.peers import FO1, FO2, OVERLAY, PEERS, UNIONFS, mounted_fresh
from ..lab.profiles import GIB, MIB, Profile
from ..lab.stores import BLOCK, COW, COW_BTRFS, COW_XFS, ROW, THIN, VFS, Opened, opened

STORES = (ROW, COW, COW_XFS, COW_BTRFS, VFS, THIN)
FILESYSTEMS = (OVERLAY, FO1, FO2, UNIONFS)
BTRFS = "btrfs snapshot"
SUBJECTS = (*STORES, *FILESYSTEMS, BTRFS)

Trial = Callable[[int], Iterator[tuple[Path, float]]]  # yields (the big file, seconds that preparing took)


def _sizes(profile: Profile) -> tuple[float, ...]:
    return tuple(map(float, profile.first_write))


def measure(lab: Lab) -> None:
    for size in lab.profile.first_write:
        lower = trees.big_file(lab, size)
        room = 3 * size + (512 << 20)
        with contextlib.ExitStack() as stack:
            ready: dict[str, object] = {}
            for subject in lab.wanted(SUBJECTS):
                if subject in lab.result.skipped:
                    continue
                with lab.trying(subject):
                    if subject in STORES:
                        store = stack.enter_context(opened(lab, subject, room))
                        store.base("base", lambda at, source=lower: _copy(source, at))  # type: ignore[misc]
                        ready[subject] = store
                    elif subject == BTRFS:
                        disk = stack.enter_context(lab.fresh("btrfs", room))
                        run(["btrfs", "-q", "subvolume", "create", disk / "base"])
                        _copy(lower, disk / "base")
                        ready[subject] = disk
                    else:
                        reason = PEERS[subject].absent()
                        if reason:
                            raise SkipSubject(reason)
                        ready[subject] = None
            run(["cat", lower / "big"])
            os.sync()
            rounds = lab.profile.rounds if size < GIB else min(lab.profile.rounds, 3 if size == GIB else 2)
            for metric in ("latency", "cold"):
                for number, subject in lab.rounds([s for s in SUBJECTS if s in ready], rounds):
                    key, offset = (
                        f"trial-{metric}-{number}",
                        lab.rng(f"{size}/{number}").randrange(size // BLOCK) * BLOCK,
                    )
                    with (
                        lab.trying(subject),
                        _trial(lab, subject, ready[subject], lower, key, room) as (file, prepared),
                    ):
                        if metric == "cold":
                            drop_caches()
                        os.stat(file)
                        took = timed(lambda: _write(file, offset))  # noqa: B023 - called at once
                        lab.record(metric, subject, took, float(size))
                        if metric == "latency":
                            lab.record("with prepare", subject, took + prepared, float(size))


def _copy(source: Path, at: Path) -> None:
    shutil.copyfile(source / "big", at / "big")


def _write(file: Path, offset: int) -> None:
    fd = os.open(file, os.O_WRONLY)
    os.pwrite(fd, b"\xa5" * BLOCK, offset)
    os.close(fd)


@contextlib.contextmanager
def _trial(lab: Lab, subject: str, ready: object, lower: Path, key: str, room: int) -> Iterator[tuple[Path, float]]:
    """A writable snapshot of the base, mounted: (its big file, seconds that making the snapshot took)."""
    if isinstance(ready, Opened):
        prepared = timed(lambda: ready.store.prepare(key, "base"))
        with ready.mount(key) as (at, _):
            yield at / "big", prepared
        ready.store.remove(key)
    elif isinstance(ready, Path):
        snapshot = ready / key
        prepared = run(["btrfs", "-q", "subvolume", "snapshot", ready / "base", snapshot])
        yield snapshot / "big", prepared
        run(["btrfs", "-q", "subvolume", "delete", snapshot])
    else:
        with mounted_fresh(lab, subject, (lower,), "ext4", room) as mount:
            yield mount.path / "big", 0.0


CLAIM = Claim(
    name="first_write",
    title="first 4 KiB write to a big file of a lower layer",
    why="A database or disk image in a base image is touched once and copied whole, unless blocks are redirected.",
    topic="row",
    metrics=(
        Metric(name="latency", title="open, write 4 KiB, close", x_title="file size", x_unit="B", xs=_sizes),
        Metric(name="cold", title="the same, caches dropped before", x_title="file size", x_unit="B", xs=_sizes),
        Metric(
            name="with prepare",
            title="the same, making the snapshot included",
            x_title="file size",
            x_unit="B",
            xs=_sizes,
        ),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="latency", subject=ROW, x=GIB, at_most=0.002, says="first 4 KiB write to 1 GiB, row"),
        Bar(metric="latency", subject=THIN, x=GIB, at_most=0.002, says="first 4 KiB write to 1 GiB, block"),
        Bar(
            metric="latency",
            subject=ROW,
            x=GIB,
            against_x=MIB,
            at_most=1.5,
            says="first 4 KiB write, row: 1 GiB against 1 MiB",
        ),
        *(
            Bar(
                metric=metric,
                subject=ROW,
                x=GIB,
                against=against,
                at_most=1 / 300,
                says=f"first 4 KiB write to 1 GiB, row against {name}{how}",
            )
            for metric, how in (("latency", ""), ("cold", ", cold"))
            for against, name in ((OVERLAY, "kernel overlayfs"), ((FO1, FO2), "fuse-overlayfs"))
        ),
    ),
)


def test_first_write(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
