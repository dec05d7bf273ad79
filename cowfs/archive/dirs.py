"""The directories an extraction writes into: open descriptors, never paths.

Strategy. Every change is made relative to an open directory, so a name can only ever lead one
step down. Directories stay open in a bounded cache, most recently used last. When one leaves
the cache its times (and, without privilege, its mode) are set, since writing into it changed
them; when a later entry comes back to it they are read first and restored again. So an archive
in any order leaves every directory as recorded, and memory does not grow with the archive.

Rule 1: opening never follows a symbolic link; a link where a directory is needed is an error
if this archive made it, and is replaced like any other file if it was there before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from cowfs.sys import xattr
from cowfs.sys.files import open_beneath

__all__ = ["Dir", "Dirs"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BEHIND = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class Dir:
    """One open directory.

    Attributes:
        fd: owned by the cache, closed when it leaves. path: canonical, ``b""`` for the root.
        atime, mtime: nanoseconds, set when it leaves. mode: set when it leaves, if not None.
        inherits: new entries get group or ACL from it, so both must be set anew on each.
        sealed: lower layers are hidden below it (opaque, or new in place of something else).
    """

    __slots__ = ("atime", "fd", "inherits", "mode", "mtime", "path", "sealed")

    def __init__(self, fd: int, path: bytes, atime: int, mtime: int) -> None:
        self.fd, self.path, self.atime, self.mtime = fd, path, atime, mtime
        self.mode: int | None = None
        self.inherits = False
        self.sealed = False


class Dirs:
    """Open directories by path.

    Args:
        root_fd: the layer directory; stays the caller's.
        create: makes (or clears the way for) the directory ``name`` in its parent and returns
            it opened; called with (parent, name, path) when no directory can be opened.
        check_acl: look at existing directories for a default ACL.
        capacity: open descriptors at most.

    The holder of a :class:`Dir` may use it until the second directory after it is got or found: the last two never leave.
    """

    def __init__(
        self, root_fd: int, create: Callable[[Dir, bytes, bytes], Dir], *, check_acl: bool, capacity: int = 256
    ) -> None:
        self._create = create
        self._check_acl = check_acl
        self._capacity = max(capacity, 16)
        self._open: dict[bytes, Dir] = {}
        self._closed = False
        self.root = self._adopt(os.open(".", _OPEN, dir_fd=root_fd), b"")
        self.last = self.root

    def _adopt(self, fd: int, path: bytes) -> Dir:
        st = os.fstat(fd)
        found = Dir(fd, path, st.st_atime_ns, st.st_mtime_ns)
        found.inherits = bool(st.st_mode & stat.S_ISGID) or (self._check_acl and has_default_acl(fd))
        if st.st_mode & 0o300 != 0o300 and os.geteuid():  # without privilege we cannot write into our own
            found.mode = stat.S_IMODE(st.st_mode)
            os.chmod(fd, found.mode | 0o700)
        return found

    def get(self, path: bytes) -> Dir:
        """The directory at a canonical path, made with all its parents where it is missing."""
        last = self.last
        if last.path == path:
            return last
        found = self._open.pop(path, None)
        if found is not None:
            self._open[path] = found
            self.last = found
            return found
        if not path:
            self.last = self.root
            return self.root
        found = self.find(path)
        if found is None:
            found = self._walk(path)
        self.last = found
        return found

    def find(self, path: bytes) -> Dir | None:
        """The directory if it exists, reached through directories only."""
        if not path:
            return self.root
        found = self._open.get(path)
        if found is not None:
            return found
        try:
            fd = open_beneath(self.root.fd, path, _OPEN)
        except OSError as error:
            if error.errno == errno.EACCES:
                return None  # the walk can open it by the owner's rights
            if error.errno not in _BEHIND:
                raise
            return None
        return self.keep(self._adopt(fd, path))

    def _walk(self, path: bytes) -> Dir:
        missing: list[bytes] = []
        here: Dir | None = None
        rest = path
        while here is None:
            rest, _, name = rest.rpartition(b"/")
            missing.append(name)
            here = self._open.get(rest) if rest else self.root
        # the deepest open ancestor, then down; directories opened on the way stay in the cache
        for name in reversed(missing):
            below = here.path + b"/" + name if here.path else name
            here = self.keep(self.open_child(here, name, below) or self._create(here, name, below))
        return here

    def open_child(self, parent: Dir, name: bytes, path: bytes) -> Dir | None:
        """An existing sub-directory, not yet in the cache; None if the name is missing or no directory."""
        try:
            fd = os.open(name, _OPEN, dir_fd=parent.fd)
        except OSError as error:
            if error.errno == errno.EACCES:
                return self._open_closed(parent, name, path)
            if error.errno not in _BEHIND:
                raise
            return None
        return self._adopt(fd, path)

    def _open_closed(self, parent: Dir, name: bytes, path: bytes) -> Dir:
        """Open a directory of this user whose mode keeps its owner out."""
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent.fd)
        try:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.chmod(f"/proc/self/fd/{handle}", mode | 0o700)
        finally:
            os.close(handle)
        found = self._adopt(os.open(name, _OPEN, dir_fd=parent.fd), path)
        found.mode = mode
        return found

    def keep(self, found: Dir) -> Dir:
        """Put an opened directory into the cache; the longest unused one may leave it, but never the one got last."""
        old = self._open.pop(found.path, None)
        if old is not None:
            os.close(old.fd)
        self._open[found.path] = found
        if len(self._open) > self._capacity:
            oldest = next(path for path, open_dir in self._open.items() if open_dir is not self.last)
            self._leave(self._open.pop(oldest))
        return found

    def cached(self, path: bytes) -> Dir | None:
        """The directory if it is open right now."""
        return self._open.get(path) if path else self.root

    @staticmethod
    def _leave(found: Dir) -> None:
        try:
            if found.mode is not None:
                os.chmod(found.fd, found.mode)
            os.utime(found.fd, ns=(found.atime, found.mtime))
        finally:
            os.close(found.fd)

    def forget(self, path: bytes) -> None:
        """Drop a directory and all below it: it is about to be removed."""
        below = path + b"/"
        for key in [key for key in self._open if key == path or key.startswith(below)]:
            os.close(self._open.pop(key).fd)
        if self.last.path == path or self.last.path.startswith(below):
            self.last = self.root

    def finish(self) -> None:
        """Everything leaves, the root last."""
        while self._open:
            self._leave(self._open.popitem()[1])
        self._closed = True
        self._leave(self.root)

    def abandon(self) -> None:
        """Close the descriptors and set nothing."""
        while self._open:
            os.close(self._open.popitem()[1].fd)
        if not self._closed:
            self._closed = True
            os.close(self.root.fd)


def has_default_acl(fd: int) -> bool:
    """Whether new entries of this directory inherit an ACL."""
    try:
        return bool(os.getxattr(fd, "system.posix_acl_default"))
    except OSError as error:
        if error.errno not in xattr.ABSENT:
            raise
        return False
