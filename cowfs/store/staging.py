"""Directories that are being made or deleted, and their distinction from garbage.

Order, for every verb:

* made: fill ``new-ID`` under a flock, fsync it, then in one transaction write the row and rename
  it to ``layers/ID``;
* deleted: delete the row and commit, then rename ``layers/ID`` to ``rm-ID``, then delete it.

So a killed process leaves one of these, and nothing else:

=================  ===========================  =========================================
on disk            in the index                 what :func:`sweep` does
=================  ===========================  =========================================
``new-ID``, lock   no row                       nothing: somebody is building it
``new-ID``         no row                       deletes it
``new-ID``         a row (the rename was lost)  renames it to ``layers/ID``
``rm-ID``, lock    no row                       nothing: somebody is deleting it
``rm-ID``          no row                       deletes it, unless a mount still shows it
``rm-ID``          a row (the commit was lost)  renames it back
``layers/ID``      no row                       ``gc`` deletes it, ``check`` names it
=================  ===========================  =========================================

A sweep reads and renames under the write lock, which excludes a verb that makes a layer between its row and its rename. A verb that
deletes renames without the lock: both may want the same directory, and either takes it.
"""

from __future__ import annotations

import os
import resource
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from cowfs._log import Part
from cowfs._typed import Any
from cowfs.driver.interface import Driver
from cowfs.index.database import Index
from cowfs.store.reserve import FULL
from cowfs.sys import files, locks
from cowfs.sys.atomic import fsync_directory
from cowfs.sys.faults import point
from cowfs.sys.mounts import mountinfo
from cowfs.sys.regular import read_small

__all__ = ["Staged", "discard", "finish", "leftovers", "orphans", "read_note", "staged", "sweep"]

_log = Part("cowfs.store")

NEW, RM = "new-", "rm-"
SQUASH = "squash-"
"""Notes of squashes (:mod:`cowfs.store.squash`): what they name as old may still be somebody's."""
_MOST_HELD = 512  # locks that a sweep holds at once
PROBE = "new-probe-"  # a driver's probe, which exists for a moment; only gc takes it for garbage


class Staged:
    """A layer being made: ``new-ID`` on disk, locked for as long as this process lives.

    Attributes:
        id: the id it will have.
        staged: the id to hand to the driver meanwhile.
    """

    def __init__(self, driver: Driver, index: Index, id: str) -> None:
        self.id = id
        self.staged = NEW + id
        self._driver = driver
        self._index = index
        self._fd = _make_locked(driver.directory(self.staged))

    def publish(self) -> None:
        """Give the directory its final name. Only inside the transaction that writes the row."""
        self._driver.publish(self.staged, self.id)
        if self._driver.fsync:
            fsync_directory(f"{self._driver.root}/layers")
            fsync_directory(self._driver.root)

    def close(self, *, keep: bool) -> None:
        """Close, and delete the directory unless it is kept, or a row names it: an interrupt may come right after the transaction was committed."""
        try:
            if not keep:
                if os.path.lexists(self._driver.directory(self.staged)):
                    self._driver.remove(self.staged)
                elif self._index.find_id(self.id) is None:
                    discard(self._driver, self.id)
        finally:
            os.close(self._fd)


def _make_locked(path: str) -> int:
    """A fresh directory and a descriptor that holds its lock."""
    while True:
        os.mkdir(path, 0o700)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # a sweep came before the lock
        try:
            locks.lock(fd, wait=True)
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                files.make_plain(fd, 0o700)
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                os.rmdir(path)
            raise
        os.close(fd)


@contextmanager
def staged(driver: Driver, index: Index, id: str) -> Iterator[Staged]:
    """A staged layer, deleted again when the block fails before its row is there."""
    layer = Staged(driver, index, id)
    try:
        yield layer
    except BaseException:
        layer.close(keep=False)
        raise
    layer.close(keep=True)


def discard(driver: Driver, id: str, *, later: bool = False) -> None:
    """Delete a layer that no row names; a missing one is no error.

    Args:
        later: only rename it for a later :func:`sweep`.
    """
    try:
        driver.publish(id, RM + id)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in FULL:
            raise
        driver.remove(id)  # one more name in the store's directory may need a block
        return
    point("remove.renamed")
    if later:
        return
    finish(driver, id)


def finish(driver: Driver, id: str) -> None:
    """Delete a layer that was discarded for later. Its lock tells others that somebody does."""
    fd = _lock(f"{driver.root}/{RM}{id}")
    try:
        driver.remove(RM + id)
    finally:
        if fd is not None:
            os.close(fd)
    point("remove.emptied")


def unlink(path: str) -> None:
    """Remove a file that may be gone."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def read_note(path: str) -> dict[str, Any] | None:
    """A note about an unfinished verb; ``None`` without one, or if its writer was killed before it was whole.

    Raises:
        OSError: it is unreadable, which differs from a missing one: its layers may be in use.
    """
    import json

    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None  # put there by a stranger
        note = json.loads(read_small(path))
    except (FileNotFoundError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def spared(root: str) -> set[str]:
    """Ids of directories without a row that are no garbage: running mounts may still read them."""
    found: set[str] = set()
    for name in os.listdir(root):
        if name.startswith(SQUASH):
            note = read_note(f"{root}/{name}")
            if note is not None:
                found.update(note.get("old", ()))
    return found


def _in_use(driver: Driver, id: str) -> bool:
    """Whether a mount still shows a removed layer (``rm-ID``).

    A server holds the lock of the tree. The kernel tells the path that an overlay's upper had when it was mounted, and the
    path that the source of a bind has now.
    """
    tree = driver.tree(RM + id)
    try:
        fd = locks.open_locked(tree)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if fd is None:
        return True
    os.close(fd)
    former, now = os.fsencode(driver.tree(id)), os.fsencode(f"/{RM}{id}/fs")
    for entry in mountinfo():
        if entry.fstype == "overlay":
            if b"upperdir=" + former in entry.super_options.split(b",") or entry.source == b"cowfs:" + os.fsencode(id):
                return True
        elif entry.root.endswith(now):
            return True
    return False


def orphans(driver: Driver, index: Index) -> list[str]:
    """Ids of the directories in ``layers`` without a row, at this moment (slightly earlier on a store that cannot be locked).

    A directory that a verb is about to delete is none: it is looked at again, for up to a second.
    """
    until = time.monotonic() + 1
    while True:
        with index.read() if index.refused else index.write():
            known = index.ids() | spared(driver.root)
            found = sorted(id for id in os.listdir(f"{driver.root}/layers") if id not in known)
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.05)


def leftovers(driver: Driver, index: Index) -> list[str]:
    """The paths, relative to the store, that a sweep of everything would delete outside of ``layers`` now. Changes nothing."""
    found = []
    known = index.ids()
    for name in os.listdir(driver.root):
        if not name.startswith((NEW, RM)):
            continue
        fd = _lock(f"{driver.root}/{name}")
        if fd is None:
            continue
        os.close(fd)
        id = name.removeprefix(NEW).removeprefix(RM)
        if id not in known and not (name.startswith(RM) and _in_use(driver, id)):
            found.append(name)
    return found


def sweep(driver: Driver, index: Index, *, everything: bool = False) -> list[str]:
    """Remove leftovers of processes that were killed; see the table in the module.

    Args:
        everything: search ``layers`` for directories without a row, too.

    Returns:
        The deleted paths, relative to the store.
    """
    found: list[str] = []
    looked: set[str] = set()
    if not everything and not _leftover(driver.root, everything, looked):
        return found
    most = max(1, min(_MOST_HELD, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
    while True:
        with ExitStack() as held:
            with index.write():
                doomed, more = _doom(driver, index, held, most, everything, looked)
            for name in doomed:
                _log.info("delete %s, left by a process that was killed", name)
                driver.remove(name)
        found += doomed
        if not more:
            return found


def _leftover(root: str, everything: bool, looked: set[str]) -> list[str]:
    """Directories in a store that were being made or deleted."""
    found = [name for name in os.listdir(root) if name.startswith((NEW, RM)) and name not in looked]
    return found if everything else [name for name in found if not name.startswith(PROBE)]


def _doom(
    driver: Driver, index: Index, held: ExitStack, most: int, everything: bool, looked: set[str]
) -> tuple[list[str], bool]:
    """Find directories to be deleted, and hold their locks: each is a descriptor. Under the write lock.

    Args:
        most: the most locks to hold.
        looked: names examined so far; grows.

    Returns:
        Their names, and whether there may be more.
    """
    root, doomed, known = driver.root, list[str](), index.ids()
    for name in _leftover(root, everything, looked):
        if not most:
            return doomed, True
        looked.add(name)
        id = name.removeprefix(NEW).removeprefix(RM)
        fd = _lock(f"{root}/{name}")
        if fd is None:
            continue
        held.callback(os.close, fd)
        most -= 1
        if id in known and not os.path.isdir(driver.directory(id)):
            driver.publish(name, id)
        elif not (name.startswith(RM) and _in_use(driver, id)):
            doomed.append(name)
    if not everything:
        return doomed, False
    kept = known | spared(root)
    doomed += _set_aside_strays(driver, kept, looked)
    for id in os.listdir(f"{root}/layers"):
        if id not in kept and not most:
            return doomed, True
        if id not in kept:
            try:
                driver.publish(id, RM + id)
            except FileNotFoundError:
                continue  # renamed since by the process that removes it
            looked.add(RM + id)
            point("gc.renamed")
            if _in_use(driver, id):
                continue  # removed while it was mounted, by a process that was then killed
            fd = _lock(f"{root}/{RM}{id}")
            if fd is not None:
                held.callback(os.close, fd)
                most -= 1
                doomed.append(RM + id)
    return doomed, False


def _set_aside_strays(driver: Driver, kept: set[str], looked: set[str]) -> list[str]:
    """Directories made for what a driver keeps elsewhere without one, so that its removal is found again."""
    made = []
    for id in driver.strays():
        if id not in kept and RM + id not in looked:
            looked.add(RM + id)
            with suppress(FileExistsError):  # renamed since by the process that removes it
                os.mkdir(driver.directory(RM + id), 0o700)
                made.append(RM + id)
    return made


def _lock(path: str) -> int | None:
    """A locked descriptor, or None while another process builds or deletes it."""
    try:
        return locks.open_locked(path)
    except OSError:
        return None
