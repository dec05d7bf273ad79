"""The store of snapshots. Start with :mod:`cowfs.store.core`; :mod:`cowfs.store.staging` says what survives a kill."""

from cowfs.store.store import Store

__all__ = ["Store"]
