"""Adapters between code that writes to a file or reads from one, and streams of answers and requests."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

__all__ = ["written"]

CHUNK = 256 << 10


def written(write: Callable[[BinaryIO], object], name: str = "cowfs-writer") -> Iterator[bytes]:
    """The output of a function, in parts, while it writes; a pipe bounds its lead.

    The function runs in a thread. It gets EPIPE when the reader stops; its error is raised here, after its output.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with os.fdopen(writing, "wb") as out:
                write(out)
        except BrokenPipeError:
            pass
        except Exception as error:  # noqa: BLE001  it is raised below, where it ends the answer
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
