"""Claim: chown -R over a lower tree copies no data (a metadata-only copy-up), as the kernel does with metacopy=on.

Bytes: storage that the upper takes afterwards, counted by a scan of it. The bar is a page a file: the copy of a
directory entry and its attributes, never the content.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from . import trees
from .claims import Bar, Claim, Key, Metric
from .lab import Lab, allocated, run
from .peers import ALL, COWFS, OVERLAY, Stack, available, mounted

METACOPY = OVERLAY + " metacopy"
SUBJECTS = (OVERLAY, METACOPY, *ALL[1:])


def measure(lab: Lab) -> None:
    tree = trees.small_files(lab, lab.profile.chown_files, median=16384, salt="chown")
    lab.note(f"{len(tree.names):,} files with {tree.bytes:,} bytes")
    names = available(lab, SUBJECTS)
    for _, name in lab.rounds(names, min(3, lab.profile.rounds)):
        with lab.trying(name), lab.fresh("ext4") as fresh:
            upper = fresh / "upper"
            with mounted(lab, name, Stack(lowers=tree.layers, upper=upper, work=fresh / "work")) as mount:
                lab.record("time", name, run(["chown", "-R", "1234:1234", "."], cwd=mount.path))
            os.sync()
            lab.record("data copied", name, max(0.0, allocated(upper) - directories(upper)) / tree.bytes)


def directories(root: os.PathLike[str]) -> int:
    """Bytes that the directories themselves take: no file data."""
    return sum(os.lstat(base).st_blocks * 512 for base, _, _ in os.walk(root))


CLAIM = Claim(
    name="chown",
    title="chown -R of lower files",
    why="Containers with mapped users chown whole images; copying them is minutes and gigabytes.",
    metrics=(
        Metric(name="data copied", unit="x", title="storage taken by files, of the tree's bytes"),
        Metric(name="time", title="chown -R"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="data copied",
            subject=COWFS,
            at_most=0.01,
            says="chown -R of lower files: share of the data that is copied",
        ),
        Bar(
            metric="time",
            subject=COWFS,
            against=("fuse-overlayfs 1", "fuse-overlayfs 2"),
            at_most=1.0,
            says="chown -R of lower files: time",
        ),
    ),
)


def test_chown(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
