"""Claim: a look-up round trip is no slower than fuse-overlayfs's, though the server is Python.

Names that are not there, each asked for once (access(2), so that the client raises nothing), one after another: the
kernel has no answer of its own, so each costs one request and one reply. In seconds a look-up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed
from ..lab.peers import ALL, COWFS, FUSE_OVERLAYFS, FUSEPY, Stack, available, mounted


def measure(lab: Lab) -> None:
    layers = trees.deep_stack(lab, 3)
    names = available(lab, (*ALL, FUSEPY))
    count = lab.profile.lookups
    for metric in ("read-only", "writable"):
        with contextlib.ExitStack() as stack:
            at: dict[str, Path] = {}
            for name in names:
                with lab.trying(name):
                    upper = stack.enter_context(lab.fresh("tmpfs", 1 << 30)) if metric == "writable" else None
                    layered = Stack(lowers=layers, upper=upper and upper / "upper", work=upper and upper / "work")
                    at[name] = stack.enter_context(mounted(lab, name, layered)).path
                    os.listdir(at[name] / "common")
            for number, name in lab.rounds([n for n in names if n in at]):
                fd = os.open(at[name] / "common", os.O_RDONLY)
                missing = [f"no-{number}-{n:06}" for n in range(count)]

                def ask(fd: int = fd, missing: list[str] = missing) -> None:
                    access = os.access
                    for entry in missing:
                        access(entry, os.F_OK, dir_fd=fd)

                try:
                    lab.record(metric, name, timed(ask) / count)
                finally:
                    os.close(fd)


CLAIM = Claim(
    name="lookup",
    title="look-up round trip",
    why="What is not cached costs a round trip; PATH, include and import searches are mostly misses.",
    metrics=(
        Metric(name="read-only", title="a missing name, read-only mount"),
        Metric(name="writable", title="a missing name, writable mount"),
    ),
    subjects=(*ALL, FUSEPY),
    measure=measure,
    bars=(
        Bar(
            metric="read-only", subject=COWFS, against=FUSE_OVERLAYFS, at_most=1.0, says="look-up round trip, read-only"
        ),
        Bar(metric="writable", subject=COWFS, against=FUSE_OVERLAYFS, at_most=1.0, says="look-up round trip, writable"),
    ),
)


def test_lookup(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
