"""Redirect files when the upper layer takes over the layer beneath it (:mod:`cowfs.union.absorb`).

Only the blocks that the layer holds are brought up; all of them if the base cannot be named once the layer is gone.
"""

from __future__ import annotations

from collections.abc import Callable

from cowfs._typed import Protocol
from cowfs.format.redirect import Ref
from cowfs.row.file import RowFile
from cowfs.union.filedata import Absorbing
from cowfs.union.layers import Layer, Source
from cowfs.union.node import Node

_PIECE = 1 << 20  # bytes that are filled in one go


class Files(Protocol):
    """The interface of a view's redirect files for this module."""

    def ref_at(self, where: Source, name: bytes) -> Ref | None: ...

    def redirect(self, node: Node) -> bool: ...

    def make_plain(self, file: RowFile) -> None: ...


def reference(rows: Files, node: Node, layer: Layer) -> Ref | None:
    """The reference of the layer's redirect file at or beneath a file; ``None`` for a plain one."""
    file = node.data
    assert isinstance(file, RowFile)
    if node.where is not None and node.where.layer is layer and file.where is not None:
        return file.ref if file.layer is layer else None
    file.load()
    for level in file.levels:
        if level.where.layer is layer:
            return rows.ref_at(level.where, level.name)
    return None


def stands_on(rows: Files, node: Node, layer: Layer) -> bool:
    """Whether a file of another layer needs data of ``layer``, the topmost lower one."""
    file = node.data
    assert isinstance(file, RowFile)
    extents = file.load()
    mine = [n for n, level in enumerate(file.levels) if level.where.layer is layer]
    if not mine:
        return False
    below = reference(rows, node, layer)
    return (
        below is None
        or file.ref is None
        or below.path != file.ref.path
        or below.base_end < file.base_end
        or any(extents.share(n, file.base_end) for n in mine)
    )


class RowAbsorbing(Absorbing):
    """One redirect file on its way up.

    Args:
        renames: whether the layer renamed directories, so that its paths to lower objects are no longer valid.
    """

    def __init__(self, rows: Files, node: Node, layer: Layer, *, renames: bool) -> None:
        self._rows, self._node, self._layer = rows, node, layer
        old = node.data
        before = reference(rows, node, layer)
        rows.redirect(node)
        file = node.data
        assert isinstance(file, RowFile)
        named = file.ref is not None and before is not None and before.path == file.ref.path and not renames
        if old.path is not None:
            named = False
        #: the end of the data that shows through the layer's file; -1: all of it becomes the file's own
        self._base_end = before.base_end if before is not None and named else -1

    def _file(self) -> RowFile | None:
        """The file, while it is still a redirect file of the upper layer."""
        file = self._node.data
        return file if isinstance(file, RowFile) and file.writable else None

    def step(self) -> bool:
        file = self._file()
        if file is None:
            return False
        file.load()
        mine = None
        if self._base_end >= 0:
            mine = {n for n, level in enumerate(file.levels) if level.where.layer is self._layer}
        if not file.missing(mine):
            return False
        file.fill(_PIECE, mine)
        return True

    def sync_job(self) -> Callable[[bool], None] | None:
        file = self._file()
        return file.sync_job() if file is not None else None

    def finish(self) -> bool:
        file = self._file()
        if file is None:
            return True
        if self._base_end < 0:
            if file.missing():
                return False
            self._rows.make_plain(file)
        else:
            file.end_base(self._base_end)
            file.rebase()
        return True
