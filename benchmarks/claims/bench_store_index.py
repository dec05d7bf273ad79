"""Claim: the cost of commit and diff is that of the change, not of the tree.

A tree of 100,000 files in directories of a hundred, and one directory of 100,000 entries: ten files or one are
changed, committed, and compared with the parent and with a sibling. Written straight into the layer: no mount is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed
from ..lab.stores import COW, opened


def tree(top: Path, files: int) -> None:
    for number in range(files):
        folder = top / f"d{number // 1000}" / f"e{number // 100 % 10}"
        if number % 100 == 0:
            folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / f"f{number % 100}", os.O_CREAT | os.O_WRONLY, 0o644))


def measure(lab: Lab) -> None:
    files = lab.profile.store_tree
    with lab.trying(COW), opened(lab, COW, 32 << 30, fsync=False) as opened_:
        store = opened_.store

        def top(key: str) -> Path:
            return Path(store.driver.tree(store.index.get(key).id))

        store.prepare("k")
        tree(top("k"), files)
        lab.record("first commit", COW, timed(lambda: store.commit("k", "base")))
        store.prepare("k")
        (top("k") / "big").mkdir()
        for number in range(files):
            os.close(os.open(top("k") / "big" / f"file-{number:06}", os.O_CREAT | os.O_WRONLY, 0o644))
        store.commit("k", "flat")
        for number in range(4 * lab.profile.rounds):
            store.prepare("k", "base")
            for one in range(10):
                at = (number * 31 + one * 17) % max(1, files // 1000), one
                folder = top("k") / f"d{at[0]}" / f"e{at[1]}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"f{one}").write_text(f"{number} {one}")
            name = f"ten-{number}"
            lab.record("commit of 10", COW, timed(lambda name=name: store.commit("k", name)))  # type: ignore[misc]
            lab.record("diff to parent", COW, timed(lambda name=name: list(store.diff(name))))  # type: ignore[misc]
            if number:
                other = f"ten-{number - 1}"
                lab.record("diff of siblings", COW, timed(lambda name=name, other=other: list(store.diff(other, name))))  # type: ignore[misc]
            lab.record("usage", COW, timed(lambda name=name: store.usage(name)))  # type: ignore[misc]
            store.prepare("k", "flat")
            (top("k") / "big").mkdir()
            (top("k") / "big" / f"file-{number * 13:06}").write_text("changed")
            lab.record("commit of 1 in a big directory", COW, timed(lambda: store.commit("k", f"flat-{number}")))  # noqa: B023
            if lab.late:
                break


CLAIM = Claim(
    name="store_index",
    title="commit and diff in a tree of 100,000 files",
    why="Snapshots in short steps, and a quick answer to what a build or an agent has changed.",
    metrics=tuple(
        Metric(name=name)
        for name in ("first commit", "commit of 10", "diff to parent", "diff of siblings", "usage", "commit of 1 in a big directory")
    ),
    subjects=(COW,),
    measure=measure,
    bars=(
        Bar(metric="commit of 10", subject=COW, at_most=0.030, says="commit of 10 changed files among 100,000"),
        Bar(metric="diff to parent", subject=COW, at_most=0.010, says="diff of two snapshots of 100,000 files, 10 changes"),
        Bar(metric="diff of siblings", subject=COW, at_most=0.010, says="diff of two siblings, 20 changes"),
        Bar(metric="usage", subject=COW, at_most=0.005, says="usage of a snapshot"),
        Bar(metric="commit of 1 in a big directory", subject=COW, at_most=0.150, says="commit of one change in a directory of 100,000"),
    ),
    topic="store",
    picture=False,
)  # fmt: skip


def test_store_index(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
