"""Claim: unpacking a layer into the store takes at most twice GNU tar's time, index and digests included.

All have the same tar. cowfs: `Store.apply`, which also takes the digest of the archive and of every file and keeps
the headers; and import, which commits too. umoci: `raw unpack`-like `umoci unpack` of an image with this one layer.
Export is of the committed layer, against `tar -c` of the same tree. fsync is off everywhere (none of the peers has it).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, SkipSubject, run, timed
from ..lab.stores import COW, opened

TAR = "GNU tar"
UMOCI = "umoci"
SUBJECTS = (COW, TAR, UMOCI)


def _image(lab: Lab, tar: Path) -> Path:
    """An OCI layout with the tar as its only layer, made by umoci itself."""
    if not shutil.which("umoci"):
        raise SkipSubject("umoci is not installed")
    layout = lab.folder("layout") / "image"
    run(["umoci", "init", "--layout", layout])
    run(["umoci", "new", "--image", f"{layout}:one"])
    run(["umoci", "raw", "add-layer", "--image", f"{layout}:one", tar])
    return layout


def measure(lab: Lab) -> None:
    source = trees.small_files(lab, lab.profile.apply_files, median=4096, salt="apply")
    tar = trees.archive(lab, source, "apply")
    lab.note(f"{trees.members(tar):,} members, {tar.stat().st_size >> 20} MiB")
    names = lab.wanted(SUBJECTS)
    layout: Path | None = None
    if UMOCI in names:
        with lab.trying(UMOCI):
            layout = _image(lab, tar)
    with opened(lab, COW, 16 << 30, fsync=False) as opened_:
        store = opened_.store
        for number, name in lab.rounds(names):
            with lab.trying(name):
                place = opened_.disk / f"{name.replace(' ', '-')}-{number}"
                if name == COW:
                    _cowfs(lab, store, tar, number)
                elif name == TAR:
                    place.mkdir()
                    lab.record("apply", TAR, run(["tar", "-C", place, "-xf", tar]))
                    lab.record("export", TAR, run(["tar", "-C", place, "-cf", opened_.disk / "out.tar", "."]))
                elif layout is not None:
                    lab.record("apply", UMOCI, run(["umoci", "unpack", "--image", f"{layout}:one", place]))
                if place.exists():
                    run(["rm", "-rf", place])


def _cowfs(lab: Lab, store: object, tar: Path, number: int) -> None:
    from cowfs.store import Store

    assert isinstance(store, Store)

    def apply() -> None:
        with tar.open("rb") as stream:
            store.apply("k", stream)

    store.prepare("k")
    lab.record("apply", COW, timed(apply))
    lab.record("commit", COW, timed(lambda: store.commit("k", f"layer-{number}")))
    out = Path(store.root).parent / "out.tar"
    lab.record("export", COW, timed(lambda: store.export(f"layer-{number}", out, format="layer")))
    store.remove(f"layer-{number}")


CLAIM = Claim(
    name="store_archive",
    title="a layer archive in and out",
    why="Pulling and building images is mostly this.",
    metrics=(Metric(name="apply"), Metric(name="commit"), Metric(name="export")),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="apply", subject=COW, against=TAR, at_most=2.0, goal=1.2, says="apply, with all digests, against GNU tar"),
        Bar(metric="apply", subject=COW, against=UMOCI, at_most=1.0, says="apply against umoci"),
        Bar(metric="export", subject=COW, against=TAR, at_most=2.0, goal=1.0, says="export against GNU tar"),
    ),
    topic="store",
)  # fmt: skip


def test_store_archive(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
