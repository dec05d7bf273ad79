"""The totals of a store, from its records alone."""

from __future__ import annotations

import os

from cowfs._record import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cowfs.index.database import Index
    from cowfs.model import Usage

__all__ = ["Totals", "sum_up"]


@record(frozen=True, slots=True, kw_only=True)
class Totals:
    """The totals of a store, from the records alone.

    Attributes:
        committed: usage of the committed layers. Of active ones only ``count`` is known without a walk; views hold nothing.
        reclaimable: usage of committed ones with neither tag nor child.
        count: snapshots by kind.
        host_bytes, host_free: size and free space of the host file system, bytes.
    """

    committed: Usage
    reclaimable: Usage
    count: dict[str, int]
    host_bytes: int
    host_free: int


def sum_up(root: str, index: Index) -> Totals:
    """The sums of a store.

    Raises:
        OSError: the store's directory is gone.
    """
    with index.read():
        count, used, free = index.counts(), index.used(), index.reclaimable()
    host = os.statvfs(root)
    return Totals(
        committed=used,
        reclaimable=free,
        count=count,
        host_bytes=host.f_blocks * host.f_frsize,
        host_free=host.f_bavail * host.f_frsize,
    )
