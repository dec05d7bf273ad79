"""The aufs backend: a layer is a delta in the form of archives and of aufs: ``.wh.NAME`` deletes, ``.wh..wh..opq`` hides.

Strategy: a layer is an unpacked layer archive, readable by any tool for archives. It begins as a layer of the overlay
backend, of the form for ordinary users, and at the freeze its whiteouts become names (:mod:`cowfs.format.aufs`).
Layers of an old host's ``aufs/diff`` can be used unchanged. No kernel mounts them; cowfs's own
server does.

The form knows no redirects and no metacopies: to rename a directory of a lower layer copies what is in it, and to
change a file's mode copies its data. No mount shows a name that begins with ``.wh.``, and nobody can make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from cowfs._typed import Any, ClassVar
from cowfs.driver.interface import Capabilities, Driver, Probe
from cowfs.format import aufs
from cowfs.format.whiteout import AUFS
from cowfs.model import Limit, Usage
from cowfs.sys import trees

from . import deltas


class AufsDriver(Driver):
    """Deltas in the archive form."""

    name = "aufs"
    own_form: ClassVar[str] = AUFS.name

    def __init__(self, root: str, *, form: str = "auto", fsync: bool = True, **options: Any) -> None:
        super().__init__(root, form=AUFS.name, fsync=fsync, **options)

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Usable on a host for uppers: one with whiteouts and the xattrs of ordinary users."""
        name, reason = deltas.why_not(root, AUFS)
        if reason:
            return Probe(usable=False, reasons=(reason,))
        return Probe(usable=True, rank=5, reasons=(f"{name} takes layers in the archive form; mounts by FUSE",))

    @cached_property
    def capabilities(self) -> Capabilities:
        """Deltas that no kernel mounts."""
        return Capabilities(kernel_mount=False)

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """Empty directories, the root's attributes from the parent."""
        deltas.create(self, id, parents)
        return Usage()

    def freeze(self, id: str) -> None:
        """Turn whiteouts into names, and empty the work directory."""
        self.settle(id)
        trees.empty_tree(self.work(id))

    def settle(self, id: str) -> None:
        """Turn whiteouts into names. A mount that goes on reads both."""
        with self.open_tree(id) as fd:
            aufs.keep_by_names(fd, self.form)
