"""The reference backend: every layer is a whole, plain tree. Slow to prepare, simple to trust.

Strategy: ``create`` copies the parent (sharing extents where the host can reflink), and a mount is
a bind mount of the copy. A layer can be read, backed up and repaired with nothing but a shell.

Limits: a plain directory has none, so with one the mount is the FUSE mount over an empty layer.
What was copied is not the layer's own: it is added to the limit that the mount is given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs.driver.interface import Driver, Probe
from cowfs.errors import Unsupported
from cowfs.model import Limit, Mount, Usage
from cowfs.sys import host, trees

from . import records


class VfsDriver(Driver):
    """Plain copies. Works on every host and file system, for every user."""

    name = "vfs"
    whole = True

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Always usable, and the last choice."""
        return Probe(usable=True, rank=10, reasons=("plain copies work everywhere",))

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """Copy the nearest parent's tree."""
        tree = self.tree(id)
        os.mkdir(tree, 0o755)
        os.chmod(tree, 0o755)
        os.mkdir(self.work(id), 0o700)
        if not parents:
            return Usage()
        trees.copy_tree(self.tree(parents[0]), tree)
        if self.fsync:
            trees.sync_tree(tree)
        return self.usage(id)

    def mounts(
        self,
        id: str,
        parents: Sequence[str],
        *,
        readonly: bool = False,
        limit: Limit = Limit(),  # noqa: B008 - frozen
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """A bind mount; the FUSE mount where a limit must hold."""
        if mount_type == "kernel" and limit:
            raise Unsupported("a bind mount holds no limit", remedy="leave out --mount-type, or the limit")
        if mount_type != "fuse" and not limit and (mount_type == "kernel" or host.has_cap(host.CAP_SYS_ADMIN)):
            return (Mount(type="bind", source=self.tree(id), options=("ro" if readonly else "rw", "rbind")),)
        lowers = [f"{self.root}/empty"]
        return (records.fuse(lowers, self.tree(id), self.work(id), readonly=readonly, limit=limit),)
