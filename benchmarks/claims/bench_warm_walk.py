"""Claim: walking and stat-ing a tree again costs the same as with the kernel's own overlay, since the server gets no request.

`find` with a format that needs every inode's attributes, over all mounts at once, each walked once before. The client
is GNU find, so that the language of the client is not measured.
"""

from __future__ import annotations

from collections.abc import Callable

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, run
from ..lab.peers import ALL, COWFS, OVERLAY
from ..lab.warm import measure_warm

WALK = ("find", ".", "-printf", "%s %T@ %m %n\n")


def measure(lab: Lab) -> None:
    tree = trees.small_files(lab, lab.profile.walk_files)
    measure_warm(lab, tree, ALL, lambda at: run(WALK, cwd=at))


CLAIM = Claim(
    name="warm_walk",
    title="warm walk and stat of small files",
    why="Every build tool, package manager and language runtime stats its tree again and again.",
    metrics=(
        Metric(name="read-only", title="walk, read-only mount"),
        Metric(name="writable", title="walk, writable mount"),
    ),
    subjects=ALL,
    measure=measure,
    bars=(
        Bar(metric="read-only", subject=COWFS, against=OVERLAY, at_most=1.25, says="warm walk-and-stat, read-only"),
        Bar(metric="writable", subject=COWFS, against=OVERLAY, at_most=1.5, says="warm walk-and-stat, writable"),
    ),
)


def test_warm_walk(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
