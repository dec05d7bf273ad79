"""Claim: untar, cp -a and rm -rf of thousands of files are no slower than with the faster fuse-overlayfs.

Every sample has a fresh mount over an empty lower, on a fresh upper file system: tmpfs (the file system's own cost)
and ext4 (with its journal).
"""

from __future__ import annotations

from collections.abc import Callable

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, run
from ..lab.peers import ALL, COWFS, FUSE_OVERLAYFS, FUSEPY, available, mounted_fresh

HOSTS = ("tmpfs", "ext4")


def measure(lab: Lab) -> None:
    source = trees.small_files(lab, lab.profile.unpack_files, median=8192, salt="unpack")
    tar = trees.archive(lab, source, "unpack")
    lower = lab.folder("lower")
    (lower / "etc").mkdir()
    names = available(lab, (*ALL, FUSEPY))
    for host in HOSTS:
        for _, name in lab.rounds(names):
            with lab.trying(name), mounted_fresh(lab, name, (lower,), host) as mount:
                (mount.path / "tree").mkdir()
                lab.record(f"untar {host}", name, run(["tar", "-C", mount.path / "tree", "-xf", tar]))
                lab.record(f"cp {host}", name, run(["cp", "-a", "tree", "copy"], cwd=mount.path))
                lab.record(f"rm {host}", name, run(["rm", "-rf", "tree", "copy"], cwd=mount.path))


def _bars() -> tuple[Bar, ...]:
    table = (("untar", 1.0, 0.8), ("cp", 1.0, 0.8), ("rm", 0.9, 0.7))
    says = {"untar": "untar", "cp": "cp -a", "rm": "rm -rf"}
    return tuple(
        Bar(
            metric=f"{what} {host}",
            subject=COWFS,
            against=FUSE_OVERLAYFS,
            at_most=bar,
            goal=goal,
            says=f"{says[what]}, upper on {host}",
        )
        for host in HOSTS
        for what, bar, goal in table
    )


CLAIM = Claim(
    name="unpack",
    title="untar, cp -a, rm -rf",
    why="Installing packages and building images is this work.",
    metrics=tuple(Metric(name=f"{what} {host}") for host in HOSTS for what in ("untar", "cp", "rm")),
    subjects=(*ALL, FUSEPY),
    measure=measure,
    bars=_bars(),
)


def test_unpack(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
