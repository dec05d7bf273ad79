"""Claim: a kernel mount with a limit (an ext4 image of the limit's size for an upper) costs the same as one without a limit.

All on the file system of the work folder, so that the image is one loop device above the disk and no more. Every sample
has a fresh snapshot of one small base; the image is made before the clock starts ("mount" is the time for that). untar,
cp -a, rm -rf of small files; dd with fsync, and cat with an empty page cache; fio as in its own claim. Against the same
store mounted by the kernel without a limit, and by cowfs's own server with one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, drop_caches, run, timed
from ..lab.peers import needs
from .bench_fio import JOBS, _fio

LOOP, OVERLAY, FUSE = "loop", "overlayfs, no limit", "cowfs, limit"
SUBJECTS = (LOOP, OVERLAY, FUSE)


@contextlib.contextmanager
def _mounted(lab: Lab, store: Any, name: str, size: int) -> Iterator[Path]:
    """A fresh snapshot, mounted by a subject's engine; removed on leaving."""
    at = lab.folder("mnt")
    store.prepare("key", "base", **({} if name == OVERLAY else {"size": size}))
    handle = None
    try:

        def mount() -> None:
            nonlocal handle
            handle = store.mount("key", str(at), mount_type="fuse" if name == FUSE else "kernel")

        lab.record("mount", name, timed(mount))
        yield at
    finally:
        if handle is not None:
            handle.unmount()
        store.remove("key")


def measure(lab: Lab) -> None:
    import cowfs

    source = trees.small_files(lab, lab.profile.unpack_files, median=8192, salt="unpack")
    tar = trees.archive(lab, source, "unpack")
    big = lab.profile.big
    size = 4 * big + (1 << 30)
    with cowfs.Store.open(lab.folder("store")) as store:
        store.prepare("key")
        with store.paths("key") as paths:
            paths.mkdir(b"etc")
        store.commit("key", "base")
        for _, name in lab.rounds(lab.wanted(SUBJECTS)):
            with lab.trying(name), _mounted(lab, store, name, size) as top:
                (top / "tree").mkdir()
                drop_caches(1)
                lab.record("untar", name, run(["tar", "-C", top / "tree", "-xf", tar]))
                lab.record("cp", name, run(["cp", "-a", "tree", "copy"], cwd=top))
                lab.record("rm", name, run(["rm", "-rf", "tree", "copy"], cwd=top))
                drop_caches(1)
                write = ["dd", "if=/dev/zero", f"of={top}/new", "bs=1M", f"count={big >> 20}", "conv=fsync"]
                lab.record("write fsync", name, run(write))
                drop_caches(1)
                lab.record("read", name, run(["cat", top / "new"]))
                if not needs("fio")():
                    trees.write_big(top / "data", lab.profile.fio_size)
                    for metric, (kind, fsync) in JOBS.items():
                        drop_caches(1)
                        lab.record(f"fio {metric}", name, _fio(lab, top / "data", kind, fsync))


def _bars() -> Iterator[Bar]:
    for metric, says in (
        ("untar", "untar"),
        ("cp", "cp -a"),
        ("rm", "rm -rf"),
        ("write fsync", "sequential write with fsync"),
        ("read", "sequential read, cold"),
    ):
        yield Bar(
            metric=metric, subject=LOOP, against=(OVERLAY,), at_most=1.1, says=f"kernel mount with a limit: {says}"
        )
    for metric in JOBS:
        yield Bar(
            metric=f"fio {metric}",
            subject=LOOP,
            against=(OVERLAY,),
            at_least=1 / 1.1,
            says=f"kernel mount with a limit: fio random {metric}",
        )


CLAIM = Claim(
    name="kernel_limit",
    title="kernel mounts with a limit",
    why="A limit that holds at the kernel's own speed, for whom df may show a little more than the limit.",
    metrics=(
        Metric(name="mount", title="a mount, its image made"),
        Metric(name="untar"),
        Metric(name="cp", title="cp -a"),
        Metric(name="rm", title="rm -rf"),
        Metric(name="write fsync", title="sequential write, fsync"),
        Metric(name="read", title="sequential read, cold"),
        *(Metric(name=f"fio {name}", unit="1/s", title=f"fio random {name}", higher_is_better=True) for name in JOBS),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=tuple(_bars()),
    topic="store",
)


def test_kernel_limit(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
