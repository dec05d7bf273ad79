"""Claim: a random 4 KiB read through 128 layers that all changed the file costs at most 1.3x of that through one.

Each layer overwrites 64 random blocks of one file and is committed; then a view of the top is mounted and every block
read once in random order with read-ahead off, so that each read is a request. x is the chain's length. All lengths are
views of one chain, read in the same round one after the other, so that a busy host weighs on each; each is read twice,
through a fresh mount, so that the host has the layers in memory when it counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, cache_drops, timed
from ..lab.profiles import MIB, Profile
from ..lab.stores import BLOCK, COW, ROW, VFS, Opened, opened_all, overwrite, read_random, some_blocks
from ..lab.warm import TRIES

SIZE = 16 * MIB
SUBJECTS = (ROW, COW, VFS)


def _depths(profile: Profile) -> tuple[float, ...]:
    return tuple(map(float, profile.depths))


def measure(lab: Lab) -> None:
    source = trees.big_file(lab, SIZE) / "big"
    with opened_all(lab, SUBJECTS, 4 << 30) as stores:
        tops: dict[str, dict[int, str]] = {}
        for subject, store in stores.items():
            with lab.trying(subject):
                tops[subject] = {0: store.base("layer-0", lambda at: _fill(source, at))}
        for depth in range(1, max(lab.profile.depths) + 1):
            for subject, names in tops.items():
                with lab.trying(subject):
                    names[depth] = _deeper(lab, stores[subject], names[depth - 1], depth)
        for number, subject in lab.rounds(list(tops)):
            for wanted in lab.profile.depths:
                with lab.trying(subject):
                    _read_view(lab, stores[subject], tops[subject][wanted], float(wanted), number)


def _deeper(lab: Lab, store: Opened, top: str, depth: int) -> str:
    """One more committed layer, which overwrites 64 blocks."""
    blocks = some_blocks(lab.rng(f"layer-{depth}"), SIZE, 64 * BLOCK / SIZE)
    return store.base(f"layer-{depth}", lambda at: _change(at, blocks, lab), top)


def _read_view(lab: Lab, store: Opened, top: str, x: float, number: int) -> None:
    some = some_blocks(lab.rng(f"view-{number}"), SIZE, 0.5)
    for attempt in range(TRIES):
        drops = cache_drops()
        took = [_pass(store, top, f"view-{attempt}-{again}", some) for again in range(2)][1]
        if cache_drops() == drops:
            break
    else:
        lab.note("somebody drops the kernel's caches all the time")
    lab.record("random read", store.subject, took, x)


def _pass(store: Opened, top: str, key: str, some: list[int]) -> float:
    """Seconds a read, through a fresh mount; the first read, which opens the file, is not in it."""
    store.store.view(key, top)
    with store.mount(key) as (at, _):
        read_random(at / "big", some[:1])
        took = _read_rest(at / "big", some)
    store.store.remove(key)
    return took


def _read_rest(file: Path, some: list[int]) -> float:
    """Seconds a read of all but the first offset."""
    return timed(lambda: read_random(file, some[1:])) / (len(some) - 1)


def _fill(source: Path, at: Path) -> None:
    shutil.copyfile(source, at / "big")


def _change(at: Path, blocks: list[int], lab: Lab) -> None:
    overwrite(at / "big", blocks, lab.rng("data"))


CLAIM = Claim(
    name="depth",
    title="random reads through a chain of layers",
    why="Snapshots of snapshots make deep chains; reading must not ask each layer.",
    topic="row",
    metrics=(Metric(name="random read", title="4 KiB at random", x_title="layers that changed the file", xs=_depths),),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="random read",
            subject=ROW,
            x="last",
            against_x="first",
            at_most=1.3,
            says="random read, row: depth 128 against depth 1",
        ),
    ),
)


def test_depth(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
