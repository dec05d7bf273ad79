"""Reading a layer into directory records, for commit and for the diff of an active snapshot.

Strategy. The records of the parent come first; a layer's directory is a set of edits on one of them. So only
directories that the layer has are read, and the cost is that of the change. Two kinds of layer:

* *delta* (:func:`scan_delta`): the kernel's overlay format. A whiteout is a removal, an opaque
  directory starts from nothing, a redirect starts from another record, a metacopy keeps the
  data's place of the entry below.
* *full* (:func:`scan_full`): a whole tree, of which all is read; an entry that agrees with the
  parent's in everything is the parent's, so unchanged directories share their records here too.

Directories are walked with an explicit stack: hostile trees are deeper than Python's stack.
Everything is opened relative to the directory before it, without following links. Of a deep
path only the last ``KEEP_OPEN`` descriptors stay open; the others are found again by "..".
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

from cowfs._record import record
from cowfs.errors import Corrupt
from cowfs.format import whiteout
from cowfs.format.redirect import Ref as RowRef
from cowfs.format.whiteout import Form
from cowfs.index.directory import (
    EMPTY,
    Entry,
    Pair,
    Pending,
    Records,
    Ref,
    Writer,
    decode,
    edit,
    encode,
    entries,
    find,
    join,
)
from cowfs.model import Usage
from cowfs.sys import files, xattr
from cowfs.union.inodes import handle_of
from cowfs.union.measure import Sums, Tally

__all__ = ["KNOWS_LINKS", "KnownDigest", "Scanned", "locate", "scan_delta", "scan_full"]

KEEP_OPEN = 128
KNOWS_LINKS = 0x20
"""In the flags of a root entry: the tree was recorded with what its files with several names are (since 2026-12)."""
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FLUSH = 4096  # entries of a new directory that are kept before they are recorded
_MANY = 64  # from this many names of a big directory, one look-up of all is cheaper than one for each

KnownDigest = Callable[[bytes, os.stat_result], bytes | None]
"""SHA-256 of a file's data where it is known: (path in the layer, its stat)."""

SameAsParent = Callable[[bytes, os.stat_result, Entry], bool]
"""Whether a file of a full layer still holds its parent's bytes, when all attributes agree."""


@record(frozen=True, slots=True)
class Scanned:
    """A layer over its parent.

    Attributes:
        root: the root entry of the merged tree.
        usage: the layer's own use.
        pending: the records that are new.
        latest: the latest ctime in the layer, nanoseconds: the time of its last change.
        held: of a whole layer, the use of its tree; None of a delta.
        sums: the same in parts, on hosts that tell them.
    """

    root: Pair
    usage: Usage
    pending: Pending
    latest: int
    held: Usage | None = None
    sums: Sums | None = None


def locate(records: Records, root: Pair | None, path: bytes) -> tuple[Pair | None, bytes]:
    """The entry at a path of a merged tree, and the path of its data, or of its files: (pair, path)."""
    pair, base = root, b""
    if pair is not None:
        base = decode(pair).base or b""
    for name in path.split(b"/"):
        if not name:
            continue
        entry = decode(pair) if pair is not None else None
        if entry is None or entry.ref is None:
            return None, b""
        pair = find(records, entry.ref.storage, name)
        base = join(base, name)
        if pair is not None:
            entry = decode(pair)
            base = (entry.base if entry.is_dir else entry.path) or base
    return pair, base


class Frame:
    """One directory being read.

    Attributes:
        path: its path in the layer, and for users.
        below: the parent's record it starts from, or EMPTY.
        base: the path of that record's files; ``path`` if it starts from nothing.
        edits: this layer's changes of it.
    """

    __slots__ = (
        "base", "below", "cache", "edits", "entry", "fd", "implied", "many", "name", "nested", "path", "todo", "writer",
    )  # fmt: skip

    def __init__(
        self, fd: int, name: bytes, path: bytes, entry: Entry, below: Ref, base: bytes, implied: bytes
    ) -> None:
        self.fd = fd
        self.name = name
        self.path = path
        self.entry = entry
        self.below = below
        self.base = base
        self.implied = implied  # the place of it and of its files, if its entry has none
        self.edits: dict[bytes, Pair | None] = {}
        self.writer: Writer | None = None  # of a directory that starts from nothing
        self.nested = False
        self.cache: dict[bytes, Pair] | None = None
        self.many = False
        self.todo: Iterator[tuple[bytes, bool]] = iter(())

    def lower(self, records: Records, name: bytes) -> Pair | None:
        """The parent's entry of this name."""
        if self.below == EMPTY:
            return None
        if self.cache is None:
            if not self.many and records.record(self.below.storage)[:1] == b"L":
                return find(records, self.below.storage, name)
            self.cache = entries(records, self.below.storage)
        return self.cache.get(name)

    def place(self, name: bytes, actual: bytes) -> bytes | None:
        """The path field of an entry, for its real path."""
        return None if join(self.base, name) == actual else actual


class _Scan(ABC):
    """State common to both kinds of layer. Owner: one verb, one thread."""

    def __init__(
        self, root_fd: int, num: int, form: Form, base: Pair | None, records: Records, known: KnownDigest | None
    ) -> None:
        self.root_fd = root_fd
        self.fs = files.fs_name(root_fd)
        self.dev = os.fstat(root_fd).st_dev
        self.decodes = True  # whether this process may open by handle
        self.num = num
        self.form = form
        self.base = base
        self.pending = Pending(records)
        self.known = known
        self.names: Mapping[int, int] = {}
        self.links = True
        self.tally = Tally(self.fs, form)
        self.latest = 0
        self.counted: set[int] = set()  # inodes with several names

    def run(self) -> Scanned:
        fd = os.open(".", _DIR, dir_fd=self.root_fd)
        self.tally.root(fd)
        stack: list[Frame] = []
        try:
            stack.append(self.enter(None, b"", fd))
            while True:
                frame = stack[-1]
                child = next(frame.todo, None)
                if child is None:
                    pair = self.leave(frame)
                    if len(stack) == 1:
                        break
                    above = stack[-2]
                    if above.fd < 0:
                        above.fd = os.open("..", _DIR, dir_fd=frame.fd)
                    os.close(frame.fd)
                    stack.pop()
                    above.edits[frame.name] = pair
                elif child[1]:
                    stack.append(self.enter(frame, child[0], os.open(child[0], _DIR, dir_fd=frame.fd)))
                    if len(stack) > KEEP_OPEN:
                        old = stack[-KEEP_OPEN]
                        if old.fd >= 0:
                            os.close(old.fd)
                            old.fd = -1
                else:
                    st = os.stat(child[0], dir_fd=frame.fd, follow_symlinks=False)
                    if st.st_ctime_ns > self.latest:
                        self.latest = st.st_ctime_ns
                    self.file(frame, child[0], st)
                if frame.writer is not None and len(frame.edits) > _FLUSH:
                    self.flush(frame, frame.writer)
        finally:
            for frame in stack:
                if frame.fd >= 0:
                    os.close(frame.fd)
        return Scanned(pair, self.tally.usage(), self.pending, self.latest, sums=self.tally.sums())

    @abstractmethod
    def enter(self, above: Frame | None, name: bytes, fd: int) -> Frame:
        """Begin a directory that the layer has, open as ``fd``; no frame above: the root."""

    @abstractmethod
    def file(self, frame: Frame, name: bytes, st: os.stat_result) -> None:
        """Take an object that is no directory."""

    def leave(self, frame: Frame) -> Pair:
        if frame.below == EMPTY:
            writer = frame.writer or Writer(self.pending)
            if frame.writer is None:
                frame.edits = dict(sorted(frame.edits.items()))
            self.flush(frame, writer)
            ref = writer.done()
        elif frame.edits:
            ref = edit(self.pending, frame.below.storage, frame.edits)
        else:
            ref = frame.below
        path = None if frame.path == frame.implied else frame.path
        base = None if frame.base == frame.implied else frame.base
        entry = frame.entry._replace(ref=ref, path=path, base=base)
        if not frame.path:
            entry = entry._replace(flags=KNOWS_LINKS if self.links else 0)
        return encode(frame.name, entry)

    def flush(self, frame: Frame, writer: Writer) -> None:
        """Record the entries of a new directory so far, in the order of its names."""
        for name, pair in frame.edits.items():
            if pair is not None:
                writer.add(name, pair)
        frame.edits = {}

    def listed(self, frame: Frame) -> list[bytes]:
        """Start reading the frame's names (all at once: the layer is not changing)."""
        names: list[bytes] = []
        inner: set[bytes] = set()
        marks: list[bytes] = []
        with os.scandir(frame.fd) as listing:
            for entry in listing:
                name = os.fsencode(entry.name)
                if self.form.dotwh and name.startswith(whiteout.WH_PREFIX):
                    marks.append(name)
                    continue
                names.append(name)
                if entry.is_dir(follow_symlinks=False):
                    inner.add(names[-1])
        frame.many = len(names) > _MANY
        if frame.below == EMPTY and len(names) > _FLUSH:
            names.sort()
            frame.writer = Writer(self.pending)
        for mark in marks:  # a whiteout beside the name in this layer hides the lower objects
            target = whiteout.wh_target(mark)
            if target is not None:
                self.tally.hide(mark)
                frame.edits[target] = None
        frame.todo = ((name, name in inner) for name in names)
        return names

    def count(
        self, fd: int, name: bytes, st: os.stat_result, stored: dict[bytes, bytes], *, entry: bytes, data: bool
    ) -> None:
        """Add one object, whose name is ``entry``, to the usage (:mod:`cowfs.union.measure`)."""
        self.tally.names += self.tally.name_cost(entry)
        if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
            if st.st_ino in self.counted:
                return
            self.counted.add(st.st_ino)
        self.tally.inode(fd, name, st, {key: len(value) for key, value in stored.items()}, data=data)

    def visible(self, stored: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Extended attributes as users see them, in the order of their names."""
        if not stored:
            return ()
        show = self.form.show_name
        return tuple(sorted((shown, value) for key, value in stored.items() if (shown := show(key)) is not None))

    def make(self, frame: Frame, name: bytes, st: os.stat_result, stored: dict[bytes, bytes]) -> Entry:
        """An entry whose data is in this layer."""
        mode = st.st_mode
        path = join(frame.path, name)
        target, digest = b"", None
        if stat.S_ISLNK(mode):
            target = os.readlink(name, dir_fd=frame.fd)
        elif self.known is not None and stat.S_ISREG(mode):
            digest = self.known(path, st)
        names = self.names.get(st.st_ino, st.st_nlink)
        return Entry(
            mode, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, st.st_ino, st.st_blocks,
            st.st_rdev if mode & 0o170000 in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            names, target, self.visible(stored), self.num, frame.place(name, path), digest,
            link=(self.num, st.st_ino) if names != 1 and self.links else None,
        )  # fmt: skip


def _hides_by_name(above: Frame | None, name: bytes, fd: int) -> bool:
    """Whether a name in a directory, or beside it, makes it hide all that is beneath it."""
    beside = above is not None and name in above.edits and above.edits[name] is None
    return beside or whiteout.exists(fd, whiteout.WH_OPAQUE)


def _directory(st: os.stat_result, num: int, xattrs: tuple[tuple[bytes, bytes], ...], ino: int) -> Entry:
    return Entry(
        st.st_mode, st.st_uid, st.st_gid, 0, st.st_mtime_ns, ino, st.st_blocks, nlink=0, xattrs=xattrs, layer=num
    )


class _Delta(_Scan):
    """A layer in the kernel's overlay format over its parent's tree."""

    def enter(self, above: Frame | None, name: bytes, fd: int) -> Frame:
        st = os.fstat(fd)
        self.latest = max(self.latest, st.st_ctime_ns)
        stored = xattr.read_all(fd, b"")
        form = self.form
        path = join(above.path, name) if above is not None else b""
        implied = join(above.base, name) if above is not None else b""
        opaque = stored.get(form.opaque, b"")
        below, base, ino = EMPTY, path, st.st_ino
        if not (_hides_by_name(above, name, fd) if form.dotwh else False) and (opaque != b"y" or above is None):
            redirect = stored.get(form.redirect) if form.redirects else None
            if above is None:
                pair, base = locate(self.pending, self.base, b"")
            elif redirect is None:
                pair, base = above.lower(self.pending, name), implied
            elif redirect.startswith(b"/"):
                pair, base = locate(self.pending, self.base, redirect[1:])
            else:
                pair, base = above.lower(self.pending, redirect), join(above.base, redirect)
            entry = decode(pair) if pair is not None else None
            if entry is not None and entry.ref is not None:
                below, base = entry.ref, base if entry.base is None else entry.base
                if above is None or form.origin in stored or redirect is not None:
                    ino = entry.ino
            if below == EMPTY:
                base = path
        if below == EMPTY and above is not None and form.origin in stored:  # a copy of one that a squash removed
            ino = self._number(stored[form.origin]) or ino
        frame = Frame(fd, name, path, _directory(st, self.num, self.visible(stored), ino), below, base, implied)
        frame.nested = opaque == b"x"
        if above is not None:
            self.count(fd, b"", st, stored, entry=name, data=False)
        self.listed(frame)
        return frame

    def file(self, frame: Frame, name: bytes, st: os.stat_result) -> None:
        if whiteout.is_whiteout(st):
            frame.edits[name] = None
            self.tally.hide(name)
            return
        stored = xattr.read_all(frame.fd, name)
        form = self.form
        if frame.nested and form.whiteout in stored and not st.st_size:
            frame.edits[name] = None
            self.tally.hide(name)
            return
        meta = form.redirects and form.metacopy in stored and stat.S_ISREG(st.st_mode)
        redirect = stored.get(form.redirect)
        data: tuple[Entry, bytes] | None = None
        if meta:
            data = self._data_of(frame, name, redirect)
            if data is None:
                raise Corrupt(f"{join(frame.path, name)!r} is a metacopy without data beneath it")
        elif form.row in stored:  # a redirect file without a map changes only attributes, if it shows all of its base
            row = RowRef.unpack(stored[form.row], name)
            if not row.has_map and row.base_end == st.st_size:
                data = self._data_of(frame, name, b"/" + row.path)
                if data is not None and data[0].size != st.st_size:
                    data = None
        self.count(frame.fd, name, st, stored, entry=name, data=data is None)
        entry = self.make(frame, name, st, stored)
        if data is not None:
            below, place = data
            entry = entry._replace(
                ino=below.ino, blocks=below.blocks, layer=below.layer, path=frame.place(name, place), digest=below.digest,
                flags=below.flags,
            )  # fmt: skip
        elif form.origin in stored:
            entry = entry._replace(ino=self._origin(frame, name, st, stored[form.origin]))
        frame.edits[name] = encode(name, entry)

    def _data_of(self, frame: Frame, name: bytes, redirect: bytes | None) -> tuple[Entry, bytes] | None:
        """The parent's entry whose data a file of this layer shows, and its path; None if there is none."""
        if redirect is None:
            pair, place = frame.lower(self.pending, name), join(frame.base, name)
        elif redirect.startswith(b"/"):
            pair, place = locate(self.pending, self.base, redirect[1:])
        else:
            pair, place = frame.lower(self.pending, redirect), join(frame.base, redirect)
        data = decode(pair) if pair is not None else None
        if data is None or not stat.S_ISREG(data.mode):
            return None
        return data, data.path or place

    def _origin(self, frame: Frame, name: bytes, st: os.stat_result, value: bytes) -> int:
        """The inode number of a copied-up object: that of the lower one, the same under all its names."""
        number = self._number(value)
        if (
            number is None and not self.decodes and st.st_nlink == 1
        ):  # the lower entry of a further name may be another file
            pair = frame.lower(self.pending, name)
            if pair is not None:
                entry = decode(pair)
                if entry.type == stat.S_IFMT(st.st_mode):
                    return entry.ino
        return number or st.st_ino

    def _number(self, origin: bytes) -> int | None:
        """The inode number of the file that an ``origin`` names, if it exists; a reused number does not count."""
        handle = handle_of(origin)
        if handle is None or not self.decodes:
            return None
        try:
            fd = files.open_handle(self.root_fd, *handle)
        except PermissionError:
            self.decodes = False
            return None
        except OSError:
            return None
        try:
            st = os.fstat(fd)
        finally:
            os.close(fd)
        return st.st_ino if st.st_dev == self.dev else None


class Full(_Scan):
    """A whole tree, compared with its parent's entry by entry.

    A file with several names keeps the parent's entries only if all its names were one and the same file there, too. A
    pass that finds other files (:meth:`torn`) is repeated, with these in ``own``.
    """

    same: SameAsParent

    def __init__(
        self, root_fd: int, num: int, form: Form, base: Pair | None, records: Records, known: KnownDigest | None
    ) -> None:
        super().__init__(root_fd, num, form, base, records, known)
        self.own: set[int] = set()
        self._files: dict[int, set[tuple[int, int]]] = {}  # inode with several names -> the files of their entries
        self._inodes: dict[tuple[int, int], int] = {}  # file -> an inode that has an entry of it

    def torn(self) -> set[int]:
        """Inodes whose names would become several files, or a part of one."""
        return {inode for inode, files in self._files.items() if len(files) > 1}

    def _file_of(self, inode: int, before: Entry | None) -> bool:
        """Note the file of a name of an inode. Returns whether that is the parent's, ``before``."""
        keeps = before is not None and inode not in self.own
        file = before.file if before is not None and keeps else (self.num, inode)
        said = self._files.setdefault(inode, set())
        said.add(file)
        other = self._inodes.setdefault(file, inode)
        if other != inode:
            said.add((self.num, inode))
            self._files[other].add((self.num, other))
        return keeps

    def enter(self, above: Frame | None, name: bytes, fd: int) -> Frame:
        st = os.fstat(fd)
        self.latest = max(self.latest, st.st_ctime_ns)
        stored = xattr.read_all(fd, b"")
        path = join(above.path, name) if above is not None else b""
        pair = above.lower(self.pending, name) if above is not None else self.base
        before = decode(pair) if pair is not None else None
        below = before.ref if before is not None and before.ref is not None else EMPTY
        entry = _directory(st, self.num, self.visible(stored), st.st_ino)
        if before is not None and before.ref is not None and _same_attributes(before, entry):
            entry = before
        frame = Frame(fd, name, path, entry, below, path, path)
        if above is not None:
            self.count(fd, b"", st, stored, entry=name, data=False)
        self.list(above, frame)
        return frame

    def list(self, above: Frame | None, frame: Frame) -> None:
        """Find the names of a directory to read, and the parent's names that are gone."""
        found = self.listed(frame)
        if frame.below != EMPTY:
            frame.many = True
            here = set(found)
            for gone in entries(self.pending, frame.below.storage):
                if gone not in here:
                    frame.edits[gone] = None

    def file(self, frame: Frame, name: bytes, st: os.stat_result) -> None:
        stored = xattr.read_all(frame.fd, name)
        self.count(frame.fd, name, st, stored, entry=name, data=True)
        entry = self.make(frame, name, st, stored)
        pair = frame.lower(self.pending, name)
        before = decode(pair) if pair is not None else None
        if before is not None and not (
            _same_attributes(before, entry)
            and (not stat.S_ISREG(st.st_mode) or not st.st_size or self.same(join(frame.path, name), st, before))
        ):
            before = None
        if st.st_nlink == 1:
            if before is not None:
                return
        elif self._file_of(st.st_ino, before):
            return
        if before is not None and entry.digest is None:
            entry = entry._replace(digest=before.digest)
        frame.edits[name] = encode(name, entry)


def _same_attributes(a: Entry, b: Entry) -> bool:
    """Whether all that users see of two entries agrees, the data of files apart."""
    return (
        a.mode == b.mode
        and a.uid == b.uid
        and a.gid == b.gid
        and a.mtime_ns == b.mtime_ns
        and (a.is_dir or (a.size == b.size and a.nlink == b.nlink))
        and a.rdev == b.rdev
        and a.target == b.target
        and a.xattrs == b.xattrs
    )


def scan_delta(
    root_fd: int,
    *,
    num: int,
    form: Form,
    base: Pair | None,
    records: Records,
    known: KnownDigest | None = None,
    names: Mapping[int, int] | None = None,
    links: bool = True,
) -> Scanned:
    """Read an overlay layer over its parent's tree.

    Args:
        root_fd: the layer's root directory.
        num: the layer's number in the records.
        form: the xattr form of its whiteouts and marks.
        base: the parent's root entry; None when there is no parent.
        records: the index.
        known: digests of files that are known already.
        names: inode -> its names, for files that have further names outside the layer, which are about to go.
        links: record the identity of files with several names; without, the records are those of before 2026-12.

    Raises:
        Corrupt: a metacopy has no data beneath it, or the parent's records are incomplete.
        OSError: the layer cannot be read.
    """
    delta = _Delta(root_fd, num, form, base, records, known)
    delta.names, delta.links = names or {}, links
    return delta.run()


def scan_full(
    root_fd: int,
    *,
    num: int,
    form: Form,
    base: Pair | None,
    records: Records,
    same: SameAsParent,
    known: KnownDigest | None = None,
    links: bool = True,
) -> Scanned:
    """Read a layer that is a whole tree; ``usage`` is that of the whole tree.

    Args:
        same: called with files that agree with the parent's in all attributes.
        links: as for :func:`scan_delta`.

    Raises:
        Corrupt: the parent's records are incomplete.
        OSError: the layer cannot be read.
    """
    own: set[int] = set()
    while True:
        scan = Full(root_fd, num, form, base, records, known)
        scan.same, scan.own, scan.links = same, own, links
        found = scan.run()
        torn = scan.torn() if links else set()
        if not torn:
            return found
        own |= torn
