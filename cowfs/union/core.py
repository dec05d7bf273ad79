"""The parts that the operations on a view share, and the calls between operations.

The modules of this package hold one concept each, as functions that take the view first. They are written against
:class:`Core`; :class:`cowfs.union.view.View` puts them together. So no module needs to know the module of another
operation, and none imports the view.

Each part keeps its own invariants, and only its own methods assign its attributes:

=======================  ======================================================================================
:mod:`stack`             the layers, the work directory, the index of the lowest layers
:mod:`table`             the nodes by id, their further names, ids that are spent
:mod:`moves`             directories that renames moved, files of a layer with several names
:mod:`openfiles`         the descriptors of file data
:mod:`quota`             the count and the limit
:mod:`filedata`          redirect files
=======================  ======================================================================================
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod

from cowfs._typed import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from cowfs.format.whiteout import Form
    from cowfs.sys.descriptors import Shares
    from cowfs.union.filedata import Redirects
    from cowfs.union.inodes import Inodes
    from cowfs.union.layers import Descriptors, Layer, Source
    from cowfs.union.moves import Moves
    from cowfs.union.node import Dir, Node
    from cowfs.union.openfiles import OpenFiles
    from cowfs.union.options import Options, TreeIndex
    from cowfs.union.owners import Owners
    from cowfs.union.quota import Space
    from cowfs.union.stack import LayerStack
    from cowfs.union.table import NodeTable
    from cowfs.union.work import Work
    from cowfs.union.workdir import WorkDir

__all__ = ["Core"]


class Core(ABC):
    """The parts of a view, and the operations that other operations need. Owner: the view's thread.

    Attributes:
        form: the xattrs of the layers.
        share: the number of descriptors of each use.
        nodes: the table's, id -> node in use.
        space: the count of the upper layer, while it is kept.
        rows: the redirect files, if there may be some.
        patient: whether the front end can wait for pending FORGETs (:class:`~cowfs.union.bound.Awaited`).
        monotonic: the host of the upper layer never gives an inode number twice.
        work: the costly work that the view did.
        limit_reached: called when the limit refuses a change.
        root_ino: the inode number shown for the root.
    """

    NOW: ClassVar[object]

    options: Options
    form: Form
    share: Shares
    descriptors: Descriptors
    open_files: OpenFiles
    stack: LayerStack
    table: NodeTable
    moves: Moves
    nodes: dict[int, Node]
    inodes: Inodes
    owners: Owners | None
    space: Space | None
    rows: Redirects | None
    root: Dir
    root_ino: int
    readonly: bool
    patient: bool
    work: Work
    limit_reached: Callable[[], None] | None
    monotonic: bool

    # -- the parts, for reading ---------------------------------------------------------------------

    @property
    def upper(self) -> Layer | None:
        """The layer that is written."""
        return self.stack.upper

    @property
    def layers(self) -> list[Layer]:
        """All layers, bottom first."""
        return self.stack.layers

    @property
    def workdir(self) -> WorkDir | None:
        """The work directory of the upper layer."""
        return self.stack.workdir

    @property
    def index(self) -> TreeIndex | None:
        """The merged tree of the lowest layers, if known."""
        return self.stack.index

    @property
    def indexed_layers(self) -> int:
        """The number of layers that the index covers."""
        return self.stack.indexed_layers

    @property
    def must_sync(self) -> bool:
        """Whether copies are synced before they are named: not on volatile mounts."""
        return not self.options.volatile

    def need_upper(self) -> Layer:
        """The upper layer, or EROFS."""
        upper = self.stack.upper
        if self.readonly or upper is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return upper

    def wait_for_forgets(self, on: bool) -> None:
        """Set whether the front end can wait for pending FORGETs."""
        self.patient = on

    def on_limit(self, tell: Callable[[], None] | None) -> None:
        """Call ``tell`` each time that the limit refuses a change, from now on."""
        self.limit_reached = tell

    def refuse_changes(self) -> None:
        """Make every change EROFS from now on, for good."""
        self.readonly = True

    def swap_space(self, space: Space | None) -> Space | None:
        """Count in ``space`` from now on (None: not at all). Returns the count before."""
        before, self.space = self.space, space
        return before

    # -- descriptors ----------------------------------------------------------------------------------

    @abstractmethod
    def open_data(self, node: Node) -> int: ...

    @abstractmethod
    def open_own(self, node: Node) -> int: ...

    @abstractmethod
    def data_fd(self, node: Node, write: bool) -> int: ...

    @abstractmethod
    def trim(self) -> None: ...

    @abstractmethod
    def uuid_at(self, fd: int) -> bytes: ...

    # -- names and nodes --------------------------------------------------------------------------------

    @abstractmethod
    def load(self, directory: Dir) -> dict[bytes, Node | int]: ...

    @abstractmethod
    def lookup(self, parent: Dir, name: bytes) -> Node: ...

    @abstractmethod
    def child(self, parent: Dir, name: bytes) -> Node | None: ...

    @abstractmethod
    def parent(self, node: Dir) -> Dir: ...

    @abstractmethod
    def node(self, id: int) -> Node: ...

    @abstractmethod
    def new_dir(self, parent: Dir, name: bytes, sources: list[Source], ino: int) -> Dir: ...

    @abstractmethod
    def pack_into(self, node: Node, st: os.stat_result, source: Source, name: bytes) -> None: ...

    @abstractmethod
    def entry(self, directory: Dir, name: bytes) -> tuple[int, int]: ...

    @abstractmethod
    def bind(self, parent: Dir, name: bytes, node: Node) -> None: ...

    @abstractmethod
    def unbind(self, parent: Dir, name: bytes, node: Node) -> bool: ...

    @abstractmethod
    def names_of(self, node: Node) -> list[tuple[Dir, bytes]]: ...

    @abstractmethod
    def upper_of(self, directory: Dir) -> Source | None: ...

    @abstractmethod
    def in_upper(self, node: Node) -> bool: ...

    @abstractmethod
    def is_nameless(self, node: Node) -> bool: ...

    @abstractmethod
    def path(self, node: Node) -> bytes: ...

    @abstractmethod
    def low_path(self, directory: Dir) -> bytes: ...

    @abstractmethod
    def low_child(self, parent: Dir, name: bytes) -> bytes: ...

    @abstractmethod
    def source_at(self, layer: Layer, path: bytes) -> Source: ...

    @abstractmethod
    def drop(self, node: Node) -> None: ...

    @abstractmethod
    def forget(self, id: int, count: int) -> None: ...

    # -- attributes ---------------------------------------------------------------------------------------

    @abstractmethod
    def attr(self, node: Node) -> bytes: ...

    @abstractmethod
    def size(self, node: Node) -> int: ...

    @abstractmethod
    def mode(self, node: Node) -> int: ...
