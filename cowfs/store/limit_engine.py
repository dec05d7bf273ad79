"""Engines that keep a mounted snapshot to its limit, behind one interface.

A limit belongs to the snapshot (:meth:`Store.limit <cowfs.Store.limit>`); an engine holds a mount to it. The default is
cowfs's own server, which counts every write, for every user and on every host. The others leave the data path to the
kernel: a file system of the limit's size takes the place of the upper. docs/mounts.md has the precision of each.

===========  =====================================================  ==========================================
name         mechanism                                              module
===========  =====================================================  ==========================================
``fuse``     cowfs's own server counts                              :mod:`cowfs.union.quota`
``loop``     the upper is an ext4 image of the limit's size         :mod:`cowfs.store.limit_loop`
``loop-xfs`` the same with an XFS image, which any root makes       :mod:`cowfs.store.limit_image`
             larger while it is mounted
``tmpfs``    the upper is a tmpfs of the limit's size, and          :mod:`cowfs.mounting.kernel` (of no store)
             goes with the mount
``driver``   the layer holds its limit itself (``own_limit``)       the driver
===========  =====================================================  ==========================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from cowfs.driver.interface import Driver
from cowfs.errors import FailedPrecondition
from cowfs.model import Limit

__all__ = ["MOUNT_TYPES", "DriverEngine", "LimitEngine", "ServerEngine"]

MOUNT_TYPES = {"fuse": "fuse", "loop": "kernel", "loop-xfs": "kernel"}
"""The engines that a mount may ask for, with its type; the first is the default."""


class LimitEngine(ABC):
    """The engine that holds one mounted snapshot to its limit now."""

    name: str

    @abstractmethod
    def change(self, limit: Limit) -> None:
        """Give the mount another limit on the snapshot's own use.

        Raises:
            FailedPrecondition: it cannot take this limit while mounted.
        """


class ServerEngine(LimitEngine):
    """cowfs's own server.

    Args:
        socket: its control socket.
    """

    name = "fuse"

    def __init__(self, socket: str) -> None:
        self._socket = socket

    def change(self, limit: Limit) -> None:
        from cowfs.mounting import protocol

        protocol.ask(self._socket, "limit", bytes=limit.bytes, inodes=limit.inodes)


class DriverEngine(LimitEngine):
    """A driver whose layers hold their limits themselves, under a mount of the kernel.

    Args:
        id: of the layer.
        key: of the snapshot, for messages.
    """

    name = "driver"

    def __init__(self, driver: Driver, id: str, key: str) -> None:
        self._driver = driver
        self._id = id
        self._key = key

    def change(self, limit: Limit) -> None:
        why = self._driver.plan(self._id, [], limit=limit).why_not_kernel
        if why:
            raise FailedPrecondition(f"{self._key!r} is mounted by the kernel: {why}", remedy="unmount it first")
        self._driver.limit(self._id, limit)
