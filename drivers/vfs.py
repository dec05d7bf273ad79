"""The reference backend: every layer is a whole, plain tree. Slow to prepare, simple to trust.

Strategy: ``create`` copies the parent (sharing extents where the host can reflink), and a mount is
a bind mount of the copy. A layer can be read, backed up and repaired with nothing but a shell.

Limits: a plain directory has none, so with one the mount is the FUSE mount over an empty layer.
Copied data is not the layer's own: the store adds its use to the limit of the mount.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs.driver.interface import Driver, Probe
from cowfs.model import Limit, Usage
from cowfs.sys import trees


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
