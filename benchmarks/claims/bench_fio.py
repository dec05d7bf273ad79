"""Claim: random 4 KiB writes and reads, with and without fsync: `--io passthrough` is for databases, `--io cached`
for limits.

fio, one job, psync, time-based, on a file of the upper layer that was laid out before; upper on a fresh ext4 on a
loop device. In operations a second.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from ..lab.claim import Bar, Claim, Key, Metric
from ..lab.measure import SEED, Lab, SkipClaim, drop_caches
from ..lab.peers import ALL, COWFS, FO1, FUSE_OVERLAYFS, PASSTHROUGH, available, mounted_fresh, needs
from ..lab.trees import write_big

SUBJECTS = (*ALL, PASSTHROUGH)
JOBS = {"read": ("randread", 0), "write": ("randwrite", 0), "write fsync": ("randwrite", 1)}


def measure(lab: Lab) -> None:
    missing = needs("fio")()
    if missing:
        raise SkipClaim(f"{missing} (apt-get install fio)")
    lower = lab.folder("lower")
    (lower / "etc").mkdir()
    names = available(lab, SUBJECTS)
    for _, name in lab.rounds(names, min(3, lab.profile.rounds)):
        size = 4 * lab.profile.fio_size + (256 << 20)
        with lab.trying(name), mounted_fresh(lab, name, (lower,), "ext4", size) as mount:
            write_big(mount.path / "data", lab.profile.fio_size)
            for metric, (kind, fsync) in JOBS.items():
                drop_caches(1)
                lab.record(metric, name, _fio(lab, mount.path / "data", kind, fsync))


def _fio(lab: Lab, file: Path, kind: str, fsync: int) -> float:
    argv = [
        "fio",
        "--name=job",
        f"--filename={file}",
        f"--rw={kind}",
        "--bs=4k",
        f"--size={lab.profile.fio_size}",
        "--ioengine=psync",
        "--time_based",
        f"--runtime={lab.profile.fio_seconds}",
        f"--randseed={SEED}",
        "--output-format=json",
        "--fallocate=none",
        "--end_fsync=0",
        f"--fsync={fsync}",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fio: {done.stderr.strip()[-200:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["read" if kind == "randread" else "write"]["iops"])


def _iops(name: str, title: str) -> Metric:
    return Metric(name=name, unit="1/s", title=title, higher_is_better=True)


CLAIM = Claim(
    name="fio",
    title="random 4 KiB I/O (fio)",
    why="A database's pages.",
    metrics=(
        _iops("read", "random read"),
        _iops("write", "random write"),
        _iops("write fsync", "random write, fsync after each"),
    ),
    subjects=SUBJECTS,
    measure=measure,
    bars=(
        Bar(metric="read", subject=COWFS, against=FUSE_OVERLAYFS, at_least=1.0, says="fio random read, --io cached"),
        Bar(metric="write", subject=COWFS, against=FO1, at_least=1.0, says="fio random write, --io cached"),
        Bar(
            metric="write fsync",
            subject=COWFS,
            against=FUSE_OVERLAYFS,
            at_least=1.0,
            says="fio random write + fsync, --io cached",
        ),
        Bar(
            metric="read",
            subject=PASSTHROUGH,
            against=FUSE_OVERLAYFS,
            at_least=1.0,
            says="fio random read, --io passthrough",
        ),
        Bar(
            metric="write",
            subject=PASSTHROUGH,
            against=FUSE_OVERLAYFS,
            at_least=1.0,
            says="fio random write, --io passthrough",
        ),
        Bar(
            metric="write fsync",
            subject=PASSTHROUGH,
            against=FUSE_OVERLAYFS,
            at_least=1.0,
            says="fio random write + fsync, --io passthrough",
        ),
    ),
)


def test_fio(key: Key, replay: Callable[[Key], None]) -> None:
    replay(key)
