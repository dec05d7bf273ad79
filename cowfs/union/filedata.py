"""Where the data of a file is: the interface, and the two kinds that the view knows itself.

===========================  ==================================================================================
:class:`Plain`               in the file's own inode: any file but those below, and every other type of node
:class:`Lower`               in one file of a lower layer: what a metacopy stands for
``cowfs.row.file.RowFile``   in several files, block by block: a redirect file
===========================  ==================================================================================

The view asks a node's ``data`` (:class:`FileData`); it never asks for the class. A kind of one descriptor is read and
written through that (``pieced`` is false); a pieced kind answers ``pread`` and ``pwrite`` itself. Only data of the upper
layer is written: a file of any other kind is copied up, or redirected, before.

:class:`Redirects` is the other half: what a view asks of the implementation of redirect files as a whole. Which one that is
says :mod:`cowfs.union.redirecting`; a view without any treats every file as plain or lower.

Threads: the view's thread owns all of it; a job is run once, in any thread.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.union.layers import Layer, Source
    from cowfs.union.node import Node

__all__ = ["PLAIN", "FileData", "Lower", "Plain", "Redirects"]


def _unsupported() -> OSError:
    return OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class FileData(ABC):
    """The data of one file.

    Attributes:
        pieced: no single descriptor shows the data; it is read by :meth:`pread`.
        stays: the node keeps it for as long as it is in use, whatever is found under its name meanwhile.
    """

    __slots__ = ()

    pieced = False
    stays = False

    @property
    @abstractmethod
    def home(self) -> Layer | None:
        """The layer of the file that has the data; ``None`` for the layer of the node itself."""

    @property
    @abstractmethod
    def path(self) -> bytes | None:
        """The path in the merged lower tree that a metacopy's ``redirect`` says; ``None`` for what stands for itself."""

    @abstractmethod
    def place(self) -> tuple[Source, bytes] | None:
        """The file that has the data: its directory in a layer, its name; ``None`` where the node says it."""

    @abstractmethod
    def shown(self, st: os.stat_result) -> tuple[int, int]:
        """(size in bytes, blocks of 512) to show, given the node's own lstat."""

    @property
    def writable(self) -> bool:
        """Whether it is pieced data of the upper layer, which :meth:`pwrite` changes where it is."""
        return False

    # -- the life of a node -----------------------------------------------------------------------

    def bind(self, node: Node) -> None:  # noqa: B027 - most kinds have nothing to do here
        """The node whose data this is."""

    def close(self) -> None:  # noqa: B027 - most kinds have nothing to do here
        """The node goes, or its data is other data now: give back descriptors."""

    def rebase(self) -> None:  # noqa: B027 - most kinds have nothing to do here
        """The layers beneath are others now, with the same data."""

    def in_layers(self, layers: set[Layer]) -> bool:
        """Whether any of the data is in one of some layers."""
        return self.home in layers

    def found_at(self) -> object:
        """Equal for two of one kind that are found at the same place."""
        there = self.place()
        return None if there is None else (there[0].layer, there[0].path(), there[1])

    # -- pieced data ------------------------------------------------------------------------------

    def own_fd(self) -> int:
        """The descriptor of the file in the upper layer (do not close it). Pieced data only."""
        raise _unsupported()

    def pread(self, offset: int, buffer: memoryview, flags: int = 0) -> int:
        """Read into ``buffer``; fewer bytes only at the end. Pieced data only.

        Raises:
            OSError: EIO; EAGAIN with ``flags`` RWF_NOWAIT when the disk would be waited for.
        """
        raise _unsupported()

    def reader(self, offset: int, length: int) -> Callable[[memoryview], int] | None:
        """A read to be run once in any thread, while nobody writes; ``None``: by descriptor."""
        return None

    def stream(self, offset: int, length: int) -> Callable[[memoryview], int] | None:
        """:meth:`reader` for a read that goes on where the last one ended."""
        return None

    def lseek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE. Pieced data only. Raises ENXIO past the end."""
        raise _unsupported()

    def pwrite(self, offset: int, data: memoryview | bytes) -> int:
        """Write; short where the limit or the host's space ends. Writable data only. Raises ENOSPC, EFBIG."""
        raise _unsupported()

    def truncate(self, size: int) -> None:
        """Set the size. Writable data only."""
        raise _unsupported()

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). Writable data only."""
        raise _unsupported()

    def sync_job(self) -> Callable[[bool], None] | None:
        """fsync(2), to be run once in any thread (True: fdatasync(2) will do); ``None``: by descriptor."""
        return None


class Absorbing(ABC):
    """Data of the topmost lower layer on its way into the upper one, a piece between two requests."""

    @abstractmethod
    def step(self) -> bool:
        """One piece. True: go on; False: all is there."""

    @abstractmethod
    def sync_job(self) -> Callable[[bool], None] | None:
        """After the last piece: what is to be run, in any thread, before :meth:`finish`; ``None``: nothing is left to do."""

    @abstractmethod
    def finish(self) -> bool:
        """The data is on the disk. False: more was found to be missing, go on with :meth:`step`."""


class Plain(FileData):
    """The inode has its data itself. There is one, :data:`PLAIN`."""

    __slots__ = ()

    @property
    def home(self) -> None:
        return None

    @property
    def path(self) -> None:
        return None

    def place(self) -> None:
        return None

    def shown(self, st: os.stat_result) -> tuple[int, int]:
        return st.st_size, st.st_blocks


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


PLAIN: FileData = Plain()


class Redirects(ABC):
    """The redirect files of one view."""

    @abstractmethod
    def find(self, where: Source, name: bytes, data: FileData) -> FileData:
        """The data of a regular file of a layer: a redirect file's, also behind a metacopy; else ``data``, as it was found."""

    @abstractmethod
    def redirect(self, node: Node, keep: int | None = None, *, data: bool = True) -> bool:
        """Have a redirect file in the upper layer for a file that is about to change.

        Args:
            keep: how much of the data is still wanted, bytes.
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
        """What syncfs(2) adds here: every dirty file; to be run in any thread."""

    @abstractmethod
    def own_all(self, node: Node) -> bool:
        """Have all data of a file with pieced data in the upper layer, and make it a plain one. False where that takes a copy."""

    @abstractmethod
    def stands_on(self, node: Node, layer: Layer) -> bool:
        """Whether a node with pieced data of another layer needs what the topmost lower layer holds."""

    @abstractmethod
    def absorb(self, node: Node, layer: Layer, *, renames: bool) -> Absorbing:
        """Begin to bring up the pieced data that the topmost lower layer holds of a node.

        Args:
            renames: the layer renamed directories, so paths by which it refers to what is beneath hold no more.
        """

    @abstractmethod
    def forget(self, layer: Layer) -> None:
        """A layer has left the view."""

    @abstractmethod
    def trim_logs(self) -> None:
        """Close the maps opened longest ago, above their share. Only before a map is used."""

    @abstractmethod
    def give_back(self) -> None:
        """Close what can be opened again. Only between operations."""

    @abstractmethod
    def close(self) -> None:
        """Sync what is dirty, mark the maps, close everything."""
