"""Live snapshots with a driver that copies a layer at one instant (``Capabilities.snapshots``), without a switch of layers.

The key goes on in its own layer, mounted or not; the copy becomes the committed snapshot beneath it. One transaction
gives the former record of the key to the copy, makes a new record for the key, and names the copy's directory, as
``prepare`` does for a new layer. So a kill leaves the state before, and a directory that the next sweep deletes, or the
state after.

The limit of the key counts the writes since prepare: its base stays.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.index.database import Row
from cowfs.index.transaction import Committed
from cowfs.model import Kind, Usage
from cowfs.store import layers
from cowfs.store.names import new_id
from cowfs.store.staging import staged
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.scanning import Scanning

__all__ = ["Instant"]


class Instant:
    """Live snapshots of layers that the driver copies."""

    def __init__(self, context: Context, lookup: Lookup, scanning: Scanning) -> None:
        self.context = context
        self._lookup = lookup
        self._scanning = scanning

    def snapshot(self, row: Row, name: str, labels: Mapping[str, str], server: dict[str, Any] | None) -> None:
        """Make the present content of an active snapshot a committed one.

        Args:
            server: the answer of the server that has it mounted; None if no server has.

        Raises:
            NameTaken, FailedPrecondition, OSError: nothing has changed.
        """
        driver, index = self.context.driver, self.context.index
        parent = index.by_num(row.parent) if row.parent is not None else None
        with ExitStack() as held:
            ask = None
            if server is not None:
                from cowfs.mounting import protocol

                ask = partial(protocol.ask, server["socket"], timeout=600.0)
            elif layers.kernel_mount_of(driver.tree(row.id)) is None:
                held.enter_context(layers.hold(driver, index, row, "snapshot"))
            copy = held.enter_context(staged(driver, index, new_id()))
            point("create.made")
            driver.snapshot(row.id, copy.staged, ask)
            point("create.filled")
            digests = f"{driver.directory(row.id)}/{layers.KEPT}"
            if os.path.exists(digests):  # by inode and ctime, which are the same in the copy
                import shutil

                shutil.copyfile(digests, f"{driver.directory(copy.staged)}/{layers.KEPT}")
            scanned = self._scanning.scan_at(
                copy.staged, row.num, parent, layers.KeptDigests.load(driver, copy.staged), self._scanning.copied(row)
            )
            if scanned.held is not None:
                driver.note(copy.staged, scanned.held, scanned.sums or ())
            point("create.synced")
            beneath = None if parent is None else (parent.num, parent.depth)
            now = Committed(usage=scanned.usage, root=scanned.root, records=scanned.pending.new)
            with index.write() as change:
                self._lookup.active(row.name, row.num)
                self._lookup.must_be_free(name)
                config, limit = index.config_of(row.num), index.by_num(row.num).limit
                change.stand_on(row.num, beneath, base=row.base, shares_limit=row.shares_limit, id=copy.id)
                change.commit_active(row.num, name, labels, now)
                change.add_snapshot(
                    id=row.id,
                    name=row.name,
                    kind=Kind.ACTIVE,
                    parent=(row.num, row.depth),
                    labels=row.labels,
                    limit=limit,
                    base=row.base,
                    shares_limit=True,
                    created=row.created,
                    config=config,
                )
                point("create.recorded")
                copy.publish()
                point("create.renamed")
        point("create.committed")

    def base_at(self, row: Row, ancestor: Row) -> tuple[Usage, bool]:
        """The base of a key after a rollback to an ancestor, and whether they share a limit.

        For a snapshot of the key itself, the use copied at prepare; else the whole use of the ancestor.
        """
        under = row
        for num, _ in self.context.index.chain(row.parent):
            if not under.shares_limit:
                break
            one = self.context.index.by_num(num)
            if num == ancestor.num:
                return row.base, True
            under = one
        return self.context.driver.held(ancestor.id), False
