"""The bound on a count: a change that would pass the limit is refused before it is made."""

from __future__ import annotations

import errno
import os

from cowfs._typed import TYPE_CHECKING
from cowfs.format.whiteout import Form
from cowfs.model import Limit
from cowfs.union.blocks import UNIT, units
from cowfs.union.measure import FREE_WHITEOUTS, GROWTH, NOTHING, Room, Tally, names_cost

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Awaited", "Bound", "LimitReached"]


class LimitReached(OSError):
    """ENOSPC of the limit, not of the host."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Awaited(LimitReached):
    """Retry after all pending FORGETs are handled: unlinked inodes count until then.

    Only raised for a front end that can wait (``wait_for_forgets``); nothing was changed. A kernel sends FORGETs behind
    waiting requests, so a client that unlinked a file can need its space, or look for it with statfs(2), before the
    view has it back. It is ENOSPC for a front end that does not retry.
    """


class Bound(Tally):
    """A count and the limit that it must not pass.

    Owner: the view's thread.
    """

    __slots__ = ("_base", "_base_inodes", "_excess", "limit")

    def __init__(self, fs: str, form: Form) -> None:
        super().__init__(fs, form)
        self.limit = Limit()
        self._base = self._base_inodes = 0  # use outside the upper layer that counts
        self._excess = 0  # units of rule 3

    def _sum(self) -> None:
        """Update the sum after a change of the use by rule 3."""
        self._excess = self.beyond()

    def set_limit(self, limit: Limit) -> None:
        """Set the bound."""
        self.limit = limit

    def offset(self, blocks: int, inodes: int) -> None:
        """Add use outside the upper layer (or, negative, exclude use inside it)."""
        self._base += blocks
        self._base_inodes += inodes

    def left(self) -> int:
        """Units that may still be allocated."""
        limit = self.limit.bytes
        if limit is None:
            return 1 << 62
        most = limit // UNIT - self._base
        if (self.hidden or self.exempt) and self.exempt + units(self.hidden) - FREE_WHITEOUTS > most:
            return 0
        return max(0, most - self.units - self._excess)

    def need(self, blocks: int, inodes: int = 0, names: int = 0, room: Room = NOTHING) -> None:
        """Raise ENOSPC unless so much more fits. Counts nothing.

        Args:
            blocks: units.
            names: bytes that new names may take (:meth:`entering`).
            room: for xattrs.
        """
        if self.limit.bytes is not None:
            blocks += room.large
            more = names + inodes * self.host.inode + room.small * UNIT
            if more > 0:
                blocks += max(0, self.beyond(more) - self._excess)
            if blocks > 0 and blocks > self.left():
                raise self._full()
        most = self.limit.inodes
        if inodes and most is not None and self._base_inodes + self.inodes + inodes > most:
            raise self._full()

    def entering(self, name: bytes, count: int = 1) -> int:
        """The most bytes that a new name (or ``count`` like it) may take, for :meth:`need`."""
        if self.host.grows:
            return count * GROWTH * UNIT
        return count * self.name_cost(name) if self.host.name else 0

    def need_hidden(self, names: Iterable[bytes], blocks: int = 0) -> None:
        """Raise ENOSPC unless whiteouts of these names, and so many units of directories for them, fit into the allowance."""
        if self.limit.bytes is None:
            return
        more = self.exempt + blocks + units(self.hidden + names_cost(self, names)) - FREE_WHITEOUTS
        if more > max(self.limit.bytes // UNIT - self._base, self.units + self._excess):
            raise self._full()

    def _full(self) -> OSError:
        """The error for a change that does not fit."""
        return Awaited() if self._may_return() else LimitReached()

    def _may_return(self) -> bool:
        """Whether space may come back without a request."""
        return False
