"""Engines that hold the limit of a mounted snapshot: what each can do here, behind one interface.

A limit belongs to the snapshot (:meth:`Store.limit <cowfs.Store.limit>`); the engine is how a mount is kept to it. The default is
cowfs's own server, which counts every write, for every user and on every host. The others leave the data path to the kernel: a file
system of the limit's size takes the place of the upper. docs/mounts.md has what each holds how exactly.

===========  =====================================================  ==========================================
name         mechanism                                              module
===========  =====================================================  ==========================================
``fuse``     cowfs's own server counts                              :mod:`cowfs.union.quota`
``loop``     the upper is an ext4 image of the limit's size         :mod:`cowfs.store.limit_loop`
``tmpfs``    the upper is a tmpfs of the limit's size, and   :mod:`cowfs.mounting.kernel` (of no store)
             goes with the mount
``driver``   the layer holds its limit itself (``own_limit``)       the driver
===========  =====================================================  ==========================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from cowfs.driver.interface import Driver
from cowfs.driver.plan import MountPlan
from cowfs.model import Limit, Usage

__all__ = ["FuseEngine", "LimitEngine"]


class LimitEngine(ABC):
    """How a mount is kept to a limit."""

    name: ClassVar[str]
    kernel: ClassVar[bool]
    """Whether the kernel serves what is mounted so."""

    @abstractmethod
    def why_not(self, driver: Driver) -> str:
        """Why mounts of a store cannot be kept to a limit so, here and by this user; "" where they can."""

    @abstractmethod
    def used(self, driver: Driver, id: str) -> Usage | None:
        """What a layer that is kept so holds now, as the engine counts it; None where the engine does not hold it."""

    @contextmanager
    def limited(self, driver: Driver, id: str, plan: MountPlan) -> Iterator[MountPlan]:
        """A plan whose upper can take no more than the limit, for as long as the block or a mount made in it lasts.

        Raises:
            Unsupported: this limit cannot be held so.
        """
        yield plan

    @abstractmethod
    def change(self, driver: Driver, id: str, limit: Limit) -> None:
        """Give a mounted layer another limit.

        Raises:
            FailedPrecondition: this one it takes only when it is mounted again.
        """


class FuseEngine(LimitEngine):
    """cowfs's own server. It is asked by its socket (:mod:`cowfs.store.mounts`), so that nothing is left to do here."""

    name = "fuse"
    kernel = False

    def why_not(self, driver: Driver) -> str:
        return ""

    def used(self, driver: Driver, id: str) -> Usage | None:
        return None

    def change(self, driver: Driver, id: str, limit: Limit) -> None:
        raise NotImplementedError("a server is asked by its socket")
