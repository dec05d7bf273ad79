"""The descriptors of file data: the nodes with one, and the closable ones among them.

A node keeps the descriptor that it was opened with. Those of files with a name are closed when many others were opened since
(:mod:`cowfs.sys.descriptors`), at the start of an operation, since one may use several.
"""

from __future__ import annotations

import os
from itertools import islice

from cowfs.sys.descriptors import Shares
from cowfs.union.node import Node


class OpenFiles:
    """The nodes whose ``fd`` is open. Owner: the view's thread.

    Every node with a descriptor is in exactly one of the two tables.

    Attributes:
        most, most_nameless: the size of each table between operations.
        opened: nodes that a name leads to: closed and opened again at will, oldest first.
        nameless: nodes that only their descriptor leads to.
    """

    __slots__ = ("most", "most_nameless", "nameless", "opened")

    def __init__(self, share: Shares) -> None:
        self.most = share.files
        self.most_nameless = share.nameless
        self.opened: dict[Node, None] = {}
        self.nameless: dict[Node, None] = {}

    def add(self, node: Node) -> None:
        """Enter a node whose descriptor was opened, or whose path has changed."""
        if node.where is not None:
            self.nameless.pop(node, None)
            self.opened[node] = None
        else:
            self.opened.pop(node, None)
            self.nameless[node] = None

    def let_go(self, node: Node) -> int:
        """Take a node's descriptor away from it, for the caller to close. Returns it, or -1."""
        fd, node.fd, node.wfd = node.fd, -1, False
        self.opened.pop(node, None)
        self.nameless.pop(node, None)
        return fd

    def close(self, node: Node) -> None:
        """Close a node's descriptor, if it has one."""
        if node.fd >= 0:
            os.close(self.let_go(node))

    def use(self, node: Node, fd: int, *, writable: bool) -> None:
        """Make ``fd`` the descriptor of a node's data."""
        self.close(node)
        node.fd, node.wfd = fd, writable
        self.add(node)

    def trim(self) -> None:
        """Close the oldest above the share, and some more, so that this is seldom. Only between operations."""
        opened = self.opened
        if len(opened) > self.most:
            for node in list(islice(opened, len(opened) - self.most + self.most // 8)):
                self.close(node)

    def close_all(self) -> None:
        """Close every descriptor that can be opened again. Only between operations."""
        for node in list(self.opened):
            self.close(node)

    @property
    def full(self) -> bool:
        """Whether one more file without a name should get one in the work directory."""
        return len(self.nameless) >= self.most_nameless


__all__ = ["OpenFiles"]
