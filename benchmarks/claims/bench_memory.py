"""Claim: the server takes at most 600 bytes a cached node and 30 MB at rest, and forgetting frees them.

Resident memory (VmRSS) of the server process: after the mount's first answer, after a walk over N files, after the
kernel was made to forget them (drop_caches), and after the same walk again. Bytes a node are the growth by the first
walk over the number of nodes (files and directories). Growth again: the memory after the second walk, after everything
was forgotten, minus that after the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, drop_caches, rss, run
from ..lab.peers import COWFS, FO1, FO2, UNIONFS, Stack, available, mounted
from .bench_warm_walk import WALK

SUBJECTS = (FO1, FO2, UNIONFS, COWFS)


def settle(pid: int) -> int:
    """Resident bytes once they stand still for 0.3 s (at most 10 s): forgets are handled after they were sent."""
    last, since, end = rss(pid), time.monotonic(), time.monotonic() + 10
    while time.monotonic() < end and time.monotonic() - since < 0.3:
        time.sleep(0.05)
        now = rss(pid)
        if now != last:
            last, since = now, time.monotonic()
    return last


def measure(lab: Lab) -> None:
    tree = trees.empty_files(lab, lab.profile.memory_files)
    nodes = len(tree.names) + len({name.rpartition(b"/")[0] for name in tree.names})
    names = available(lab, SUBJECTS)
    for _, name in lab.rounds(names, min(2, lab.profile.rounds)):
        with lab.trying(name), mounted(lab, name, Stack(lowers=tree.layers)) as mount:
            assert mount.pid is not None
            drop_caches(2)
            rest = settle(mount.pid)
            lab.record("at rest", name, rest)
            run(WALK, cwd=mount.path)
            walked = settle(mount.pid)
            lab.record("a node", name, (walked - rest) / nodes)
            drop_caches(2)
            forgotten = settle(mount.pid)
            lab.record("after forget", name, forgotten)
            run(WALK, cwd=mount.path)
            lab.record("walked again", name, settle(mount.pid) / walked)


CLAIM = Claim(
    name="memory",
    title="server memory",
    why="Hundreds of mounts stand on one host.",
    metrics=(
        Metric(name="a node", unit="B", title="resident bytes a cached node"),
        Metric(name="at rest", unit="B", title="resident at rest"),
        Metric(name="after forget", unit="B", title="resident after all were forgotten"),
        Metric(name="walked again", unit="x", title="second walk's memory, of the first's"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="a node", subject=COWFS, at_most=600, goal=500, says="server memory a cached node"),
        Bar(metric="at rest", subject=COWFS, at_most=30e6, says="server memory at rest"),
        Bar(
            metric="walked again",
            subject=COWFS,
            at_most=1.02,
            says="walked, forgotten, walked again: memory of the second, of the first",
        ),
    ),
)


def test_memory(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
