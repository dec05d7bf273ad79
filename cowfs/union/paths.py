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
from typing import IO, TYPE_CHECKING, Any

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
    """Path-level calls on a :class:`~cowfs.union.view.View`; errors are OSError, as in ``os``.

    Made objects belong to ``uid`` and ``gid`` (default: this process's).
    """

    def __init__(self, view: View, *, uid: int | None = None, gid: int | None = None) -> None:
        self.view = view
        self.uid = os.geteuid() if uid is None else uid
        self.gid = os.getegid() if gid is None else gid

    # -- finding ------------------------------------------------------------------------------

    def node(self, path: Path) -> Node:
        """The node of a path. Raises ENOENT, ENOTDIR."""
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
        """Whether there is something at ``path``."""
        try:
            self.node(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def stat(self, path: Path) -> Attr:
        """Attributes (of a link itself)."""
        return unpack(self.view.attr(self.node(path)))

    def listdir(self, path: Path = b"") -> list[bytes]:
        """Names in a directory, sorted."""
        directory = _as_dir(self.node(path))
        return sorted(name for name, _ in self.view.listing(directory) if name not in (b".", b".."))

    def walk(self, path: Path = b"") -> Iterator[tuple[bytes, Attr]]:
        """(path, attributes) of everything beneath, parents first, in sorted order."""
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
        """A file's content, or ``size`` bytes of it."""
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
        """Replace a file's content, making the file when there is none. Returns bytes written."""
        parent, name = self._split(path)
        node = self.view.child(parent, name)
        if node is None:
            node = self.view.mknod(parent, name, stat.S_IFREG | mode, 0, self.uid, self.gid)
        else:
            self.view.setattr(node, size=0)
        return self._write(node, 0, data)

    def write_at(self, path: Path, offset: int, data: bytes) -> int:
        """Overwrite a part of a file. Returns bytes written: fewer only at the limit."""
        return self._write(self.node(path), offset, data)

    def _write(self, node: Node, offset: int, data: bytes) -> int:
        done = 0
        while done < len(data):
            done += self.view.write(node, offset + done, memoryview(data)[done:])
        return done

    def truncate(self, path: Path, size: int) -> None:
        """Set a file's size."""
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
        """A file's bytes, opened in a mode of ``open`` without ``b`` and ``t``; errors as of :meth:`open`."""
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

        A file at ``path`` is replaced, directories are merged; its parent directory must be there. A link at the end of ``source``
        is copied itself. ``owners`` and errors: :func:`cowfs.union.transfer.copy`.
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
        """Copy a file, or a directory with all below it, to ``target`` on the host, in pieces; as :meth:`copy_in`."""
        from cowfs.union.transfer import DirTarget, copy, host_end

        top = b"/".join(_parts(path))
        with host_end(target) as (fd, name):
            return copy(PathsTarget(self), top, DirTarget(fd), name, owners=owners, progress=progress)

    def readlink(self, path: Path) -> bytes:
        """A symbolic link's target."""
        return self.view.readlink(self.node(path))

    # -- names --------------------------------------------------------------------------------

    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        """Make a directory."""
        parent, name = self._split(path)
        self.view.mkdir(parent, name, mode, self.uid, self.gid)

    def makedirs(self, path: Path, mode: int = 0o755) -> None:
        """Make a directory and its missing parents."""
        here = self.view.root
        for part in _parts(path):
            child = self.view.child(here, part)
            here = _as_dir(
                child if child is not None
                else self.view.mkdir(here, part, mode, self.uid, self.gid)
            )  # fmt: skip

    def mknod(self, path: Path, mode: int, rdev: int = 0) -> None:
        """Make a file of any type but directory and link."""
        parent, name = self._split(path)
        self.view.mknod(parent, name, mode, rdev, self.uid, self.gid)

    def symlink(self, target: Path, path: Path) -> None:
        """Make a symbolic link at ``path``."""
        parent, name = self._split(path)
        self.view.symlink(parent, name, os.fsencode(target), self.uid, self.gid)

    def link(self, old: Path, new: Path) -> None:
        """Make a hard link."""
        node = self.node(old)
        parent, name = self._split(new)
        self.view.link(node, parent, name)

    def rename(self, old: Path, new: Path, flags: int = 0) -> None:
        """Rename; ``flags`` as renameat2(2)."""
        parent, name = self._split(old)
        to, to_name = self._split(new)
        self.view.rename(parent, name, to, to_name, flags)

    def unlink(self, path: Path) -> None:
        """Remove anything but a directory."""
        parent, name = self._split(path)
        self.view.unlink(parent, name)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        parent, name = self._split(path)
        self.view.rmdir(parent, name)

    def rmtree(self, path: Path) -> None:
        """Remove a directory with everything in it."""
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
        """Set permission bits."""
        self.view.setattr(self.node(path), mode=mode)

    def chown(self, path: Path, uid: int, gid: int) -> None:
        """Set the owner; -1 leaves one alone."""
        self.view.setattr(self.node(path), uid=None if uid == -1 else uid, gid=None if gid == -1 else gid)

    def utime(self, path: Path, *, atime_ns: int | None = None, mtime_ns: int | None = None) -> None:
        """Set times, ns since 1970."""
        self.view.setattr(self.node(path), atime=atime_ns, mtime=mtime_ns)

    def getxattr(self, path: Path, name: Path) -> bytes:
        """The value of an extended attribute."""
        return self.view.getxattr(self.node(path), os.fsencode(name))

    def setxattr(self, path: Path, name: Path, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute."""
        self.view.setxattr(self.node(path), os.fsencode(name), value, flags)

    def listxattr(self, path: Path) -> list[bytes]:
        """The names of the extended attributes."""
        return self.view.listxattr(self.node(path))

    def removexattr(self, path: Path, name: Path) -> None:
        """Remove an extended attribute."""
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
