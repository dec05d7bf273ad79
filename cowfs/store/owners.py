"""Owners that a layer records in attributes because its maker could not give them (``owners="xattr"``).

Rule 1. A layer is *recorded* when an archive was applied to it that way: the file ``cowfs-owners`` lies beside its tree.
Only then is ``user.containers.override_stat`` trusted, since any writer of a file may set its attribute.
Rule 2. In a store of an ordinary user, a layer over a recorded one is recorded, too: a copied-up file has its
attribute, and only that user can have set one. Rule 3. In a recorded layer an object without the attribute that belongs
to the store's own user is root's: symbolic links, which can have none, and objects made in a namespace where this user
was root. Rule 4. A layer whose owners were left out (``owners="ignore"``) has ``cowfs-owners-ignored`` beside its tree:
it is not the layer of an import with another policy, even with the same diff id.
"""

from __future__ import annotations

import os
import stat

from cowfs._typed import Literal, NamedTuple
from cowfs.archive.options import OVERRIDE_XATTR
from cowfs.driver.interface import Driver
from cowfs.index.database import Index
from cowfs.index.directory import Entry

__all__ = ["Owner", "Recorded", "carry", "mark", "policy_of"]

MARK = "cowfs-owners"
Policy = Literal["fail", "xattr", "ignore"]
MARKS: dict[Policy, str] = {"xattr": MARK, "ignore": "cowfs-owners-ignored"}
"""Policy -> the file beside a layer that says so; owners as they are need none."""


class Owner(NamedTuple):
    """The intended owner and mode of an object that its maker could not make so: ``mode`` has the type bits."""

    mode: int
    uid: int
    gid: int
    rdev: int


def mark(directory: str, policy: str = "xattr") -> None:
    """Record that a layer's directory is about to get owners by a policy (:attr:`cowfs.archive.ApplyOptions.owners`)."""
    name = {str(each): name for each, name in MARKS.items()}.get(policy)
    if name is not None:
        os.close(os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def policy_of(directory: str) -> Policy:
    """The policy by which a layer got its owners; of layers of before 2026-12, ``fail`` stands for ``ignore``, too."""
    return next((policy for policy, name in MARKS.items() if os.path.exists(f"{directory}/{name}")), "fail")


def carry(driver: Driver, sources: list[str], target: str) -> None:
    """Mark the layer ``target``, merged of ``sources``, as recorded if one of them was."""
    if any(os.path.exists(f"{driver.directory(id)}/{MARK}") for id in sources):
        mark(driver.directory(target))


class Recorded:
    """Real owners of the entries of a store's layers. Threads: one at a time."""

    def __init__(self, driver: Driver, index: Index) -> None:
        self._driver = driver
        self._index = index
        self._known: dict[int, bool] = {}
        st = os.stat(driver.root)
        self._maker = st.st_uid, st.st_gid

    def covers(self, num: int) -> bool:
        """Whether a layer, given by its number, is recorded."""
        found = self._known.get(num)
        if found is None:
            chain = self._index.chain(num) if self._maker[0] else self._index.chain(num)[:1]
            found = any(os.path.exists(f"{self._driver.directory(id)}/{MARK}") for _, id in chain)
            self._known[num] = found
        return found

    def owner(self, entry: Entry, path: bytes) -> Owner:
        """The owner and the type of an entry.

        Raises:
            InvalidArgument: its attribute is malformed.
        """
        if self.covers(entry.layer):
            for name, value in entry.xattrs:
                if name == OVERRIDE_XATTR:
                    return _told(value, entry, path)
            if entry.uid == self._maker[0]:
                return Owner(entry.mode, 0, 0 if entry.gid == self._maker[1] else entry.gid, entry.rdev)
        return Owner(entry.mode, entry.uid, entry.gid, entry.rdev)

    def others(self, entry: Entry) -> dict[bytes, bytes]:
        """An entry's extended attributes without the one that :meth:`owner` believes."""
        found = dict(entry.xattrs)
        if OVERRIDE_XATTR in found and self.covers(entry.layer):
            del found[OVERRIDE_XATTR]
        return found


def _told(value: bytes, entry: Entry, path: bytes) -> Owner:
    """The owner that an attribute tells."""
    from cowfs.archive.members import TYPES, overridden

    uid, gid, mode, kind, rdev = overridden(value, TYPES.get(stat.S_IFMT(entry.mode), b""), path)
    form = next((form for form, each in TYPES.items() if each == kind), stat.S_IFMT(entry.mode))
    return Owner(form | mode, uid, gid, rdev)
