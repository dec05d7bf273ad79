"""Claim: on btrfs, the cost of commit is that of the change, and a fork's does not depend on the base; beside the
overlay driver on the same file system.

A tree of 100,000 files in directories of a hundred, of which ten are changed and committed; forks of it; removal of a
fork. Written straight into the layer: no mount is timed. The commit of the driver btrfs holds the ten files' way to the
disk, which a snapshot of a subvolume brings with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed
from ..lab.stores import BTRFS, COW_BTRFS, opened_all
from .bench_store_index import tree

SUBJECTS = (BTRFS, COW_BTRFS)


def measure(lab: Lab) -> None:
    files = lab.profile.store_tree
    with opened_all(lab, SUBJECTS, 32 << 30, fsync=False) as stores:
        for opened in stores.values():
            store = opened.store
            store.prepare("k")
            tree(Path(store.driver.tree(store.index.get("k").id)), files)
            store.commit("k", "base")
        for number, subject in lab.rounds(list(stores), 4 * lab.profile.rounds):
            store = stores[subject].store
            lab.record("prepare", subject, timed(lambda: store.prepare("k", "base")))  # noqa: B023
            top = Path(store.driver.tree(store.index.get("k").id))
            for one in range(10):
                folder = top / f"d{(number * 31 + one * 17) % max(1, files // 1000)}" / f"e{one}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"f{one}").write_text(f"{number} {one}")
            name = f"ten-{number}"
            lab.record("commit of 10", subject, timed(lambda: store.commit("k", name)))  # noqa: B023
            assert sum(change.type == "file" for change in store.diff(name)) == 10
            store.prepare("gone", name)
            lab.record("remove", subject, timed(lambda: store.remove("gone")))  # noqa: B023
        for number, subject in lab.rounds(list(stores), lab.profile.forks):
            store = stores[subject].store
            lab.record("fork", subject, timed(lambda: store.fork("base", f"sandbox-{number}")))  # noqa: B023
        lab.note(f"files in the base: {files:,}; file system: {os.uname().release}")


CLAIM = Claim(
    name="store_btrfs",
    title="subvolumes as layers: 100,000 files on btrfs",
    why="The host's own snapshots, with cowfs's index beside them.",
    metrics=tuple(Metric(name=name) for name in ("prepare", "commit of 10", "remove", "fork")),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="commit of 10", subject=BTRFS, at_most=0.030, says="commit of 10 changed files among 100,000, driver btrfs"),
        Bar(metric="fork", subject=BTRFS, at_most=0.020, says="one more fork of 100,000 files, driver btrfs"),
    ),
    topic="store",
    picture=False,
)  # fmt: skip


def test_store_btrfs(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
