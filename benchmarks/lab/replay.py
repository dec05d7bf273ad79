"""Replay of interleaved samples into pytest-benchmark, which itself measures one subject after another.

A claim is measured once a session, interleaved; then each (metric, subject, x) is one test that plays its samples
back: a clock that moves only by the recorded samples is the benchmark's timer (a documented option of
pytest-benchmark), so its table, statistics and JSON are about the real samples. Metrics that are no times go to
``extra_info`` and are shown as "seconds"; the test's name has their unit.
"""

from __future__ import annotations

from collections.abc import Iterator

from .claim import Claim, Key
from .profiles import Profile


class Clock:
    """A clock moved by hand; its unit is the metric's."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def clock() -> float:
    """The timer given to pytest-benchmark."""
    return CLOCK.now


def player(samples: list[float]) -> Iterator[float]:
    """Each step moves the clock by the next sample."""
    for sample in samples:
        CLOCK.now += sample
        yield sample


def keys(claim: Claim, profile: Profile) -> list[Key]:
    """All keys that a claim may give under a profile: the tests that pytest collects."""
    found: list[Key] = []
    for metric in claim.metrics:
        xs: list[float | None] = [None] if metric.xs is None else [float(x) for x in metric.xs(profile)]
        found += [(metric.name, subject, x) for subject in claim.subjects for x in xs]
    return found


def key_id(key: Key) -> str:
    metric, subject, x = key
    return f"{metric}-{subject.replace(' ', '_')}" + ("" if x is None else f"-{x:g}")
