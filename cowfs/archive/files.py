"""A plain tar into a tree by path (``cowfs cp - KEY:DIR``), as tar(1) unpacks it in a chroot.

No member deletes: names that begin with ``.wh.`` are ordinary. Existing objects are replaced, directories are merged. A
link, old or from the archive, is followed inside the tree's root where it stands for a directory on the way, and
nowhere else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from cowfs._typed import BinaryIO
from cowfs.archive import header
from cowfs.archive.attributes import is_smuggled
from cowfs.archive.compress import Unpacker
from cowfs.archive.header import Member
from cowfs.archive.members import TYPES
from cowfs.archive.names import canonical
from cowfs.archive.options import ApplyOptions
from cowfs.archive.reader import Reader, blame
from cowfs.errors import CowfsError, InvalidArgument
from cowfs.union.transfer import Copied, Target, dress
from cowfs.union.tree import LowerStat, resolve

__all__ = ["unpack_files"]

_FORMATS = {kind: form for form, kind in TYPES.items()}


def unpack_files(
    stream: BinaryIO,
    target: Target,
    where: bytes,
    *,
    owners: bool,
    options: ApplyOptions | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Copied:
    """Unpack a tar, plain or compressed, into a directory of a tree.

    Args:
        stream: read from front to end: a pipe will do.
        where: the directory, canonical.
        owners: as for :func:`cowfs.union.transfer.copy`.
        options: its bounds are those of a stranger's archive.
        progress: called with (bytes read, members) so far.

    Raises:
        InvalidArgument: not a tar, a damaged or hostile one; the message names the entry.
        LimitExceeded: past a bound.
        OSError: of the tree; its file name is the member's.
    """
    options = options or ApplyOptions()
    source = Unpacker(stream, max_bytes=options.max_bytes)
    try:
        reader = Reader(source, max_header=options.max_header, max_entries=options.max_entries)
        made = _Unpacking(target, where, reader, options, owners)
        for member in reader:
            try:
                made.member(member)
            except CowfsError as error:
                raise blame(error, member.ordinal, member.name) from error
            except OSError as error:
                error.filename = error.filename or member.name
                raise
            if progress is not None:
                progress(source.read_bytes, reader.entries)
        source.finish()
    except BaseException:
        source.stop()
        raise
    made.finish()
    return Copied(reader.entries, made.bytes)


class _Unpacking:
    def __init__(self, target: Target, where: bytes, reader: Reader, options: ApplyOptions, owners: bool) -> None:
        self._target, self._where, self._reader = target, where, reader
        self._options, self._owners = options, owners
        self._directories: dict[bytes, tuple[LowerStat, dict[bytes, bytes]]] = {}
        self._parent: tuple[bytes, bytes] = (b"", where)
        self.bytes = 0

    def member(self, member: Member) -> None:
        options = self._options
        path = canonical(member.name, max_path=options.max_path, max_depth=options.max_depth)
        if not path:
            return  # the directory itself stays as it is
        form = stat.S_IFREG if member.type == header.LINK else _FORMATS.get(member.type)
        if form is None:
            raise InvalidArgument(f"an entry of type {member.type!r} cannot be unpacked")
        parent, _, name = path.rpartition(b"/")
        at = self._join(self._directory(parent), name)
        st = LowerStat(
            mode=form | member.mode, uid=member.uid, gid=member.gid, size=member.size, mtime=member.mtime,
            rdev=os.makedev(*member.device),
        )  # fmt: skip
        xattrs = {key: value for key, value in (member.xattrs or {}).items() if not is_smuggled(key)}
        target, had = self._target, self._target.stat(at)
        if form == stat.S_IFDIR:
            if had is not None and not stat.S_ISDIR(had.mode):
                target.remove(at)
                had = None
            if had is None:
                target.mkdir(at)
            self._directories[at] = st, xattrs  # later: its mode may forbid writing in it
            return
        if had is not None and stat.S_ISDIR(had.mode):
            raise InvalidArgument("it would replace a directory that is there", remedy="remove that first")
        if had is not None:
            target.remove(at)
        if member.type == header.LINK:
            first = canonical(member.linkname, max_path=options.max_path, max_depth=options.max_depth)
            above, _, last = first.rpartition(b"/")
            old = self._join(self._directory(above, make=False), last)
            found = target.stat(old)
            if found is None or stat.S_ISDIR(found.mode):
                raise InvalidArgument(f"it is a link to {os.fsdecode(first)!r}, which is no file that is there")
            target.link(old, at)
            return
        if form == stat.S_IFREG:
            target.write(at, member.size, self._pieces(member))
            self.bytes += member.size
        elif form == stat.S_IFLNK:
            target.symlink(at, member.linkname)
        else:
            target.mknod(at, st.mode, st.rdev)
        dress(target, at, st, xattrs, owners=self._owners)

    def finish(self) -> None:
        for at, (st, xattrs) in reversed(self._directories.items()):
            dress(self._target, at, st, xattrs, owners=self._owners)

    def _directory(self, path: bytes, *, make: bool = True) -> bytes:
        """The canonical path of a member's directory; parents that the archive does not list are made."""
        if path == self._parent[0]:
            return self._parent[1]
        at = self._where
        for part in path.split(b"/") if path else ():
            at = resolve(self._target, self._join(at, part))
            st = self._target.stat(at)
            if st is None and make:
                self._target.mkdir(at)
                self._target.chmod(at, 0o755)
            elif st is None or not stat.S_ISDIR(st.mode):
                raise InvalidArgument(f"{os.fsdecode(at)!r} is no directory")
        self._parent = path, at
        return at

    def _pieces(self, member: Member) -> Iterator[tuple[int, bytes]]:
        """A file's data with offsets; those of a sparse file are from its map."""
        spans = [0, member.size] if member.segments is None else list(member.segments)
        at, left = 0, 0
        for piece in self._reader.data():
            rest = memoryview(piece)
            while rest:
                while not left:
                    at, left = spans[0], spans[1]
                    del spans[:2]
                part = rest[:left]
                yield at, bytes(part)
                at, left, rest = at + len(part), left - len(part), rest[len(part) :]

    @staticmethod
    def _join(directory: bytes, name: bytes) -> bytes:
        return directory + b"/" + name if directory else name
