"""The options of a view: one frozen record, every field with a default."""

from __future__ import annotations

from collections.abc import Mapping

from cowfs._record import record
from cowfs._typed import Any, Protocol
from cowfs.model import Limit

IdRange = tuple[int, int, int]  # (inside the layers, shown outside, count)


class Entry(Protocol):
    """One name of a directory record, as a tree index gives it (see cowfs.index.directory)."""

    type: int  # DT_* of readdir(3)
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ino: int
    blocks: int
    rdev: int
    nlink: int
    xattrs: Mapping[bytes, bytes]
    layer: int  # the layer of the stack with the data, 0 at the bottom
    path: bytes | None  # path there, when it is not the merged path
    record: Any  # a directory's own record: opaque, but for ``path``, its path in the index's tree
    file: Any  # equal for all names of one file with several links


class TreeIndex(Protocol):
    """The interface of a known merged lower tree, which makes scans of its layers needless."""

    def root(self) -> Any:
        """The record of the root directory."""

    def entries(self, record: Any) -> Mapping[bytes, Entry]:
        """The names of a directory record."""


@record(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a :class:`~cowfs.union.view.View`.

    Attributes:
        form: ``auto``, ``trusted`` or ``user``: the xattr prefix of the layers.
        readonly: refuse every change with EROFS.
        volatile: sync nothing.
        limit: bound on the use of the upper layer.
        uid_map, gid_map: (id in the layers, id shown, count) ranges; empty is the identity.
        squash_uid, squash_gid: show this owner for everything and record none.
        override_xattr: keep owner and mode in this xattr instead of the inode
            (``user.containers.override_stat``).
        noxattrs: answer every xattr call with ENOTSUP.
        dotwh: names ``.wh.NAME`` in layers are whiteouts; in the upper they are turned into real ones, and none can be made.
        max_fds: the number of directory descriptors to keep.
        index: the merged lower tree, if known.
        row: block size in bytes: redirect writes of lower files instead of copying them up.
        drop_synced: drop a redirect file's own blocks from the host's page cache once they are synced: the reader caches them itself.
    """

    form: str = "auto"
    readonly: bool = False
    volatile: bool = False
    limit: Limit | None = None
    uid_map: tuple[IdRange, ...] = ()
    gid_map: tuple[IdRange, ...] = ()
    squash_uid: int | None = None
    squash_gid: int | None = None
    override_xattr: bytes | None = None
    noxattrs: bool = False
    dotwh: bool = False
    max_fds: int | None = None
    index: TreeIndex | None = None
    row: int | None = None
    drop_synced: bool = False
