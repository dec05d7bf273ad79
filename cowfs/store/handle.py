"""The handle that :meth:`cowfs.Store.mount` returns."""

from __future__ import annotations

from collections.abc import Mapping

from cowfs._typed import TYPE_CHECKING, Protocol
from cowfs.mounting.client import MountHandle

if TYPE_CHECKING:
    from cowfs.model import Info

__all__ = ["LiveHandle"]


class LiveStore(Protocol):
    """The interface of a mount's store for its handle; see :class:`cowfs.Store`."""

    def snapshot(self, key: str, name: str, *, labels: Mapping[str, str] | None = None) -> Info: ...

    def rollback(self, key: str, name: str, *, keep: str | None = None) -> Info: ...


class LiveHandle(MountHandle):
    """A mount of an active snapshot of a store: a :class:`cowfs.MountHandle` that can also make snapshots of itself.

    Attributes:
        key: the snapshot's key.
    """

    def __init__(self, handle: MountHandle, store: LiveStore, key: str) -> None:
        super().__init__(handle.mountpoint, handle.pid, handle.socket)
        self.key = key
        self._store = store

    def snapshot(self, name: str, *, labels: Mapping[str, str] | None = None) -> Info:
        """As :meth:`cowfs.Store.snapshot`."""
        return self._store.snapshot(self.key, name, labels=labels)

    def rollback(self, name: str, *, keep: str | None = None) -> Info:
        """As :meth:`cowfs.Store.rollback`."""
        return self._store.rollback(self.key, name, keep=keep)
