"""Claim: after random overwrites, row still reads at a useful speed, and compaction gives the rest back.

1 %, 10 % and 100 % of a lower file's blocks are overwritten in random order; then the file is read as a whole and at
random places, through a fresh mount with all caches dropped. "plain" is an untouched file of the same size in the
same mount of the same store: what the mount itself costs is on both sides.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from . import trees
from .claims import Bar, Claim, Key, Metric
from .lab import Lab, drop_caches, run, timed
from .stores import COW, ROW, VFS, opened, overwrite, read_random, some_blocks

SHARES = (1, 10, 100)
COMPACTED = "row compacted"
PLAIN = "plain"
SUBJECTS = (ROW, COMPACTED, COW, VFS, PLAIN)


def measure(lab: Lab) -> None:
    size = lab.profile.big // 2
    source = trees.big_file(lab, size) / "big"

    def fill(at: object) -> None:
        for name in ("big", "calm"):
            shutil.copyfile(source, f"{at}/{name}")

    rounds = min(3, lab.profile.rounds)
    for driver in lab.wanted((ROW, COW, VFS)):
        with lab.trying(driver), opened(lab, driver, 12 * size + (1 << 30)) as store:
            store.base("base", fill)
            for share in SHARES:
                key = f"share-{share}"
                store.store.prepare(key, "base")
                with store.mount(key) as (at, _):
                    overwrite(at / "big", some_blocks(lab.rng(key), size, share / 100), lab.rng("data"), fsync=True)
                for number in range(rounds):
                    for name, subject in (("big", driver), ("calm", PLAIN)):
                        if subject != PLAIN or driver == ROW:
                            _read(lab, store, key, name, subject, share, size, number)
                if driver == ROW:
                    compact = getattr(store.store, "compact", None)
                    if compact is None:
                        lab.skip(COMPACTED, "this store has no compact")
                    else:
                        with lab.trying(COMPACTED):
                            lab.record(f"compaction {share} %", COMPACTED, timed(lambda: compact(key)))  # noqa: B023
                            for number in range(rounds):
                                _read(lab, store, key, "big", COMPACTED, share, size, number)
                store.store.remove(key)


def _read(lab: Lab, store: object, key: str, name: str, subject: str, share: int, size: int, number: int) -> None:
    some = some_blocks(lab.rng(f"read-{number}"), size, min(1.0, 2_000 * 4096 / size))
    for kind in ("sequential", "random"):
        with store.mount(key) as (at, _):  # type: ignore[attr-defined]
            drop_caches()
            if kind == "sequential":
                lab.record(f"sequential read {share} %", subject, run(["cat", at / name]))
            else:
                lab.record(f"random read {share} %", subject, timed(lambda: read_random(at / name, some)) / len(some))


CLAIM = Claim(
    name="overwrite",
    title="reading after random overwrites",
    why="Redirected blocks lie scattered: the price of row, and what compaction gives back.",
    topic="row",
    metrics=(
        *(Metric(name=f"sequential read {s} %", title=f"whole file, {s} % overwritten") for s in SHARES),
        *(Metric(name=f"random read {s} %", title=f"4 KiB at random, {s} % overwritten") for s in SHARES),
        *(Metric(name=f"compaction {s} %", title=f"compaction, {s} % overwritten") for s in SHARES),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="sequential read 10 %",
            subject=ROW,
            against=PLAIN,
            at_most=1 / 0.6,
            says="sequential read after overwriting 10 %, time (0.6x speed)",
        ),
        Bar(
            metric="sequential read 10 %",
            subject=COMPACTED,
            against=PLAIN,
            at_most=1 / 0.95,
            says="the same after compaction (0.95x speed)",
        ),
    ),
)


def test_overwrite(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
