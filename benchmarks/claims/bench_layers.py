"""Claim: with 128 layers a look-up and a listing cost the same as with 2, once the directory was seen.

Look-up: a missing name in a directory that all layers have. Listing: of that directory, after a change in it (so that
the kernel's cached listing is void and the server must answer). x is the number of layers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, timed
from ..lab.peers import ALL, COWFS, Stack, available, mounted
from ..lab.profiles import Profile


def _depths(profile: Profile) -> tuple[float, ...]:
    return (2.0, float(profile.layers))


def measure(lab: Lab) -> None:
    names = available(lab, ALL)
    count = max(100, lab.profile.lookups // 10)
    with contextlib.ExitStack() as stack:
        at: dict[tuple[str, float], Path] = {}
        for depth in _depths(lab.profile):
            layers = trees.deep_stack(lab, int(depth))
            for name in names:
                with _trying_one(lab, name, depth):
                    upper = stack.enter_context(lab.fresh("tmpfs", 256 << 20))
                    mount = stack.enter_context(
                        mounted(lab, name, Stack(lowers=layers, upper=upper / "upper", work=upper / "work"))
                    )
                    at[name, depth] = mount.path / "common"
                    os.listdir(at[name, depth])
        for number, name in lab.rounds(names, 2 * lab.profile.rounds):
            for depth in _depths(lab.profile):
                if (name, depth) not in at:
                    continue
                fd = os.open(at[name, depth], os.O_RDONLY)
                try:
                    missing = [f"no-{number}-{n:06}" for n in range(count)]

                    def ask(fd: int = fd, missing: list[str] = missing) -> None:
                        for entry in missing:
                            os.access(entry, os.F_OK, dir_fd=fd)

                    lab.record("look-up", name, timed(ask) / count, depth)
                    took = 0.0
                    for n in range(20):
                        os.mkdir(f"mark-{number}-{n}", dir_fd=fd)
                        os.rmdir(f"mark-{number}-{n}", dir_fd=fd)
                        took += timed(lambda: os.listdir(at[name, depth]))  # noqa: B023 - called at once
                    lab.record("listing", name, took / 20, depth)
                finally:
                    os.close(fd)


@contextlib.contextmanager
def _trying_one(lab: Lab, name: str, depth: float) -> Iterator[None]:
    """A peer that fails at one depth keeps its samples at the other."""
    try:
        yield
    except (SkipSubject, RuntimeError, OSError) as why:
        lab.note(f"{name} at {depth:g} layers: {why}")


CLAIM = Claim(
    name="layers",
    title="many layers",
    why="Images of a hundred layers exist; a look-up must not ask each of them again.",
    metrics=(
        Metric(name="look-up", title="look-up of a missing name", x_title="layers", xs=_depths),
        Metric(name="listing", title="listing after a change", x_title="layers", xs=_depths),
    ),
    subjects=ALL,
    measure=measure,
    bars=(
        Bar(
            metric="look-up",
            subject=COWFS,
            x="last",
            against_x="first",
            at_most=1.2,
            says="look-up with 128 layers against 2",
        ),
        Bar(
            metric="listing",
            subject=COWFS,
            x="last",
            against_x="first",
            at_most=1.2,
            says="listing with 128 layers against 2",
        ),
    ),
)


def test_layers(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
