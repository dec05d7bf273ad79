"""The overlay backend: a layer is what changed, in the kernel overlayfs's own format.

Strategy: ``create`` makes empty directories, so its cost does not depend on the parent. Layers are
mounted by the kernel's overlayfs where this host and user may and no limit is asked for (the
kernel knows none), otherwise by the FUSE mount; both read and write the same layers.

A record whose options do not fit into mount(2)'s page becomes the FUSE one, which reads any number
of layers, unless the kernel's was asked for by name (fsconfig(2) takes it). Source of the options: the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence

from cowfs.driver import Driver, Probe
from cowfs.errors import InvalidArgument, Unsupported
from cowfs.model import Limit, Mount, Usage
from cowfs.sys import files, host, trees, xattr
from cowfs.whiteout import choose_form
from . import records


class OverlayDriver(Driver):
    """Deltas in the overlay format."""

    name = "overlay"

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Usable where the file system takes whiteouts and the xattrs of the layer form."""
        form = choose_form()
        with tempfile.TemporaryDirectory(prefix="new-probe-", dir=root) as place:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # no sweep of another process takes it away
                name = files.fs_name(fd)
                try:
                    xattr.setx(fd, b"", form.opaque, b"y")
                except OSError as error:
                    return Probe(usable=False, reasons=(f"{name} takes no {form.name}.* xattrs: {error.strerror}",))
                try:
                    os.mknod("whiteout", 0o020000, 0, dir_fd=fd)
                except OSError as error:
                    return Probe(usable=False, reasons=(f"no whiteouts can be made on {name}: {error.strerror}",))
            finally:
                os.close(fd)
        how = "the kernel's overlayfs and FUSE" if host.has_cap(host.CAP_SYS_ADMIN) else "FUSE"
        return Probe(usable=True, rank=20, reasons=(f"{name} takes the {form.name} layer form; mounts by {how}",))

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """Empty directories, the root's attributes from the parent."""
        directory, tree = self.directory(id), self.tree(id)
        os.mkdir(tree, 0o755)
        os.mkdir(self.work(id), 0o700)
        os.chmod(tree, 0o755)
        if parents:
            src = os.open(self.tree(parents[0]), os.O_RDONLY | os.O_DIRECTORY)
            dst = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
            try:
                trees.copy_attributes(src, dst, os.fstat(src))
                for own in (self.form.origin, self.form.impure, self.form.opaque):
                    if xattr.try_get(dst, b"", own) is not None:
                        xattr.remove(dst, b"", own)
            finally:
                os.close(src)
                os.close(dst)
        if self.fsync:
            for path in (tree, directory):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        return Usage()

    def mounts(
        self,
        id: str,
        parents: Sequence[str],
        *,
        readonly: bool = False,
        limit: Limit = Limit(),  # noqa: B008 - frozen
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """The kernel's record or the FUSE one; see the module."""
        if mount_type not in (None, "kernel", "fuse"):
            raise InvalidArgument(f"no mount type {mount_type!r}", remedy="kernel or fuse")
        upper, work = (None, None) if readonly else (self.tree(id), self.work(id))
        lowers = [self.tree(parent) for parent in parents]
        if readonly and not lowers:
            lowers = [self.tree(id)]
        by_fuse = records.fuse(lowers or [f"{self.root}/empty"], upper, work, limit=limit)
        if mount_type == "fuse":
            return (by_fuse,)
        if not lowers or (readonly and len(lowers) == 1):
            source = upper or lowers[0]
            by_kernel = Mount(type="bind", source=source, options=("ro" if readonly else "rw", "rbind"))
        else:
            by_kernel = records.kernel(lowers, upper, work, trusted=self.form.redirects)
        why_not = self._why_not_kernel(limit)
        if not why_not and mount_type is None and len(os.fsencode(records.joined(by_kernel))) > records.MAX_OPTIONS:
            return (by_fuse,)
        if why_not and mount_type == "kernel":
            raise Unsupported(f"a kernel mount is not possible: {why_not}", remedy="leave out mount_type")
        return (by_fuse,) if why_not else (by_kernel,)

    def _why_not_kernel(self, limit: Limit) -> str:
        if limit:
            return "the kernel's overlayfs holds no limit"
        if not host.has_cap(host.CAP_SYS_ADMIN):
            return "this user may not mount"
        return ""

    def freeze(self, id: str) -> None:
        """Empty the work directory, which only a writer fills."""
        trees.empty_tree(self.work(id))
