"""Claim: a hundred sandboxes that each change 1 % of a big file take 1 % each, not a copy each, with row.

Every sandbox overwrites its own random 1 % of the 4 KiB blocks. Backends that copy the file whole are measured on
three sandboxes only (a hundred would need a hundred files' space), which a note says. Space is st_blocks of the whole
store, per sandbox.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed, used
from ..lab.stores import COPYING, COW, COW_XFS, ROW, VFS, Opened, opened_all, overwrite, some_blocks

SUBJECTS = (ROW, COW, COW_XFS, VFS)


def measure(lab: Lab) -> None:
    size = lab.profile.sandbox_big
    source = trees.big_file(lab, size) / "big"
    counts = {s: min(3, lab.profile.sandboxes) if s in COPYING else lab.profile.sandboxes for s in SUBJECTS}
    with opened_all(lab, SUBJECTS, (max(counts[s] for s in COPYING) + 4) * size + (1 << 30)) as stores:
        before: dict[str, int] = {}
        for subject, store in stores.items():
            with lab.trying(subject):
                store.base("base", lambda at: _fill(source, at))
                before[subject] = used(store.disk)
        for number in range(lab.profile.sandboxes):
            for subject, store in stores.items():
                if number < counts[subject] and subject not in lab.result.skipped:
                    with lab.trying(subject):
                        _sandbox(lab, store, f"sandbox-{number}", size)
        for subject, store in stores.items():
            if subject not in lab.result.skipped:
                lab.record("space a sandbox", subject, (used(store.disk) - before[subject]) / counts[subject])
                lab.note(f"{subject}: {counts[subject]} sandboxes")


def _fill(source: Path, at: Path) -> None:
    shutil.copyfile(source, at / "big")


def _sandbox(lab: Lab, store: Opened, key: str, size: int) -> None:
    lab.record("prepare", store.subject, timed(lambda: store.store.prepare(key, "base")))
    blocks, rng = some_blocks(lab.rng(key), size, 0.01), lab.rng("data")
    with store.mount(key) as (at, _):
        lab.record("change", store.subject, timed(lambda: overwrite(at / "big", blocks, rng)))


CLAIM = Claim(
    name="sandboxes",
    title="sandboxes that each change 1 % of a big file",
    why="Agents and tests fork one data set many times and touch little of it.",
    topic="row",
    metrics=(
        Metric(name="space a sandbox", unit="B", title="storage a sandbox"),
        Metric(name="change", title="changing 1 %"),
        Metric(name="prepare", title="making the sandbox"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="space a sandbox",
            subject=ROW,
            against=COW,
            at_most=0.02,
            says="space of a sandbox that changes 1 % of 1 GiB, row against overlay",
        ),
    ),
)


def test_sandboxes(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
