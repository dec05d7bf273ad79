"""Objects of lower layers that an archive's hard links bring into a layer.

A layer that holds changes only cannot link to a file beneath it: the file becomes a part of the layer, at its own place and under all
the names that it has beneath. Such an object is a *guest*: for whiteouts it still lies beneath, so that a layer means
the same tree with every driver. The first entry of the archive at its path, or below it, makes it the archive's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from cowfs._typed import TYPE_CHECKING, Protocol
from cowfs.archive import header
from cowfs.archive.clear import lstat
from cowfs.archive.header import Member
from cowfs.archive.names import show
from cowfs.errors import InvalidArgument

if TYPE_CHECKING:
    from cowfs.archive.dirs import Dir, Dirs
    from cowfs.archive.options import LowerStat, Tree

__all__ = ["Guests"]

_TYPES = {
    stat.S_IFLNK: header.SYMLINK,
    stat.S_IFIFO: header.FIFO,
    stat.S_IFCHR: header.CHAR,
    stat.S_IFBLK: header.BLOCKDEV,
}


class Layer(Protocol):
    """The interface of the layer being written, for its guests (:class:`cowfs.archive.extract.Extractor`)."""

    dirs: Dirs

    def hides(self, path: bytes) -> bool:
        """Whether the layer hides a path of the layers beneath."""

    def written(self, path: bytes) -> None:
        """Record that the object at this path is not older than the archive."""

    def bring_file(self, home: Dir, name: bytes, path: bytes, st: LowerStat, lower: Tree) -> None:
        """Copy a regular file of the layers beneath."""

    def bring_other(self, member: Member, home: Dir, name: bytes, path: bytes) -> None:
        """Make a link, a FIFO or a device."""


class Guests:
    """The guests of one layer.

    Args:
        layer: the layer being written.
        lower: the tree beneath; None where there is none, or where the layer is a whole tree.
    """

    def __init__(self, layer: Layer, lower: Tree | None) -> None:
        self._layer = layer
        self._lower = lower
        self._paths: set[bytes] = set()  # files, and the directories that were made to hold them
        self._groups: dict[object, list[bytes]] | None = None  # names of the files beneath that have several

    def __bool__(self) -> bool:
        return bool(self._paths)

    def adopt(self, path: bytes) -> None:
        """Note an entry of the archive at this path: it and the directories above it are the archive's."""
        while path:
            self._paths.discard(path)
            path = path.rpartition(b"/")[0]

    def dismiss(self, path: bytes, *, itself: bool) -> None:
        """Remove the guests below a path, and the one at it if ``itself``, as a whiteout hides the lower objects."""
        if not self._paths:
            return
        below = path + b"/" if path else b""
        found = [guest for guest in self._paths if guest.startswith(below) or (itself and guest == path)]
        self._paths.difference_update(found)
        dirs = self._layer.dirs
        for guest in sorted(found, key=lambda guest: -guest.count(b"/")):
            parent_path, _, name = guest.rpartition(b"/")
            home = dirs.get(parent_path)
            st = lstat(home.fd, name)
            if st is None:
                continue
            if stat.S_ISDIR(st.st_mode):
                dirs.forget(guest)
                os.rmdir(name, dir_fd=home.fd)
            else:
                os.unlink(name, dir_fd=home.fd)

    def bring(self, member: Member, path: bytes) -> Dir:
        """Bring in the lower object that a hard link of the archive names, and return its directory in the layer.

        Raises:
            InvalidArgument: there is no such object, it is a directory, or the layer deletes it.
        """
        lower = self._lower
        st = lower.stat(path) if lower is not None else None
        if lower is None or st is None:
            raise InvalidArgument(
                f"hard link to {show(path)}, which is neither in this archive" + (" nor below it" if lower else "")
            )
        kind = stat.S_IFMT(st.mode)
        if kind != stat.S_IFREG and kind not in _TYPES:
            raise InvalidArgument(f"hard link to {show(path)}, which is no file in the layers below")
        if self._layer.hides(path):
            raise InvalidArgument(f"hard link to {show(path)}, which this layer deletes")
        home, name = self._home(path)
        if kind == stat.S_IFREG:
            self._layer.bring_file(home, name, path, st, lower)
        else:
            self._layer.bring_other(self._as_member(member, path, st, lower), home, name, path)
        for other in self._names(path, st, lower):
            if other != path and not self._layer.hides(other):
                place, other_name = self._home(other)
                home = self._layer.dirs.get(path.rpartition(b"/")[0])
                os.link(name, other_name, src_dir_fd=home.fd, dst_dir_fd=place.fd, follow_symlinks=False)
        return self._layer.dirs.get(path.rpartition(b"/")[0])

    def _home(self, path: bytes) -> tuple[Dir, bytes]:
        """(the directory of a guest, its name there); directories made for it are guests, too."""
        parent_path, _, name = path.rpartition(b"/")
        above = parent_path
        while above and self._layer.dirs.find(above) is None:
            self._paths.add(above)
            above = above.rpartition(b"/")[0]
        home = self._layer.dirs.get(parent_path)
        self._paths.add(path)
        self._layer.written(path)
        return home, name

    @staticmethod
    def _as_member(member: Member, path: bytes, st: LowerStat, lower: Tree) -> Member:
        kind = stat.S_IFMT(st.mode)
        found = Member()
        found.name, found.type, found.ordinal = member.name, _TYPES[kind], member.ordinal
        found.mode, found.uid, found.gid, found.mtime = stat.S_IMODE(st.mode), st.uid, st.gid, st.mtime
        found.size = found.stored = 0
        found.linkname = lower.readlink(path) if kind == stat.S_IFLNK else b""
        found.device = (os.major(st.rdev), os.minor(st.rdev))
        found.xattrs = lower.xattrs(path)
        return found

    def _names(self, path: bytes, st: LowerStat, lower: Tree) -> list[bytes]:
        """All names of a lower file, this one among them; the tree is read once for them."""
        if st.nlink <= 1 or st.ident is None:
            return [path]
        if self._groups is None:
            self._groups = {}
            for name, there in _walk(lower):
                if there.nlink > 1 and not stat.S_ISDIR(there.mode):
                    self._groups.setdefault(there.ident, []).append(name)
        return self._groups.get(st.ident) or [path]


def _walk(tree: Tree) -> Iterator[tuple[bytes, LowerStat]]:
    todo = [b""]
    while todo:
        here = todo.pop()
        for name in tree.names(here):
            path = here + b"/" + name if here else name
            st = tree.stat(path)
            if st is None:
                continue
            yield path, st
            if stat.S_ISDIR(st.mode):
                todo.append(path)
