"""The overlay backend: a layer is a delta in the kernel overlayfs's own format.

Strategy: ``create`` makes empty directories, so its cost does not depend on the parent. Layers are
mounted by the kernel's overlayfs where this host and user may and no limit is asked for (the
kernel knows none), otherwise by the FUSE mount; both read and write the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from cowfs.driver.interface import Driver, Probe
from cowfs.format.whiteout import choose_form
from cowfs.model import Limit, Usage
from cowfs.sys import host, trees

from . import deltas


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

    def freeze(self, id: str) -> None:
        """Empty the work directory, which only a writer fills."""
        trees.empty_tree(self.work(id))
