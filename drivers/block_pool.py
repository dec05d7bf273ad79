"""The pool of the block backend: what each layer's image holds, as a row chain of one file.

Strategy: a *delta* is a row layer (docs/row.md) with the one file ``disk``: the blocks that were written over the delta beneath. Deltas
lie in ``ROOT/block``, each a directory; a layer names its topmost one. So a live snapshot is a new delta: the layer goes on with it, and the
snapshot names the one before. How often a delta is named is its file's link count: ``ref`` in the delta is linked as ``top`` into each layer that
begins with it, and as ``below`` into each delta on it (a symbolic link, whose target is the delta's name: it is on the disk with its directory). A delta that nothing names is deleted by whoever took the last name away, or, after
a kill, by the next sweep.

Order: a delta is complete before anything names it; a name goes before the delta does. The maker of one holds ``ROOT/block/turn``
shared until it is named, and the sweep wants that for itself.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cowfs.errors import Corrupt
from cowfs.format.whiteout import Form
from cowfs.row import layer as row_layer
from cowfs.sys import atomic, locks, trees

__all__ = ["DISK", "Pool"]

DISK = "disk"
_TURN = "turn"
_NEW, _RM = "new-", "rm-"
_MOST = 10_000  # deltas of a chain; more is a circle


class Pool:
    """The deltas of one store. Keeps nothing between calls.

    Args:
        path: its directory; made when the first delta is.
        form: of the xattrs of row layers.
        durable: whether a delta is on the disk before anything names it.
    """

    def __init__(self, path: str, form: Form, *, durable: bool) -> None:
        self.path = path
        self._form = form
        self._durable = durable

    def directory(self, name: str) -> str:
        """Where a delta is.

        Raises:
            Corrupt: that is no name.
        """
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise Corrupt(f"a layer names a delta {name!r}", remedy="restore it from a backup")
        return f"{self.path}/{name}"

    def tree(self, name: str) -> str:
        """The row layer's tree, with :data:`DISK` in it."""
        return f"{self.directory(name)}/fs"

    def work(self, name: str) -> str:
        """The work directory of its mounts."""
        return f"{self.directory(name)}/work"

    @contextmanager
    def turn(self, *, alone: bool = False, wait: bool = True) -> Iterator[bool]:
        """Keep the sweep away, or (``alone``) everybody; yields whether that was had."""
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        fd = os.open(f"{self.path}/{_TURN}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield locks.lock(fd, shared=not alone, wait=wait)
        finally:
            os.close(fd)

    def make(self, below: str | None, *, name: str = "") -> str:
        """A new delta over another one, with the turn held; its name. With a name of its own, it is there under :meth:`staged` only."""
        found = name or secrets.token_hex(8)
        place = f"{self.path}/{_NEW}{found}"
        trees.remove_tree(place)  # of a base that was not finished
        os.mkdir(place, 0o700)
        os.mkdir(f"{place}/fs", 0o755)
        os.mkdir(f"{place}/work", 0o700)
        row_layer.mark(f"{place}/fs", self._form)
        os.symlink(found, f"{place}/ref")
        if below is not None:
            os.link(f"{self.directory(below)}/ref", f"{place}/below", follow_symlinks=False)
        if not name:
            self.publish(found)
        return found

    def staged(self, name: str) -> str:
        """The directory of a delta that :meth:`make` was given a name for."""
        return f"{self.path}/{_NEW}{name}"

    def publish(self, name: str) -> None:
        """Give a delta its name."""
        if self._durable:
            atomic.fsync_directory(self.staged(name))
        os.rename(self.staged(name), self.directory(name))
        if self._durable:
            atomic.fsync_directory(self.path)

    def base(self, name: str, fill: Callable[[str], None]) -> str:
        """The delta of an empty file system, made by ``fill`` (given its tree) where it is not there."""
        if os.path.isdir(self.directory(name)):
            return name
        with self.turn(alone=True):
            if not os.path.isdir(self.directory(name)):
                self.make(None, name=name)
                place = self.staged(name)
                fill(place)
                os.link(f"{place}/ref", f"{place}/keep", follow_symlinks=False)  # it stays
                self.publish(name)
        return name

    # -- names

    def name(self, delta: str, directory: str) -> None:
        """Have a layer's directory begin with a delta, in place of the one before, if there was."""
        link = f"{directory}/top"
        new = f"{directory}/top.new"
        with suppress(FileNotFoundError):
            os.unlink(new)
        os.link(f"{self.directory(delta)}/ref", new, follow_symlinks=False)
        os.rename(new, link)
        if self._durable:
            atomic.fsync_directory(directory)

    def top(self, directory: str) -> str:
        """The delta that a layer's directory begins with.

        Raises:
            FileNotFoundError: there is none.
        """
        return _read(f"{directory}/top")

    def chain(self, name: str) -> list[str]:
        """A delta and all beneath it, topmost first.

        Raises:
            Corrupt: one of them is gone.
        """
        found = [name]
        while True:
            try:
                found.append(_read(f"{self.directory(found[-1])}/below"))
            except FileNotFoundError:
                break
            if len(found) > _MOST:
                raise Corrupt(f"the delta {name} stands on itself", remedy="restore the store from a backup")
        for one in found:
            if not os.path.isdir(self.tree(one)):
                raise Corrupt(f"the delta {one} is gone: {self.directory(one)}", remedy="restore it from a backup")
        return found

    def forget(self, directory: str) -> None:
        """Take the name away that a layer's directory has; what nothing names then is deleted."""
        for link in ("top.new", "top"):
            try:
                delta = _read(f"{directory}/{link}")
            except FileNotFoundError:
                continue
            os.unlink(f"{directory}/{link}")
            self.drop(delta)

    def drop(self, name: str | None) -> None:
        """Delete a delta, and those beneath it, as far as nothing names them."""
        while name is not None:
            place = self.directory(name)
            try:
                if os.lstat(f"{place}/ref").st_nlink > 1:
                    return
                os.rename(place, f"{self.path}/{_RM}{name}")
            except FileNotFoundError:
                return  # somebody else deletes it
            name = self._delete(f"{self.path}/{_RM}{name}")

    def _delete(self, place: str) -> str | None:
        """Delete a delta's directory; the name of the one that it stood on."""
        try:
            below: str | None = _read(f"{place}/below")
        except FileNotFoundError:
            below = None
        trees.remove_tree(place)
        return below

    def sweep(self) -> None:
        """Delete what processes that were killed have left, unless somebody makes a delta just now."""
        if not os.path.isdir(self.path):
            return
        with self.turn(alone=True, wait=False) as mine:
            if not mine:
                return
            for name in os.listdir(self.path):
                if name.startswith((_NEW, _RM)):
                    self.drop(self._delete(f"{self.path}/{name}"))
            for name in os.listdir(self.path):
                if name != _TURN:
                    self.drop(name)


def _read(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Corrupt(f"{path} names no delta", remedy="restore it from a backup") from None
