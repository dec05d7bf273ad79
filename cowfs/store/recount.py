"""A new count of use that an earlier version counted by a smaller measure.

Only a driver that copies whole layers needs it: the copied use is subtracted from the layer's, so both must be by one
measure (:mod:`cowfs.union.measure`). The base of other active snapshots is a separate sum, and stays right.
"""

from __future__ import annotations

import os

from cowfs.driver.interface import Driver
from cowfs.index.database import Index
from cowfs.model import Kind, Usage

__all__ = ["MEASURE", "recount"]

MEASURE = "2"
"""The measure by which a store counts: its fact ``measure``. Stores of before 0.2 have none."""


def recount(index: Index, driver: Driver) -> None:
    """Count the copies of active snapshots again, once for each store. Its parents are walked."""
    if (
        not driver.capabilities.whole
        or index.meta("measure") is not None
        or os.statvfs(driver.root).f_flag & os.ST_RDONLY
    ):
        return
    active = [row for row in index.rows() if row.kind is Kind.ACTIVE and row.parent is not None and row.base != Usage()]
    found: dict[int, Usage] = {}
    for parent in {row.parent for row in active if row.parent is not None}:
        found[parent] = driver.usage(index.by_num(parent).id)
    if active:
        with index.write() as change:
            for row in active:
                assert row.parent is not None
                change.set_base(row.num, found[row.parent])
    index.set_meta("measure", MEASURE)
