"""Claim: while one process makes a big file copy up, another one's stat calls do not wait: 99th percentile under 20
ms.

A child opens a lower file for writing and writes 4 KiB, which copies it up; meanwhile fresh missing names are asked
for, so each needs an answer of the server. x-less; the copy's own time stands beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab
from ..lab.peers import ALL, COWFS, available, mounted_fresh

TOUCH = "import os,sys; fd = os.open(sys.argv[1], os.O_RDWR); os.pwrite(fd, b'x' * 4096, 4096); os.close(fd)"


def measure(lab: Lab) -> None:
    lower = trees.big_file(lab, lab.profile.big)
    names = available(lab, ALL)
    for _, name in lab.rounds(names, min(3, lab.profile.rounds)):
        size = 2 * lab.profile.big + (256 << 20)
        with lab.trying(name), mounted_fresh(lab, name, (lower,), "ext4", size) as mount:
            waits, copy = _race(mount.path)
            cuts = statistics.quantiles(waits, n=100)
            lab.record("stat p99", name, cuts[98])
            lab.record("stat median", name, cuts[49])
            lab.record("stat worst", name, max(waits))
            lab.record("copy-up", name, copy)


def _race(at: Path) -> tuple[list[float], float]:
    """(seconds of each stat while the copy ran, seconds of the copy). At least two stats are returned."""
    os.stat(at / "big")
    clock = time.perf_counter
    begin = clock()
    child = subprocess.Popen([sys.executable, "-S", "-E", "-c", TOUCH, at / "big"])
    waits: list[float] = []
    number = 0
    while child.poll() is None or number < 2:
        start = clock()
        os.access(f"{at}/no-{number}", os.F_OK)
        waits.append(clock() - start)
        number += 1
        time.sleep(0.0005)
    took = clock() - begin
    if child.returncode:
        raise RuntimeError(f"the writer ended with {child.returncode}")
    return waits, took


CLAIM = Claim(
    name="nobody_waits",
    title="stat during a big copy-up",
    why="One process that touches a big file must not stall a whole container.",
    metrics=(
        Metric(name="stat p99", title="99th percentile of stat"),
        Metric(name="stat median", title="median of stat"),
        Metric(name="stat worst", title="worst stat"),
        Metric(name="copy-up", title="the copy-up itself"),
    ),
    subjects=ALL,
    measure=measure,
    bars=(Bar(metric="stat p99", subject=COWFS, at_most=0.02, says="stat's 99th percentile while 1 GiB is copied up"),),
)


def test_nobody_waits(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
