"""Files of snapshots by path, without any mount: reading, walking, copying in and out.

The ways to a snapshot's tree:

=======================================  =====================================================================================
the snapshot                             its files
=======================================  =====================================================================================
committed, or a view                     the index says where each is; its bytes come from the layer. Nothing is locked or made.
active, and mounted                      through that mount, so that its server counts, and what it has in memory is seen
active, and not mounted                  a view in this process (:meth:`cowfs.Store.paths`); in use like a mounted one meanwhile
active, not mounted, used by another     for reading only: its own layer is read, and then as a committed one
=======================================  =====================================================================================

Rule: links are followed as if the snapshot's root were the root directory, also through a mount: no path leads outside.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from cowfs import archive
from cowfs._typed import IO, TYPE_CHECKING, Any, BinaryIO
from cowfs.errors import FailedPrecondition, InvalidArgument
from cowfs.index.directory import Pending
from cowfs.model import TYPE_NAMES, FileInfo, Kind
from cowfs.store.content import IndexedTree
from cowfs.store.layers import LayerFile, kernel_mount_of
from cowfs.union.tree import DirTree, LowerStat, Tree, resolve

if TYPE_CHECKING:
    from cowfs.index.database import Row
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted
    from cowfs.store.mounts import Mounting
    from cowfs.store.reading import Reading
    from cowfs.store.scanning import Scanning
    from cowfs.union.path_file import Data
    from cowfs.union.transfer import Copied, Target

__all__ = ["Files"]

Progress = Callable[[int, int], object]


class Files:
    """Files by path."""

    def __init__(
        self,
        context: Context,
        reading: Reading,
        lookup: Lookup,
        scanning: Scanning,
        mounted: Mounted,
        mounting: Callable[[], Mounting],
    ) -> None:
        self.context = context
        self._reading = reading
        self._lookup = lookup
        self._scanning = scanning
        self._mounted = mounted
        self._mounting = mounting

    @contextmanager
    def tree(self, name: str) -> Iterator[Tree]:
        """As :meth:`cowfs.Store.tree`."""
        row = self._reading.resolve(name)
        if row.kind is not Kind.ACTIVE:
            yield self._indexed(row)
            return
        with ExitStack() as held:
            try:
                tree: Tree = held.enter_context(self._target(row))
            except FailedPrecondition:
                tree = self._indexed(row)
            yield tree

    def _indexed(self, row: Row) -> IndexedTree:
        pending = Pending(self.context.index)
        return self._scanning.content(self._scanning.tree(row, pending), pending)

    @contextmanager
    def _target(self, row: Row) -> Iterator[Target]:
        """The tree of an active snapshot to write.

        Raises:
            FailedPrecondition: it is not active, or another verb uses it.
        """
        from cowfs.union.paths import PathsTarget
        from cowfs.union.transfer import DirTarget

        self._lookup.active(row.name)
        with ExitStack() as held:
            root = self._mounted_root(row)
            if root is not None:
                held.callback(os.close, root)
                yield DirTarget(root)
            else:
                yield PathsTarget(held.enter_context(self._mounting().paths(row.name)))

    def _mounted_root(self, row: Row) -> int | None:
        """A descriptor of the root of an active snapshot's mount, in whichever mount namespace; None if it is not mounted."""
        from cowfs.mounting import protocol

        told = self._mounted.notice_of(row)
        places: list[str] = []
        device = ""
        if told is not None:
            places = [f"/proc/{told.pid}/root{told.mountpoint}", told.mountpoint]
            device = protocol.device_of(told.socket)
        elif (where := kernel_mount_of(self.context.driver.tree(row.id))) is not None:
            places = [where]
        for place in places:
            with suppress(OSError):
                fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                here = os.fstat(fd).st_dev
                if f"{os.major(here)}:{os.minor(here)}" == device:
                    return fd  # that mount, and not one over it
                if not device[2:].isdecimal() and here != os.stat("..", dir_fd=fd).st_dev:
                    return fd
                os.close(fd)
        if told is not None and os.path.exists(told.socket):
            raise FailedPrecondition(
                f"{row.name!r} is mounted at {told.mountpoint}, which this process cannot reach",
                remedy="run as root, or in the namespace of that mount",
            )
        return None

    def open_file(
        self,
        name: str,
        path: str | bytes,
        mode: str = "rb",
        *,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """As :meth:`cowfs.Store.open_file`."""
        from cowfs.union.path_file import PathFile, wrap

        def make(kind: str) -> PathFile:
            with ExitStack() as held:
                writes = kind != "r"
                tree = held.enter_context(self._target(self._lookup.keyed(name)) if writes else self.tree(name))
                found = resolve(tree, os.fsencode(path), last="x" not in kind)
                data = _data(tree, found, kind, os.fsdecode(path))
                return PathFile(data, kind, os.fsdecode(path), held=held.pop_all())

        return wrap(make, mode, buffering, encoding, errors, newline)

    def walk_files(self, name: str, path: str | bytes = b"", *, depth: int | None = None) -> Iterator[FileInfo]:
        """As :meth:`cowfs.Store.walk_files`."""
        with self.tree(name) as tree:
            top = resolve(tree, os.fsencode(path), last=False)
            todo = [(top, _stat(tree, top, path), 0)]
            while todo:
                here, st, level = todo.pop()
                yield _file_info(tree, here, st)
                if stat.S_ISDIR(st.mode) and (depth is None or level < depth):
                    below = []
                    for each in sorted(tree.names(here)):
                        inner = here + b"/" + each if here else each
                        found = tree.stat(inner)
                        if found is not None:
                            below.append((inner, found, level + 1))
                    todo += reversed(below)

    def stat_file(self, name: str, path: str | bytes, *, follow: bool = True) -> FileInfo:
        """As :meth:`cowfs.Store.stat_file`."""
        with self.tree(name) as tree:
            found = resolve(tree, os.fsencode(path), last=follow)
            return _file_info(tree, found, _stat(tree, found, path))

    def copy_out(
        self,
        name: str,
        path: str | bytes,
        target: str | os.PathLike[str],
        *,
        owners: bool = False,
        progress: Progress | None = None,
    ) -> Copied:
        """As :meth:`cowfs.Store.copy_out`."""
        from cowfs.union.transfer import DirTarget, copy, host_end

        with self.tree(name) as tree, host_end(target) as (fd, own):
            top = resolve(tree, os.fsencode(path), last=False)
            return copy(tree, top, DirTarget(fd), own, owners=owners, progress=progress)

    def copy_in(
        self,
        name: str,
        source: str | os.PathLike[str],
        path: str | bytes,
        *,
        owners: bool = False,
        progress: Progress | None = None,
    ) -> Copied:
        """As :meth:`cowfs.Store.copy_in`."""
        from cowfs.union.transfer import copy, host_end

        with self._target(self._lookup.keyed(name)) as target, host_end(source) as (fd, own):
            where = resolve(target, os.fsencode(path), last=False)
            return copy(DirTree(fd), own, target, where, owners=owners, progress=progress)

    def copy_between(
        self,
        name: str,
        path: str | bytes,
        key: str,
        target: str | bytes,
        *,
        owners: bool = True,
        progress: Progress | None = None,
    ) -> Copied:
        """As :meth:`cowfs.Store.copy_between`."""
        from cowfs.union.transfer import copy

        with ExitStack() as held:
            to = held.enter_context(self._target(self._lookup.keyed(key)))
            same = self._reading.resolve(name).name == key
            source: Tree = to if same else held.enter_context(self.tree(name))
            top = resolve(source, os.fsencode(path), last=False)
            where = resolve(to, os.fsencode(target), last=False)
            if same and (where == top or where.startswith(top + b"/") or not top):
                raise InvalidArgument(f"{os.fsdecode(path)} cannot be copied into itself")
            return copy(source, top, to, where, owners=owners, progress=progress)

    def copy_out_tar(self, name: str, path: str | bytes, out: BinaryIO, *, progress: Progress | None = None) -> None:
        """As :meth:`cowfs.Store.copy_out_tar`."""
        wanted = os.fsencode(path)
        with self.tree(name) as tree:
            contents = wanted.endswith(b"/.")
            top = resolve(tree, wanted, last=contents)
            _stat(tree, top, path)
            above = top if contents else top.rpartition(b"/")[0]
            archive.export_tree(_Below(tree, above), out, top=top[len(above) :].lstrip(b"/"), progress=progress)

    def copy_in_tar(
        self,
        key: str,
        stream: BinaryIO,
        path: str | bytes,
        *,
        owners: bool = True,
        progress: Progress | None = None,
    ) -> Copied:
        """As :meth:`cowfs.Store.copy_in_tar`."""
        from cowfs.archive.files import unpack_files

        with self._target(self._lookup.keyed(key)) as target:
            where = resolve(target, os.fsencode(path))
            if not stat.S_ISDIR(_stat(target, where, path).mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(path))
            return unpack_files(stream, target, where, owners=owners, progress=progress)

    @contextmanager
    def writable_tree(self, key: str) -> Iterator[Target]:
        """As :meth:`cowfs.Store.writable_tree`."""
        with self._target(self._lookup.keyed(key)) as target:
            yield target


class _Below:
    """A directory of a tree as a tree (:class:`cowfs.union.tree.Tree`)."""

    def __init__(self, tree: Tree, top: bytes) -> None:
        self._tree, self._prefix = tree, top + b"/" if top else b""

    def _at(self, path: bytes) -> bytes:
        return (self._prefix + path).rstrip(b"/")

    def stat(self, path: bytes) -> LowerStat | None:
        return self._tree.stat(self._at(path))

    def names(self, path: bytes) -> list[bytes]:
        return self._tree.names(self._at(path))

    def readlink(self, path: bytes) -> bytes:
        return self._tree.readlink(self._at(path))

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        return self._tree.xattrs(self._at(path))

    def read(self, path: bytes) -> Iterator[bytes]:
        return self._tree.read(self._at(path))

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        return self._tree.data(self._at(path))


def _stat(tree: Tree, path: bytes, asked: str | bytes) -> LowerStat:
    """The object at a canonical path. Raises FileNotFoundError with that path."""
    st = tree.stat(path)
    if st is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(asked))
    return st


def _file_info(tree: Tree, path: bytes, st: LowerStat) -> FileInfo:
    kind = TYPE_NAMES[stat.S_IFMT(st.mode)]
    return FileInfo(
        path=path,
        type=kind,
        mode=stat.S_IMODE(st.mode),
        uid=st.uid,
        gid=st.gid,
        size=st.size if kind == "file" else 0,
        mtime=st.mtime,
        rdev=st.rdev if kind in ("char", "block") else 0,
        nlink=st.nlink,
        file=st.ident,
        target=tree.readlink(path) if kind == "symlink" else b"",
    )


def _data(tree: Tree, path: bytes, kind: str, name: str) -> Data:
    """The bytes of the file at a canonical path, opened in a mode of ``open`` without ``b`` and ``t``."""
    from cowfs.union.path_file import FileData

    st = tree.stat(path)
    if st is not None and not stat.S_ISREG(st.mode):
        number = errno.EISDIR if stat.S_ISDIR(st.mode) else errno.EEXIST if "x" in kind else errno.EINVAL
        raise OSError(number, os.strerror(number), name)
    if st is None and "r" in kind:
        raise FileNotFoundError(2, os.strerror(2), name)
    if isinstance(tree, IndexedTree):
        return _LayerData(tree.open(path))
    if isinstance(tree, DirTree):
        return FileData(tree.opened(path, kind))
    from cowfs.union.paths import PathsTarget

    assert isinstance(tree, PathsTarget)
    return tree.opened(path, kind)


class _LayerData:
    """The bytes of a file in a layer (:class:`cowfs.union.path_file.Data`), for reading."""

    def __init__(self, file: LayerFile | None) -> None:
        self._file = file

    def size(self) -> int:
        return self._file.size if self._file is not None else 0

    def read_into(self, offset: int, buffer: memoryview) -> int:
        data = self._file.pread(len(buffer), offset) if self._file is not None else b""
        buffer[: len(data)] = data
        return len(data)

    def write(self, offset: int, data: memoryview) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def truncate(self, size: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
