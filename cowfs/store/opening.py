"""The directory of a store, and the check whether a directory may become one.

Rule: a store is made only in an empty or missing directory, and one that has lost its index is never taken for a new
one, since its layers would be garbage.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.errors import Corrupt, InvalidArgument, NotFound, Unsupported
from cowfs.sys import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cowfs.driver.interface import Driver

__all__ = ["INDEX", "default_root", "make_root", "mark_ids", "must_run", "needs_ids", "only_one"]

INDEX = "index.db"
_MANY_IDS = "many-ids"
"""An empty file in a store in which files may have other owners than its own: it was opened in a user namespace with many ids."""


def default_root() -> str:
    """The default directory of a store: ``/var/lib/cowfs`` as root, the user's data directory otherwise."""
    if host.is_root_here():
        return "/var/lib/cowfs"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "cowfs")


def make_root(path: str, create: bool) -> None:
    """Make a store's directory, private, or refuse an unfit one.

    Raises:
        NotFound: there is no store, and ``create`` is off.
        InvalidArgument: the directory holds something else.
        Corrupt: a store without its index.
        Unsupported: this user may not.
    """
    index, layers = os.path.join(path, INDEX), os.path.join(path, "layers")
    # Another process may be making this very store, and makes the index first, so the index is checked last.
    try:
        names = os.listdir(path) if os.path.isdir(path) else []
        held = os.listdir(layers) if "layers" in names else []
    except PermissionError:
        raise Unsupported(f"{path} is not this user's", remedy="choose a place of your own with --root DIR") from None
    if os.path.lexists(index):
        if not stat.S_ISREG(os.lstat(index).st_mode):
            raise Corrupt(f"the index {index} is not a regular file", remedy="restore it from a backup")
        _refuse_others(path)
        if os.path.getsize(index):
            return
        if held:
            raise Corrupt(f"the index {index} is empty, but there are layers", remedy="restore it from a backup")
        if create:
            return
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InvalidArgument(f"{path} is not a directory", remedy="a store is a directory")
    if "layers" in names:
        raise Corrupt(f"the store {path} has lost its index ({INDEX})", remedy="restore it from a backup")
    if create and any(not name.startswith(("index.db", "empty", "new-")) for name in names):
        raise InvalidArgument(f"{path} holds something that is not a store", remedy="choose an empty directory")
    if not create:
        raise NotFound(f"no store at {path}", remedy="make one with 'cowfs init'")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        _refuse_anothers(path)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            from cowfs.sys import files

            files.make_plain(fd, 0o700)
        finally:
            os.close(fd)
    except PermissionError:
        raise Unsupported(f"{path} cannot be made by this user", remedy="choose a place with --root DIR") from None


def _refuse_others(path: str) -> None:
    """Refuse a store in which another user may write, since he could direct this process's reads and writes.

    Raises:
        InvalidArgument: others may write in it, or this process is root and it is another user's.
    """
    st = os.stat(path)
    if st.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InvalidArgument(
            f"others may write in the store {path}", remedy=f"chmod go-w {path}, if you trust what is in it"
        )
    _refuse_anothers(path)


def _refuse_anothers(path: str) -> None:
    """Raise InvalidArgument if this process is root and a store's directory is another user's."""
    owner = os.stat(path).st_uid
    if owner and not os.geteuid():
        raise InvalidArgument(
            f"the store {path} belongs to the user {owner}", remedy="run as that user, or choose another --root"
        )


def mark_ids(path: str) -> None:
    """Note it where this process can make files of many owners in a store of an ordinary user.

    Raises:
        OSError: of the host.
    """
    if host.has_many_ids() and not os.path.lexists(f"{path}/{_MANY_IDS}"):
        os.close(os.open(f"{path}/{_MANY_IDS}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def needs_ids(path: str) -> bool:
    """Whether this process, of an ordinary user, needs a user namespace with its ids to handle all files of a store."""
    return os.geteuid() != 0 and os.path.lexists(f"{path}/{_MANY_IDS}")


@contextmanager
def only_one(path: str) -> Iterator[None]:
    """Admit one process at a time, for the first opening of a store (flock on its directory)."""
    from cowfs.sys import locks

    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        locks.lock(fd, wait=True)
        yield
    finally:
        os.close(fd)


def must_run(driver: type[Driver], root: str) -> None:
    """Raise Unsupported, with its reasons, when a driver cannot run below ``root``."""
    probe = driver.probe(root)
    if not probe.usable:
        raise Unsupported(f"the driver {driver.name} cannot run here: {', '.join(probe.reasons)}")
