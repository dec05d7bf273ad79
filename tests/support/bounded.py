"""A mount whose server runs under limits of its own (setrlimit(2)): descriptors, address space."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import command, mounts


class Bounded:
    """A running mount: ``path``, and its server's ``pid``."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process
        self.pid = process.pid

    def descriptors(self) -> int:
        """How many the server has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident(self) -> int:
        """Bytes of memory that the server holds."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def mounted(
    lowers: Sequence[Path], base: Path, *options: str, limits: Sequence[str] = (), log: Path | None = None
) -> Iterator[Bounded]:
    """Mount layers (bottom first) with ``cowfs-overlayfs -f`` below ``prlimit LIMITS``; upper, work and mnt in ``base``."""
    for name in ("upper", "work", "mnt"):
        (base / name).mkdir(exist_ok=True)
    words = ["lowerdir=" + ":".join(str(lower) for lower in reversed(lowers)), *options]
    if "ro" not in options:
        words += [f"upperdir={base / 'upper'}", f"workdir={base / 'work'}"]
    target = base / "mnt"
    with open(log or base / "server.log", "ab") as output:
        process = subprocess.Popen(
            [
                "prlimit", *limits, "--", sys.executable, "-m", "cowfs.cli.overlayfs", "-f", "-o", ",".join(words),
                str(target),
            ],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=command.environment(),
        )  # fmt: skip
    try:
        while not os.path.ismount(target):
            assert process.poll() is None, (log or base / "server.log").read_text()
            time.sleep(0.02)
        yield Bounded(target, process)
    finally:
        if process.poll() is None:  # else it was unmounted
            mounts.umount_busy(str(target), 20.0)
        process.wait(60)


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so; AssertionError when it is not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
