"""The overlay backend: a layer is what changed, in the kernel overlayfs's own format.

Strategy: ``create`` makes empty directories, so its cost does not depend on the parent. Layers are
mounted by the kernel's overlayfs where this host and user may and no limit is asked for (the
kernel knows none), otherwise by the FUSE mount; both read and write the same layers.

A record whose options do not fit into mount(2)'s page becomes the FUSE one, which reads any number
of layers, unless the kernel's was asked for by name (fsconfig(2) takes it). Source of the options: the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs.driver.interface import Driver, Probe
from cowfs.errors import InvalidArgument, Unsupported
from cowfs.format.whiteout import choose_form
from cowfs.model import Limit, Mount, Usage
from cowfs.sys import host, trees

from . import deltas, records


class OverlayDriver(Driver):
    """Deltas in the overlay format."""

    name = "overlay"

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Usable where the file system takes whiteouts and the xattrs of the layer form."""
        form = choose_form()
        name, reason = deltas.why_not(root, form)
        if reason:
            return Probe(usable=False, reasons=(reason,))
        how = "the kernel's overlayfs and FUSE" if host.has_cap(host.CAP_SYS_ADMIN) else "FUSE"
        return Probe(usable=True, rank=20, reasons=(f"{name} takes the {form.name} layer form; mounts by {how}",))

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """Empty directories, the root's attributes from the parent."""
        deltas.create(self, id, parents)
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
            raise Unsupported(f"a kernel mount is not possible: {why_not}", remedy="leave out --mount-type")
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
