"""The interface of the tree that a session serves.

:class:`cowfs.union.View` is one; the tests have another one in memory. Nodes are the tree's own objects: the session hands their
``id`` out, counts look-ups in ``nlookup`` and reads the attributes named at :class:`Tree`.

Threads: the session's loop makes every call, except :meth:`Stage.run` and the jobs marked for any thread.

Errors: OSError with the errno that the system call of that name documents, and :class:`cowfs.union.bound.Awaited`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from cowfs._typed import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cowfs.model import Limit

__all__ = ["Node", "Stage", "Tree"]

Node = Any
"""A node of a tree. The session reads

id, generation      what the kernel knows it by; never given again together
type                DT_* of readdir(3)
attr                the packed attributes, or None when :meth:`Tree.attr` must be asked
nlookup             how often the kernel was told the id; counted by the session
fd, wfd             an open descriptor of the data or -1, and whether it may be written
bare                true when it has no capability
"""


class Stage(Protocol):
    """A copy that has to be made before a node's data changes."""

    @property
    def small(self) -> bool:
        """Whether it is quick enough to be run at once."""

    def run(self) -> None:
        """Copy; any thread. Never raises: :meth:`Tree.publish` raises its error."""

    def fail(self, error: OSError) -> None:
        """Mark the copy as failed: :meth:`Tree.publish` will raise the error."""

    def cancel(self) -> None:
        """Cancel the copy; any thread."""


class Work(Protocol):
    """The work of a tree that costs time."""

    directories_read: int


class Tree(Protocol):
    """A file system to be served.

    Attributes:
        nodes: id -> node in use.
        root: the node of the root.
        readonly: every change is EROFS.
        limit: the bound in force.
        space: not None while the use is counted.
        form: its ``redirects`` says whether attributes change without a copy of the data.
        options: its ``noxattrs`` says that every xattr call is ENOTSUP.
        must_sync: whether writes must be durable at once.
        NOW: "the present time", for :meth:`setattr`.
    """

    @property
    def NOW(self) -> object: ...

    @property
    def nodes(self) -> dict[int, Any]: ...

    @property
    def root(self) -> Node: ...

    @property
    def readonly(self) -> bool: ...

    @property
    def limit(self) -> Limit | None: ...

    @property
    def space(self) -> object | None: ...

    @property
    def form(self) -> Any: ...

    @property
    def options(self) -> Any: ...

    @property
    def must_sync(self) -> bool: ...

    @property
    def work(self) -> Work: ...

    def wait_for_forgets(self, on: bool) -> None:
        """Tell the tree whether the session can wait for pending FORGETs."""

    def trim(self) -> None:
        """Close descriptors above the share; between requests."""

    def give_back(self) -> None:
        """Close every descriptor that can be opened again; between requests."""

    def statfs(self) -> os.statvfs_result: ...

    # -- names and nodes ----------------------------------------------------------------------------

    def node(self, id: int) -> Node:
        """The node of an id. Raises ESTALE."""

    def directory(self, id: int) -> Node:
        """The directory of an id. Raises ESTALE, ENOTDIR."""

    def lookup(self, parent: Node, name: bytes, /) -> Node: ...

    def child(self, parent: Node, name: bytes, /) -> Node | None: ...

    def parent(self, node: Node, /) -> Node: ...

    def forget(self, id: int, count: int, /) -> None: ...

    def revive(self, id: int) -> Node:
        """The node of a file handle, forgotten or not. Raises ESTALE."""

    def listing(self, directory: Node, cookie: int = 0, /) -> Iterator[tuple[bytes, int]]: ...

    def entry(self, directory: Node, name: bytes, /) -> tuple[int, int]: ...

    def mknod(self, parent: Node, name: bytes, mode: int, rdev: int, uid: int, gid: int, umask: int = 0, /) -> Node: ...

    def mkdir(self, parent: Node, name: bytes, mode: int, uid: int, gid: int, umask: int = 0, /) -> Node: ...

    def symlink(self, parent: Node, name: bytes, to: bytes, uid: int, gid: int, /) -> Node: ...

    def link(self, node: Node, parent: Node, name: bytes, /) -> Node: ...

    def tmpfile(self, parent: Node, mode: int, uid: int, gid: int, umask: int = 0, /) -> Node: ...

    def unlink(self, parent: Node, name: bytes, /) -> None: ...

    def rmdir(self, parent: Node, name: bytes, /) -> None: ...

    def rename(self, parent: Node, name: bytes, to: Node, to_name: bytes, flags: int = 0, /) -> Sequence[int]:
        """Returns the ids of other nodes whose attributes changed."""

    # -- attributes -----------------------------------------------------------------------------------

    def attr(self, node: Node, /) -> bytes: ...

    def setattr(
        self,
        node: Node,
        /,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime: object = None,
        mtime: object = None,
        kill: bool = False,
    ) -> None: ...

    def kill_privileges(self, node: Node, /) -> bool: ...

    def getxattr(self, node: Node, name: bytes, /) -> bytes: ...

    def listxattr(self, node: Node, /) -> list[bytes]: ...

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int = 0, /) -> None: ...

    def removexattr(self, node: Node, name: bytes, /) -> None: ...

    # -- data -----------------------------------------------------------------------------------------

    def readlink(self, node: Node, /) -> bytes: ...

    def pread(self, node: Node, offset: int, buffer: memoryview, flags: int = 0, /) -> int: ...

    def write(self, node: Node, offset: int, data: memoryview, kill: bool = False, /) -> int: ...

    def fallocate(self, node: Node, mode: int, offset: int, length: int, /) -> None: ...

    def lseek(self, node: Node, offset: int, whence: int, /) -> int: ...

    def copy_range(self, src: Node, soff: int, dst: Node, doff: int, length: int, /) -> int: ...

    def data_fd(self, node: Node, write: bool, /) -> int:
        """The node's own descriptor of its data (not to be closed). Raises EOPNOTSUPP if no single descriptor has the data."""

    def in_upper(self, node: Node, /) -> bool:
        """Whether the node's attributes can change without a copy."""

    def has_own_data(self, node: Node, /) -> bool:
        """Whether the node's data can change without a copy, through its descriptor."""

    def writable(self, node: Node, keep: int | None = None, /) -> Stage | None:
        """The copy that must be made before the data changes (``keep``: bytes that are still wanted), or None."""

    def publish(self, stage: Any, /) -> None:
        """Put a copy that was run in its place. Raises its error."""

    def reader(self, node: Node, offset: int, length: int, *, streams: bool) -> Callable[[memoryview], int] | None:
        """A read for any thread; None if :meth:`data_fd` suffices."""

    def fsync_fd(self, node: Node, /) -> int | None:
        """A new descriptor to fsync and close in any thread; None if there is nothing to sync."""

    def sync_job(self, node: Node, /) -> Callable[[bool], None] | None:
        """fsync(2) for any thread (True: fdatasync(2) will do), if a descriptor is not enough."""

    def sync_all_job(self) -> Callable[[], None] | None:
        """The part of syncfs(2) to be done before the host's, for any thread."""
