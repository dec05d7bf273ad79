"""The options and results of apply and export."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from cowfs._record import record
from cowfs._typed import Literal
from cowfs.errors import LimitExceeded
from cowfs.union.tree import LowerStat, Tree

__all__ = ["FORM", "Applied", "ApplyOptions", "Budget", "Exported", "LowerStat", "Owners", "Tree"]

Owners = Literal["fail", "xattr", "ignore"]

FORM = 4
"""Counts up when an export gives other bytes than before for some tree: digests of older exports are not believed."""

# Where fuse-overlayfs and containers/storage keep the facts that a user may not give a file:
# "UID:GID:0MODE:TYPE", TYPE one of file, dir, symlink, pipe, socket, block-MAJ-MIN, char-MAJ-MIN.
OVERRIDE_XATTR = b"user.containers.override_stat"


@record(frozen=True, slots=True, kw_only=True)
class ApplyOptions:
    """Bounds for an archive from a stranger, and what to do without privilege.

    Attributes:
        max_bytes: of the uncompressed archive (of an image's layers together), and of other data that the host writes
            for it: directories that it does not list, files of lower layers that it links to. Default 64 GiB.
        max_entries: members, and directories for them that the archive does not list. Default 1,000,000.
        max_file: length of one file in bytes, holes included. Default 1 TiB.
        max_path: bytes of a name. max_depth: directories it may go down.
        max_header: bytes of one PAX header or long name.
        owners: what to do about owners, devices and privileged attributes that this process may
            not set: ``fail``; ``xattr``: record them in :data:`OVERRIDE_XATTR` (files and
            directories; a device or FIFO becomes an empty file that carries it; a symbolic link can carry nothing
            and loses its owner); ``ignore``: leave
            them out, and never keep a set-id bit without its owner.
        xattrs: restore extended attributes at all.
        whiteouts: names that begin with ``.wh.`` delete; in the tar of a whole tree they are names like any other.
    """

    max_bytes: int = 64 << 30
    max_entries: int = 1_000_000
    max_file: int = 1 << 40
    max_path: int = 4095
    max_depth: int = 512
    max_header: int = 1 << 20
    owners: Owners = "fail"
    xattrs: bool = True
    whiteouts: bool = True


class Budget:
    """The bytes that several archives together may still write on this host.

    Args:
        max_bytes: as in :class:`ApplyOptions`.

    Threads: any.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = self._left = max_bytes
        self._lock = threading.Lock()

    def spend(self, count: int) -> None:
        """Count bytes. Raises LimitExceeded."""
        with self._lock:
            self._left -= count
        if self._left < 0:
            raise LimitExceeded(f"it unpacks to more than {self._max_bytes} bytes", remedy="raise --max-size")


@record(frozen=True, slots=True, kw_only=True)
class Applied:
    """The figures of an applied archive.

    Attributes:
        diff_id: ``sha256:`` and the digest of the uncompressed archive. size: its bytes.
        blob_digest, blob_size: the same of the stream as received. compression: of the stream.
        entries: members read. whiteouts: names hidden, opaque directories among them. reserved: whiteout names that
            were taken literally (without ``ApplyOptions.whiteouts``). root: whether it has an entry for its root.
        dropped: extended attributes that were not restored, name to count: the overlay's own names, and those that this
            host or user cannot set (with ``owners`` other than ``fail``).
        skipped: members left out (devices without privilege under ``owners="ignore"``, aufs book-keeping).
        log_size: bytes of the header log that was written, 0 without one.
    """

    diff_id: str
    size: int
    blob_digest: str
    blob_size: int
    compression: str
    entries: int
    whiteouts: int
    dropped: Mapping[str, int]
    skipped: int
    log_size: int
    reserved: int = 0
    root: bool = False


@record(frozen=True, slots=True, kw_only=True)
class Exported:
    """The figures of an export.

    Attributes:
        diff_id, size: of the uncompressed tar. digest, blob_size: of the bytes written.
        entries: members, whiteouts included.
    """

    diff_id: str
    size: int
    digest: str
    blob_size: int
    entries: int
