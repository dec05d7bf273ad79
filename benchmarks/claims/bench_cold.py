"""Claim: the first walk and the first read after a mount are no slower than fuse-overlayfs's.

Each sample is a fresh mount with the kernel's caches dropped; "first" is the same with the host's page cache warm, so
that the file system's own work shows and not the disk's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, drop_caches, run
from ..lab.peers import COWFS, FO1, FO2, FUSE_OVERLAYFS, OVERLAY, Stack, available, mounted
from .bench_warm_walk import WALK

SUBJECTS = (OVERLAY, FO1, FO2, COWFS)


def measure(lab: Lab) -> None:
    tree = trees.small_files(lab, lab.profile.walk_files)
    names = available(lab, SUBJECTS)
    stack = Stack(lowers=tree.layers)
    read: list[str | Path] = ["xargs", "-0", "-a", tree.list0, "cat"]
    for _, name in lab.rounds(names, min(lab.profile.rounds, 3)):
        with lab.trying(name):
            with mounted(lab, name, stack) as mount:
                drop_caches()
                lab.record("walk", name, run(WALK, cwd=mount.path))
            with mounted(lab, name, stack) as mount:
                drop_caches()
                lab.record("read", name, run(read, cwd=mount.path))
            with mounted(lab, name, stack) as mount:
                lab.record("first walk", name, run(WALK, cwd=mount.path))
                lab.record("first read", name, run(read, cwd=mount.path))


def _bar(metric: str, says: str) -> Bar:
    return Bar(metric=metric, subject=COWFS, against=FUSE_OVERLAYFS, at_most=1.0, goal=0.5, says=says)


CLAIM = Claim(
    name="cold",
    title="cold walk and read",
    why="A container's first start is all cold.",
    metrics=(
        Metric(name="walk", title="walk, caches dropped"),
        Metric(name="read", title="read, caches dropped"),
        Metric(name="first walk", title="first walk, host cache warm"),
        Metric(name="first read", title="first read, host cache warm"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        _bar("walk", "cold walk"),
        _bar("read", "cold read"),
        _bar("first walk", "first walk of a mount, host cache warm"),
        _bar("first read", "first read of a mount after its walk, host cache warm"),
    ),
)


def test_cold(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
