"""The walk over a layer directory that is being exported.

Strategy. By open descriptors, depth first, names sorted as bytes, whiteouts before their siblings.
An archive cannot hold references to lower layers (a renamed directory, a metadata-only copy), as an overlay layer does;
there the merged tree is read instead, through the caller's :class:`~cowfs.archive.options.Tree`: a renamed directory is
written whole, behind an opaque mark.

Rule 1: an object's attributes are those of its descriptor (fstat after open); a name that changes in between is an
error, never a different object. Rule 2: no link is followed, no FIFO or device is opened for reading.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from cowfs.archive import header
from cowfs.archive.attributes import is_smuggled
from cowfs.archive.decode import CHUNK
from cowfs.archive.members import TYPES, MemberWriter, overridden, write_object, write_tree
from cowfs.archive.names import OPAQUE_NAME, WHITEOUT_PREFIX, show
from cowfs.archive.options import OVERRIDE_XATTR, Tree
from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.format import whiteout
from cowfs.sys import xattr

__all__ = ["LayerWalk"]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WORTH = 64 << 10  # a smaller file is never written as a sparse one


class LayerWalk:
    """One walk over a layer directory in overlay form (``form`` None: a plain one)."""

    def __init__(self, form: whiteout.Form | None, tree: Tree | None, override: bool, sparse: bool) -> None:
        self._form, self._tree, self._override, self._sparse = form, tree, override, sparse
        self._writer: MemberWriter
        self._maker = 0

    def run(self, writer: MemberWriter, root: int) -> None:
        self._writer = writer
        self._maker = os.fstat(root).st_uid
        stack: list[tuple[int, Iterator[tuple[bytes, int]], bytes]] = []
        try:
            stack.append(self._enter(os.dup(root), b""))
            while stack:
                fd, names, prefix = stack[-1]
                step = next(names, None)
                if step is None:
                    stack.pop()
                    os.close(fd)
                    continue
                name, kind = step
                if kind == stat.S_IFREG:
                    self._file(fd, name, prefix + name)
                elif kind == stat.S_IFDIR:
                    child = self._open(fd, name, _DIR, prefix + name)
                    if not self._renamed(child, prefix + name):
                        stack.append(self._enter(child, prefix + name))
                else:
                    self._other(fd, name, prefix + name)
        finally:
            for fd, *_ in stack:
                os.close(fd)

    def _renamed(self, fd: int, path: bytes) -> bool:
        """A directory that refers to another place in the layers below: written from the merged tree."""
        form = self._form
        if form is None or not form.redirects or xattr.try_get(fd, b"", form.redirect) is None:
            return False
        os.close(fd)
        write_tree(self._writer, self._need_tree(path), path, opaque=True)
        return True

    def _need_tree(self, path: bytes) -> Tree:
        if self._tree is None:
            raise Unsupported(
                f"{show(path)} refers to a lower layer and cannot be exported from this layer alone",
                remedy="export it through the store",
            )
        return self._tree

    def _enter(self, fd: int, path: bytes) -> tuple[int, Iterator[tuple[bytes, int]], bytes]:
        """Write a directory and its whiteouts; returns it with the names to go on with, sorted."""
        try:
            st = os.fstat(fd)
            own, xattrs = self._xattrs(fd, b"")
            self._object(path, header.DIRECTORY, st, xattrs, own)
            prefix = path + b"/" if path else b""
            form = self._form
            opaque = own.get(form.opaque, b"") if form is not None else b""
            if opaque == b"y" or (form is not None and form.dotwh and whiteout.exists(fd, OPAQUE_NAME)):
                self._writer.mark(prefix + OPAQUE_NAME)
            deleted: list[bytes] = []
            found: list[tuple[bytes, int]] = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if form is not None and form.dotwh and name.startswith(WHITEOUT_PREFIX):
                        hidden = whiteout.wh_target(name)
                        deleted += [hidden] if hidden is not None else []
                    elif entry.is_file(follow_symlinks=False):
                        if opaque == b"x" and form is not None and whiteout.has_whiteout_xattr(fd, name, form):
                            deleted.append(name)
                        else:
                            found.append((name, stat.S_IFREG))
                    elif entry.is_dir(follow_symlinks=False):
                        found.append((name, stat.S_IFDIR))
                    elif form is not None and not entry.is_symlink() and self._is_whiteout(fd, name):
                        deleted.append(name)
                    else:
                        found.append((name, 0))
            for name in sorted(deleted):
                self._writer.mark(prefix + WHITEOUT_PREFIX + name)
            found.sort()
            return fd, iter(found), prefix
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def _is_whiteout(fd: int, name: bytes) -> bool:
        return whiteout.is_whiteout(os.stat(name, dir_fd=fd, follow_symlinks=False))

    @staticmethod
    def _open(dirfd: int, name: bytes, flags: int, path: bytes) -> int:
        try:
            return os.open(name, flags, dir_fd=dirfd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise FailedPrecondition(
                    f"{show(path)} was replaced while it was exported", remedy="export a snapshot"
                ) from None
            raise

    def _file(self, dirfd: int, name: bytes, path: bytes) -> None:
        fd = self._open(dirfd, name, _FILE, path)
        try:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode):
                raise FailedPrecondition(f"{show(path)} was replaced while it was exported", remedy="export a snapshot")
            own, xattrs = self._xattrs(fd, b"")
            form = self._form
            if form is not None and own and (form.metacopy in own or form.row in own):
                write_object(self._writer, self._need_tree(path), path)
                return
            if st.st_nlink > 1 and self._linked(path, st):
                return
            size = st.st_size
            if self._sparse and size >= _WORTH and st.st_blocks * 512 <= size // 2 and not self._override:
                self._writer.check_name(path)
                self._writer.sparse(path, st, fd, xattrs, (st.st_mode, st.st_uid, st.st_gid))
                return
            if not self._object(path, header.REGULAR, st, xattrs, own):
                return
            if size <= CHUNK:
                data = os.read(fd, size) if size else b""
                if len(data) == size:
                    self._writer.whole(data)
                else:
                    self._writer.data(path, size, _pieces(fd, data))
            else:
                self._writer.data(path, size, _pieces(fd))
        finally:
            os.close(fd)

    def _other(self, dirfd: int, name: bytes, path: bytes) -> None:
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        kind = TYPES.get(stat.S_IFMT(st.st_mode))
        if kind is None:
            return
        if kind in (header.REGULAR, header.DIRECTORY):
            raise FailedPrecondition(f"{show(path)} was replaced while it was exported", remedy="export a snapshot")
        if st.st_nlink > 1 and self._linked(path, st):
            return
        link = os.readlink(name, dir_fd=dirfd) if kind == header.SYMLINK else b""
        self._object(path, kind, st, self._xattrs(dirfd, name)[1], linkname=link)

    def _linked(self, path: bytes, st: os.stat_result) -> bool:
        return self._writer.linked(path, (st.st_dev, st.st_ino), st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns)

    def _xattrs(self, dirfd: int, name: bytes) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """(the layer form's own attributes, the user's)."""
        names = os.listxattr(dirfd) if not name else xattr.listx(dirfd, name)
        if not names:
            return _NONE, _NONE
        own: dict[bytes, bytes] = {}
        users: dict[bytes, bytes] = {}
        for stored in names:
            stored = os.fsencode(stored)
            value = xattr.try_get(dirfd, name, stored)
            if value is None:
                continue
            if stored == OVERRIDE_XATTR or (self._form is not None and self._form.is_own(stored)):
                own[stored] = value
            elif not is_smuggled(stored):
                users[stored] = value
        return own, users

    def _object(
        self, path: bytes, kind: bytes, st: os.stat_result, xattrs: dict[bytes, bytes],
        own: dict[bytes, bytes] | None = None, *, linkname: bytes = b"",
    ) -> bool:  # fmt: skip
        """Write a header; True when data must follow."""
        mode, uid, gid, rdev = st.st_mode, st.st_uid, st.st_gid, st.st_rdev
        if self._override and own and OVERRIDE_XATTR in own:
            uid, gid, mode, kind, rdev = overridden(own[OVERRIDE_XATTR], kind, path)
        elif self._override and kind == header.SYMLINK and uid == self._maker:
            uid = gid = 0  # a link has no override attribute, and its owner has no effect
        size = st.st_size if kind == header.REGULAR else 0
        self._writer.header(
            path, kind, mode, uid, gid, size, st.st_mtime_ns, linkname=linkname, rdev=rdev, xattrs=xattrs
        )
        return kind == header.REGULAR


_NONE: dict[bytes, bytes] = {}


def _pieces(fd: int, first: bytes = b"") -> Iterator[bytes]:
    if first:
        yield first
    while data := os.read(fd, CHUNK):
        yield data
