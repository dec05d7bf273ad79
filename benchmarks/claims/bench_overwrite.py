"""Claim: after random overwrites, row still reads at a useful speed, and compaction gives the rest back.

1 %, 10 % and 100 % of a lower file's blocks are overwritten in random order; then the file is read as a whole and at
random places, through a fresh mount with all caches dropped, and as a whole once more through another fresh mount, with
the layers in the host's memory ("warm"). "plain" is an untouched file of the same size in the same mount of the same
store: both sides include the cost of the mount itself. So the ratios are the price of the redirects alone; the claim
"sequential" compares a mount with the bare host.

The disk is a loop device that passes requests on as they come: one that goes through the page cache handles one after
the other, unlike any disk, and the scattered blocks would wait for that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, drop_caches, run, timed
from ..lab.stores import BLOCK, COW, ROW, VFS, Opened, opened_all, overwrite, read_random, some_blocks

SHARES = (1, 10, 100)
COMPACTED = "row compacted"
PLAIN = "plain"
AGAIN = "plain beside compacted"
SUBJECTS = (ROW, COMPACTED, COW, VFS, PLAIN, AGAIN)


def measure(lab: Lab) -> None:
    size = lab.profile.big // 2
    source = trees.big_file(lab, size) / "big"
    rounds = min(3, lab.profile.rounds)
    with opened_all(lab, (ROW, COW, VFS), 9 * size + (1 << 30), direct=True) as stores:
        for driver, store in stores.items():
            with lab.trying(driver):
                store.base("base", lambda at: _fill(source, at))
        for share in SHARES:
            for driver, store in stores.items():
                with lab.trying(driver):
                    store.store.prepare(f"share-{share}", "base")
                    blocks, rng = some_blocks(lab.rng(f"share-{share}"), size, share / 100), lab.rng("data")
                    with store.mount(f"share-{share}") as (at, _):
                        overwrite(at / "big", blocks, rng, fsync=True)
            for number, driver in lab.rounds(list(stores), rounds):
                with lab.trying(driver):
                    _read(lab, stores[driver], "big", driver, share, size, number)
                    if driver == (ROW if ROW in stores else COW):
                        _read(lab, stores[driver], "calm", PLAIN, share, size, number)
            if ROW in stores:
                with lab.trying(COMPACTED):
                    _compacted(lab, stores[ROW], share, size, rounds)
            for driver, store in stores.items():
                if driver not in lab.result.skipped:
                    store.store.remove(f"share-{share}")


def _fill(source: Path, at: Path) -> None:
    for name in ("big", "calm"):
        shutil.copyfile(source, at / name)


def _compacted(lab: Lab, store: Opened, share: int, size: int, rounds: int) -> None:
    compact = getattr(store.store, "compact", None)
    if compact is None:
        raise SkipSubject("this store has no compact")
    lab.record(f"compaction {share} %", COMPACTED, timed(lambda: compact(f"share-{share}", share=0.0)))
    for number in range(rounds):
        _read(lab, store, "big", COMPACTED, share, size, number)
        _read(lab, store, "calm", AGAIN, share, size, number)


def _read(lab: Lab, store: Opened, name: str, subject: str, share: int, size: int, number: int) -> None:
    some = some_blocks(lab.rng(f"read-{number}"), size, min(1.0, 2_000 * BLOCK / size))
    with store.mount(f"share-{share}") as (at, _):
        drop_caches()
        lab.record(f"sequential read {share} %", subject, run(["cat", at / name]))
    with store.mount(f"share-{share}") as (at, _):
        lab.record(f"sequential read {share} %, warm", subject, run(["cat", at / name]))
    with store.mount(f"share-{share}") as (at, _):
        drop_caches()
        lab.record(f"random read {share} %", subject, timed(lambda: read_random(at / name, some)) / len(some))


CLAIM = Claim(
    name="overwrite",
    title="reading after random overwrites",
    why="Redirected blocks lie scattered: the price of row, and what compaction gives back.",
    topic="row",
    metrics=(
        *(Metric(name=f"sequential read {s} %", title=f"whole file, {s} % overwritten") for s in SHARES),
        *(
            Metric(name=f"sequential read {s} %, warm", title=f"the same from memory, {s} % overwritten")
            for s in SHARES
        ),
        *(Metric(name=f"random read {s} %", title=f"4 KiB at random, {s} % overwritten") for s in SHARES),
        *(Metric(name=f"compaction {s} %", title=f"compaction, {s} % overwritten") for s in SHARES),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=tuple(
        Bar(metric=f"sequential read 10 %{how}", subject=subject, against=against, at_most=at_most, says=f"{says}{how}")
        for how in ("", ", warm")
        for subject, against, at_most, says in (
            (ROW, PLAIN, 1 / 0.6, "sequential read after overwriting 10 %, time (0.6x speed)"),
            (COMPACTED, AGAIN, 1 / 0.95, "the same after compaction (0.95x speed)"),
        )
    ),
)


def test_overwrite(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
