"""Room that is kept for deletions, so that a store whose file system has no free byte can be emptied.

A deletion writes, too: SQLite's log and shared memory, and an event. So a file of some size lies beside the index, whose blocks
a deletion gives back first, and takes again when it has ended, as far as there is room. Readers need none of it.

Two deletions may meet: one may take back the room that the other needs. So a deletion that fails for want of
room tries again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable

from cowfs._typed import Concatenate, ParamSpec, Protocol, TypeVar
from cowfs.sys import files

__all__ = ["FULL", "RESERVE", "NoRoomError", "Reserve", "names_full", "no_room"]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The errnos of a file system, or a user's quota on it, that takes no more."""

RESERVE = "reserve"
_MOST, _LEAST, _PART = 2 << 20, 256 << 10, 64  # bytes; one 64th of a small file system
_INODES = 3  # empty files beside it: log, shared memory, and one to spare
_TRIES = 4


class _Rooted(Protocol):
    @property
    def root(self) -> str: ...


class _Service(Protocol):
    @property
    def context(self) -> _Rooted: ...


_P = ParamSpec("_P")
_S = TypeVar("_S", bound=_Service)
_T = TypeVar("_T")


class Reserve:
    """The reserve of the store in ``root``. Threads: any; processes: any number."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._path = os.path.join(root, RESERVE)
        self._inodes = [f"{self._path}.{number}" for number in range(_INODES)]

    def keep(self) -> None:
        """Take the room of the reserve, if it is not taken already; a lack of room is no error."""
        if os.path.exists(self._path):
            return
        new = f"{self._path}.new-{os.getpid()}"
        with contextlib.suppress(OSError):
            host = os.statvfs(self._root)
            size = min(_MOST, max(_LEAST, host.f_blocks * host.f_frsize // _PART))
            if host.f_bavail * host.f_frsize < 2 * size:
                return  # leave the last room to others
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                for path in self._inodes:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
                os.rename(new, self._path)
            except OSError:
                os.unlink(new)
                raise
            finally:
                os.close(fd)

    def give(self) -> bool:
        """Give the room back to the file system. Returns whether there was any."""
        given = False
        for path in (self._path, *self._inodes):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                given = True
        return given

    def spend(self, delete: Callable[[], _T], again: Callable[[], None]) -> _T:
        """Call ``delete``, which frees room, with the reserve if it needs some.

        Args:
            delete: all of it, or nothing.
            again: called before the second attempt.

        Raises:
            OSError: there is no room even so.
        """
        given = False
        try:
            for tries in range(_TRIES):
                try:
                    return delete()
                except OSError as error:
                    if error.errno not in FULL or tries == _TRIES - 1 or not (self.give() or given):
                        raise
                    given = True
                    again()
            raise AssertionError
        finally:
            if given:
                self.keep()


def no_room(error: OSError, root: str) -> OSError:
    """An error for want of room as a sentence with the full file system and a remedy."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name, host = files.fs_name(fd), os.fstatvfs(fd)
    finally:
        os.close(fd)
    above = os.path.realpath(root)
    while not os.path.ismount(above):
        above = os.path.dirname(above)
    where = f"{name} at {above}"
    if error.errno == errno.EROFS:
        text = f"the store {root} is on a read-only file system ({where}): it can be looked at, not changed"
    else:
        what = "disk quota exceeded on" if error.errno == errno.EDQUOT else "no space left on"
        if host.f_files and not host.f_favail:
            what = "no inodes left on"
        remedy = "'cowfs rm' and 'cowfs gc' work even so, 'cowfs df -v' shows what can go"
        if not os.path.exists(os.path.join(root, RESERVE)):
            remedy = "remove something there, then 'cowfs rm' and 'cowfs gc' work again"
        text = f"{what} the file system of the store {root} ({where}; {remedy})"
    told = NoRoomError(error.errno, text)
    if error.filename and root not in os.fsdecode(error.filename):
        told.filename = error.filename
    return told


class NoRoomError(OSError):
    """ENOSPC, EDQUOT or EROFS whose text names the file system."""


def names_full(verb: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Make a verb's error for want of room name the full file system (:func:`no_room`)."""

    @functools.wraps(verb)
    def run(self: _S, /, *args: _P.args, **more: _P.kwargs) -> _T:
        try:
            return verb(self, *args, **more)
        except OSError as error:
            if error.errno not in (errno.EROFS, *FULL) or isinstance(error, NoRoomError):
                raise
            raise no_room(error, self.context.root) from error

    return run
