"""Claim: a snapshot of a live mount holds up its writers for at most 50 ms (median).

A child writes 4 KiB blocks at random offsets of a 4 MiB file, which the driver overlay copies after each snapshot, without a
pause, and notes the time after each pause of more than a millisecond. Meanwhile snapshots are made. The stall is the
longest of those pauses during the making of a snapshot.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab
from ..lab.stores import COW, ROW, opened_all

SUBJECTS = (ROW, COW)
FILE = 4 << 20
WRITER = """
import os, random, sys, time
fd, rng, clock = os.open(sys.argv[1], os.O_RDWR), random.Random(7), time.clock_gettime
blocks, data = os.fstat(fd).st_size // 4096, b"w" * 4096
last, end, pauses = clock(1), clock(1) + float(sys.argv[2]), []
print("ready", flush=True)
while last < end:
    os.pwrite(fd, data, rng.randrange(blocks) * 4096)
    now = clock(1)
    if now - last > 0.001:
        pauses.append((last, now))
    last = now
print(*(f"{a} {b}" for a, b in pauses), sep="\\n")
"""
_SECONDS, _EVERY = 3.0, 0.4


def measure(lab: Lab) -> None:
    with opened_all(lab, SUBJECTS, 8 << 30) as stores:
        for subject, store in stores.items():
            with lab.trying(subject):
                store.base("base", _fill)
        for number, subject in lab.rounds(list(stores)):
            with lab.trying(subject):
                store = stores[subject]
                store.store.prepare(f"live-{number}", "base")
                with store.mount(f"live-{number}") as (at, handle):
                    for stall in _stalls(at / "file", handle, f"state-{number}"):
                        lab.record("stall", subject, stall)


def _fill(at: Path) -> None:
    (at / "file").write_bytes(b"b" * FILE)


def _stalls(path: Path, handle: Any, name: str) -> list[float]:
    """Seconds of the longest pause of the writer during each snapshot."""
    command = [sys.executable, "-S", "-E", "-c", WRITER, str(path), str(_SECONDS)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    windows: list[tuple[float, float]] = []
    until = time.clock_gettime(time.CLOCK_MONOTONIC) + _SECONDS - _EVERY
    while time.clock_gettime(time.CLOCK_MONOTONIC) < until:
        time.sleep(_EVERY)
        begun = time.clock_gettime(time.CLOCK_MONOTONIC)
        handle.snapshot(f"{name}-{len(windows)}")
        windows.append((begun, time.clock_gettime(time.CLOCK_MONOTONIC)))
    text = child.stdout.read()
    if child.wait():
        raise RuntimeError(f"the writer ended with {child.returncode}")
    pauses = [(float(a), float(b)) for a, b in (line.split() for line in text.splitlines() if line)]
    return [max((b - a for a, b in pauses if b > begun and a < ended), default=0.001) for begun, ended in windows]


CLAIM = Claim(
    name="live_stall",
    title="writers during a live snapshot",
    why="A snapshot that holds a database up for a second is one that nobody makes.",
    metrics=(Metric(name="stall", title="longest pause of a writer during a snapshot"),),
    subjects=SUBJECTS,
    measure=measure,
    bars=tuple(
        Bar(metric="stall", subject=subject, at_most=0.05, says=f"median stall of a writer, {subject}")
        for subject in SUBJECTS
    ),
)


def test_live_stall(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
