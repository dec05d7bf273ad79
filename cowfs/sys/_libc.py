"""One libc handle, and the one way to turn its -1 into an OSError."""

from __future__ import annotations

import ctypes
import os

from cowfs._typed import Any

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long


def check(result: int, name: bytes | str | os.PathLike[str] | os.PathLike[bytes] | None = None) -> int:
    """``result`` unless it is -1: then OSError with the thread's errno."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(name) if name is not None else None)
    return result


def syscall(number: int, *args: Any) -> int:
    """syscall(2); integers go as long, buffers and bytes as pointers."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return check(_syscall(ctypes.c_long(number), *wide))
