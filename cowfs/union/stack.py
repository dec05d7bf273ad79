"""The layers of a view: their order, the written one, and the part that an index covers.

Invariants: ``layers`` and ``roots`` are the same layers in opposite orders; ``upper`` is the topmost of them or ``None``; each
layer's ``index`` is its place; ``sources`` holds directories of layers that are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cowfs._typed import TYPE_CHECKING
from cowfs.union.layers import Layer, Source

if TYPE_CHECKING:
    from cowfs.union.options import TreeIndex
    from cowfs.union.workdir import WorkDir

__all__ = ["LayerStack"]


class LayerStack:
    """The layers of one view, bottom first. Owner: the view's thread.

    Attributes:
        layers: all of them, bottom first.
        roots: their roots, topmost first: where absolute redirects start.
        upper: the layer that is written, ``None`` for a read-only view.
        workdir: the work directory beside it.
        retired: work directories of frozen layers: files open at the freeze may still be in them.
        index: the merged tree of the lowest layers, if known.
        indexed_layers: the number of layers that the index covers; those above are scanned.
        lower_count: the number of lower layers when the view was made.
        plain_layers: the number of lowest layers that show their files' own inode numbers, ignoring origins.
        sources: (layer's index, path) -> directory of a layer that an index led to.
    """

    __slots__ = (
        "index", "indexed_layers", "layers", "lower_count", "plain_layers", "retired", "roots", "sources", "upper",
        "workdir",
    )  # fmt: skip

    def __init__(self, lower_count: int, index: TreeIndex | None) -> None:
        self.layers: list[Layer] = []
        self.roots: list[Source] = []
        self.upper: Layer | None = None
        self.workdir: WorkDir | None = None
        self.retired: list[WorkDir] = []
        self.index = index
        self.indexed_layers = lower_count if index is not None else 0
        self.lower_count = self.plain_layers = lower_count
        self.sources: dict[tuple[int, bytes], Source] = {}

    def add(self, layer: Layer, *, upper: bool = False) -> None:
        """Add a layer on top; ``upper``: the one that is written from now on."""
        layer.index = len(self.layers)
        self.layers.append(layer)
        self.roots.insert(0, layer.root)
        if upper:
            self.upper = layer

    def work_in(self, workdir: WorkDir) -> None:
        """Set the work directory of the upper layer; the one before is kept until its files are closed."""
        if self.workdir is not None:
            self.retired.append(self.workdir)
        self.workdir = workdir

    def cut(self, frozen: Layer) -> list[Layer]:
        """Take away the layers above one. Returns them; the caller closes them."""
        dropped = self.layers[frozen.index + 1 :]
        del self.layers[frozen.index + 1 :]
        self.roots[:] = [root for root in self.roots if root.layer not in dropped]
        self.sources = {key: source for key, source in self.sources.items() if source.layer not in dropped}
        self.upper = None
        return dropped

    def drop_upper(self) -> Layer:
        """Take away the upper layer, which the caller closes, and puts another in its place."""
        dropped = self.layers.pop()
        assert dropped is self.upper
        self.roots[:] = [root for root in self.roots if root.layer is not dropped]
        self.sources = {key: source for key, source in self.sources.items() if source.layer is not dropped}
        self.upper = None
        return dropped

    @contextmanager
    def replaced(self, lowers: Sequence[Layer], index: TreeIndex | None, covered: int) -> Iterator[None]:
        """Put other lower layers, bottom first, under the upper one; an error in the block restores the former ones.

        Args:
            index: the merged tree of the lowest ``covered`` of them, if known.
        """
        assert self.upper is not None
        layers, roots, sources = self.layers[:], self.roots[:], self.sources
        known = self.index, self.indexed_layers, self.lower_count, self.plain_layers
        try:
            kept = {*lowers, self.upper}
            self._set([*lowers, self.upper])
            self.sources = {(s.layer.index, s.path()): s for s in sources.values() if s.layer in kept}
            self.index, self.indexed_layers = index, covered if index is not None else 0
            yield
        except BaseException:
            self._set(layers)
            self.roots[:], self.sources = roots, sources
            self.index, self.indexed_layers, self.lower_count, self.plain_layers = known
            raise
        self.lower_count = len(lowers)
        self.own_numbers()

    def _set(self, layers: list[Layer]) -> None:
        self.layers[:] = layers
        self.roots[:] = [layer.root for layer in reversed(layers)]
        for number, layer in enumerate(layers):
            layer.index = number

    def own_numbers(self) -> None:
        """Show every file by the inode number that it was copied from, in all layers, as in a store's mounts."""
        self.plain_layers = 0

    def close(self) -> None:
        """Give back every descriptor."""
        for source in self.sources.values():
            source.close()
        for layer in self.layers:
            layer.close()
        for workdir in [*self.retired, self.workdir]:
            if workdir is not None:
                workdir.close()
        self.retired.clear()
        self.workdir = None
