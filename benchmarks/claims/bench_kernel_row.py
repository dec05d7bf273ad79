"""Claim: the kernel reads a chain of redirect files, through chunk maps in an image, faster than cowfs's own server.

A big file, and four snapshots that each rewrite one block in a hundred of it, at random. Sequential with an empty page cache and again, and 4 KiB at random with an empty
one. Against cowfs's server over the same chain, and against the kernel over a chain of the overlay driver, where each snapshot is a copy. "image" is making the
image from the maps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, drop_caches, run, timed
from ..lab.stores import overwrite, read_random, some_blocks

KERNEL, FUSE, COPIED = "row, kernel", "row, cowfs", "overlay, kernel"
SUBJECTS = (KERNEL, FUSE, COPIED)
_LEVELS, _READS = 4, 2_000


def _fill(lab: Lab, store: Any, big: int) -> None:
    at = lab.folder("fill")
    store.prepare("key")
    with store.mount("key", str(at)):
        trees.write_big(at / "big", big)
    store.commit("key", "level-0")
    rng = lab.rng("blocks")
    for level in range(1, _LEVELS + 1):
        store.prepare("key", f"level-{level - 1}")
        with store.mount("key", str(at)):
            overwrite(at / "big", some_blocks(rng, big, 0.01), rng)
        store.commit("key", f"level-{level}")
    store.view("view", f"level-{_LEVELS}")


def measure(lab: Lab) -> None:
    import cowfs
    from cowfs.store import kernel_image

    big = lab.profile.big
    with (
        cowfs.Store.open(lab.folder("row"), driver="row") as row,
        cowfs.Store.open(lab.folder("overlay"), driver="overlay") as overlay,
    ):
        _fill(lab, row, big)
        _fill(lab, overlay, big)
        at: Path = lab.folder("mnt")
        top = row.index.get(f"level-{_LEVELS}")
        offsets = [block * 4096 for block in lab.rng("reads").sample(range(big // 4096), min(_READS, big // 4096))]
        for _, name in lab.rounds(lab.wanted(SUBJECTS)):
            with lab.trying(name):
                if name == KERNEL:
                    path = kernel_image.path_of(row.driver, row.index, top)
                    if os.path.exists(path):
                        os.unlink(path)
                    lab.record("image", name, timed(lambda: kernel_image.build(row.driver, row.index, top)))
                store = overlay if name == COPIED else row
                with store.mount("view", str(at), mount_type="fuse" if name == FUSE else "kernel"):
                    drop_caches(1)
                    lab.record("read", name, run(["cat", at / "big"]))
                    lab.record("read again", name, run(["cat", at / "big"]))
                    drop_caches(1)
                    lab.record("random", name, timed(lambda: read_random(at / "big", offsets)) / len(offsets))


CLAIM = Claim(
    name="kernel_row",
    title="redirect files read by the kernel",
    why="A virtual disk or database that only reads what stands on many snapshots gets the kernel's own speed.",
    metrics=(
        Metric(name="image", title="making the image of the chain"),
        Metric(name="read", title="sequential read, cold"),
        Metric(name="read again", title="sequential read, warm"),
        Metric(name="random", title="4 KiB at random, cold"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(
            metric="read",
            subject=KERNEL,
            against=(FUSE,),
            at_most=1.0,
            says="row chain by the kernel, sequential, cold",
        ),
        Bar(
            metric="random", subject=KERNEL, against=(FUSE,), at_most=1.0, says="row chain by the kernel, random, cold"
        ),
        Bar(
            metric="read",
            subject=KERNEL,
            against=(COPIED,),
            goal=1.1,
            says="row chain by the kernel against whole copies",
        ),
    ),
    topic="row",
)


def test_kernel_row(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
