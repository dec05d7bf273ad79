"""Directories that renames moved away from their path in the lower layers, and files of a layer with several names.

Both are found by scanning a layer once, and kept for as long as the layer is in the view.
"""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cowfs.union.layers import Layer
    from cowfs.union.node import Dir, Node

__all__ = ["Groups", "Leaving", "Moves"]

Groups = dict[Any, list[bytes]]
"""Inode -> its paths in a layer, for inodes with more than one link."""


class Leaving(Protocol):
    """The absorption of the topmost lower layer, while it is under way (:mod:`cowfs.union.absorb`)."""

    def before_up(self, node: Node) -> None:
        """Called before a file is copied up, renamed or linked."""

    def renamed(self) -> None:
        """Called after the rename of a directory."""


class Moves:
    """The moves that one view knows of. Owner: the view's thread.

    Attributes:
        moved: directories of the upper layer that a rename took away from their lower path.
        redirects: layer -> (path beneath, path in the layer) of the directories that it moved.
        groups: layer, or an index -> its files with several names.
        leaving: the absorption that is under way.
    """

    __slots__ = ("groups", "leaving", "moved", "redirects")

    def __init__(self) -> None:
        self.moved: dict[Dir, None] = {}
        self.redirects: dict[Layer, list[tuple[bytes, bytes]]] = {}
        self.groups: dict[object, Groups] = {}
        self.leaving: Leaving | None = None

    def forget(self, layer: Layer) -> None:
        """Forget a layer that has left the view."""
        self.groups.pop(layer, None)
        self.redirects.pop(layer, None)

    def froze(self, layer: Layer | None) -> None:
        """Handle a freeze: the lower paths of directories are now their present paths."""
        if layer is not None:
            self.redirects.pop(layer, None)
        for directory in self.moved:
            directory.lowpath = None
        self.moved.clear()

    def drop(self, directory: Node, upper: Layer | None) -> None:
        """Forget a directory whose node goes; its former path is looked up again on demand."""
        if directory in self.moved and upper is not None:
            del self.moved[directory]
            self.redirects.pop(upper, None)

    def absorbing(self, leaving: Leaving) -> None:
        """Begin an absorption."""
        self.leaving = leaving

    def absorbed(self, leaving: Leaving) -> bool:
        """End an absorption. Returns whether it was still under way."""
        if self.leaving is not leaving:
            return False
        self.leaving = None
        return True

    def renamed_directory(self) -> None:
        """Record the rename of a directory."""
        if self.leaving is not None:
            self.leaving.renamed()
