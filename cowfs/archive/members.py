"""The encoding of members of an exported archive; other modules choose the members.

Rule: nothing that differs from host to host reaches the archive: no inode or device numbers, user
names, access times, order of a directory on disk; nor holes, unless they were asked for.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator

from cowfs.archive import header
from cowfs.archive.attributes import is_smuggled
from cowfs.archive.compress import Packer
from cowfs.archive.decode import CHUNK
from cowfs.archive.names import OPAQUE_NAME, WHITEOUT_PREFIX, show
from cowfs.archive.options import OVERRIDE_XATTR, LowerStat, Tree
from cowfs.errors import FailedPrecondition, InvalidArgument
from cowfs.sys.files import data_ranges

__all__ = ["TYPES", "MemberWriter", "Progress", "overridden", "write_object", "write_tree"]

TYPES = {
    stat.S_IFREG: header.REGULAR,
    stat.S_IFDIR: header.DIRECTORY,
    stat.S_IFLNK: header.SYMLINK,
    stat.S_IFCHR: header.CHAR,
    stat.S_IFBLK: header.BLOCKDEV,
    stat.S_IFIFO: header.FIFO,
}  # a socket has no place in an archive and is left out, as every tar does
_PADS = [bytes(size) for size in range(header.BLOCK)]
Progress = Callable[[int, int], object]


class MemberWriter:
    """Members in, bytes out.

    Args:
        reserved: refuse names that a layer archive gives another meaning.
        override: owners are recorded in :data:`~cowfs.archive.options.OVERRIDE_XATTR`.
    """

    def __init__(self, packer: Packer, progress: Progress | None, *, reserved: bool, override: bool) -> None:
        self._packer, self._progress, self._reserved = packer, progress, reserved
        self.override = override
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
        """A whiteout or an opaque mark: an empty file of user 0, mode 0 and time 0."""
        self._put(path, header.REGULAR, 0, 0, 0, 0, 0)

    def linked(self, path: bytes, ident: object, st_mode: int, uid: int, gid: int, mtime: int) -> bool:
        """Write a hard link if the object was written under another name already."""
        first = self._links.setdefault(ident, path)
        if first == path:
            return False
        self.header(path, header.LINK, st_mode, uid, gid, 0, mtime, linkname=first)
        return True

    def sparse(
        self, path: bytes, st: os.stat_result, fd: int, xattrs: dict[bytes, bytes], owner: tuple[int, int, int]
    ) -> None:
        """A file with its holes: PAX sparse version 1.0, a map and then the data ("Storing Sparse Files")."""
        size = st.st_size
        segments = [(start, end - start) for start, end in data_ranges(fd, size)]
        if not segments or sum(segments[-1]) < size:
            segments.append((size, 0))  # the format's sign that the file ends in a hole
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


def _ranges(fd: int, segments: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    for start, count in segments:
        while count and (data := os.pread(fd, min(count, CHUNK), start)):
            yield data
            start += len(data)
            count -= len(data)


_STAND_INS = {b"pipe": header.FIFO, b"char": header.CHAR, b"block": header.BLOCKDEV}


def overridden(value: bytes, kind: bytes, path: bytes) -> tuple[int, int, int, bytes, int]:
    """(uid, gid, mode, type, device) of an override attribute. Raises InvalidArgument."""
    try:
        uid, gid, mode, *rest = value.split(b":")
        numbers = int(uid), int(gid), int(mode, 8) & 0o7777
        what, *device = rest[0].split(b"-") if rest else [b""]
        if not (0 <= numbers[0] <= header.MAX_ID and 0 <= numbers[1] <= header.MAX_ID):
            raise ValueError("owner")
        rdev = os.makedev(int(device[0]), int(device[1])) if device else 0
    except (ValueError, IndexError, OverflowError):
        raise InvalidArgument(f"{show(path)}: unreadable {OVERRIDE_XATTR.decode()} {value[:60]!r}") from None
    return *numbers, _STAND_INS.get(what, kind), rdev


# From a merged tree ---------------------------------------------------------------------------


def write_object(writer: MemberWriter, tree: Tree, path: bytes) -> LowerStat | None:
    """One object of a merged tree; of a directory itself only."""
    st = tree.stat(path)
    if st is None:
        raise FailedPrecondition(f"{show(path)} vanished while it was exported", remedy="export a snapshot")
    kind = TYPES.get(stat.S_IFMT(st.mode))
    if kind is None:
        return st
    linkable = st.nlink > 1 and kind != header.DIRECTORY and st.ident is not None
    if linkable and writer.linked(path, st.ident, st.mode, st.uid, st.gid, st.mtime):
        return st
    xattrs = tree.xattrs(path)
    mode, uid, gid, rdev = st.mode, st.uid, st.gid, st.rdev
    if writer.override and OVERRIDE_XATTR in xattrs:
        uid, gid, mode, kind, rdev = overridden(xattrs[OVERRIDE_XATTR], kind, path)
    elif writer.override and kind == header.SYMLINK and uid == os.geteuid():
        uid = gid = 0
    size = st.size if kind == header.REGULAR else 0
    writer.header(
        path, kind, mode, uid, gid, size, st.mtime, rdev=rdev,
        linkname=tree.readlink(path) if kind == header.SYMLINK else b"",
        xattrs={name: value for name, value in xattrs.items() if not is_smuggled(name)},
    )  # fmt: skip
    if size:
        writer.data(path, size, tree.read(path))
    return st


def write_tree(writer: MemberWriter, tree: Tree, top: bytes, *, opaque: bool = False) -> None:
    """``top`` and all below it; with an opaque mark in it when it must hide the lower layers there."""
    stack: list[tuple[bytes, bool]] = [(top, opaque)]
    while stack:
        path, mark = stack.pop()
        st = write_object(writer, tree, path)
        if st is not None and stat.S_ISDIR(st.mode):
            prefix = path + b"/" if path else b""
            if mark:
                writer.mark(prefix + OPAQUE_NAME)
            stack += [(prefix + name, False) for name in sorted(tree.names(path), reverse=True)]
