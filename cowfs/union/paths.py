"""The view by paths: a program's access to a merged tree without mounting it.

Paths are ``str`` or ``bytes``, relative to the root of the tree (a leading slash is allowed).
Symbolic links are never followed: a link is an object of the tree, not a way through it.

>>> import tempfile
>>> from cowfs.union import View
>>> base = tempfile.mkdtemp()
>>> tree = Paths(View([base], tempfile.mkdtemp(dir=base + "/.."), tempfile.mkdtemp(dir=base + "/..")))
>>> tree.makedirs("etc/app")
>>> tree.write_bytes("etc/app/conf", b"x = 1")
5
>>> tree.read_bytes("etc/app/conf"), tree.listdir("etc")
(b'x = 1', [b'app'])
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator

from cowfs._typed import IO, TYPE_CHECKING, Any
from cowfs.union.attr import Attr, unpack
from cowfs.union.content import data_ranges
from cowfs.union.node import Dir, Node
from cowfs.union.tree import CHUNK, DirTree, LowerStat
from cowfs.union.view import View

if TYPE_CHECKING:
    from cowfs.union.transfer import Copied

Path = str | bytes


def find(view: View, path: bytes) -> Node | None:
    """The node at a path of names, without following links; ``None`` when there is none. Raises OSError of the layers."""
    here: Node | None = view.root
    for part in path.split(b"/") if path else ():
        if not isinstance(here, Dir):
            return None
        here = view.child(here, part)
    return here


class Paths:
    """Path-level calls on a :class:`~cowfs.union.view.View`, by the names of ``os``.

    A path names an object of the merged tree; links are never followed. Every call may raise OSError with the errno of the
    system call of its name: ENOENT, ENOTDIR and ENAMETOOLONG for the path, EIO for a damaged layer, and, if it changes the tree,
    EROFS (a read-only view) and ENOSPC (the limit, or the host). Times are nanoseconds since 1970, sizes and offsets bytes.

    Args:
        view: the view; it stays the caller's, and so does its thread.
        uid, gid: the owner of new objects; default: this process's.
    """

    def __init__(self, view: View, *, uid: int | None = None, gid: int | None = None) -> None:
        self.view = view
        self.uid = os.geteuid() if uid is None else uid
        self.gid = os.getegid() if gid is None else gid

    # -- finding ------------------------------------------------------------------------------

    def node(self, path: Path) -> Node:
        """The node of ``path`` (:class:`cowfs.union.Node`). Raises OSError: ENOENT, ENOTDIR."""
        here: Node = self.view.root
        for part in _parts(path):
            here = self.view.lookup(_as_dir(here), part)
        return here

    def _split(self, path: Path) -> tuple[Dir, bytes]:
        parts = _parts(path)
        if not parts:
            raise OSError(errno.EINVAL, "the root has no name", os.fspath(path))
        here: Node = self.view.root
        for part in parts[:-1]:
            here = self.view.lookup(_as_dir(here), part)
        return _as_dir(here), parts[-1]

    def exists(self, path: Path) -> bool:
        """Whether there is an object at ``path``. Raises OSError for other failures than ENOENT and ENOTDIR."""
        try:
            self.node(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def stat(self, path: Path) -> Attr:
        """The attributes (:class:`cowfs.union.Attr`) of the object at ``path``, as lstat(2). Raises OSError: ENOENT."""
        return unpack(self.view.attr(self.node(path)))

    def listdir(self, path: Path = b"") -> list[bytes]:
        """The names in the directory ``path``, sorted, without ``.`` and ``..``. Raises OSError: ENOTDIR."""
        directory = _as_dir(self.node(path))
        return sorted(name for name, _ in self.view.listing(directory) if name not in (b".", b".."))

    def walk(self, path: Path = b"") -> Iterator[tuple[bytes, Attr]]:
        """(path, attributes) of every object below ``path``, parents first, names in sorted order.

        Changes during the walk may be visible or not. Raises OSError: ENOTDIR, and ENOENT for an object removed meanwhile.
        """
        start = b"/".join(_parts(path))
        pending = [(start, iter(self.listdir(start)))]
        while pending:
            above, names = pending[-1]
            name = next(names, None)
            if name is None:
                pending.pop()
                continue
            inner = above + b"/" + name if above else name
            attr = self.stat(inner)
            yield inner, attr
            if stat.S_ISDIR(attr.mode):
                pending.append((inner, iter(self.listdir(inner))))

    # -- contents -----------------------------------------------------------------------------

    def read_bytes(self, path: Path, offset: int = 0, size: int | None = None) -> bytes:
        """The content of a regular file.

        Args:
            path: the file.
            offset: the first byte.
            size: bytes to read; None: to the end. Fewer are returned only at the end.

        Raises:
            OSError: EISDIR or EINVAL for any other type.
        """
        node = self.node(path)
        if size is None:
            size = max(0, self.view.size(node) - offset)
        buffer = bytearray(size)
        done = 0
        while done < size:
            count = self.view.pread(node, offset + done, memoryview(buffer)[done:])
            if count == 0:
                break
            done += count
        return bytes(buffer[:done])

    def write_bytes(self, path: Path, data: bytes, *, mode: int = 0o644) -> int:
        """Replace the content of a regular file, which is made if missing.

        Args:
            path: the file; its directory must exist.
            data: the new content.
            mode: permission bits of a new file, without a umask.

        Returns:
            The number of bytes written; fewer than ``data`` has only where the limit ends.

        Raises:
            OSError: ENOSPC if not even one byte fits; EISDIR.
        """
        parent, name = self._split(path)
        node = self.view.child(parent, name)
        if node is None:
            node = self.view.mknod(parent, name, stat.S_IFREG | mode, 0, self.uid, self.gid)
        else:
            self.view.setattr(node, size=0)
        return self._write(node, 0, data)

    def write_at(self, path: Path, offset: int, data: bytes) -> int:
        """Overwrite a part of a regular file, or extend it.

        Args:
            path: the file, which must exist.
            offset: the place of the first byte of ``data``; a gap behind the end is a hole.

        Returns:
            The number of bytes written; fewer than ``data`` has only where the limit ends.

        Raises:
            OSError: ENOSPC if not even one byte fits; EISDIR.
        """
        return self._write(self.node(path), offset, data)

    def _write(self, node: Node, offset: int, data: bytes) -> int:
        done = 0
        while done < len(data):
            done += self.view.write(node, offset + done, memoryview(data)[done:])
        return done

    def truncate(self, path: Path, size: int) -> None:
        """Set the size, in bytes, of the file ``path``; a longer file ends in a hole. Raises OSError: EISDIR, EFBIG, ENOSPC."""
        self.view.setattr(self.node(path), size=size)

    def open(
        self,
        path: Path,
        mode: str = "rb",
        *,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        permissions: int = 0o644,
    ) -> IO[Any]:
        """A file object over a file of the tree, which is read and written in pieces.

        Args:
            path: the file; its directory must exist.
            mode, buffering, encoding, errors, newline: as for the built-in ``open``, but that the default is ``rb``, and UTF-8 in text.
            permissions: of a file that is made.

        Raises:
            OSError: ENOENT, EEXIST (mode ``x``), EISDIR, EROFS, ENOSPC, and EINVAL for what is not a regular file.
            ValueError: not a mode.
        """
        from cowfs.union.path_file import PathFile, wrap

        name = os.fsdecode(path)
        return wrap(
            lambda kind: PathFile(self.opened(path, kind, permissions), kind, name),
            mode, buffering, encoding, errors, newline,
        )  # fmt: skip

    def opened(self, path: Path, mode: str, permissions: int = 0o644) -> NodeData:
        """The bytes of the file ``path``, opened in a ``mode`` of ``open`` without ``b`` and ``t``; a new file gets ``permissions``.

        Raises OSError as :meth:`open`.
        """
        return NodeData(self.view, self._opened(path, mode, permissions))

    def _opened(self, path: Path, mode: str, permissions: int) -> Node:
        parent, name = self._split(path)
        node = self.view.child(parent, name)
        if node is None:
            if "r" in mode:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
            return self.view.mknod(parent, name, stat.S_IFREG | permissions, 0, self.uid, self.gid)
        if "x" in mode:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
        kind = stat.S_IFMT(unpack(self.view.attr(node)).mode)
        if kind != stat.S_IFREG:
            number = errno.EISDIR if kind == stat.S_IFDIR else errno.ELOOP if kind == stat.S_IFLNK else errno.EINVAL
            raise OSError(number, os.strerror(number), os.fspath(path))
        if "w" in mode:
            self.view.setattr(node, size=0)
        return node

    def copy_in(
        self,
        source: str | os.PathLike[str],
        path: Path,
        *,
        owners: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Copied:
        """Copy a file, or a directory with all below it, from the host to ``path``, in pieces.

        A file at ``path`` is replaced, directories are merged.

        Args:
            source: a path of the host; a link at its end is copied itself.
            path: the destination; its parent directory must exist.
            owners: keep owners, set-id bits and all xattrs; without, the copy belongs to ``uid`` and ``gid``.
            progress: called with (bytes, objects) so far.

        Returns:
            The amount copied.

        Raises:
            OSError: of either side; a file that could not be written to its end is removed, files copied before it stay.
        """
        from cowfs.union.transfer import copy, host_end

        where = b"/".join(_parts(path))
        with host_end(source) as (fd, name):
            return copy(DirTree(fd), name, PathsTarget(self), where, owners=owners, progress=progress)

    def copy_out(
        self,
        path: Path,
        target: str | os.PathLike[str],
        *,
        owners: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Copied:
        """Copy a file, or a directory with all below it, from ``path`` to the host, in pieces; otherwise as :meth:`copy_in`.

        Args:
            path: the object to copy; a link at its end is copied itself.
            target: a path of the host; its parent directory must exist.
            owners: keep owners, set-id bits and all xattrs; without, the copy belongs to this process's user.
            progress: called with (bytes, objects) so far.

        Returns:
            The amount copied.

        Raises:
            OSError: of either side; the error's file name says which.
        """
        from cowfs.union.transfer import DirTarget, copy, host_end

        top = b"/".join(_parts(path))
        with host_end(target) as (fd, name):
            return copy(PathsTarget(self), top, DirTarget(fd), name, owners=owners, progress=progress)

    def readlink(self, path: Path) -> bytes:
        """The target of the symbolic link ``path``. Raises OSError: EINVAL for any other type."""
        return self.view.readlink(self.node(path))

    # -- names --------------------------------------------------------------------------------

    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        """Make the directory ``path`` with the permission bits ``mode``, without a umask. Raises OSError: EEXIST, ENOSPC."""
        parent, name = self._split(path)
        self.view.mkdir(parent, name, mode, self.uid, self.gid)

    def makedirs(self, path: Path, mode: int = 0o755) -> None:
        """Make the directory ``path`` and its missing parents, all with the bits ``mode``. An existing directory is no error. Raises OSError: ENOTDIR, ENOSPC."""
        here = self.view.root
        for part in _parts(path):
            child = self.view.child(here, part)
            here = _as_dir(
                child if child is not None
                else self.view.mkdir(here, part, mode, self.uid, self.gid)
            )  # fmt: skip

    def mknod(self, path: Path, mode: int, rdev: int = 0) -> None:
        """Make a regular file, FIFO, socket or device at ``path``.

        Args:
            path: a free name.
            mode: the type (``stat.S_IFREG`` and so on) and permission bits.
            rdev: of a device, as :func:`os.makedev` gives it.

        Raises:
            OSError: EEXIST, ENOSPC; EPERM for character device 0/0, which is a whiteout.
        """
        parent, name = self._split(path)
        self.view.mknod(parent, name, mode, rdev, self.uid, self.gid)

    def symlink(self, target: Path, path: Path) -> None:
        """Make a symbolic link to ``target`` at ``path``. Raises OSError: EEXIST, ENOSPC."""
        parent, name = self._split(path)
        self.view.symlink(parent, name, os.fsencode(target), self.uid, self.gid)

    def link(self, old: Path, new: Path) -> None:
        """Give the file ``old`` one more name, ``new``. Raises OSError: EEXIST, EPERM for a directory, EMLINK, ENOSPC."""
        node = self.node(old)
        parent, name = self._split(new)
        self.view.link(node, parent, name)

    def rename(self, old: Path, new: Path, flags: int = 0) -> None:
        """Rename ``old`` to ``new``, in place of an object there.

        Args:
            flags: of renameat2(2): 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2).

        Raises:
            OSError: as renameat2(2); EXDEV only for a directory whose marks the host has no room for.
        """
        parent, name = self._split(old)
        to, to_name = self._split(new)
        self.view.rename(parent, name, to, to_name, flags)

    def unlink(self, path: Path) -> None:
        """Remove the name ``path`` of any object but a directory. Raises OSError: EISDIR, ENOSPC for a whiteout past the limit."""
        parent, name = self._split(path)
        self.view.unlink(parent, name)

    def rmdir(self, path: Path) -> None:
        """Remove the empty directory ``path``. Raises OSError: ENOTEMPTY, ENOTDIR."""
        parent, name = self._split(path)
        self.view.rmdir(parent, name)

    def rmtree(self, path: Path) -> None:
        """Remove the directory ``path`` with all below it, deepest first. After an error the rest stays. Raises OSError: ENOTDIR."""
        directories = [b"/".join(_parts(path))]
        for above in directories:  # the list grows meanwhile
            for name in self.listdir(above):
                inner = above + b"/" + name if above else name
                if stat.S_ISDIR(self.stat(inner).mode):
                    directories.append(inner)
                else:
                    self.unlink(inner)
        for directory in reversed(directories):
            self.rmdir(directory)

    # -- attributes ---------------------------------------------------------------------------

    def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits of ``path`` to ``mode``. Raises OSError: EOPNOTSUPP for a symbolic link."""
        self.view.setattr(self.node(path), mode=mode)

    def chown(self, path: Path, uid: int, gid: int) -> None:
        """Set owner and group of ``path``; -1 for ``uid`` or ``gid`` leaves that one alone. Raises OSError: EOVERFLOW for an id outside the maps."""
        self.view.setattr(self.node(path), uid=None if uid == -1 else uid, gid=None if gid == -1 else gid)

    def utime(self, path: Path, *, atime_ns: int | None = None, mtime_ns: int | None = None) -> None:
        """Set the times of ``path``: ``atime_ns`` and ``mtime_ns`` are nanoseconds since 1970; None leaves one alone. Raises OSError."""
        self.view.setattr(self.node(path), atime=atime_ns, mtime=mtime_ns)

    def getxattr(self, path: Path, name: Path) -> bytes:
        """The value of the extended attribute ``name`` (with its namespace) of ``path``. Raises OSError: ENODATA, EOPNOTSUPP."""
        return self.view.getxattr(self.node(path), os.fsencode(name))

    def setxattr(self, path: Path, name: Path, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute of ``path``.

        Args:
            name: with its namespace, as ``user.mime``.
            value: at most 64 KiB.
            flags: 0, ``os.XATTR_CREATE`` or ``os.XATTR_REPLACE``.

        Raises:
            OSError: EEXIST, ENODATA by the flags; ENOSPC, EOPNOTSUPP, EPERM.
        """
        self.view.setxattr(self.node(path), os.fsencode(name), value, flags)

    def listxattr(self, path: Path) -> list[bytes]:
        """The names of the extended attributes of ``path``, without the overlay's own. Raises OSError."""
        return self.view.listxattr(self.node(path))

    def removexattr(self, path: Path, name: Path) -> None:
        """Remove the extended attribute ``name`` of ``path``. Raises OSError: ENODATA, EOPNOTSUPP."""
        self.view.removexattr(self.node(path), os.fsencode(name))


class NodeData:
    """The bytes of a node that is open (:class:`cowfs.union.path_file.Data`)."""

    def __init__(self, view: View, node: Node) -> None:
        self._view, self._node = view, node

    def size(self) -> int:
        return self._view.size(self._node)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return self._view.pread(self._node, offset, buffer)

    def write(self, offset: int, data: memoryview) -> int:
        return self._view.write(self._node, offset, data)

    def truncate(self, size: int) -> None:
        self._view.setattr(self._node, size=size)

    def close(self) -> None:
        """Nothing to close: the node stays, and the view closes its descriptors by itself."""


class PathsTarget:
    """A :class:`~cowfs.union.transfer.Target` that is a view, by its :class:`Paths`. Threads: the view's owner."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def stat(self, path: bytes) -> LowerStat | None:
        try:
            attr = unpack(self._paths.view.attr(self._paths.node(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return LowerStat(
            mode=attr.mode, uid=attr.uid, gid=attr.gid, size=attr.size, mtime=attr.mtime_ns, rdev=attr.rdev,
            nlink=attr.nlink, ident=attr.ino,
        )  # fmt: skip

    def names(self, path: bytes) -> list[bytes]:
        return self._paths.listdir(path)

    def readlink(self, path: bytes) -> bytes:
        return self._paths.readlink(path)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        return {name: self._paths.getxattr(path, name) for name in self._paths.listxattr(path)}

    def read(self, path: bytes) -> Iterator[bytes]:
        with self._paths.open(path, buffering=0) as file:
            while piece := file.read(CHUNK):
                yield piece

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        view, node = self._paths.view, self._paths.node(path)
        for start, end in data_ranges(view, node):
            while start < end:
                buffer = bytearray(min(CHUNK, end - start))
                count = view.pread(node, start, memoryview(buffer))
                if not count:
                    break
                yield start, bytes(buffer[:count])
                start += count

    def opened(self, path: bytes, mode: str) -> NodeData:
        """A file's bytes (:meth:`Paths.opened`)."""
        return self._paths.opened(path, mode)

    def remove(self, path: bytes) -> None:
        if stat.S_ISDIR(self._paths.stat(path).mode):
            self._paths.rmtree(path)
        else:
            self._paths.unlink(path)

    def mkdir(self, path: bytes) -> None:
        self._paths.mkdir(path, 0o700)

    def write(self, path: bytes, size: int, data: Iterable[tuple[int, bytes]]) -> None:
        self._paths.mknod(path, stat.S_IFREG | 0o600)
        try:
            for offset, piece in data:
                self._paths.write_at(path, offset, piece)
            if self._paths.stat(path).size != size:
                self._paths.truncate(path, size)
        except BaseException:
            self._paths.unlink(path)
            raise

    def symlink(self, path: bytes, target: bytes) -> None:
        self._paths.symlink(target, path)

    def link(self, old: bytes, new: bytes) -> None:
        self._paths.link(old, new)

    def mknod(self, path: bytes, mode: int, rdev: int) -> None:
        self._paths.mknod(path, stat.S_IFMT(mode) | 0o600, rdev)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        self._paths.chown(path, uid, gid)

    def chmod(self, path: bytes, mode: int) -> None:
        self._paths.chmod(path, mode)

    def setxattr(self, path: bytes, name: bytes, value: bytes) -> None:
        self._paths.setxattr(path, name, value)

    def utime(self, path: bytes, mtime: int) -> None:
        self._paths.utime(path, mtime_ns=mtime)


def _parts(path: Path) -> list[bytes]:
    parts = [part for part in os.fsencode(path).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise OSError(errno.EINVAL, "a path may not hold '..'", os.fspath(path))
    return parts


def _as_dir(node: Node) -> Dir:
    if not isinstance(node, Dir):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), node.name)
    return node
