"""The part of fusepy that cowfs uses. fusepy has no types; its module has the name of the folder tests/fuse."""

import ctypes
from collections.abc import Callable
from typing import Any

fuse_operations: type[ctypes.Structure]  # replaced by cowfs.fuse.portable

class fuse_file_info(ctypes.Structure): ...

class FuseOSError(OSError):
    def __init__(self, errno: int) -> None: ...

class Operations:
    def __call__(self, op: str, *args: Any) -> Any: ...

class FUSE:
    encoding: str
    operations: Callable[..., Any]
    def __init__(
        self, operations: Callable[..., Any], mountpoint: str, raw_fi: bool = ..., encoding: str = ..., **options: Any
    ) -> None: ...
    def _decode_optional_path(self, path: bytes | None) -> str | None: ...
    def utimens(self, path: bytes, buf: Any) -> Any: ...

def fuse_get_context() -> tuple[int, int, int]: ...
