"""Layers that came from an archive, and are exported as it.

A layer that came from an archive is exported as that archive, byte for byte: its headers are kept beside the layer
(``cowfs-headers``), and the row has the diff id. A row gets it only if nothing in the layer has changed since: no
ctime is later than the one of ``cowfs-applied``, which is the very file that was made then.
"""

from __future__ import annotations

from cowfs import archive, images
from cowfs._typed import TYPE_CHECKING, Protocol
from cowfs.index.database import Row
from cowfs.model import Kind
from cowfs.store.layers import marked_time, unmark
from cowfs.sys.regular import open_regular, read_small

if TYPE_CHECKING:
    from cowfs.driver.interface import Driver
    from cowfs.index import scan
    from cowfs.index.database import Index
    from cowfs.store.context import Context

__all__ = ["APPLIED", "HEADERS", "Archived", "HasLayers", "forget", "present"]

HEADERS = "cowfs-headers"
APPLIED = "cowfs-applied"


class HasLayers(Protocol):
    """An open store, or its context."""

    index: Index

    @property
    def driver(self) -> Driver: ...


class Archived:
    """The archive of a layer."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def archive_of(self, row: Row, scanned: scan.Scanned) -> tuple[str | None, str | None]:
        """(diff id, chain id) of a layer that is exactly one archive's."""
        path = f"{self.context.driver.directory(row.id)}/{APPLIED}"
        mark = marked_time(self.context.driver, path)
        if mark is None or scanned.latest >= mark:
            forget(self.context.driver.directory(row.id))
            return None, None
        diff_id = read_small(path).decode("ascii").strip()
        return diff_id, self.chain_id(row.parent, diff_id)

    def chain_id(self, parent: int | None, diff_id: str) -> str | None:
        """The chain id of a layer over a snapshot; None if the snapshot has none (OCI image-spec, "Layer ChainID")."""
        if parent is None:
            return diff_id
        above = self.context.index.by_num(parent).chain_id
        return None if above is None else images.digest_of(f"{above} {diff_id}".encode())

    def is_archived(self, row: Row) -> bool:
        """Whether a layer is exported as the archive that it came from."""
        if row.kind is not Kind.COMMITTED or row.diff_id is None:
            return False
        try:
            with open(open_regular(f"{self.context.driver.directory(row.id)}/{HEADERS}"), "rb") as log:
                return bool(archive.read_trailer(log).get("complete"))
        except FileNotFoundError:
            return False


def forget(directory: str) -> None:
    """Drop the records of a layer that is no longer one archive's."""
    for name in (APPLIED, HEADERS):
        unmark(f"{directory}/{name}")


def present(store: HasLayers, parent: Row | None, chain_id: str, diff_id: str | None, owners: str) -> Row | None:
    """A snapshot with this layer, by this policy of owners, on the disk.

    After a squash other snapshots may still have its chain id.
    """
    from cowfs.store.owners import policy_of

    driver = store.driver
    for row in store.index.by_chain(chain_id, None if parent is None else parent.num):
        if row.diff_id == diff_id and policy_of(driver.directory(row.id)) == owners and not driver.check(row.id):
            return row
    return None
