"""The nodes of a view by id, and the records that outlive them: used ids, their bearers, and spent ones.

Invariants: an id together with a generation is given once; ``names`` holds nodes with several known names only; a number that
a rollback took away (``burnt``) is no id again.
"""

from __future__ import annotations

import os

from cowfs._typed import TYPE_CHECKING
from cowfs.union.forgotten import Parents
from cowfs.union.inodes import SYNTHETIC

if TYPE_CHECKING:
    from cowfs.union.node import Dir, Node

__all__ = ["GENERATIONS", "ROOT_ID", "NodeTable"]

ROOT_ID = 1
GENERATIONS = 0xFFFFFFFF  # file handles of FUSE hold 32 bits (fs/fuse/inode.c, fuse_encode_fh)


class NodeTable:
    """The nodes of one view. Owner: the view's thread.

    Attributes:
        nodes: id -> node in use.
        names: further names of nodes with more than one, the first being (node.parent, node.name).
        parents: id of a forgotten node -> its parent's id.
        era: the first generation of each id: another one for each view, so that a file handle made before a remount, when an
            id may have been another file's, is ESTALE.
        dead: id -> generation that its next bearer gets.
        burnt: ids that a rollback took away.
        reborn: after a rollback: inode number -> id of the replacement node.
        displaced: (device, inode) of a file with several names -> its id, where the number that it would show is another's.
        linked: file of an index with several names -> its id.
        shown: inode number -> which of the files of an index shows it.
        astray: upper inodes in use whose known names are gone, while they have others.
    """

    __slots__ = (
        "astray", "burnt", "dead", "displaced", "era", "last", "linked", "names", "nodes", "parents", "reborn", "shown",
    )  # fmt: skip

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.names: dict[Node, list[tuple[Dir, bytes]]] = {}
        self.parents = Parents()
        self.era = int.from_bytes(os.urandom(4), "little")
        self.dead: dict[int, int] = {}
        self.burnt: set[int] = set()
        self.reborn: dict[int, int] = {}
        self.displaced: dict[tuple[int, int], int] = {}
        self.linked: dict[object, int] = {}
        self.shown: dict[int, object] = {}
        self.astray: set[Node] = set()
        self.last = SYNTHETIC  # the last fresh id

    def fresh_id(self) -> int:
        """An id that no inode number can be."""
        self.last += 1
        return self.last

    def free(self, id: int) -> bool:
        """Whether an id is free."""
        return id not in self.nodes and id > ROOT_ID and id not in self.burnt

    def instead_of(self, id: int, first: int) -> int:
        """A fresh id for a file whose number cannot be its id; ``first``: that number, before a rollback replaced it."""
        fresh = self.fresh_id()
        if id in self.burnt:
            self.reborn[first] = fresh
        return fresh

    def add(self, node: Node) -> None:
        """Enter a node."""
        node.generation = self.dead.get(node.id, self.era) if self.dead else self.era
        self.nodes[node.id] = node

    def spend(self, node: Node) -> None:
        """Retire the id of a file that is gone for good; later bearers get another generation."""
        self.dead[node.id] = node.generation + 1 & GENERATIONS

    def strike(self, node: Node) -> None:
        """Make a node's id answer ESTALE from now on; it is never used again."""
        self.nodes.pop(node.id, None)
        self.parents.discard(node.id)
        self.burnt.add(node.id)
        self.names.pop(node, None)

    def names_of(self, node: Node) -> list[tuple[Dir, bytes]]:
        """Every name of a node that is known, the first one first."""
        first = [(node.parent, node.name)] if node.parent is not None else []
        return first + self.names.get(node, [])
