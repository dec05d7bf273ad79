"""The trees of containers, mounted while they run or during a copy, and the changes in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowfs.errors import CowfsError, FailedPrecondition, NotFound
from cowfs.service import changes
from cowfs.service.containers.container import Container
from cowfs.service.logs import log
from cowfs.sys import files

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["Trees"]


class Trees:
    """The trees of a daemon's containers.

    Threads: any; a container's lock is held while its tree is mounted and unmounted.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def mount(self, container: Container) -> None:
        """Mount a tree at ``rootfs`` in the bundle; one that a killed daemon left mounted is used."""
        os.makedirs(container.rootfs, mode=0o700, exist_ok=True)
        where = self._store.mounted_at(container.key)
        if where is not None:
            if os.path.realpath(where) != os.path.realpath(container.rootfs):
                raise FailedPrecondition(f"the snapshot of container {container.id[:12]} is mounted at {where}")
            self._store.unmount(container.key, lazy=True)
        self._store.mount(container.key, container.rootfs, options=("dev", "suid"))

    def unmount(self, container: Container) -> None:
        """Unmount a tree, if it is mounted."""
        try:
            self._store.unmount(container.key)
        except NotFound:
            pass
        except CowfsError as error:
            log.warning("container %s: %s; it is unmounted when nobody uses it any more", container.name, error)
            try:
                self._store.unmount(container.key, lazy=True)
            except CowfsError:
                pass

    @staticmethod
    def is_mounted(container: Container) -> bool:
        """Whether a tree is mounted."""
        return os.path.ismount(container.rootfs) if os.path.isdir(container.rootfs) else False

    def synced(self, container: Container) -> None:
        """Bring writes through the mount into the layer."""
        if not self.is_mounted(container):
            return
        fd = os.open(container.rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            files.syncfs(fd)
        finally:
            os.close(fd)

    def changes(self, container: Container) -> Iterator[tuple[str, int]]:
        """Paths that a container changed (0), added (1) and deleted (2), in order, the directories above them among them."""
        self.synced(container)
        return changes.changes(self._store, container.key)

    def mounted(self, container: Container) -> _Mounted:
        """Have the container's tree mounted at ``rootfs`` for the block, running or not."""
        return _Mounted(self, container)


class _Mounted:
    def __init__(self, trees: Trees, container: Container) -> None:
        self._trees, self._container = trees, container
        self._mine = False

    def __enter__(self) -> int:
        """A descriptor of the root directory."""
        container = self._container
        with container.lock:
            if not container.running:
                container.wait_settled()
                self._trees.mount(container)
                container.lock.acquire()  # the lock keeps it from being started or removed meanwhile
                self._mine = True
        self._root = os.open(container.rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._root

    def __exit__(self, *_: object) -> None:
        os.close(self._root)
        if self._mine:
            self._trees.unmount(self._container)
            self._container.lock.release()
