"""The row backend: redirect-on-write. The first write to a big file stores only the blocks that were written.

Strategy: layers are those of the overlay backend, but a file that was only partly written is a *redirect file*: a
sparse file that holds the written blocks at their own offsets, and a map beside the layer that lists them (docs/row.md;
:mod:`cowfs.row.redirects`). The kernel's overlayfs does not know them, so mounts are the FUSE mount, or the kernel's
through an image of the chain, which the store makes.

Choose it for images, databases and other big files that change in places. For many small files the overlay backend is
as good, and its layers can be mounted by the kernel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from cowfs._typed import Any
from cowfs.driver.interface import Driver, Probe
from cowfs.errors import InvalidArgument
from cowfs.format.redirect import check_block
from cowfs.format.whiteout import choose_form
from cowfs.model import Limit, Usage, parse_size
from cowfs.row import layer as row_layer
from cowfs.sys import atomic, trees
from cowfs.sys.regular import read_small

from . import deltas

DEFAULT_BLOCK = 4096
_BLOCK_FILE = "row-block"


class RowDriver(Driver):
    """Deltas in the overlay format, with redirect files.

    Args:
        block: bytes a block of new redirect files, a power of two from 4 KiB to 1 MiB. The store keeps the last
            one given; files made before keep theirs.
    """

    name = "row"

    def __init__(
        self, root: str, *, form: str = "auto", fsync: bool = True, block: int | str | None = None, **options: Any
    ) -> None:
        super().__init__(root, form=form, fsync=fsync, **options)
        path = os.path.join(root, _BLOCK_FILE)
        if block is not None:
            self.row = parse_size(block)
            try:
                check_block(self.row)
            except ValueError as error:
                raise InvalidArgument(str(error)) from None
            atomic.write_file(path, f"{self.row}\n".encode(), durable=fsync)
            return
        try:
            text = read_small(path, limit=100).decode("ascii", "replace").strip()
        except FileNotFoundError:
            self.row = DEFAULT_BLOCK
            return
        if not re.fullmatch(r"[0-9]{4,7}", text):
            raise InvalidArgument(f"{path} holds no block size", remedy="open the store with block=4096")
        self.row = int(text)

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Usable where the file system holds the layer form, and FUSE is there."""
        name, reason = deltas.why_not(root, choose_form())
        if not reason and not os.path.exists("/dev/fuse"):
            reason = "there is no /dev/fuse"
        if reason:
            return Probe(usable=False, reasons=(reason,))
        return Probe(
            usable=True, rank=15, reasons=(f"{name} takes the {choose_form().name} layer form; mounts by FUSE",)
        )

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """Empty directories, the root's attributes from the parent."""
        deltas.create(self, id, parents)
        row_layer.mark(self.tree(id), self.form)
        return Usage()

    def freeze(self, id: str) -> None:
        """Make the maps true for good, and empty the work directory."""
        row_layer.seal(self.tree(id), form=self.form, durable=self.fsync)
        row_layer.collect(self.tree(id), self.form)
        trees.empty_tree(self.work(id))

    def settle(self, id: str) -> None:
        """Make the maps true for good; a mount may still read them."""
        row_layer.seal(self.tree(id), form=self.form, durable=self.fsync)

    def check(self, id: str) -> list[str]:
        """Check that every redirect file has its map. Walks the layer."""
        found = super().check(id)
        if found:
            return found
        damage, _ = row_layer.inspect(self.tree(id), self.form)
        return [f"layer {id}: {line}" for line in damage]
