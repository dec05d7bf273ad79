"""Programs of the administrator (mkfs, zfs, fsfreeze...), which an ordinary PATH may not name."""

from __future__ import annotations

import os
import shutil
import subprocess

from cowfs.errors import Unsupported

__all__ = ["find", "run"]


def find(name: str) -> str | None:
    """The path of a program; None if it is not installed."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def run(name: str, *arguments: str, package: str, hold: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, without input; its messages are in English.

    Args:
        package: of Debian that has it.
        hold: a descriptor that the program keeps open until it ends, even if this process is killed.

    Raises:
        Unsupported: it is not installed.
    """
    program = find(name)
    if program is None:
        raise Unsupported(f"the program {name} is not installed", remedy=f"apt-get install {package}")
    return subprocess.run(
        [program, *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        pass_fds=() if hold is None else (hold,),
    )
