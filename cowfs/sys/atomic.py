"""Files that appear whole or not at all.

Strategy: write beside the final name, fsync(2), then rename(2) over it (or link(2) where it must be new), then fsync the directory:
after a crash there is the old file or the new one. ``durable=False`` leaves out both fsyncs, where a crash may cost the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowfs._typed import BinaryIO

__all__ = ["create_file", "fsync_directory", "replacing", "write_file"]


@contextmanager
def replacing(path: str, *, mode: int = 0o600, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write within the block; at its end it takes the name ``path`` in place of any other file.

    Args:
        path: its final name.
        mode: permission bits, whatever the umask.
        durable: it is on the disk when the block has ended.

    Raises:
        OSError: of writing; the temporary file is gone then, and the old file keeps the name.
    """
    temporary = f"{path}.new-{os.getpid()}"
    with suppress(FileNotFoundError):
        os.unlink(temporary)  # of a process that was killed, and had our number
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            yield file
            file.flush()
            if durable:
                os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        fsync_directory(os.path.dirname(path) or ".")


def write_file(path: str, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write a whole file in place of any other of its name, as :func:`replacing`."""
    with replacing(path, mode=mode, durable=durable) as file:
        file.write(data)


def create_file(path: str, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write a whole file under a name that is free.

    Raises:
        FileExistsError: something has the name.
    """
    temporary = f"{path}.new-{os.getpid()}"
    write_file(temporary, data, mode=mode, durable=durable)
    try:
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    if durable:
        fsync_directory(os.path.dirname(path) or ".")


def fsync_directory(path: str) -> None:
    """Bring the names in a directory to the disk (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
