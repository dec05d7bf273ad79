"""Named points between the steps of a verb, where a test may kill the process.

Strategy: every verb is a short list of system calls, and between any two of them stands a
:func:`point`. In production it is one comparison. A test sets :data:`hook`, enumerates
:data:`POINTS`, and kills at each; a point that is not in the table is an error as soon as it is
passed, so that the enumeration stays complete.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["POINTS", "point"]

POINTS: dict[str, str] = {
    "create.made": "the new-* directory exists and is locked, and is empty",
    "create.filled": "the driver has filled new-*",
    "create.synced": "new-* is on the disk",
    "create.recorded": "the row is written, the transaction open",
    "create.renamed": "the directory has its final name, the transaction open",
    "create.committed": "the transaction is committed",
    "commit.frozen": "the driver has frozen the layer",
    "commit.scanned": "the records of the tree are made",
    "commit.synced": "the layer is on the disk",
    "commit.recorded": "records and row are written, the transaction open",
    "commit.committed": "the transaction is committed",
    "apply.unpacked": "the archive is in the layer, its digests are not",
    "apply.synced": "its digests are kept beside the layer",
    "remove.deleted": "the row is deleted, the transaction open",
    "remove.committed": "the transaction is committed, the directory still has its name",
    "remove.renamed": "the directory is called rm-*",
    "remove.emptied": "the directory is deleted",
    "switch.made": "live-* is complete, nothing has switched",
    "switch.done": "the mark is left and the server has switched, the index knows nothing",
    "switch.recorded": "the rows are written, the transaction open",
    "switch.renamed": "live-* has its final name, the transaction open",
    "switch.committed": "the transaction is committed, note and mark are still there",
    "settle.copied": "fs.new holds what the image of a limit engine does",
    "settle.exchanged": "the copy is the layer's tree, the image is still there",
    "settle.unlinked": "the image is gone, the tree of before is still there",
    "squash.absorbed": "an active child holds what the snapshot did, the index knows nothing",
    "squash.built": "the merged layer is in new-*, nothing is recorded",
    "squash.recorded": "the rows are written, the transaction open",
    "squash.renamed": "the merged layer has its final name, the transaction open",
    "squash.committed": "the transaction is committed, the old layers are still there",
    "squash.switched": "no mount uses the old layers, which are still there",
    "update.recorded": "the labels are written, the transaction open",
    "gc.swept": "unused records are deleted, the transaction open",
    "gc.committed": "the transaction is committed",
    "gc.renamed": "a directory that nothing records is called rm-*",
    "migrate.snapshot": "a snapshot is in the new store",
    "migrate.copied": "all snapshots are in the new store, which is beside the old one",
    "migrate.exchanged": "the new store is in the place of the old one, which is beside it",
    "migrate.carried": "what was not the old store's own is in the new one",
}
"""Every point, and what is true when it is passed."""

hook: Callable[[str], None] | None = None
"""Called with each point's name; only tests set it."""


def point(name: str) -> None:
    """Pass a fault point.

    Raises:
        KeyError: the point is not in :data:`POINTS`.
    """
    if hook is not None:
        POINTS[name]
        hook(name)
