"""The error tree: kinds of failure, as classes a caller can act on.

    CowfsError
    ├── NotFound             a snapshot, tag, mount or file that is not there
    ├── AlreadyExists        a key, name or tag that is taken
    ├── InvalidArgument      a bad name, size, option or parent
    ├── FailedPrecondition   right verb, wrong state: in use, has children, is mounted
    ├── LimitExceeded        bytes or inodes past a limit
    ├── Corrupt              what is on disk contradicts its own records
    └── Unsupported          the host lacks something; the message says what

Strategy: below the store (``cowfs.sys``, ``cowfs.union``, ``cowfs.fuse``) failures are plain
:class:`OSError` with an errno, since that is what a file system answers. Above it they are
:class:`CowfsError`. The two edges that translate are the FUSE session and the command.
"""

from __future__ import annotations

import errno as _errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

__all__ = [
    "AlreadyExists",
    "Corrupt",
    "CowfsError",
    "FailedPrecondition",
    "InvalidArgument",
    "LimitExceeded",
    "NotFound",
    "Unsupported",
]


class CowfsError(Exception):
    """Base of every error cowfs raises on purpose.

    Args:
        message: one line: what, and where.
        remedy: one clause: how to mend it (may be empty).

    Attributes:
        exit_code: the status the ``cowfs`` command ends with.
        errno: the nearest errno, for callers that speak only those.
    """

    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = _errno.EIO

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled and copied with its remedy, whatever arguments a subclass takes."""
        return _rebuilt, (type(self), self.message), self.__dict__


def _rebuilt(kind: type[CowfsError], message: str) -> CowfsError:
    error = kind.__new__(kind)
    CowfsError.__init__(error, message)
    return error


class NotFound(CowfsError):
    """The name or path that was given does not exist."""

    exit_code = 3
    errno = _errno.ENOENT


class AlreadyExists(CowfsError):
    """The key, name or tag is taken."""

    exit_code = 4
    errno = _errno.EEXIST


class InvalidArgument(CowfsError):
    """A name, size, option or parent that can never work."""

    exit_code = 2
    errno = _errno.EINVAL


class FailedPrecondition(CowfsError):
    """The verb is right but the state is not: in use, mounted, has children, is a view."""

    exit_code = 5
    errno = _errno.EBUSY


class LimitExceeded(CowfsError):
    """More bytes or inodes than a limit allows."""

    exit_code = 6
    errno = _errno.ENOSPC


class Corrupt(CowfsError):
    """The data on disk contradicts its own records."""

    exit_code = 7
    errno = _errno.EIO


class Unsupported(CowfsError):
    """This host or user cannot do it; the message names what is missing."""

    exit_code = 8
    errno = _errno.EOPNOTSUPP
