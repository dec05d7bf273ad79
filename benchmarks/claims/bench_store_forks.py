"""Claim: a thousand sandboxes of one base take constant time each and next to no disk while idle.

Durable as users have it (fsync on). "prepare" is timed for each; its place in the row is on the axis. "disk" is the
growth of the file system's use by all of them, divided by their number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed, used
from ..lab.profiles import Profile
from ..lab.stores import BTRFS, COW, ROW, THIN, opened

SUBJECTS = (COW, ROW, THIN, BTRFS)


def _places(profile: Profile) -> tuple[float, ...]:
    return (1.0, float(profile.forks))


def measure(lab: Lab) -> None:
    count = lab.profile.forks
    for subject in lab.wanted(SUBJECTS):
        with lab.trying(subject), opened(lab, subject, 8 << 30) as opened_:
            store = opened_.store
            store.prepare("k")
            store.commit("k", "base")
            before = used(opened_.disk)
            took = [timed(lambda: store.prepare(f"sandbox-{number}", "base")) for number in range(count)]  # noqa: B023
            tenth = max(1, count // 10)
            for value in took[:tenth]:
                lab.record("prepare", subject, value, 1.0)
            for value in took[-tenth:]:
                lab.record("prepare", subject, value, float(count))
            lab.record("disk", subject, (used(opened_.disk) - before) / count)
            lab.note(f"{subject}: median of all {count}: {statistics.median(took) * 1000:.2f} ms")


CLAIM = Claim(
    name="store_forks",
    title="a thousand sandboxes of one base",
    why="A sandbox for each request, each task, each try.",
    metrics=(
        Metric(name="prepare", title="prepare", x_title="sandboxes made before it", xs=_places),
        Metric(name="disk", unit="B", title="disk for each idle sandbox"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="prepare", subject=COW, at_most=0.020, x="last", says="prepare of one more sandbox, durable"),
        Bar(metric="prepare", subject=COW, at_most=1.3, goal=1.0, x="last", against_x="first", says="the last tenth against the first"),
        Bar(metric="prepare", subject=THIN, at_most=1.3, goal=1.0, x="last", against_x="first", says="block: the last tenth against the first"),
        Bar(metric="disk", subject=THIN, at_most=64 * 1024, says="disk for each idle sandbox, block"),
        Bar(metric="disk", subject=COW, at_most=16 * 1024, says="disk for each idle sandbox"),
    ),
    topic="store",
    picture=False,
)  # fmt: skip


def test_store_forks(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
