"""Claim: chown -R over a lower tree copies no data (a metadata-only copy-up), as the kernel does with metacopy=on.

Data: the bytes that SEEK_DATA finds in the upper afterwards. Storage is a second figure: a metadata-only copy takes an
inode and, where its xattrs do not fit into that, a block.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..lab import trees
from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import Lab, allocated, run
from ..lab.peers import ALL, COWFS, OVERLAY, Stack, available, mounted

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
            lab.record("data copied", name, data_bytes(upper) / tree.bytes)
            lab.record("storage", name, allocated(upper) / len(tree.names))


def data_bytes(root: Path) -> int:
    """Bytes of file data under a directory, without holes (SEEK_DATA and SEEK_HOLE), each inode once."""
    seen: set[int] = set()
    total = 0
    for base, _, files in os.walk(root):
        for name in files:
            path = os.path.join(base, name)
            st = os.lstat(path)
            if not stat.S_ISREG(st.st_mode) or st.st_ino in seen:
                continue
            seen.add(st.st_ino)
            fd = os.open(path, os.O_RDONLY)
            try:
                end = 0
                while end < st.st_size:
                    start = os.lseek(fd, end, os.SEEK_DATA)
                    end = os.lseek(fd, start, os.SEEK_HOLE)
                    total += end - start
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data after this place
                    raise
            finally:
                os.close(fd)
    return total


CLAIM = Claim(
    name="chown",
    title="chown -R of lower files",
    why="Containers with mapped users chown whole images; copying them is minutes and gigabytes.",
    metrics=(
        Metric(name="data copied", unit="x", title="data in the upper, of the tree's"),
        Metric(name="storage", unit="B", title="storage that the upper takes, a file"),
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
