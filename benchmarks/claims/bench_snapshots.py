"""Claim: making, removing and rolling back a snapshot costs the same for any number of snapshots.

x is how many snapshots the store holds besides (siblings of one base). "create" and "roll back" use a live mount if the
driver can; "commit" is prepare, one small file written, commit. The last metric has the number of files changed since
the last snapshot on its axis.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cowfs.errors import CowfsError

from ..lab.claim import Claim, Key, Metric
from ..lab.measure import Lab, timed
from ..lab.profiles import Profile
from ..lab.stores import COW, ROW, VFS, Opened, opened_all

SUBJECTS = (ROW, COW, VFS)


def _counts(profile: Profile) -> tuple[float, ...]:
    return tuple(map(float, profile.snapshots))


def _changes(profile: Profile) -> tuple[float, ...]:
    return (1.0, 10.0, 100.0, 1000.0) if profile.rounds > 1 else (1.0, 10.0)


def _base(at: Path) -> None:
    for number in range(100):
        (at / f"base-{number:03}").write_bytes(b"b" * 1000)


def measure(lab: Lab) -> None:
    with opened_all(lab, SUBJECTS, 8 << 30) as stores:
        have = 0
        for subject, store in stores.items():
            with lab.trying(subject):
                store.base("base", _base)
        for count in lab.profile.snapshots:
            for subject, store in stores.items():
                with lab.trying(subject):
                    for other in range(have, count):
                        store.store.prepare(f"other-{other}-active", "base")
                        store.store.commit(f"other-{other}-active", f"other-{other}")
            have = count
            for number, subject in lab.rounds(list(stores)):
                with lab.trying(subject):
                    _one(lab, stores[subject], subject, float(count), f"{count}-{number}")
        for change in _changes(lab.profile):
            for number, subject in lab.rounds(list(stores), min(3, lab.profile.rounds)):
                with lab.trying(subject):
                    _by_change(lab, stores[subject], subject, int(change), number)


def _one(lab: Lab, store: Opened, subject: str, x: float, tag: str) -> None:
    verbs = store.store
    verbs.prepare(f"plain-{tag}", "base")
    with store.mount(f"plain-{tag}") as (at, _):
        (at / "new").write_bytes(b"n" * 1000)
    lab.record("commit", subject, timed(lambda: verbs.commit(f"plain-{tag}", f"leaf-{tag}")), x)
    lab.record("remove", subject, timed(lambda: verbs.remove(f"leaf-{tag}")), x)
    verbs.prepare(f"live-{tag}", "base")
    with store.mount(f"live-{tag}") as (at, handle):
        try:
            (at / "first").write_bytes(b"1")
            lab.record("create", subject, timed(lambda: handle.snapshot(f"state-{tag}")), x)
            (at / "second").write_bytes(b"2")
            lab.record("roll back", subject, timed(lambda: handle.rollback(f"state-{tag}")), x)
        except (CowfsError, AttributeError, OSError) as why:  # without live snapshots the other figures stay
            lab.note(f"{subject}: no live snapshot: {why}")


def _by_change(lab: Lab, store: Opened, subject: str, change: int, number: int) -> None:
    key = f"changed-{change}-{number}"
    store.store.prepare(key, "base")
    with store.mount(key) as (at, _):
        for n in range(change):
            (at / f"c-{n:04}").write_bytes(b"c" * 100)
    lab.record("commit of a change", subject, timed(lambda: store.store.commit(key, key + "-done")), float(change))


CLAIM = Claim(
    name="snapshots",
    title="snapshots: create, commit, remove, roll back",
    why="Agents and CI branch and go back all day; it must not get slower as snapshots pile up.",
    topic="row",
    metrics=(
        *(
            Metric(name=name, title=title, x_title="snapshots in the store", xs=_counts)
            for name, title in (
                ("create", "snapshot of a live mount"),
                ("roll back", "roll a live mount back"),
                ("commit", "commit of one new file"),
                ("remove", "remove a snapshot"),
            )
        ),
        Metric(
            name="commit of a change", title="commit against the amount of change", x_title="files changed", xs=_changes
        ),
    ),
    subjects=SUBJECTS,
    measure=measure,
)


def test_snapshots(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
