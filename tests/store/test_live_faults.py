"""Snapshot, rollback and squash killed between any two steps, of an unmounted key and under a mount that goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.store import Store
from cowfs.sys import faults

from .conftest import tree_path
from .test_faults import LIVE, _in_child, _passed

Act = Callable[[Store], object]

ACTS: dict[str, Act] = {
    "snapshot": lambda store: store.snapshot("k", "new"),
    "rollback": lambda store: store.rollback("k", "base"),
    "squash into the key": lambda store: store.squash("middle"),
    "squash into a snapshot": lambda store: store.squash("base"),
}
CAN = os.path.exists("/dev/fuse") and os.geteuid() == 0
MOUNTED = pytest.param(True, marks=pytest.mark.skipif(not CAN, reason="needs /dev/fuse and root"))


def _make(root: Path, driver: str) -> None:
    """base < middle < k, one file written in each."""
    with Store.open(root, driver=driver, fsync=False) as store:
        parent = None
        for name in ("base", "middle"):
            store.prepare("work", parent)
            (tree_path(store, "work") / name).write_text(name)
            store.commit("work", name)
            parent = name
        store.prepare("k", "middle")
        (tree_path(store, "k") / "mine").write_text("mine")


def _names(store: Store, key: str, mnt: Path) -> list[str]:
    with store.mount(key, mnt):
        return sorted(os.listdir(mnt))


def _verify(store: Store, verb: str, mnt: Path, later: list[str]) -> None:
    names = _names(store, "k", mnt)
    if verb == "rollback" and "mine" not in names:
        assert names == sorted([*(["base"] if store.stat("k").parent == "base" else ["base", "middle"]), *later])
    else:
        assert names == sorted(["base", "middle", "mine", *later])
    if verb == "snapshot" and store.exists("new"):
        assert store.stat("k").parent == "new"
        store.view("look", "new")
        assert _names(store, "look", mnt) == ["base", "middle", "mine"]
        store.remove("look")


CASES = [("overlay", verb) for verb in ACTS] + [("row", verb) for verb in ACTS if verb.startswith("squash")]


@pytest.mark.parametrize("mounted", [False, MOUNTED])
@pytest.mark.parametrize(("driver", "verb"), CASES)
def test_a_kill_between_two_steps_leaves_a_whole_state(driver: str, verb: str, mounted: bool, space: Path) -> None:
    act, mnt = ACTS[verb], space / "mnt"
    mnt.mkdir()
    _make(space / "record", driver)
    points = _passed(space / "record", act)
    for number, name in enumerate(points):
        root = space / f"kill-{number}"
        _make(root, driver)
        count = 0

        def kill(passed: str, number: int = number) -> None:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        later = []
        if mounted:
            with Store.open(root, fsync=False) as store:
                handle = store.mount("k", mnt)
        status = _in_child(root, act, kill)
        assert os.WIFSIGNALED(status), f"{verb} was not killed at {name}"
        if mounted:
            (mnt / "later").write_text("later")
            later.append("later")
            handle.unmount()
        with Store.open(root, fsync=False) as store:
            assert store.check().damage == [], f"{verb} killed at {name}"
            _verify(store, verb, mnt, later)
            store.gc()
            assert store.check(content=True).problems == [], f"{verb} killed at {name}"
            assert not [left for left in os.listdir(root) if left.startswith(("new-", "rm-", "live-", "squash-"))]
            _verify(store, verb, mnt, later)


def test_the_live_verbs_pass_every_point_of_theirs(space: Path) -> None:
    seen: set[str] = set()
    for verb, act in ACTS.items():
        _make(space / verb, "overlay")
        seen |= set(_passed(space / verb, act))
    assert {name for name in faults.POINTS if name.startswith(LIVE)} <= seen
