"""Python's file objects over a file of a tree: raw ones, which :mod:`io` buffers and decodes as it does those of ``open``."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from contextlib import ExitStack

from cowfs._typed import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Data", "FileData", "PathFile", "wrap"]


class Data(Protocol):
    """The bytes of an open file. Raises OSError."""

    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Read at an offset; fewer bytes than asked for only at the end."""

    def write(self, offset: int, data: memoryview) -> int:
        """Write at an offset; fewer bytes only where a limit ends."""

    def truncate(self, size: int) -> None: ...

    def close(self) -> None: ...


class FileData:
    """The bytes of an open file of the host; the descriptor is closed with it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def write(self, offset: int, data: memoryview) -> int:
        return os.pwrite(self._fd, data, offset)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)


class PathFile(io.RawIOBase):
    """A raw file of a tree.

    Args:
        data: its bytes; closed with the file.
        mode: as for ``open``, without ``b`` and ``t``.
        name: for messages.
        held: closed after the data.
    """

    def __init__(self, data: Data, mode: str, name: str, *, held: ExitStack | None = None) -> None:
        super().__init__()
        self._held = held
        self._data = data
        self._reads = "r" in mode or "+" in mode
        self._writes = "r" not in mode or "+" in mode
        self._appends = "a" in mode
        self._at = data.size() if self._appends else 0
        self.name = name
        self.mode = mode

    def readable(self) -> bool:
        return self._reads

    def writable(self) -> bool:
        return self._writes

    def seekable(self) -> bool:
        return True

    def _check(self, allowed: bool, what: str) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if not allowed:
            raise io.UnsupportedOperation(f"not {what}")

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._check(self._reads, "readable")
        count = self._data.read_into(self._at, memoryview(buffer).cast("B"))
        self._at += count
        return count

    def write(self, data: ReadableBuffer) -> int:
        self._check(self._writes, "writable")
        if self._appends:
            self._at = self._data.size()
        count = self._data.write(self._at, memoryview(data).cast("B"))
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check(True, "")
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"invalid whence: {whence}")
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._data.size()}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._at = at
        return at

    def tell(self) -> int:
        self._check(True, "")
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self._check(self._writes, "writable")
        size = self._at if size is None else size
        self._data.truncate(size)
        return size

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()
            finally:
                try:
                    self._data.close()
                finally:
                    if self._held is not None:
                        self._held.close()


def plain_mode(mode: str) -> tuple[str, bool]:
    """(the mode without ``b`` and ``t``, whether it is binary).

    Raises:
        ValueError: not a mode of ``open``.
    """
    kind = mode.replace("b", "").replace("t", "")
    if kind not in ("r", "w", "x", "a", "r+", "w+", "x+", "a+") or ("b" in mode and "t" in mode):
        raise ValueError(f"invalid mode: {mode!r}")
    return kind, "b" in mode


def wrap(
    make: Callable[[str], io.RawIOBase],
    mode: str,
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
) -> IO[Any]:
    """A raw file as ``open`` would give it: buffered, and decoded in a text mode.

    Args:
        make: opens the raw file, given the mode without ``b`` and ``t``.
        mode, buffering, encoding, errors, newline: as for ``open``, but that text is UTF-8 unless said otherwise.
    """
    kind, binary = plain_mode(mode)
    if buffering == 0 and not binary:
        raise ValueError("can't have unbuffered text I/O")
    if binary and (encoding is not None or errors is not None or newline is not None):
        raise ValueError("a binary mode takes no encoding, errors or newline")
    raw: Any = make(kind)
    if buffering == 0:
        return raw  # type: ignore[no-any-return]
    size = buffering if buffering > 1 else 128 << 10
    buffered: Any
    if "+" in kind:
        buffered = io.BufferedRandom(raw, size)
    elif kind == "r":
        buffered = io.BufferedReader(raw, size)
    else:
        buffered = io.BufferedWriter(raw, size)
    if binary:
        return buffered  # type: ignore[no-any-return]
    return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)
