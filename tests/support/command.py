"""The command as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import users

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """An environment in which the tree under test is imported."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}


def run_module(module: str, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module arguments``; text output, at most a minute."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "env": environment(), **more}
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], **options
    )
    return done


def user_python() -> str | None:
    """An interpreter that an ordinary user can run with the tree under test, or None."""
    probe = "import subprocess, sys, cowfs.mounting.server; subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys.executable, "/usr/bin/python3"):
        command = users.command_as([python, "-c", probe])
        if (
            os.path.exists(python)
            and not subprocess.run(command, capture_output=True, env=environment(), cwd="/").returncode
        ):
            return python
    return None


def status_of(cowfs: Run, mnt: Path) -> dict[str, object]:
    """The entry of `cowfs mounts --json` for one mount point."""
    found = [entry for entry in json.loads(cowfs("mounts", "--json").stdout) if entry["mountpoint"] == str(mnt)]
    assert len(found) == 1, found
    status: dict[str, object] = found[0]
    return status


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Standard error of a failed command: exactly one line, which names the program."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("cowfs"), lines
    return lines[0]
