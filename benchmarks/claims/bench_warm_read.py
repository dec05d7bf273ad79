"""Claim: reading all files of a tree again costs the same as with the kernel's own overlay: no request reaches the server.

`cat` opens, stats, reads and closes each file; all mounts stand at once and have read the tree twice before.
"""

from __future__ import annotations

from collections.abc import Callable

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, run
from ..lab.peers import ALL, COWFS, OVERLAY
from ..lab.warm import measure_warm


def measure(lab: Lab) -> None:
    tree = trees.small_files(lab, lab.profile.walk_files)
    lab.note(f"{len(tree.names):,} files, {tree.bytes / 1e6:,.0f} MB")
    measure_warm(lab, tree, ALL, lambda at: run(["xargs", "-0", "-a", tree.list0, "cat"], cwd=at))


CLAIM = Claim(
    name="warm_read",
    title="warm read of all small files",
    why="Imports, headers and scripts are read over and over; this is where FUSE file systems lose most.",
    metrics=(
        Metric(name="read-only", title="read, read-only mount"),
        Metric(name="writable", title="read, writable mount"),
    ),
    subjects=ALL,
    measure=measure,
    bars=(
        Bar(metric="read-only", subject=COWFS, against=OVERLAY, at_most=1.25, says="warm read of all files, read-only"),
        Bar(metric="writable", subject=COWFS, against=OVERLAY, at_most=1.5, says="warm read of all files, writable"),
    ),
)


def test_warm_read(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
