"""A zfs pool on a file, for the driver zfs: by a zfs-fuse of our own, whose socket is in the run's mount namespace only."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from .measure import Lab, SkipSubject, run


@contextlib.contextmanager
def pool(lab: Lab, size: int) -> Iterator[Path]:
    """The mount point of a new pool of ``size`` bytes (sparse); all of it is gone on leaving.

    Raises:
        SkipSubject: this host has no zfs-fuse.
    """
    daemon = shutil.which("zfs-fuse")
    if daemon is None:
        raise SkipSubject("zfs-fuse is not installed")
    area = lab.folder("zfs")
    name = f"cowfsbench{os.getpid()}"
    with contextlib.ExitStack() as held:
        for place in ("/run/zfs", "/run/lock/zfs", "/var/lib/zfs"):
            os.makedirs(place, exist_ok=True)
            run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", place])
            held.callback(run, ["umount", "-l", place])
        with open(area / "log", "wb") as log:
            server = subprocess.Popen([daemon, "-n", "-p", area / "pid"], stdout=log, stderr=log)
        held.callback(server.wait)
        held.callback(server.kill)  # it waits for lazily unmounted file systems for ever otherwise
        end = time.monotonic() + 30
        while not os.path.exists("/run/zfs/zfs_socket"):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"zfs-fuse does not start: {(area / 'log').read_text()[-300:]}")
            time.sleep(0.01)
        with open(area / "image", "wb") as file:
            file.truncate(size)
        run(["zpool", "create", "-m", area / name, name, area / "image"])
        try:
            yield area / name
        finally:
            for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
                if line.split()[1].startswith(f"{area}/"):
                    subprocess.run(["umount", line.split()[1]], check=False, capture_output=True)
