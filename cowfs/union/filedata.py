"""File data outside of the file's own inode: the two halves of the interface to redirect files, and metacopies.

===========================  ==================================================================================
``Plain`` (:mod:`.node`)     in the file's own inode: any file but those below, and every other type of node
:class:`Lower`               in one file of a lower layer: what a metacopy stands for
``cowfs.row.file.RowFile``   in several files, block by block: a redirect file
===========================  ==================================================================================

:class:`Redirects` is the interface of the implementation of redirect files as a whole. The caller that assembles a view
hands it in (:mod:`cowfs.union.redirecting`); every file of a view without any is plain or lower.

Threads: the view's thread owns all of it; a job is run once, in any thread.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING
from cowfs.union.node import FileData

if TYPE_CHECKING:
    from cowfs.union.layers import Layer, Source
    from cowfs.union.node import Node

__all__ = ["Absorbing", "Lower", "Redirects"]


class Absorbing(ABC):
    """Data of the topmost lower layer on its way into the upper one, a piece between two requests."""

    @abstractmethod
    def step(self) -> bool:
        """Copy one piece. True: go on; False: all is copied."""

    @abstractmethod
    def sync_job(self) -> Callable[[bool], None] | None:
        """After the last piece: the job to run, in any thread, before :meth:`finish`; ``None`` if there is none."""

    @abstractmethod
    def finish(self) -> bool:
        """Finish, with the data on the disk. False: more is missing, go on with :meth:`step`."""


class Lower(FileData):
    """The data of a metacopy.

    Attributes:
        where, name: a regular file of a lower layer.
        size: bytes.
        blocks: st_blocks, 512-byte units.
    """

    __slots__ = ("_path", "blocks", "name", "size", "where")

    def __init__(self, where: Source, name: bytes, path: bytes, size: int, blocks: int) -> None:
        self.where = where
        self.name = name
        self._path = path
        self.size = size
        self.blocks = blocks

    @property
    def home(self) -> Layer:
        return self.where.layer

    @property
    def path(self) -> bytes:
        return self._path

    def place(self) -> tuple[Source, bytes]:
        return self.where, self.name

    def shown(self, st: os.stat_result) -> tuple[int, int]:
        return st.st_size, self.blocks

    def at(self, path: bytes) -> Lower:
        """The same data, found by another path of the merged lower tree."""
        return Lower(self.where, self.name, path, self.size, self.blocks)


class Redirects(ABC):
    """The redirect files of one view."""

    @abstractmethod
    def find(self, where: Source, name: bytes, data: FileData) -> FileData:
        """The data of a regular file of a layer: a redirect file's, also behind a metacopy; else ``data``, as it was found."""

    @abstractmethod
    def redirect(self, node: Node, keep: int | None = None, *, data: bool = True) -> bool:
        """Make a redirect file in the upper layer for a file that is about to change.

        Args:
            keep: the part of the data that is still wanted, bytes.
            data: the data will change; otherwise only attributes or names.

        Returns:
            ``False`` when an ordinary copy is as good: nothing is kept, or all of it is one block.

        Raises:
            OSError: EROFS, ENOSPC.
        """

    @abstractmethod
    def map_dir(self, layer: Layer) -> int:
        """The open directory of a layer's maps; for the upper layer it is made. Raises EIO when a marked layer has none."""

    @abstractmethod
    def sync_job(self) -> Callable[[], None]:
        """The part of syncfs(2) for redirect files: every dirty file; for any thread."""

    @abstractmethod
    def own_all(self, node: Node) -> bool:
        """Bring all data of a file with pieced data into the upper layer, and make it a plain one. False if that takes a copy."""

    @abstractmethod
    def stands_on(self, node: Node, layer: Layer) -> bool:
        """Whether a node with pieced data of another layer needs the topmost lower layer."""

    @abstractmethod
    def absorb(self, node: Node, layer: Layer, *, renames: bool) -> Absorbing:
        """Begin to bring up the pieced data that the topmost lower layer holds of a node.

        Args:
            renames: whether the layer renamed directories, so that its paths to lower objects are no longer valid.
        """

    @abstractmethod
    def forget(self, layer: Layer) -> None:
        """Forget a layer that has left the view."""

    @abstractmethod
    def trim_logs(self) -> None:
        """Close the maps opened longest ago, above their share. Only before a map is used."""

    @abstractmethod
    def give_back(self) -> None:
        """Close every descriptor that can be opened again. Only between operations."""

    @abstractmethod
    def close(self) -> None:
        """Sync dirty files, mark the maps, close everything."""
