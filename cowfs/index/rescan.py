"""Reading only the changes of a whole layer, if its driver knows them (:meth:`cowfs.driver.Driver.changes`).

Strategy: the scan of :mod:`cowfs.index.scan`, but in a directory that the parent has in the same place, only the names
that the driver gave are read. The driver may give too many names, never too few. The resulting records are those of a
full scan, which the tests compare.

Files with several names: all names of a file are read as soon as one is, since only together do they identify the file.
The driver finds them by the inode; then the scan is made again.

The use of the tree is the parent's, minus the former objects of those names, plus the present ones.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping

from cowfs.format.whiteout import Form
from cowfs.index.directory import EMPTY, Pair, Records, join
from cowfs.index.scan import Frame, Full, KnownDigest, SameAsParent, Scanned
from cowfs.sys import files, xattr
from cowfs.union.measure import Sums, Tally

__all__ = ["CannotTellError", "scan_changes"]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROUNDS = 16


class CannotTellError(Exception):
    """The changes are not known well enough: the whole layer has to be read."""


class _Told:
    """The names to read, by directory, and the directories to read whole."""

    def __init__(self, paths: Mapping[bytes, bool]) -> None:
        self.names: dict[bytes, set[bytes]] = {}
        self.whole: set[bytes] = set()
        for path, whole in paths.items():
            self.add(path)
            if whole:
                self.whole.add(path)

    def add(self, path: bytes) -> None:
        while path:
            above, _, name = path.rpartition(b"/")
            names = self.names.setdefault(above, set())
            if name in names:
                return
            names.add(name)
            path = above


class _Changed(Full):
    """A whole layer, of which only the given names are read.

    Attributes:
        partly: the directories that were not read whole.
        linked: inode with several names -> the names that were read.
    """

    def __init__(
        self,
        root_fd: int,
        num: int,
        form: Form,
        base: Pair | None,
        records: Records,
        known: KnownDigest | None,
        told: _Told,
    ) -> None:
        super().__init__(root_fd, num, form, base, records, known)
        self.told = told
        self.partly: set[bytes] = set()
        self.linked: dict[int, set[bytes]] = {}
        self._whole: set[bytes] = set()

    def list(self, above: Frame | None, frame: Frame) -> None:
        path = frame.path
        if frame.below == EMPTY or path in self.told.whole or (above is not None and above.path in self._whole):
            self._whole.add(path)
            super().list(above, frame)
            return
        self.partly.add(path)
        todo: list[tuple[bytes, bool]] = []
        for name in self.told.names.get(path, ()):
            try:
                st = os.stat(name, dir_fd=frame.fd, follow_symlinks=False)
            except FileNotFoundError:
                if frame.lower(self.pending, name) is not None:
                    frame.edits[name] = None
                continue
            todo.append((name, stat.S_ISDIR(st.st_mode)))
        frame.many = len(todo) > 64
        frame.todo = iter(todo)

    def file(self, frame: Frame, name: bytes, st: os.stat_result) -> None:
        if st.st_nlink > 1:
            self.linked.setdefault(st.st_ino, set()).add(join(frame.path, name))
        super().file(frame, name, st)


def scan_changes(
    root_fd: int,
    old_fd: int,
    *,
    paths: Mapping[bytes, bool],
    names: Callable[[int], Iterable[bytes]],
    sums: Sums,
    num: int,
    form: Form,
    base: Pair,
    records: Records,
    same: SameAsParent,
    known: KnownDigest | None = None,
) -> Scanned:
    """Read the changed parts of a whole layer over its parent's tree; ``usage`` is that of the whole tree.

    Args:
        root_fd, old_fd: the layer's root directory, and the parent's.
        paths: path -> whether all below it is to be read, from :meth:`cowfs.driver.Driver.changes`.
        names: the paths of an inode of the layer that has several.
        sums: the use of the parent's tree.
        num, form, base, records, same, known: as for :func:`cowfs.index.scan.scan_full`.

    Raises:
        CannotTellError: a full scan is needed.
        Corrupt, OSError: as for :func:`cowfs.index.scan.scan_full`.
    """
    told = _Told(paths)
    own: set[int] = set()
    for _ in range(_ROUNDS):
        scan = _Changed(root_fd, num, form, base, records, known, told)
        scan.same, scan.own = same, own
        found = scan.run()
        torn = scan.torn()
        try:
            more = [path for inode, seen in scan.linked.items() for path in names(inode) if path not in seen]
        except OSError as error:  # more names than the driver can give
            raise CannotTellError from error
        if not torn - own and not more:
            break
        own |= torn
        for path in more:
            told.add(path)
    else:
        raise CannotTellError
    if found.sums is None:
        raise CannotTellError
    before = _count_before(old_fd, form, scan.partly, told)
    scan.tally.become(sums.changed(before, found.sums))
    return Scanned(found.root, scan.tally.usage(), found.pending, found.latest, sums=scan.tally.sums())


def _count_before(old_fd: int, form: Form, partly: set[bytes], told: _Told) -> Sums:
    """The use of the parent's tree at the places that the scan has read."""
    tally = Tally(files.fs_name(old_fd), form)
    tally.root(old_fd)
    seen: set[int] = set()
    todo: list[bytes] = [b""]
    while todo:
        path = todo.pop()
        try:
            fd = files.open_beneath(old_fd, path, _DIR)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR):
                raise CannotTellError from error
            raise
        try:
            for name in told.names.get(path, ()) if path in partly else map(os.fsencode, os.listdir(fd)):
                try:
                    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                tally.names += tally.name_cost(name)
                if stat.S_ISDIR(st.st_mode):
                    todo.append(join(path, name))
                elif st.st_nlink > 1:
                    if st.st_ino in seen:
                        continue
                    seen.add(st.st_ino)
                stored = xattr.read_all(fd, name)
                tally.inode(fd, name, st, {key: len(value) for key, value in stored.items()}, data=True)
        finally:
            os.close(fd)
    found = tally.sums()
    if found is None:
        raise CannotTellError
    return found
