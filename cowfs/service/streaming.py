"""Between code that writes to a file or reads from one, and answers and requests that are streams."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

from cowfs.errors import CowfsError

__all__ = ["written"]

CHUNK = 256 << 10


def written(write: Callable[[BinaryIO], object], name: str = "cowfs-writer") -> Iterator[bytes]:
    """What a function writes, as parts, while it writes: a pipe bounds how far it is ahead.

    The function runs in a thread. It gets EPIPE when nobody reads on; an error that it raises is raised here, behind what it
    wrote.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with os.fdopen(writing, "wb") as out:
                write(out)
        except BrokenPipeError:
            pass
        except (CowfsError, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        with os.fdopen(reading, "rb", buffering=0) as source:
            while data := source.read(CHUNK):
                yield data
    finally:
        thread.join()
    if failed:
        raise failed[0]
