"""The xattr calls through the package ``xattr``, where Python's ``os`` has none: a build without ``sys/xattr.h``.

Same arguments, results and errors as :func:`os.getxattr` and its siblings.
"""

from __future__ import annotations

import os

import xattr

from cowfs._typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["CREATE", "REPLACE", "getxattr", "listxattr", "removexattr", "setxattr"]

CREATE: int = xattr.XATTR_CREATE
REPLACE: int = xattr.XATTR_REPLACE

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_Name = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def _object(path: int | _Path, follow_symlinks: bool) -> Any:
    return xattr.xattr(path, 0 if follow_symlinks else xattr.XATTR_NOFOLLOW)


def getxattr(path: int | _Path, attribute: _Name, *, follow_symlinks: bool = True) -> bytes:
    """As :func:`os.getxattr`."""
    return bytes(_object(path, follow_symlinks).get(os.fsdecode(attribute)))


def listxattr(path: int | _Path | None = None, *, follow_symlinks: bool = True) -> list[str]:
    """As :func:`os.listxattr`."""
    return list(_object("." if path is None else path, follow_symlinks).list())


def setxattr(
    path: int | _Path, attribute: _Name, value: ReadableBuffer, flags: int = 0, *, follow_symlinks: bool = True
) -> None:
    """As :func:`os.setxattr`."""
    _object(path, follow_symlinks).set(os.fsdecode(attribute), bytes(value), flags)


def removexattr(path: int | _Path, attribute: _Name, *, follow_symlinks: bool = True) -> None:
    """As :func:`os.removexattr`."""
    _object(path, follow_symlinks).remove(os.fsdecode(attribute))
