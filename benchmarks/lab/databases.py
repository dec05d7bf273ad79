"""The data folders of the database claims: every subject as a context that yields a writable folder over a base.

Stores commit the base as a snapshot; peers have it as a lower layer; "plain" is a copy on the same kind of fresh
ext4.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .measure import Lab
from .peers import FO1, FO2, OVERLAY, PASSTHROUGH, PEERS, mounted_fresh
from .stores import COW, ROW, VFS, opened

STORES = (ROW, COW, VFS)
PLAIN = "plain"
SUBJECTS = (PLAIN, OVERLAY, FO1, FO2, *STORES, PASSTHROUGH)


@contextlib.contextmanager
def over(lab: Lab, subject: str, base: Path, room: int) -> Iterator[Path]:
    """A writable tree that starts equal to ``base``, given by ``subject``, on a fresh ext4 of ``room`` bytes."""
    if subject in STORES:
        with opened(lab, subject, room) as store:
            store.base("base", lambda at: _copy(base, at))
            store.store.prepare("work", "base")
            with store.mount("work") as (at, _):
                yield at
        return
    if subject in PEERS:
        with mounted_fresh(lab, subject, (base,), "ext4", room) as mount:
            yield mount.path
        return
    with lab.fresh("ext4", room) as disk:
        (disk / "tree").mkdir()
        _copy(base, disk / "tree")
        yield disk / "tree"


def _copy(base: Path, at: Path) -> None:
    subprocess.run(["cp", "-a", f"{base}/.", f"{at}/"], check=True)
