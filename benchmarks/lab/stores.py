"""Stores under test: one subject a driver and host file system, used through `cowfs.Store` only.

A subject is named after its driver, with the host file system behind it unless that is ext4: "row", "overlay xfs".
Every claim opens it on a fresh file system, so nothing is shared between subjects but the page cache. A driver that
the package does not have, or that this host cannot run, is skipped with the store's own words.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import Lab, SkipSubject
from .zpool import pool

ROW = "row"
COW = "overlay"
VFS = "vfs"
COW_XFS = "overlay xfs"
COW_BTRFS = "overlay btrfs"
BTRFS = "btrfs btrfs"
THIN = "block"
AUFS = "aufs"
ZFS = "zfs"  # on a pool of its own
COPYING = (COW, VFS)  # subjects that store a whole copy of a changed file
BLOCK = 4096


@dataclass(slots=True)
class Opened:
    """A store of one subject on a file system of its own. ``store`` is a `cowfs.Store`."""

    subject: str
    store: Any
    root: Path
    disk: Path  # mount point of the file system that holds only this store
    lab: Lab

    @contextlib.contextmanager
    def mount(self, key: str) -> Iterator[tuple[Path, Any]]:
        """(mount point, `cowfs.MountHandle`) of an active snapshot or view; unmounted on leaving."""
        at = self.lab.folder("mnt")
        handle = self.store.mount(key, str(at), mount_type="kernel" if self.subject == THIN else None)
        try:
            yield at, handle
        finally:
            handle.unmount()

    def base(self, name: str, fill: Callable[[Path], None], parent: str | None = None) -> str:
        """Commits a snapshot called ``name``: ``fill`` gets the mounted root of a fresh snapshot of ``parent``."""
        key = f"{name}-active"
        self.store.prepare(key, parent)
        with self.mount(key) as (at, _):
            fill(at)
        self.store.commit(key, name)
        return name


@contextlib.contextmanager
def opened(lab: Lab, subject: str, size: int, *, direct: bool = False, **options: Any) -> Iterator[Opened]:
    """A new store for ``subject`` on a fresh file system of ``size`` bytes (sparse); closed and removed on leaving.

    Raises:
        SkipSubject: the driver is not there or cannot run here; the message is the store's.
    """
    import cowfs
    from cowfs.errors import CowfsError

    driver, _, kind = subject.partition(" ")
    with pool(lab, size) if driver == ZFS else lab.fresh(kind or "ext4", size, direct=direct) as disk:
        root = disk / "store"
        try:
            store = cowfs.Store.open(root, driver=driver, **options)
        except (CowfsError, AttributeError) as why:
            raise SkipSubject(str(why)) from None
        try:
            yield Opened(subject, store, root, disk, lab)
        finally:
            store.close()


@contextlib.contextmanager
def opened_all(
    lab: Lab, subjects: Sequence[str], size: int, *, direct: bool = False, **options: Any
) -> Iterator[dict[str, Opened]]:
    """A store for each subject that can run here, all open at once, so that rounds can be interleaved."""
    with contextlib.ExitStack() as stack:
        stores: dict[str, Opened] = {}
        for subject in lab.wanted(subjects):
            with lab.trying(subject):
                stores[subject] = stack.enter_context(opened(lab, subject, size, direct=direct, **options))
        yield stores


def overwrite(path: Path, offsets: Sequence[int], rng: random.Random, *, fsync: bool = False) -> int:
    """Writes 4 KiB of new bytes at each offset; returns the bytes written."""
    fd = os.open(path, os.O_WRONLY)
    try:
        for offset in offsets:
            os.pwrite(fd, rng.randbytes(BLOCK), offset)
        if fsync:
            os.fsync(fd)
    finally:
        os.close(fd)
    return len(offsets) * BLOCK


def some_blocks(rng: random.Random, size: int, share: float) -> list[int]:
    """Offsets of a random ``share`` of the 4 KiB blocks of a file of ``size`` bytes, at least one, in random order."""
    blocks = size // BLOCK
    return [block * BLOCK for block in rng.sample(range(blocks), max(1, int(blocks * share)))]


def read_random(path: Path, offsets: Sequence[int]) -> None:
    """Reads 4 KiB at each offset, with read-ahead off."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in offsets:
            os.pread(fd, BLOCK, offset)
    finally:
        os.close(fd)
