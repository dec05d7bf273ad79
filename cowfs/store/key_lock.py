"""One live verb at a time for each key: snapshot, rollback and squash take turns.

Strategy: one file in the store, one byte of it for each key (by a hash of its name), locked as an open file description's
lock (fcntl(2), F_OFD_SETLK). Such locks end with the process, however it ends, work between threads, and leave nothing behind.
Two keys that share a byte only wait for each other.

A process takes several locks in the order of their bytes, so that no circle of waiting arises.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.errors import FailedPrecondition
from cowfs.sys.locks import lock_byte, unlock_bytes

__all__ = ["prepare", "turn"]

FILE = "live.lock"
_BYTES = 1 << 20
_PATIENCE, _PAUSE = 600.0, 0.02  # seconds


def prepare(root: str) -> None:
    """Make the lock file early, while there is room for it."""
    if not os.path.exists(f"{root}/{FILE}"):
        os.close(_open(root))


def _open(root: str) -> int:
    return os.open(f"{root}/{FILE}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


@contextmanager
def turn(root: str, *keys: str, wait: bool = True) -> Iterator[bool]:
    """Hold the right to switch the layers of some keys of the store in ``root``.

    Args:
        wait: wait for other processes; else the block runs with False if one has the lock.

    Raises:
        FailedPrecondition: other processes took ten minutes.
    """
    fd = _open(root)
    try:
        end = time.monotonic() + _PATIENCE
        mine = True
        for place, key in sorted(
            {zlib.crc32(key.encode(errors="surrogatepass")) % _BYTES: key for key in keys}.items()
        ):
            while mine and not lock_byte(fd, place):
                if not wait:
                    mine = False
                elif time.monotonic() > end:
                    raise FailedPrecondition(
                        f"another verb has been at work on {key!r} for ten minutes", remedy="try again"
                    )
                else:
                    time.sleep(_PAUSE)
        yield mine
    finally:
        unlock_bytes(fd)
        os.close(fd)
