"""Claim: the kernel mounts a chain of 500 layers as one, through an image of its metadata.

Every layer changes some directories of a tree of 15,000 files. "mount" is processor time of this process in `Store.mount(mount_type="kernel")`
once the image is there. "first walk" is `find -ls` of the whole tree in a mount that was made with empty caches (the mount
asks for the image's pages); "walk" is one with the caches emptied beneath the mount; "warm walk" is the next. "image" is making the
image, per 100,000 inodes. Against the kernel's overlayfs with all layers as lowers, and one flat layer of the same tree.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, drop_caches, run, timed
from ..lab.stores import COW, Opened, opened

IMAGE, LOWERS, FLAT = "image", "overlayfs", "one flat layer"


def _fill(store: Opened, layers: int, files: int) -> None:
    parent = None
    for number in range(layers):
        store.store.prepare("k", parent)
        tree = Path(store.store.driver.tree(store.store.index.get("k").id))
        for which in range(3):
            place = tree / f"d{number % 40}" / f"e{which}"
            place.mkdir(parents=True, exist_ok=True)
            for at in range(max(1, files // layers // 3)):
                (place / f"f{number}-{at}").write_bytes(b"x" * 100)
        parent = f"chain-{number}"
        store.store.commit("k", parent)
    store.store.prepare("top", parent)


def measure(lab: Lab) -> None:
    from cowfs.store import kernel_image
    from cowfs.store.kernel_mounts import mount_record
    from cowfs.sys import mounts

    layers = 500 if lab.profile.rounds > 1 else 20
    with lab.trying(IMAGE), opened(lab, COW, 4 << 30, fsync=False) as opened_:
        store = opened_.store
        _fill(opened_, layers, min(15_000, lab.profile.walk_files))
        at = lab.folder("mnt")
        flat, seen = lab.folder("flat"), 0
        top = store.index.get(f"chain-{layers - 1}")
        (record,) = store.mounts("top", mount_type="kernel")
        with opened_.mount("top") as (shown, _):
            run(["cp", "-a", f"{shown}/.", str(flat)])
            seen = sum(len(names) + len(more) for _, names, more in os.walk(shown)) + 1
        for number in range(3 * lab.profile.rounds):
            path = kernel_image.path_of(store.driver, store.index, top)
            if os.path.exists(path):
                os.unlink(path)
            lab.record(
                "image", IMAGE, timed(lambda: kernel_image.build(store.driver, store.index, top)) / seen * 100_000
            )
            for name, mount in (
                (IMAGE, lambda: store.mount("top", at, mount_type="kernel")),
                (LOWERS, lambda: mount_record(record, str(at))),
                (FLAT, lambda: mounts.overlay_mount(str(at), [str(flat)], store.driver.tree(store.index.get("top").id),
                                                    store.driver.work(store.index.get("top").id), ("index=off",))),
            ):  # fmt: skip
                begin = time.process_time()
                mount()
                lab.record("mount", name, time.process_time() - begin)
                mounts.umount(str(at))
                drop_caches()
                mount()
                try:
                    lab.record("first walk", name, timed(lambda: run(["find", str(at), "-ls"])))
                    lab.record("warm walk", name, timed(lambda: run(["find", str(at), "-ls"])))
                    drop_caches()
                    lab.record("walk", name, timed(lambda: run(["find", str(at), "-ls"])))
                finally:
                    mounts.umount(str(at))
            if lab.late and number:
                break


CLAIM = Claim(
    name="kernel_chain",
    title="kernel mounts of a long chain",
    why="An engine or a person who needs no limit gets the kernel's own speed, however many layers there are.",
    metrics=(
        Metric(name="mount", title="processor time of a mount"),
        Metric(name="first walk", title="find -ls of the whole tree, mounted with empty caches"),
        Metric(name="walk", title="find -ls of the whole tree, caches emptied beneath the mount"),
        Metric(name="warm walk", title="find -ls of the whole tree, warm"),
        Metric(name="image", title="making the image, per 100,000 inodes"),
    ),
    subjects=(IMAGE, LOWERS, FLAT),
    measure=measure,
    bars=(
        Bar(metric="mount", subject=IMAGE, at_most=0.002, goal=0.001, says="processor time of a mount, seconds"),
        *(
            Bar(
                metric=metric,
                subject=IMAGE,
                against=(FLAT,),
                at_most=1.1,
                says=f"{metric} of 500 layers against one flat layer",
            )
            for metric in ("first walk", "walk", "warm walk")
        ),
        Bar(
            metric="mount",
            subject=IMAGE,
            against=(LOWERS,),
            at_most=1.0,
            says="a mount against overlayfs with all lowers",
        ),
    ),
    topic="store",
)


def test_kernel_chain(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
