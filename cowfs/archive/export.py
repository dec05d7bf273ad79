"""A layer directory, or a whole tree, becomes a tar: the same bytes for the same tree, anywhere.

Strategy. The layer directory is walked by open descriptors, depth first, names sorted as bytes,
whiteouts before their siblings (OCI image-spec ``layer.md``: "whiteout files appear before
sibling directory entries"). A header says PAX only what ustar cannot. Nothing that differs from
host to host reaches the archive: no inode or device numbers, user names, access times, holes, or order of the
directory on disk.

What an overlay layer says about lower layers by reference (a renamed directory, a metadata-only
copy) an archive cannot say; there the merged tree is read instead, through the caller's
:class:`~cowfs.archive.options.Tree`: a renamed directory is written whole, behind an opaque mark.

Rule 1: an object is what its descriptor says (fstat after open); a name that changes between is an
error, never a different object. Rule 2: no link is followed, no FIFO or device is opened for reading.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from cowfs import whiteout
from cowfs.archive import header
from cowfs.archive.attributes import is_smuggled
from cowfs.archive.compress import Packer
from cowfs.archive.decode import CHUNK
from cowfs.archive.names import OPAQUE_NAME, WHITEOUT_PREFIX, show
from cowfs.archive.options import OVERRIDE_XATTR, Exported, LowerStat, Tree
from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.model import Change
from cowfs.sys import xattr
from cowfs.sys.files import data_ranges
from cowfs.whiteout import FORMS

__all__ = ["export_changes", "export_layer", "export_tree"]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TYPES = {
    stat.S_IFREG: header.REGULAR,
    stat.S_IFDIR: header.DIRECTORY,
    stat.S_IFLNK: header.SYMLINK,
    stat.S_IFCHR: header.CHAR,
    stat.S_IFBLK: header.BLOCKDEV,
    stat.S_IFIFO: header.FIFO,
}  # a socket has no place in an archive and is left out, as every tar does
_PADS = [bytes(size) for size in range(header.BLOCK)]
_WORTH = 64 << 10  # a smaller file is never written as a sparse one
_END = bytes(2 * header.BLOCK)
Progress = Callable[[int, int], object]


class _Writer:
    """Members in, bytes out."""

    def __init__(self, packer: Packer, progress: Progress | None, *, reserved: bool) -> None:
        self._packer, self._progress, self._reserved = packer, progress, reserved
        self._write = packer.write
        self._links: dict[object, bytes] = {}
        self.entries = 0

    def header(
        self, path: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, *,
        linkname: bytes = b"", rdev: int = 0, xattrs: dict[bytes, bytes] | None = None,
    ) -> None:  # fmt: skip
        self.check_name(path)
        self._put(
            path, kind, mode, uid, gid, size, mtime, linkname=linkname,
            device=(os.major(rdev), os.minor(rdev)) if kind in (header.CHAR, header.BLOCKDEV) else None, xattrs=xattrs,
        )  # fmt: skip

    def check_name(self, path: bytes) -> None:
        """Raises InvalidArgument for a name that means something else in a layer archive."""
        if self._reserved and WHITEOUT_PREFIX in path and path.rpartition(b"/")[2].startswith(WHITEOUT_PREFIX):
            raise InvalidArgument(
                f"{show(path)} cannot be in a layer archive: names that start with .wh. mean deletions there",
                remedy="rename it, or export the whole tree as a plain tar",
            )

    def _put(
        self, path: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, *,
        linkname: bytes = b"", device: tuple[int, int] | None = None, xattrs: dict[bytes, bytes] | None = None,
    ) -> None:  # fmt: skip
        name = path or b"."
        if kind == header.DIRECTORY:
            name += b"/"
        self._write(
            header.encode(
                name, kind, mode=mode & 0o7777, uid=uid, gid=gid, size=size, mtime=mtime, linkname=linkname,
                device=device, xattrs=xattrs,
            )
        )  # fmt: skip
        self._count()

    def _count(self) -> None:
        self.entries += 1
        if self._progress is not None and self.entries % 256 == 0:
            self._progress(self._packer.size, self.entries)

    def mark(self, path: bytes) -> None:
        """A whiteout or an opaque mark: an empty file of no one and no time."""
        self._put(path, header.REGULAR, 0, 0, 0, 0, 0)

    def linked(self, path: bytes, ident: object, st_mode: int, uid: int, gid: int, mtime: int) -> bool:
        """Write a hard link if the object was written under another name already."""
        first = self._links.setdefault(ident, path)
        if first == path:
            return False
        self.header(path, header.LINK, st_mode, uid, gid, 0, mtime, linkname=first)
        return True

    def sparse(self, path: bytes, st: os.stat_result, fd: int, xattrs: dict[bytes, bytes], owner: tuple[int, int, int]) -> None:
        """A file with its holes: PAX sparse version 1.0, a map and then the data ("Storing Sparse Files")."""
        size = st.st_size
        segments = [(start, end - start) for start, end in data_ranges(fd, size)]
        if not segments or sum(segments[-1]) < size:
            segments.append((size, 0))  # how the format says that the file ends in a hole
        listed = header.sparse_map(segments)
        stored = sum(length for _, length in segments)
        mode, uid, gid = owner
        parent, slash, base = path.rpartition(b"/")
        self._write(
            header.encode(
                parent + slash + b"GNUSparseFile.0/" + base, header.REGULAR, mode=mode & 0o7777, uid=uid, gid=gid,
                size=len(listed) + stored, mtime=st.st_mtime_ns, xattrs=xattrs,
                extra=(
                    (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
                    (b"GNU.sparse.name", path), (b"GNU.sparse.realsize", b"%d" % size),
                ),
            )
        )  # fmt: skip
        self._count()
        self._write(listed)
        self.data(path, stored, _ranges(fd, segments))

    def whole(self, data: bytes) -> None:
        """All of a file's data at once."""
        if data:
            self._packer.write_all(data, _PADS[-len(data) % header.BLOCK])

    def data(self, path: bytes, size: int, pieces: Iterable[bytes]) -> None:
        left = size
        for piece in pieces:
            if len(piece) > left:
                piece = piece[:left]
            self._write(piece)
            left -= len(piece)
            if not left:
                break
        if left:
            raise FailedPrecondition(f"{show(path)} became shorter while it was exported", remedy="export a snapshot")
        if size % header.BLOCK:
            self._write(bytes(-size % header.BLOCK))


def _run(
    out: BinaryIO, compression: str, level: int | None, progress: Progress | None, reserved: bool,
    body: Callable[[_Writer], None],
) -> Exported:  # fmt: skip
    packer = Packer(out, compression, level)
    writer = _Writer(packer, progress, reserved=reserved)
    try:
        body(writer)
        packer.write(_END)
        packer.close()
    except BaseException:
        packer.abandon()
        raise
    if progress is not None:
        progress(packer.size, writer.entries)
    return Exported(
        diff_id=packer.diff_id,
        size=packer.size,
        digest=packer.blob_digest,
        blob_size=packer.blob_size,
        entries=writer.entries,
    )


def export_layer(
    layer: str | bytes | int,
    out: BinaryIO,
    *,
    form: str = "trusted",
    tree: Tree | None = None,
    compression: str = "none",
    level: int | None = None,
    override: bool = False,
    sparse: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write an OCI layer tar of a layer directory.

    Args:
        layer: the directory, a path or an open descriptor.
        form: ``trusted`` or ``user``: an overlay layer in that form; ``plain``: no whiteouts in it.
        tree: the merged tree with this layer on top; needed where the layer refers to lower ones.
        compression: ``none``, ``gzip`` or ``zstd``; level: its own scale.
        override: take owner, mode and type from ``user.containers.override_stat`` where it is
            set (a layer applied with ``owners="xattr"``).
        sparse: write files that are half holes or more as PAX sparse members (GNU tar, bsdtar and Go read
            them). The bytes then depend on where this host has holes; without it they never do.
        progress: called with (uncompressed bytes, members) now and then.

    Raises:
        InvalidArgument: a name that a layer archive cannot hold.
        Unsupported: the layer refers to lower ones and no ``tree`` was given.
        FailedPrecondition: the layer changed while it was read.
    """
    if form != "plain" and form not in FORMS:
        raise InvalidArgument(f"unknown layer form {form!r}", remedy="use trusted, user or plain")
    root = os.open(".", _DIR, dir_fd=layer) if isinstance(layer, int) else os.open(layer, _DIR)
    try:
        walk = _LayerWalk(FORMS.get(form), tree, override, sparse)
        return _run(out, compression, level, progress, True, lambda writer: walk.run(writer, root))
    finally:
        os.close(root)


def export_tree(
    tree: Tree, out: BinaryIO, *, compression: str = "none", level: int | None = None, progress: Progress | None = None
) -> Exported:
    """Write a plain tar of a whole merged tree (a root filesystem, flattened); as :func:`export_layer`."""
    return _run(out, compression, level, progress, False, lambda writer: _write_tree(writer, tree, b""))


def export_changes(
    tree: Tree, changes: Iterable[Change], out: BinaryIO, *, compression: str = "none", level: int | None = None,
    progress: Progress | None = None,
) -> Exported:  # fmt: skip
    """Write an OCI layer tar of a list of changes, the new state of each read from ``tree``.

    Args:
        changes: any order; ``deleted`` ones become whiteouts, the others members. A changed
            directory is written as itself only, an added one too: what is in it has changes of its own.
    """

    def body(writer: _Writer) -> None:
        for change in sorted(changes, key=lambda change: _order(change.path, change.kind == "deleted")):
            if change.kind == "deleted":
                parent, _, name = change.path.rpartition(b"/")
                writer.mark((parent + b"/" if parent else b"") + WHITEOUT_PREFIX + name)
            else:
                _write_object(writer, tree, change.path)

    return _run(out, compression, level, progress, True, body)


def _order(path: bytes, deleted: bool) -> list[tuple[bool, bytes]]:
    """Parents before children, whiteouts before siblings, else by bytes."""
    if not path:
        return []
    *parents, name = path.split(b"/")
    return [(True, part) for part in parents] + [(not deleted, name)]


# From a merged tree ---------------------------------------------------------------------------


def _write_object(writer: _Writer, tree: Tree, path: bytes) -> LowerStat | None:
    st = tree.stat(path)
    if st is None:
        raise FailedPrecondition(f"{show(path)} vanished while it was exported", remedy="export a snapshot")
    kind = _TYPES.get(stat.S_IFMT(st.mode))
    if kind is None:
        return st
    linkable = st.nlink > 1 and kind != header.DIRECTORY and st.ident is not None
    if linkable and writer.linked(path, st.ident, st.mode, st.uid, st.gid, st.mtime):
        return st
    size = st.size if kind == header.REGULAR else 0
    writer.header(
        path, kind, st.mode, st.uid, st.gid, size, st.mtime, rdev=st.rdev,
        linkname=tree.readlink(path) if kind == header.SYMLINK else b"",
        xattrs={name: value for name, value in tree.xattrs(path).items() if not is_smuggled(name)},
    )  # fmt: skip
    if size:
        writer.data(path, size, tree.read(path))
    return st


def _write_tree(writer: _Writer, tree: Tree, top: bytes, *, opaque: bool = False) -> None:
    """``top`` and all below it; with an opaque mark in it when it must hide what lower layers have there."""
    stack: list[tuple[bytes, bool]] = [(top, opaque)]
    while stack:
        path, mark = stack.pop()
        st = _write_object(writer, tree, path)
        if st is not None and stat.S_ISDIR(st.mode):
            prefix = path + b"/" if path else b""
            if mark:
                writer.mark(prefix + OPAQUE_NAME)
            stack += [(prefix + name, False) for name in sorted(tree.names(path), reverse=True)]


# From a layer directory -----------------------------------------------------------------------


class _LayerWalk:
    """One walk over a layer directory in overlay form (``form`` None: a plain one)."""

    def __init__(self, form: whiteout.Form | None, tree: Tree | None, override: bool, sparse: bool) -> None:
        self._form, self._tree, self._override, self._sparse = form, tree, override, sparse
        self._writer: _Writer

    def run(self, writer: _Writer, root: int) -> None:
        self._writer = writer
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
        _write_tree(self._writer, self._need_tree(path), path, opaque=True)
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
            if opaque == b"y":
                self._writer.mark(prefix + OPAQUE_NAME)
            deleted: list[bytes] = []
            found: list[tuple[bytes, int]] = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if entry.is_file(follow_symlinks=False):
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
                _write_object(self._writer, self._need_tree(path), path)
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
        kind = _TYPES.get(stat.S_IFMT(st.st_mode))
        if kind is None:
            return
        if kind in (header.REGULAR, header.DIRECTORY):
            raise FailedPrecondition(f"{show(path)} was replaced while it was exported", remedy="export a snapshot")
        if st.st_nlink > 1 and self._linked(path, st):
            return
        link = os.readlink(name, dir_fd=dirfd) if kind == header.SYMLINK else b""
        self._object(path, kind, st, self._xattrs(dirfd, name)[1], linkname=link)

    def _linked(self, path: bytes, st: os.stat_result) -> bool:
        return self._writer.linked(
            path, (st.st_dev, st.st_ino), st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns
        )

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
            uid, gid, mode, kind, rdev = _overridden(own[OVERRIDE_XATTR], kind, path)
        size = st.st_size if kind == header.REGULAR else 0
        self._writer.header(
            path, kind, mode, uid, gid, size, st.st_mtime_ns, linkname=linkname, rdev=rdev, xattrs=xattrs
        )
        return kind == header.REGULAR


_NONE: dict[bytes, bytes] = {}
_OVERRIDE_TYPES = {b"pipe": header.FIFO, b"char": header.CHAR, b"block": header.BLOCKDEV}


def _overridden(value: bytes, kind: bytes, path: bytes) -> tuple[int, int, int, bytes, int]:
    """(uid, gid, mode, type, device) of an override attribute."""
    try:
        uid, gid, mode, *rest = value.split(b":")
        numbers = int(uid), int(gid), int(mode, 8) & 0o7777
        what, *device = rest[0].split(b"-") if rest else [b""]
        rdev = os.makedev(int(device[0]), int(device[1])) if device else 0
    except (ValueError, IndexError, OverflowError):
        raise InvalidArgument(f"{show(path)}: unreadable {OVERRIDE_XATTR.decode()} {value[:60]!r}") from None
    return *numbers, _OVERRIDE_TYPES.get(what, kind), rdev


def _pieces(fd: int, first: bytes = b"") -> Iterator[bytes]:
    if first:
        yield first
    while data := os.read(fd, CHUNK):
        yield data


def _ranges(fd: int, segments: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    for start, count in segments:
        while count and (data := os.pread(fd, min(count, CHUNK), start)):
            yield data
            start += len(data)
            count -= len(data)
