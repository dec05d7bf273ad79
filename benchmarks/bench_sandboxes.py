"""Claim: a hundred sandboxes that each change 1 % of a big file take 1 % each, not a copy each, with row.

Every sandbox overwrites its own random 1 % of the 4 KiB blocks. Backends that copy the file whole are measured on
three sandboxes only (a hundred would need a hundred files' space), which a note says. Space is st_blocks of the whole
store, per sandbox.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from . import trees
from .claims import Bar, Claim, Key, Metric
from .lab import Lab, allocated, timed
from .stores import COPYING, COW, COW_XFS, ROW, VFS, opened, overwrite, some_blocks

SUBJECTS = (ROW, COW, COW_XFS, VFS)


def measure(lab: Lab) -> None:
    size = lab.profile.sandbox_big
    source = trees.big_file(lab, size) / "big"
    for subject in lab.wanted(SUBJECTS):
        count = min(3, lab.profile.sandboxes) if subject in COPYING else lab.profile.sandboxes
        with lab.trying(subject), opened(lab, subject, (count + 3) * size + (1 << 30)) as store:
            store.base("base", lambda at: shutil.copyfile(source, at / "big"))  # type: ignore[arg-type]
            os.sync()
            before = allocated(store.root)
            for number in range(count):
                key = f"sandbox-{number}"
                lab.record("prepare", subject, timed(lambda: store.store.prepare(key, "base")))  # noqa: B023
                with store.mount(key) as (at, _):
                    blocks = some_blocks(lab.rng(key), size, 0.01)
                    lab.record("change", subject, timed(lambda: overwrite(at / "big", blocks, lab.rng("data"))))  # noqa: B023
            os.sync()
            lab.record("space a sandbox", subject, (allocated(store.root) - before) / count)
            lab.note(f"{subject}: {count} sandboxes")


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
