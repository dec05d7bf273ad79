"""Putting a layer that was made upon nothing upon another one."""

from __future__ import annotations

import os
import stat

from cowfs._typed import TYPE_CHECKING
from cowfs.driver.roots import copy_root
from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.model import Info
from cowfs.store.layers import hold
from cowfs.store.snapshots import MAX_DEPTH
from cowfs.sys import xattr

if TYPE_CHECKING:
    from cowfs.index.database import Row
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup

__all__ = ["Rebasing"]


class Rebasing:
    """Layers that were unpacked apart from each other become a chain."""

    def __init__(self, context: Context, lookup: Lookup) -> None:
        self.context = context
        self._lookup = lookup

    def rebase(self, key: str, parent: str) -> Info:
        """As :meth:`cowfs.Store.rebase`."""
        context, lookup = self.context, self._lookup
        why = self.why_not()
        if why:
            raise Unsupported(f"no layer can be put upon another: {why}")
        row = lookup.active(key)
        with hold(context.driver, context.index, row, "rebase"):
            row, above = lookup.active(key, row.num), lookup.parent(parent)
            if row.parent is not None:
                raise FailedPrecondition(f"{key!r} stands on {row.parent_name!r} already")
            if above.depth + 1 >= MAX_DEPTH:
                raise InvalidArgument(
                    f"{parent!r} has {above.depth + 1} layers, {MAX_DEPTH} are allowed", remedy="cowfs squash"
                )
            if self._has_plain_root(row):
                copy_root(context.driver, above.id, row.id)
            with context.index.write() as change:
                row, above = lookup.active(key, row.num), lookup.parent(above.name, above.num)
                change.stand_on(row.num, (above.num, above.depth), base=row.base, shares_limit=row.shares_limit)
        return context.index.get(key).info()

    def _has_plain_root(self, row: Row) -> bool:
        """Whether the root of a layer has the owner, mode and attributes of an empty layer's."""
        driver = self.context.driver
        with driver.open_tree(row.id) as fd:
            root = os.fstat(fd)
            marks = {driver.form.origin, driver.form.impure, driver.form.opaque, driver.form.row}
            plain = (stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid) == (0o755, 0, 0)
            return plain and not xattr.read_all(fd, b"").keys() - marks

    def why_not(self) -> str:
        """As :meth:`cowfs.Store.why_not_rebase`."""
        driver = self.context.driver
        if driver.capabilities.whole:
            return f"the driver {driver.name} keeps whole trees"
        return f"the driver {driver.name} has another form of whiteouts" if driver.form.dotwh else ""
