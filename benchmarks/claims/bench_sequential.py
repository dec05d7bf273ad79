"""Claim: a big file is written and read at least as fast as with fuse-overlayfs 1.

Written by dd in 1 MiB blocks to a fresh upper; read by cat from a lower layer through a fresh mount (the host's page
cache is warm, the mount's is not), then again.
"""

from __future__ import annotations

from collections.abc import Callable

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, run
from ..lab.peers import ALL, COWFS, FO1, OVERLAY, PASSTHROUGH, Stack, available, mounted, mounted_fresh

SUBJECTS = (*ALL, PASSTHROUGH)


def measure(lab: Lab) -> None:
    lower = trees.big_file(lab, lab.profile.big)
    blocks = lab.profile.big >> 20
    names = available(lab, SUBJECTS)
    run(["cat", lower / "big"])
    for _, name in lab.rounds(names):
        with lab.trying(name):
            with mounted_fresh(lab, name, (lower,), "tmpfs", 2 * lab.profile.big + (64 << 20)) as mount:
                write = ["dd", "if=/dev/zero", f"of={mount.path}/new", "bs=1M", f"count={blocks}"]
                lab.record("write tmpfs", name, run(write))
            with mounted_fresh(lab, name, (lower,), "ext4", 2 * lab.profile.big + (256 << 20)) as mount:
                write = ["dd", "if=/dev/zero", f"of={mount.path}/new", "bs=1M", f"count={blocks}", "conv=fsync"]
                lab.record("write ext4 fsync", name, run(write))
            with mounted(lab, name, Stack(lowers=(lower,))) as mount:
                lab.record("read", name, run(["cat", mount.path / "big"]))
                lab.record("read again", name, run(["cat", mount.path / "big"]))


def _bar(metric: str, says: str) -> tuple[Bar, Bar]:
    return (
        Bar(metric=metric, subject=COWFS, against=FO1, at_most=1.0, says=says),
        Bar(metric=metric, subject=COWFS, against=OVERLAY, goal=1.2, says=f"{says} (goal)"),
    )


CLAIM = Claim(
    name="sequential",
    title="sequential write and read of a big file",
    why="Archives, model weights and images are moved this way.",
    metrics=(
        Metric(name="write tmpfs", title="write, upper on tmpfs"),
        Metric(name="write ext4 fsync", title="write and fsync, upper on ext4"),
        Metric(name="read", title="first read through a mount"),
        Metric(name="read again", title="second read"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        *_bar("write tmpfs", "sequential write, tmpfs"),
        *_bar("write ext4 fsync", "sequential write with fsync, ext4"),
        *_bar("read", "sequential read"),
    ),
)


def test_sequential(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
