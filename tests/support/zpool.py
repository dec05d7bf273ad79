"""A zfs pool on a file, served by a zfs-fuse of our own: its socket, lock and list of pools are in this mount namespace only."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import namespace

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def run(*command: str) -> str:
    """Run zfs or zpool; its output. Raises AssertionError with what it complained of."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@contextmanager
def pool(base: Path, name: str = "cowfstest", size: int = 512 << 20) -> Iterator[Path]:
    """A pool, mounted at ``base/name``; skips where there is none to be had."""
    if namespace.why_not:
        pytest.skip(namespace.why_not)
    daemon = shutil.which("zfs-fuse", path=PATH)
    if daemon is None:
        pytest.skip("zfs-fuse is not installed")
    for place in ("/run/zfs", "/run/lock/zfs", "/var/lib/zfs"):
        os.makedirs(place, exist_ok=True)
        namespace.mount("tmpfs", place, "tmpfs", 0, "mode=700")
    with open(base / "zfs-fuse.log", "wb") as log:
        server = subprocess.Popen([daemon, "-n", "-p", str(base / "pid")], stdout=log, stderr=log)
    try:
        _wait(lambda: os.path.exists("/run/zfs/zfs_socket") or server.poll() is not None)
        image = base / f"{name}.pool"
        with image.open("wb") as file:
            file.truncate(size)
        pool = base / name
        run("zpool", "create", "-m", str(pool), name, str(image))
        os.chmod(pool, 0o755)
        yield pool
        clear(pool)
    finally:
        server.send_signal(signal.SIGKILL)  # it waits for lazily unmounted file systems for ever otherwise
        server.wait()
        for place in ("/run/zfs", "/run/lock/zfs", "/var/lib/zfs"):
            subprocess.run(["umount", "-l", place], check=False)


def clear(pool: Path) -> None:
    """Destroy the pool's datasets, whatever is open in them."""
    while (found := _mounted(pool.name)) is not None:
        run("umount", found)  # not lazily: zfs-fuse hangs then when the last file is closed
    names = [name for name in run("zfs", "list", "-H", "-o", "name", "-d", "1", pool.name).split() if "/" in name]
    for name in names:  # with what was cloned of it, so that some are gone by their turn
        subprocess.run(
            ["zfs", "destroy", "-R", name], check=False, capture_output=True, env={**os.environ, "PATH": PATH}
        )


def _mounted(name: str) -> str | None:
    """The mount point of a dataset below a pool's own, the last mounted first."""
    with open("/proc/self/mounts", encoding="utf-8") as file:
        found = [line.split()[1] for line in file if line.startswith(f"{name}/")]
    return found[-1] if found else None


def _wait(done: object) -> None:
    assert callable(done)
    while not done():
        time.sleep(0.01)
