"""Copying files in and out of a tree by path, without any mount.

Rules:

1. A source is a :class:`~cowfs.union.tree.Tree`; a :class:`Target` is one that can be written, too. So every pair
   works: a directory of the host, a view, a snapshot.
2. No link is followed, in the source or in the target: the caller has resolved both ends (:func:`cowfs.union.tree.resolve`).
3. Nothing is loaded whole: data goes in pieces, holes stay holes, and depth is a list and no recursion.
4. A file that could not be written to its end is removed again. Files copied before it stay.
5. Without ``owners`` new objects belong to their maker; then they get no set-id bit, and of the xattrs only ``user.*``,
since others would grant another user's rights.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from cowfs._typed import NamedTuple, Protocol
from cowfs.sys import trees, xattr
from cowfs.sys.files import open_beneath
from cowfs.union.tree import DirTree, LowerStat, Tree

__all__ = ["Copied", "DirTarget", "Target", "copy", "dress", "host_end"]


class Copied(NamedTuple):
    """The amount copied: objects, and bytes of data."""

    objects: int
    bytes: int


class Target(Tree, Protocol):
    """A tree that can be written. Paths are canonical; the parent directory of each is there. Raises OSError."""

    def remove(self, path: bytes) -> None:
        """Remove an object, with all below it."""

    def mkdir(self, path: bytes) -> None: ...

    def write(self, path: bytes, size: int, data: Iterable[tuple[int, bytes]]) -> None:
        """Make a file of a size, from pieces with their offsets."""

    def symlink(self, path: bytes, target: bytes) -> None: ...

    def link(self, old: bytes, new: bytes) -> None: ...

    def mknod(self, path: bytes, mode: int, rdev: int) -> None: ...

    def chown(self, path: bytes, uid: int, gid: int) -> None: ...

    def chmod(self, path: bytes, mode: int) -> None: ...

    def setxattr(self, path: bytes, name: bytes, value: bytes) -> None: ...

    def utime(self, path: bytes, mtime: int) -> None: ...


class DirTarget(DirTree):
    """A :class:`Target` that is an open directory of the host; the descriptor stays the caller's."""

    @contextmanager
    def _at(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        fd, name = self._parent(path)
        try:
            yield fd, name or b"."
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(fd)

    @contextmanager
    def _handle(self, path: bytes) -> Iterator[str]:
        """A path to an object itself that the calls which follow links can be given."""
        fd = open_beneath(self._fd, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            yield f"/proc/self/fd/{fd}"
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(fd)

    def remove(self, path: bytes) -> None:
        with self._at(path) as (fd, name):
            trees.remove_entry(fd, name)

    def mkdir(self, path: bytes) -> None:
        with self._at(path) as (fd, name):
            os.mkdir(name, 0o700, dir_fd=fd)

    def write(self, path: bytes, size: int, data: Iterable[tuple[int, bytes]]) -> None:
        with self._at(path) as (fd, name):
            out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
            try:
                os.ftruncate(out, size)
                for offset, piece in data:
                    rest = memoryview(piece)
                    while rest:
                        done = os.pwrite(out, rest, offset)
                        rest, offset = rest[done:], offset + done
            except BaseException:
                os.unlink(name, dir_fd=fd)
                raise
            finally:
                os.close(out)

    def symlink(self, path: bytes, target: bytes) -> None:
        with self._at(path) as (fd, name):
            os.symlink(target, name, dir_fd=fd)

    def link(self, old: bytes, new: bytes) -> None:
        with self._at(old) as (from_fd, from_name), self._at(new) as (fd, name):
            os.link(from_name, name, src_dir_fd=from_fd, dst_dir_fd=fd, follow_symlinks=False)

    def mknod(self, path: bytes, mode: int, rdev: int) -> None:
        with self._at(path) as (fd, name):
            os.mknod(name, stat.S_IFMT(mode) | 0o600, rdev, dir_fd=fd)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        with self._at(path) as (fd, name):
            os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)

    def chmod(self, path: bytes, mode: int) -> None:
        with self._handle(path) as handle:
            os.chmod(handle, mode)

    def setxattr(self, path: bytes, name: bytes, value: bytes) -> None:
        with self._at(path) as (fd, own):
            xattr.setx(fd, own, name, value)

    def utime(self, path: bytes, mtime: int) -> None:
        with self._at(path) as (fd, name):
            os.utime(name, ns=(mtime, mtime), dir_fd=fd, follow_symlinks=False)


def dress(target: Target, path: bytes, st: LowerStat, xattrs: dict[bytes, bytes], *, owners: bool) -> None:
    """Give a new object its owner, mode, attributes and time, in the order in which none undoes another."""
    link = stat.S_ISLNK(st.mode)
    if owners:
        target.chown(path, st.uid, st.gid)
    if not link:
        target.chmod(path, stat.S_IMODE(st.mode) & (0o7777 if owners else 0o1777))
    for name, value in xattrs.items():
        if owners or name.startswith(b"user."):
            target.setxattr(path, name, value)
    target.utime(path, st.mtime)


def copy(
    source: Tree,
    top: bytes,
    target: Target,
    where: bytes,
    *,
    owners: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Copied:
    """Copy an object, a directory with all below it, to a path whose parent directory is there.

    Files that are there are replaced, directories are merged; a directory at ``where`` keeps its own attributes. Hard links within what is copied stay hard links; sockets are
    left out, as in archives.

    Args:
        owners: keep owners, set-id bits and all extended attributes; else see rule 5 of the module.
        progress: told (bytes, objects) so far.

    Raises:
        OSError: of either tree: ENOENT, ENOSPC, EISDIR (a file would replace a directory), ENOTDIR (a directory would replace a
            file), EPERM, ENOTSUP (an attribute that the target does not take).
    """
    if source.stat(top) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), top)
    links: dict[object, bytes] = {}
    directories: list[tuple[bytes, bytes, LowerStat]] = []
    objects = data = 0
    todo = [(top, where)]
    while todo:
        path, at = todo.pop()
        st = source.stat(path)
        if st is None or stat.S_ISSOCK(st.mode):  # it went while we were walking
            continue
        objects += 1
        if stat.S_ISDIR(st.mode):
            if _make_directory(target, at) or at != where:
                directories.append((path, at, st))
            todo += [(_join(path, name), _join(at, name)) for name in sorted(source.names(path), reverse=True)]
            continue
        _make_room(target, at)
        if st.nlink > 1 and st.ident is not None:
            first = links.setdefault(st.ident, at)
            if first != at:
                target.link(first, at)
                continue
        _make(source, path, target, at, st)
        data += st.size if stat.S_ISREG(st.mode) else 0
        try:
            dress(target, at, st, source.xattrs(path), owners=owners)
        except BaseException:
            with suppress(OSError):
                target.remove(at)
            raise
        if progress is not None:
            progress(data, objects)
    for path, at, st in reversed(directories):
        dress(target, at, st, source.xattrs(path), owners=owners)
    return Copied(objects, data)


def _make(source: Tree, path: bytes, target: Target, at: bytes, st: LowerStat) -> None:
    kind = stat.S_IFMT(st.mode)
    if kind == stat.S_IFREG:
        target.write(at, st.size, source.data(path))
    elif kind == stat.S_IFLNK:
        target.symlink(at, source.readlink(path))
    else:
        target.mknod(at, st.mode, st.rdev)


def _make_directory(target: Target, at: bytes) -> bool:
    """Whether it was not there."""
    had = target.stat(at)
    if had is None:
        target.mkdir(at)
    elif not stat.S_ISDIR(had.mode):
        raise NotADirectoryError(errno.ENOTDIR, "a directory does not replace a file", at)
    return had is None


def _make_room(target: Target, at: bytes) -> None:
    had = target.stat(at)
    if had is None:
        return
    if stat.S_ISDIR(had.mode):
        raise IsADirectoryError(errno.EISDIR, "a file does not replace a directory", at)
    target.remove(at)


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


@contextmanager
def host_end(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """A descriptor of the directory that a path of the host is in, and its name there; ``b""`` for a directory itself.

    A link at the end is not followed, unless a slash or dot is behind it.

    Raises:
        OSError: no such directory.
    """
    given = os.fsencode(path)
    directory, _, name = given.rpartition(b"/")
    if name in (b"", b".", b".."):
        directory, name = given, b""
    elif b"/" in given:
        directory = directory or b"/"
    fd = os.open(directory or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd, name
    finally:
        os.close(fd)
