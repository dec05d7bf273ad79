"""Finishing or undoing the verbs of killed processes: a list of services that can, each by its own notes.

A store without killed processes has no notes, and their readers are not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cowfs._typed import TYPE_CHECKING, NamedTuple, Protocol
from cowfs.store.key_lock import turn
from cowfs.store.reserve import FULL

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup

__all__ = ["Recoverer", "Recovery", "Unfinished"]


class Unfinished(Protocol):
    """A service whose verbs leave notes of their progress."""

    def recover(self) -> None:
        """Finish or undo the verbs in the notes."""

    def is_half_done(self, num: int) -> bool:
        """Whether a note names the active snapshot with this number."""


class Recoverer(NamedTuple):
    """The service for notes whose names begin with a prefix."""

    prefix: str
    service: Callable[[], Unfinished]


class Recovery:
    """Recovery of killed verbs."""

    def __init__(self, context: Context, lookup: Lookup, recoverers: tuple[Recoverer, ...]) -> None:
        self.context = context
        self._lookup = lookup
        self._recoverers = recoverers

    def _noted(self) -> Iterator[Unfinished]:
        names = os.listdir(self.context.root)
        for one in self._recoverers:
            if any(name.startswith(one.prefix) for name in names):
                yield one.service()

    def recover(self) -> None:
        """As :meth:`cowfs.Store.recover`."""
        if self.context.index.refused:
            return
        for service in self._noted():
            service.recover()

    def recover_with_room(self, key: str | None = None) -> None:
        """As :meth:`cowfs.Store.recover_with_room`."""
        try:
            self.recover()
        except OSError as error:
            if error.errno not in FULL or (key is not None and self.is_half_done(key)):
                raise

    def is_half_done(self, key: str) -> bool:
        """As :meth:`cowfs.Store.is_half_done`."""
        num = self._lookup.keyed(key).num
        return any(service.is_half_done(num) for service in self._noted())

    @contextmanager
    def turn(self, key: str) -> Iterator[None]:
        """Keep other live verbs from a key for the block, after recovery of any killed one."""
        with turn(self.context.root, key):
            self.recover()
            yield
