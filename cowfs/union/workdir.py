"""The work directory: where an object is built before one rename puts it in place, and what whiteouts are links of.

Rules: each name in it belongs to nobody once its process is gone, and the next mount removes it; an object gets its
place by rename(2) or link(2) only, so a crash leaves either all of it or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os

from cowfs._typed import TYPE_CHECKING
from cowfs.format.whiteout import Form, allow_nested, make as make_whiteout, make_nested
from cowfs.sys import files, trees
from cowfs.union.layers import Layer, Source

if TYPE_CHECKING:
    from cowfs.union.node import Node

__all__ = ["WorkDir", "clear"]

_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP = (b"incompat",)  # the kernel's marks of volatile mounts; who mounts honours them (cowfs.mounting.volatile)


class WorkDir:
    """The work directory: temporary names, and the one whiteout inode.

    Everything is kept in its sub-directory ``work``, as the kernel does, and what a killed
    process left there is removed when it is opened.

    On a host that is an overlay itself (a container's root) nobody may make a device 0/0. Whiteouts are then the
    kernel's nested ones: from the first on, the directories that get one and the upper's root are marked before.
    """

    def __init__(self, path: bytes, upper: Layer, form: Form) -> None:
        outer = os.open(path, _DIR_FLAGS & ~os.O_NOFOLLOW)
        try:
            if os.fstat(outer).st_dev != upper.dev:
                raise OSError(errno.EXDEV, "work and upper are on different file systems", path)
            with contextlib.suppress(FileExistsError):
                os.mkdir(b"work", 0o700, dir_fd=outer)
            fd = os.open(b"work", _DIR_FLAGS, dir_fd=outer)
        finally:
            os.close(outer)
        try:
            files.make_plain(fd, 0o700)
            clear(fd, keep=_KEEP)
        except BaseException:
            os.close(fd)
            raise
        self.source = Source(upper, None, b"", upper.root.descriptors)
        self.source.fd = fd
        self.fd = fd
        self.held: set[Node] = set()  # nodes without a name that one in here stands for (cowfs.union.holding)
        self._count = 0
        self._whiteout: bytes | None = None
        self._form = form
        self._nested = False

    def close(self) -> None:
        """Remove what is left and close."""
        with contextlib.suppress(OSError):
            clear(self.fd, keep=_KEEP)
        self.source.close()

    def temp(self) -> bytes:
        """A name that nobody has."""
        self._count += 1
        return b"#%x" % self._count

    def put_whiteout(self, dirfd: int, name: bytes) -> None:
        """Make ``name`` a whiteout: one more link of the shared inode. EEXIST when taken."""
        for _ in range(2):
            if self._whiteout is None:
                self._whiteout = self.temp()
                self._make(self.fd, self._whiteout)
            self.allow(dirfd)
            try:
                os.link(self._whiteout, name, src_dir_fd=self.fd, dst_dir_fd=dirfd, follow_symlinks=False)
                return
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT, errno.EPERM, errno.EXDEV):
                    raise
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._whiteout, dir_fd=self.fd)
                self._whiteout = None
        self._make(dirfd, name)

    def _make(self, dirfd: int, name: bytes) -> None:
        if not self._nested:
            try:
                make_whiteout(dirfd, name)
            except PermissionError:
                self._nested = True
        if self._nested:
            make_nested(dirfd, name, self._form)

    def allow(self, dirfd: int) -> None:
        """Before a whiteout moves into a directory of the upper layer."""
        if not self._nested or dirfd == self.fd:
            return
        layer = self.source.layer
        if not layer.xwhiteouts:
            allow_nested(layer.root.open(), self._form)
            layer.xwhiteouts = True
        allow_nested(dirfd, self._form)

    def cover(self, dirfd: int, name: bytes) -> None:
        """Replace the non-directory ``name`` by a whiteout, in one step."""
        temp = self.temp()
        self.put_whiteout(self.fd, temp)
        self.allow(dirfd)
        os.rename(temp, name, src_dir_fd=self.fd, dst_dir_fd=dirfd)

    def discard(self, name: bytes) -> None:
        """Remove a temporary name, whatever it is."""
        trees.remove_entry(self.fd, name)


def clear(fd: int, keep: tuple[bytes, ...] = ()) -> None:
    """Remove everything in an open directory but the names in ``keep``, never following a link."""
    for entry in os.listdir(b"/proc/self/fd/%d" % fd):
        if entry not in keep:
            trees.remove_entry(fd, entry)
