"""Claim: a store of 100,000 snapshots answers as fast as one of a hundred.

The verbs are timed one by one on a store without fsync, so that the disk's own pace does not hide the index's. The
other snapshots are committed siblings of one base, made with the same verbs. Files are written straight into the
layer, so no mount is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, timed
from ..lab.profiles import Profile
from ..lab.stores import COW, opened

SMALL = 100
VERBS = ("prepare", "commit", "stat", "usage", "remove")


def _counts(profile: Profile) -> tuple[float, ...]:
    return (float(SMALL), float(profile.store_snapshots))


def measure(lab: Lab) -> None:
    with lab.trying(COW), opened(lab, COW, 32 << 30, fsync=False) as opened_:
        store = opened_.store
        store.prepare("k")
        store.commit("k", "base")
        have = 0
        for count in (SMALL, lab.profile.store_snapshots):
            while have < count:
                store.prepare("k", "base")
                store.commit("k", f"other-{have}")
                have += 1
            for number in range(10 * lab.profile.rounds):
                key, name = f"key-{count}-{number}", f"name-{count}-{number}"
                acts: dict[str, Callable[[], object]] = {
                    "prepare": lambda key=key: store.prepare(key, "base"),  # type: ignore[misc]
                    "commit": lambda key=key, name=name: store.commit(key, name),  # type: ignore[misc]
                    "stat": lambda name=name: store.stat(name),  # type: ignore[misc]
                    "usage": lambda name=name: store.usage(name),  # type: ignore[misc]
                    "remove": lambda name=name: store.remove(name),  # type: ignore[misc]
                }
                for verb in VERBS:
                    if verb == "commit":
                        tree = store.driver.tree(store.index.get(key).id)
                        os.close(os.open(f"{tree}/file", os.O_CREAT | os.O_WRONLY))
                    lab.record(verb, COW, timed(acts[verb]), float(count))


CLAIM = Claim(
    name="store_scale",
    title="verbs against the number of snapshots",
    why="A build farm or a fleet of sandboxes has many snapshots, and each new one should cost what the first did.",
    metrics=tuple(Metric(name=verb, title=verb, x_title="snapshots in the store", xs=_counts) for verb in VERBS),
    subjects=(COW,),
    measure=measure,
    bars=(
        *(Bar(metric=verb, subject=COW, at_most=0.010, x="last", says=f"{verb} among the most snapshots") for verb in VERBS if verb != "usage"),
        Bar(metric="usage", subject=COW, at_most=0.005, x="last", says="usage among the most snapshots"),
        *(
            Bar(metric=verb, subject=COW, at_most=2.0, x="last", against_x="first", says=f"{verb}, against a hundred snapshots")
            for verb in VERBS
        ),
    ),
    topic="store",
)  # fmt: skip


def test_store_scale(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
