"""`cowfs top`: the order of what there is, a screen that fits, keys, and tables for a pipe."""

from __future__ import annotations

import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

from support.command import Run, environment, one_line

from cowfs.cli import top
from cowfs.cli.stats import Look
from cowfs.model import Limit, Statistics, Usage


def look(name: str, *, at: float, cpu: float = 0.0, requests: int = 0, used: int = 0, memory: int = 0) -> Look:
    told = Statistics(usage=Usage(bytes=used), limit=Limit(bytes=1 << 20), requests={"LOOKUP": requests})
    return Look(
        name=name, mountpoint=f"/mnt/{name}", key=name, container="", cpu=cpu, memory=memory, pids=1,
        read=None, written=None, statistics=told, at=at,
    )  # fmt: skip


BEFORE = [look("a", at=0.0), look("b", at=0.0)]
NOW = [
    look("a", at=2.0, cpu=1.0, requests=10, used=4096, memory=5),
    look("b", at=2.0, cpu=0.5, requests=40, used=8192, memory=9),
    look("c", at=2.0, cpu=9.0, requests=900),
]


def test_the_busiest_come_first() -> None:
    for key, names in {"c": "abc", "r": "bac", "m": "bac", "u": "bac", "n": "abc"}.items():
        assert "".join(line.look.name for line in top.lines(BEFORE, NOW, key)) == names
    first = top.lines(BEFORE, NOW, "c")[0]
    assert (first.cpu, first.requests) == (0.5, 5.0)
    new = top.lines(BEFORE, NOW, "n")[2]
    assert (new.cpu, new.requests) == (None, None)  # of what was not there before nothing is known yet


def test_a_frame_fits_its_screen() -> None:
    many = [look(f"mount-{number:03}", at=1.0) for number in range(300)]
    for rows, columns in ((24, 80), (5, 20), (400, 300)):
        shown = top.frame(top.lines(many, many, "n"), "n", rows=rows, columns=columns)
        assert len(shown) <= rows
        assert max(map(len, shown)) <= columns
    assert top.frame(top.lines(many, many, "n"), "n", rows=24, columns=80)[-1].startswith("... and 28")


def test_wrong_usages(cowfs: Run) -> None:
    assert "--batch" in one_line(cowfs("top", code=8))
    assert "0.1 to 3600" in one_line(cowfs("top", "-b", "--delay", "0", code=2))
    assert "at least 1" in one_line(cowfs("top", "-b", "--count", "0", code=2))
    assert "not mounted" in one_line(cowfs("top", "-b", "./nowhere", code=3))


def test_tables_and_objects_for_a_pipe(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt, "--size", "1M")
    (mnt / "file").write_bytes(b"x" * 8192)
    shown = cowfs("top", "--batch", "--count", "1", "--delay", "0.1", mnt).stdout
    assert "1 mounts" in shown.splitlines()[0]
    assert shown.splitlines()[1].split()[:2] == ["NAME", "CPU"]
    (told,) = json.loads(cowfs("top", "--json", "--count", "1", "--delay", "0.1", mnt).stdout)
    assert told["mountpoint"] == str(mnt)
    assert told["limit"]["bytes"] == 1 << 20


def test_keys_sort_and_end_and_the_terminal_is_as_it_was(cowfs: Run, stack: Path, mnt: Path) -> None:
    cowfs("mount", stack, mnt)
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "cowfs", "top", "--delay", "0.2", str(mnt)]
    with subprocess.Popen(command, env=environment(), stdin=slave, stdout=slave, stderr=slave) as running:
        seen = b""
        for word, key in ((b"sorted by cpu", b"r"), (b"sorted by requests", b"q")):
            end = time.monotonic() + 60
            while word not in seen:
                assert time.monotonic() < end, seen
                seen += os.read(master, 1 << 16)
            os.write(master, key)
        while b"\x1b[?1049l" not in seen:
            seen += os.read(master, 1 << 16)
        assert running.wait(60) == 0
    assert termios.tcgetattr(slave) == before
    assert os.fsencode(mnt) in seen
    os.close(master)
    os.close(slave)
