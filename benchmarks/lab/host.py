"""The host of a measurement: read from the system, never guessed. Every result file carries it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def _first(path: str, pattern: str, default: str = "unknown") -> str:
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return default
    return found.group(1).strip() if found else default


def version_of(*argv: str) -> str:
    """The first line with a digit of what a program prints about itself; "absent" where there is no program."""
    if not shutil.which(argv[0]):
        return "absent"
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search(r"\d", line)]
    named = [
        line
        for line in lines
        if "version" in line.lower()
        and "fuse" not in line.lower().replace("fuse-overlayfs", "").replace("unionfs-fuse", "")
    ]
    return (named or lines or ["unknown"])[0].strip()


def filesystem_of(path: Path) -> str:
    """Type and source of the file system that holds ``path``, from mountinfo."""
    best, answer = -1, "unknown"
    real = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        where = left.split()[4]
        if (real == where or real.startswith(where.rstrip("/") + "/")) and len(where) > best:
            best, answer = len(where), " ".join(right.split()[:2])
    return answer


def commit() -> str:
    """The commit of the tree that is measured, with ``+`` when it has changes; "" outside a repository."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return ""
    dirty = subprocess.run(
        ["git", "-C", here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def describe(work: Path) -> dict[str, Any]:
    """The host in one flat dictionary: processor, memory, kernel, file system of the work folder, versions."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": _first("/proc/cpuinfo", r"^model name\s*:\s*(.*)$", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_MiB": int(_first("/proc/meminfo", r"^MemTotal:\s*(\d+)", "0")) // 1024,
        "system": _first("/etc/os-release", r'^PRETTY_NAME="?([^"\n]*)'),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "root": os.geteuid() == 0,
        "work": f"{work} ({filesystem_of(work)})",
        "load_at_start": os.getloadavg()[0],
    }
