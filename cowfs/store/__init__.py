"""The store of snapshots. :mod:`cowfs.store.services` is the map of its parts; :mod:`cowfs.store.staging` has the rules
for a kill.

:class:`Store` is imported on first use: a mount's server needs only :mod:`cowfs.mounting.index_view`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cowfs.store.store import Store

__all__ = ["Store"]


def __getattr__(name: str) -> object:
    if name == "Store":
        from cowfs.store.store import Store

        return Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
