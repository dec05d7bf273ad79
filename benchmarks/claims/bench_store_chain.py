"""Claim: a chain of 500 layers mounts and compares as one of five does.

"mount" is `Store.mount` of a fresh snapshot until its root and one directory are listed, and its unmount; "diff" is of
the topmost layer. The bottom layer has ten directories of one file; each layer above writes one of them anew, so the tree is the
same size at any length.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed
from ..lab.profiles import Profile
from ..lab.stores import COW, Opened, opened


def _lengths(profile: Profile) -> tuple[float, ...]:
    return (5.0, 500.0 if profile.rounds > 1 else 20.0)


def _mount(opened_: Opened, key: str) -> None:
    with opened_.mount(key) as (at, _):
        os.listdir(at)
        os.listdir(at / "d1")


def measure(lab: Lab) -> None:
    with lab.trying(COW), opened(lab, COW, 8 << 30, fsync=False) as opened_:
        store, parent, have = opened_.store, None, 0
        tops = {}
        for length in map(int, _lengths(lab.profile)):
            while have < length:
                store.prepare("k", parent)
                tree = Path(store.driver.tree(store.index.get("k").id))
                for number in range(10) if not have else (have % 10,):
                    (tree / f"d{number}").mkdir()
                    (tree / f"d{number}" / "file").write_text(str(have))
                parent, have = f"chain-{have}", have + 1
                store.commit("k", parent)
            tops[length] = parent
        for number in range(4 * lab.profile.rounds):
            for length, top in tops.items():
                key = f"k-{number}-{length}"
                lab.record("prepare", COW, timed(lambda: store.prepare(key, top)), float(length))  # noqa: B023
                lab.record("mount", COW, timed(lambda: _mount(opened_, key)), float(length))  # noqa: B023
                lab.record("diff", COW, timed(lambda: list(store.diff(top))), float(length))  # noqa: B023
                store.remove(key)
            if lab.late:
                break


CLAIM = Claim(
    name="store_chain",
    title="prepare, mount and diff against the length of the chain",
    why="Snapshots of snapshots add up; nobody should have to squash them to stay fast.",
    metrics=tuple(Metric(name=name, title=name, x_title="layers in the chain", xs=_lengths) for name in ("prepare", "mount", "diff")),
    subjects=(COW,),
    measure=measure,
    bars=(
        Bar(metric="mount", subject=COW, at_most=1.2, goal=1.0, x="last", against_x="first", says="mount, listing and unmount at the longest chain"),
        Bar(metric="diff", subject=COW, at_most=1.5, goal=1.0, x="last", against_x="first", says="diff at the longest chain"),
    ),
    topic="store",
)  # fmt: skip


def test_store_chain(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
