"""Extraction of members into files: the only writer of archive content.

Strategy. One handler a member type, in a table. A handler creates its object exclusively
(O_EXCL and its likes never follow a link and never open what is there); only if the object exists already does it look
at the one in the way. Owner, mode, attributes and times are then set through the new descriptor
(:mod:`cowfs.archive.attributes`).

An object in the way is one of three. If this archive wrote it, the later member wins, and its predecessor's data goes
to the header log. If it was there before (a full tree, a non-empty upper), it is removed, as the layer demands. If it
is a whiteout, it goes, and a directory in its place is opaque. A set of path hashes tells the first two apart; a target
that started empty needs none.

Rule 1: nothing in the archive names anything outside the target: see :mod:`cowfs.archive.dirs`.
Rule 2: the overlay's whiteout device is never taken from an archive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable

from cowfs.archive import header
from cowfs.archive.attributes import PLAIN_END, SET_ID, Attributes, drop_acls, drop_xattr
from cowfs.archive.clear import lstat, remove_tree
from cowfs.archive.content import Content, write
from cowfs.archive.dirs import Dir, Dirs
from cowfs.archive.guests import Guests
from cowfs.archive.header import Member
from cowfs.archive.headerlog import LogWriter
from cowfs.archive.names import WHITEOUT_PREFIX, Meaning, canonical, meaning, show
from cowfs.archive.options import ApplyOptions, Budget, LowerStat, Tree
from cowfs.archive.reader import Reader
from cowfs.archive.written import Displaced, Written
from cowfs.errors import CowfsError, InvalidArgument, LimitExceeded, Unsupported
from cowfs.format import whiteout
from cowfs.sys import xattr

__all__ = ["Extractor"]

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNIT = 4096  # the least room on a host for a directory, or for a piece of a sparse file

_KINDS = {header.CHAR: stat.S_IFCHR, header.BLOCKDEV: stat.S_IFBLK, header.FIFO: stat.S_IFIFO}


class Extractor:
    """Writes members below one directory.

    Args:
        target: descriptor of the layer directory (stays the caller's).
        form: the overlay form whiteouts are written in; None applies them to a full tree instead.
        reader: where member data comes from.
        lower: the tree below, for the attributes of parents that the archive does not have, and for hard
            links to files of it.
        log: gets the data that the finished layer no longer has.
        on_file: called with (path, sha256 hex) of each regular file whose data was hashed on the way.
        on_inode: called with (inode number, sha256 hex) of each regular file, "" where it was not hashed: the last call
            for an inode counts, whatever its names.
        budget: charged with the data on disk that is not in the archive.
    """

    def __init__(
        self,
        target: int,
        form: whiteout.Form | None,
        reader: Reader,
        options: ApplyOptions,
        *,
        lower: Tree | None = None,
        log: LogWriter | None = None,
        on_file: Callable[[bytes, str], object] | None = None,
        on_inode: Callable[[int, str], object] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._form, self._reader, self._options = form, reader, options
        self._lower, self._log = lower, log
        self._budget = budget or Budget(options.max_bytes)
        self.rooted = False
        self._content = Content(reader, on_file, on_inode)
        self._attr = Attributes(options)
        self._uid, self._gid = self._attr.uid, self._attr.gid
        self._owners = options.owners
        self._written = Written(target)
        self._older = not self._written.all  # the target may hold older objects
        self._displaced = Displaced(log, reader, self._written)
        self.dirs = Dirs(target, self._implied, check_acl=self._older)
        self._head: bytes | None = None  # the directory of the member before, as the archive spells it,
        self._home: Dir | None = None  # and as it was found
        self._short = min(255, options.max_path)
        self.dropped = self._attr.dropped
        self.whiteouts = self.skipped = self.reserved = self._ordinal = 0
        self._made_whiteouts = self._older and form is not None
        self._guests = Guests(self, lower if form is not None else None)
        if not self._older:
            try:
                self._set_implied(self.dirs.root)
            except BaseException:
                self.dirs.abandon()
                raise

    def extract(self, member: Member) -> None:
        """Write one member. The reader skips its unread data.

        Raises:
            CowfsError: the member is refused; the message names it.
            OSError: the target failed (ENOSPC, EIO...); its file name is the member's.
        """
        options = self._options
        self._ordinal = member.ordinal
        try:
            if member.size > options.max_file:
                raise LimitExceeded(f"file of {member.size} bytes, at most {options.max_file} are allowed")
            head, _, base = member.name.rpartition(b"/")
            last = self.dirs.last
            if (
                head == self._head and last is self._home
                and base and base[0] != 46 and len(member.name) <= self._short and 0 not in base
            ):  # fmt: skip
                # a plain name next to the one before: all the checks of its directory were made then
                path = last.path + b"/" + base
                _HANDLERS[member.type](self, member, last, base, path)
                if self._older or self._guests:
                    self._note(path)
                return
            self._head = None
            marks = options.whiteouts
            path = canonical(member.name, max_path=options.max_path, max_depth=options.max_depth, whiteouts=marks)
            what, path = meaning(path) if marks else self._ordinary(path)
            if what is Meaning.ENTRY:
                if not path:
                    self._root(member)
                    return
                parent_path, _, name = path.rpartition(b"/")
                _HANDLERS[member.type](self, member, self.dirs.get(parent_path), name, path)
                if self._older or self._guests:
                    self._note(path)
                if base and parent_path and self.dirs.last.path == parent_path:
                    self._head, self._home = head, self.dirs.last
            else:
                self._special(member, what, path)
        except CowfsError:
            raise
        except OverflowError:
            raise InvalidArgument(f"a time of {member.mtime} ns is out of range") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.label(member)) from error

    def _ordinary(self, path: bytes) -> tuple[Meaning, bytes]:
        """A name of a whole tree, taken literally."""
        if WHITEOUT_PREFIX in path and any(part.startswith(WHITEOUT_PREFIX) for part in path.split(b"/")):
            self.reserved += 1
            if self._log is not None:
                self._log.give_up()
        return Meaning.ENTRY, path

    def finish(self) -> None:
        """Finish: set the times of directories and report the last digests."""
        self._content.finish()
        self.dirs.finish()

    def abandon(self) -> None:
        """Give descriptors and threads back after an error."""
        self._content.abandon()
        self.dirs.abandon()

    @staticmethod
    def label(member: Member) -> str:
        """The name of a member in error messages."""
        return f"archive entry {member.ordinal} {show(member.name)}"

    # For guests ---------------------------------------------------------------------------------

    def bring_file(self, home: Dir, name: bytes, path: bytes, st: LowerStat, lower: Tree) -> None:
        """Copy a regular file of the layers beneath: attributes, data without its holes."""
        fd = os.open(name, _CREATE, 0o600, dir_fd=home.fd)
        try:
            self._charge(_UNIT)
            for offset, data in lower.data(path):
                self._charge(len(data))
                os.lseek(fd, offset, os.SEEK_SET)
                write(fd, memoryview(data))
            os.truncate(fd, st.size)
            self._content.tell(fd, path, "")
            self._attr.set(fd, st.uid, st.gid, stat.S_IMODE(st.mode), "file", lower.xattrs(path), regroup=True)
            os.utime(fd, ns=(st.mtime, st.mtime))
        finally:
            os.close(fd)

    def bring_other(self, member: Member, home: Dir, name: bytes, path: bytes) -> None:
        """Make a link, a FIFO or a device as for a member of the archive."""
        _HANDLERS[member.type](self, member, home, name, path)

    def written(self, path: bytes) -> None:
        """Record that the object at this path is not older than the archive."""
        self._written.add(path)

    # Whiteouts --------------------------------------------------------------------------------

    def _special(self, member: Member, what: Meaning, path: bytes) -> None:
        if what is Meaning.SKIP:
            self.skipped += 1
        else:
            if member.type not in (header.REGULAR, header.LINK):
                raise InvalidArgument("a whiteout must be a regular file")
            self.whiteouts += 1
            if what is Meaning.OPAQUE:
                self._guests.dismiss(path, itself=False)
                self._opaque(path)
                self._note(path)
            else:
                self._guests.dismiss(path, itself=True)
                parent_path, _, name = path.rpartition(b"/")
                self._whiteout(self.dirs.get(parent_path), name, path)
                self._note(parent_path)
        if member.stored and self._log is not None:
            self._log.saved(member.name, member.ordinal, self._reader.data())

    def _whiteout(self, parent: Dir, name: bytes, path: bytes) -> None:
        if self._form is not None:
            try:
                whiteout.make(parent.fd, name)
                self._made_whiteouts = True
                return
            except FileExistsError:
                pass
        st = lstat(parent.fd, name)
        if st is None:
            return
        if self._is_whiteout(st):
            return
        if self._written.has(path):
            # A whiteout concerns lower layers only (layer.md): the new entry stays, the lower ones go.
            if stat.S_ISDIR(st.st_mode):
                self._opaque(path)
            return
        self._remove(parent, name, path, st)
        if self._form is not None:
            whiteout.make(parent.fd, name)
            self._made_whiteouts = True

    def _opaque(self, path: bytes) -> None:
        if self._older:
            self._remove_older(path)
        if path or self._form is None:
            self._seal(self.dirs.get(path))
            return
        # The root of a layer cannot be opaque: overlayfs always goes on beneath it. Each name there is hidden for itself.
        self.dirs.root.sealed = True
        for name in self._lower.names(b"") if self._lower is not None else ():
            st = lstat(self.dirs.root.fd, name)
            if st is None:
                whiteout.make(self.dirs.root.fd, name)
                self._made_whiteouts = True
            elif stat.S_ISDIR(st.st_mode):
                self._seal(self.dirs.get(name))

    def _seal(self, found: Dir) -> None:
        found.sealed = True
        if self._form is not None:
            os.setxattr(found.fd, self._form.opaque, b"y")
            if self._older and xattr.try_get(found.fd, b"", self._form.redirect) is not None:
                os.removexattr(found.fd, self._form.redirect)

    def _remove_older(self, path: bytes) -> None:
        """Remove every object that this archive did not write, at any depth."""
        pending = [path]
        while pending:
            path = pending.pop()
            for listed in os.listdir(self.dirs.get(path).fd):
                name = os.fsencode(listed)
                child = path + b"/" + name if path else name
                found = self.dirs.get(path)
                st = lstat(found.fd, name)
                if st is None:
                    continue
                if not self._written.has(child):
                    self._remove(found, name, child, st)
                elif stat.S_ISDIR(st.st_mode):
                    pending.append(child)

    # Objects in the way ------------------------------------------------------------------------

    def _note(self, path: bytes) -> None:
        """Record that this path and the directories above it are the archive's from now on."""
        if self._guests:
            self._guests.adopt(path)
        self._written.add_way(path)

    def _is_whiteout(self, st: os.stat_result) -> bool:
        return self._form is not None and whiteout.is_whiteout(st)

    def _clear(self, parent: Dir, name: bytes, path: bytes) -> None:
        """Make room for a new object that is no directory."""
        st = lstat(parent.fd, name)
        if st is not None:
            self._remove(parent, name, path, st)

    def _remove(self, parent: Dir, name: bytes, path: bytes, st: os.stat_result) -> None:
        if stat.S_ISDIR(st.st_mode):
            self.dirs.forget(path)
            remove_tree(parent.fd, name, path, self._save)
            return
        self._save(parent.fd, name, path, st)
        os.unlink(name, dir_fd=parent.fd)

    def _save(self, dirfd: int, name: bytes, path: bytes, st: os.stat_result) -> None:
        self._displaced.save(dirfd, name, path, st, self._ordinal)

    # Directories ------------------------------------------------------------------------------

    def _charge(self, count: int) -> None:
        """Count bytes that reach the disk and are not in the archive, since they count for its bound, too."""
        self._budget.spend(count)

    def _make_dir(self, parent: Dir, name: bytes, path: bytes) -> Dir:
        """Make a new directory, in place of any other object."""
        sealed = False
        try:
            os.mkdir(name, 0o700, dir_fd=parent.fd)
        except FileExistsError:
            self._clear(parent, name, path)
            os.mkdir(name, 0o700, dir_fd=parent.fd)
            sealed = True
        made = Dir(os.open(name, _DIR, dir_fd=parent.fd), path, 0, 0)
        try:
            if parent.inherits:
                drop_acls(made.fd)
            if sealed:
                self._seal(made)
        except BaseException:
            os.close(made.fd)
            raise
        return made

    def _implied(self, parent: Dir, name: bytes, path: bytes) -> Dir:
        """Make a directory that the archive does not list before its contents."""
        st = lstat(parent.fd, name)
        if st is not None and not self._is_whiteout(st) and self._written.has(path):
            kind = "symbolic link" if stat.S_ISLNK(st.st_mode) else "file"
            raise InvalidArgument(f"its directory {show(path)} is a {kind} in this archive")
        self._charge(_UNIT)
        self._reader.count()
        made = self._make_dir(parent, name, path)
        try:
            self._set_implied(made)
        except BaseException:
            os.close(made.fd)
            raise
        self._written.add(path)
        return made

    def _set_implied(self, made: Dir) -> None:
        """Set a directory's attributes as in the layer below; without one there: 0755, root's (this user's without
        privilege), of the epoch."""
        st = None
        if self._lower is not None and not self._hidden(made):
            st = self._lower.stat(made.path)
        if st is None or not stat.S_ISDIR(st.mode):
            mode, uid, gid, mtime = 0o755, 0, 0, 0
            if self._uid and self._owners != "xattr":
                uid, gid = self._uid, self._gid
            attributes: dict[bytes, bytes] = {}
        else:
            mode, uid, gid, mtime = stat.S_IMODE(st.mode), st.uid, st.gid, st.mtime
            attributes = self._lower.xattrs(made.path) if self._lower else {}
        self._attr.set(made.fd, uid, gid, mode, "dir", attributes, regroup=True)
        self._held(made, mode)
        made.inherits = bool(mode & stat.S_ISGID) or b"system.posix_acl_default" in attributes
        made.atime = made.mtime = mtime

    def _hidden(self, made: Dir) -> bool:
        """Whether lower layers are hidden below a directory: it or one above it is opaque."""
        if made.sealed:
            return True
        if self._form is None:
            return False
        path = made.path
        while path:
            path = path.rpartition(b"/")[0]
            above = self.dirs.find(path)
            if above is not None and (above.sealed or whiteout.opaque_value(above.fd, self._form) == b"y"):
                return True
        return False

    def hides(self, path: bytes) -> bool:
        """Whether this layer hides a path of the layers beneath."""
        while path:
            path, _, name = path.rpartition(b"/")
            home = self.dirs.find(path)
            if home is None:
                continue
            st = lstat(home.fd, name)
            if st is not None and not stat.S_ISDIR(st.st_mode):
                return True  # a whiteout, or a file in place of a directory
            if home.sealed or (self._form is not None and whiteout.opaque_value(home.fd, self._form) == b"y"):
                return True
        return False

    def _held(self, found: Dir, mode: int) -> None:
        """Set a directory's mode; without privilege, a mode that its owner may not write is set when the directory
        leaves the cache."""
        if self._uid and mode & 0o700 != 0o700 and self._owners != "xattr":
            found.mode = stat.S_IMODE(os.fstat(found.fd).st_mode)
            os.chmod(found.fd, found.mode | 0o700)

    def make_directory(self, member: Member, parent: Dir, name: bytes, path: bytes) -> None:
        found = self.dirs.cached(path) or self.dirs.open_child(parent, name, path)
        old = found is not None
        if found is None:
            found = self._make_dir(parent, name, path)
        try:
            self._set_directory(member, found, old=old, regroup=old or parent.inherits)
        except BaseException:
            if self.dirs.cached(path) is not found:
                os.close(found.fd)
            raise
        if self.dirs.cached(path) is not found:
            self.dirs.keep(found)

    def _root(self, member: Member) -> None:
        self.rooted = True
        if member.type != header.DIRECTORY:
            raise InvalidArgument("the root of a layer must be a directory")
        self._set_directory(member, self.dirs.root, old=True, regroup=True)

    def _set_directory(self, member: Member, found: Dir, *, old: bool, regroup: bool) -> None:
        attributes = self._attr.wanted(member)
        if old and self._options.xattrs:
            for attribute in xattr.listx(found.fd, b""):
                if attribute not in attributes and not (self._form and self._form.is_own(attribute)):
                    drop_xattr(found.fd, attribute)
        found.mode = None
        self._attr.set(found.fd, member.uid, member.gid, member.mode, "dir", attributes, regroup=regroup)
        self._held(found, member.mode)
        found.inherits = bool(member.mode & stat.S_ISGID) or b"system.posix_acl_default" in attributes
        found.mtime = member.mtime
        found.atime = member.mtime if member.atime is None else member.atime
        if self._attr.doubtful(found.mtime) or not 0 <= found.atime < PLAIN_END:
            os.utime(found.fd, ns=(found.atime, found.mtime))
            self._attr.check_time(found.fd, found.mtime)

    def _check_time(self, fd: int, mtime: int) -> None:
        if self._attr.doubtful(mtime):
            self._attr.check_time(fd, mtime)

    # Files ------------------------------------------------------------------------------------

    def make_regular(self, member: Member, parent: Dir, name: bytes, path: bytes) -> None:
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent.fd)
        except FileExistsError:
            self._clear(parent, name, path)
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent.fd)
        try:
            if member.segments is not None:
                self._charge(_UNIT * (len(member.segments) // 2))
            self._content.fill(fd, member, path)
            uid, gid, mtime = member.uid, member.gid, member.mtime
            if parent.inherits or member.xattrs is not None or self._owners != "fail":
                if parent.inherits:
                    drop_acls(fd)
                self._attr.set(fd, uid, gid, member.mode, "file", self._attr.wanted(member), regroup=parent.inherits)
            else:
                if uid != self._uid or gid != self._gid:
                    self._attr.chown(fd, uid, gid)
                os.fchmod(fd, member.mode)
            os.utime(fd, ns=(mtime if member.atime is None else member.atime, mtime))
            if mtime % header.NANO or not 0 <= mtime < PLAIN_END:
                self._check_time(fd, mtime)
        finally:
            os.close(fd)

    def make_hardlink(self, member: Member, parent: Dir, name: bytes, path: bytes) -> None:
        options = self._options
        source = canonical(member.linkname, max_path=options.max_path, max_depth=options.max_depth)
        if options.whiteouts and meaning(source)[0] is not Meaning.ENTRY:
            raise InvalidArgument(f"hard link to the whiteout {show(source)}")
        if source.startswith(path + b"/"):
            raise InvalidArgument(f"hard link in place of the directory of its target {show(source)}")
        source_parent, _, source_name = source.rpartition(b"/")
        home = self.dirs.find(source_parent) if source else None
        st = None
        if home is not None and (self._made_whiteouts or self._older or source == path):
            st = lstat(home.fd, source_name)
            if st is None or self._is_whiteout(st):
                if st is not None:
                    raise InvalidArgument(f"hard link to {show(source)}, which this layer deletes")
                home = None
            elif source == path:
                return
        try:
            if home is None:
                raise FileNotFoundError
            self._link(home, source_name, parent, name, path)
        except FileNotFoundError:
            home = self._guests.bring(member, source)
            self._link(home, source_name, self.dirs.get(parent.path), name, path)
        except PermissionError:
            raise InvalidArgument(f"hard link to {show(source)}, which is not a file") from None

    def _link(self, home: Dir, source: bytes, parent: Dir, name: bytes, path: bytes) -> None:
        """link(2), never through a symbolic link."""
        try:
            os.link(source, name, src_dir_fd=home.fd, dst_dir_fd=parent.fd, follow_symlinks=False)
        except FileExistsError:
            self._clear(parent, name, path)
            os.link(source, name, src_dir_fd=home.fd, dst_dir_fd=parent.fd, follow_symlinks=False)

    def make_symlink(self, member: Member, parent: Dir, name: bytes, path: bytes) -> None:
        target = member.linkname
        if not target or b"\0" in target:
            raise InvalidArgument("a symbolic link needs a target without NUL")
        if len(target) > 4095:
            raise InvalidArgument("a symbolic link's target is longer than 4095 bytes")
        try:
            os.symlink(target, name, dir_fd=parent.fd)
        except FileExistsError:
            self._clear(parent, name, path)
            os.symlink(target, name, dir_fd=parent.fd)
        if member.uid != self._uid or member.gid != self._gid or parent.inherits:
            self._attr.chown_name(parent.fd, name, member)
        self._attr.name_xattrs(parent.fd, name, member)
        self._attr.name_times(parent.fd, name, member)

    def make_node(self, member: Member, parent: Dir, name: bytes, path: bytes) -> None:
        kind = _KINDS[member.type]
        device = os.makedev(*member.device) if kind != stat.S_IFIFO else 0
        if kind == stat.S_IFCHR and device == 0:
            raise InvalidArgument(
                "character device 0/0 is the overlay's whiteout", remedy="a layer archive deletes with .wh. names"
            )
        if self._owners == "xattr":
            self._stand_in(member, parent, name, path)
            return
        for again in (False, True):
            try:
                os.mknod(name, kind | 0o600, device, dir_fd=parent.fd)
                break
            except FileExistsError:
                if again:
                    raise
                self._clear(parent, name, path)
            except PermissionError:
                if self._owners == "fail":
                    raise Unsupported(
                        "a device needs privilege to be made",
                        remedy="run as root, or choose --owners xattr or --owners ignore",
                    ) from None
                self.skipped += 1
                return
        # opening a FIFO or a device has effects: work by name, and by an O_PATH handle for the mode
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd)
        try:
            kept = True
            if member.uid != self._uid or member.gid != self._gid or parent.inherits:
                kept = self._attr.chown_name(parent.fd, name, member)
            os.chmod(f"/proc/self/fd/{handle}", member.mode if kept else member.mode & ~SET_ID)
        finally:
            os.close(handle)
        self._attr.name_xattrs(parent.fd, name, member)
        self._attr.name_times(parent.fd, name, member)

    def _stand_in(self, member: Member, parent: Dir, name: bytes, path: bytes) -> None:
        """Make an empty file that stands for an object that a user cannot make."""
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent.fd)
        except FileExistsError:
            self._clear(parent, name, path)
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent.fd)
        kind = "pipe"
        if member.type != header.FIFO:
            kind = f"{'char' if member.type == header.CHAR else 'block'}-{member.device[0]}-{member.device[1]}"
        try:
            self._attr.set(fd, member.uid, member.gid, member.mode, kind, self._attr.wanted(member))
            os.utime(fd, ns=(member.mtime, member.mtime))
            self._check_time(fd, member.mtime)
        finally:
            os.close(fd)


_Handler = Callable[[Extractor, Member, Dir, bytes, bytes], None]
_HANDLERS: dict[bytes, _Handler] = {
    header.REGULAR: Extractor.make_regular,
    header.LINK: Extractor.make_hardlink,
    header.SYMLINK: Extractor.make_symlink,
    header.CHAR: Extractor.make_node,
    header.BLOCKDEV: Extractor.make_node,
    header.DIRECTORY: Extractor.make_directory,
    header.FIFO: Extractor.make_node,
}


def _complete(types: Iterable[bytes]) -> bool:
    return set(_HANDLERS) == set(types)


assert _complete(header.NO_DATA | {header.REGULAR})
