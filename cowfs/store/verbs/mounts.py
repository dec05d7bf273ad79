"""The verbs of mounts."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager
    from typing import Any

    from cowfs.model import Info, Mount
    from cowfs.mounting.kernel import KernelMount
    from cowfs.mounting.request import IdMap, MountSpec
    from cowfs.store.handle import LiveHandle
    from cowfs.store.services import Services
    from cowfs.union.paths import Paths

__all__ = ["MountVerbs"]


class MountVerbs:
    """The verbs of mounts."""

    services: Services

    def mounts(self, key: str, *, mount_type: str | None = None) -> tuple[Mount, ...]:
        """The mount records of an active snapshot or a view. Mounts nothing.

        Args:
            mount_type: ``kernel`` or ``fuse``; None: the kernel's if host and user allow it and there is no limit, else FUSE.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot.
            Unsupported: the type asked for is not possible.
        """
        return self.services.plans.mounts(key, mount_type=mount_type)

    def engine_mounts(self, key: str) -> tuple[Mount, ...]:
        """The mount records of an active snapshot or a view for an engine, which may add options of its own.

        A bind of the only directory; the kernel's overlayfs; or, where there is a limit or a layer that such a mount could not
        read, a record of the type ``fuse.cowfs-overlayfs``.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot.
        """
        return self.services.engines.engine_mounts(key)

    def held_by(self, key: str) -> str:
        """The server of the mount that a service should hold for an engine to bind, where :meth:`engine_mounts` gives a FUSE record.

        Args:
            key: of an active snapshot or a view.

        Returns:
            ``kernel``: the kernel can serve it (over an image of the chain, which the mount makes if it is missing); ``fuse``:
            it has a limit, is an active snapshot of the driver row, or host or user do not allow the other. Both are
            values for ``mount_type`` of :meth:`mount`.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot.
        """
        return self.services.engines.held_by(key)

    def at(self, path: str | os.PathLike[str]) -> Info:
        """Find the snapshot that a directory of the host belongs to: its layer's, or a mount point of it.

        Args:
            path: any path in the layer or below the mount point.

        Raises:
            NotFound: it belongs to none of this store.
        """
        return self.services.engines.at(path)

    def why_not_kernel(self, key: str) -> str:
        """The reason why ``mount_type="kernel"`` cannot mount a snapshot on this host, by this user; "" if it can, as
        far as known.

        Args:
            key: of an active snapshot or a view.

        Raises:
            NotFound: no such key.
        """
        return self.services.kernel_mounts.why_not_kernel(key)

    def mount(
        self,
        key: str,
        target: str | os.PathLike[str],
        *,
        mount_type: str | None = None,
        limit_engine: str | None = None,
        readonly: bool = False,
        volatile: bool = False,
        allow_other: bool | None = None,
        io: str = "cached",
        frontend: str = "kernel",
        uid_map: IdMap = (),
        gid_map: IdMap = (),
        options: str | Iterable[str] = (),
        max_nodes: int | None = None,
        log: str | os.PathLike[str] | None = None,
        trace: bool = False,
        owner: int = 0,
        kernel_image: bool = True,
    ) -> LiveHandle | KernelMount:
        """Mount a snapshot; returns when the mount answers, some 0.1 s later (a kernel mount of row layers makes an image first).

        The mount is made in one step: it exists, whole, or the error left nothing. Until the mount ends no other process can
        mount the key for writing, commit or remove it. The server is a process of its own and outlives the caller.

        Args:
            key: of an active snapshot or a view; with ``readonly`` also a name or a tag.
            target: an existing directory.
            mount_type: ``fuse`` (the default) or ``kernel``.
            limit_engine: ``fuse``, ``loop`` or ``loop-xfs`` (kernel mounts) or ``auto``: the kernel's if possible, cowfs's own
                server otherwise; None: the one that fits the type (:mod:`cowfs.store.limit_engine`).
            readonly: a read-only mount. An active snapshot may be mounted for writing at the same time: its present
                content is shown, and later changes may show or not.
            volatile: sync nothing; after a crash of the host the snapshot cannot be used.
            allow_other: whether other users may enter; default: as root yes.
            io: "cached" (no requests when warm) or "passthrough" (root only, no limit: for databases).
            frontend: "kernel" (cowfs's own protocol engine) or "fusepy" (libfuse 2).
            uid_map, gid_map: ranges (id in the layers, id shown, count).
            options: mount(8) words: nodev, nosuid, noexec, ro, noatime..., in a sequence or with commas.
            max_nodes: bound on cached nodes in the server; default: none.
            log: file for the server's diagnostics; default: one in the run directory.
            trace: write one line a request to the log.
            owner: number of a process with whose end, however it ends, the mount ends as well; 0: none.
            kernel_image: of a kernel mount: make the image of the chain if it is missing; False: without one all layers are mounted.

            The arguments from ``volatile`` on are for FUSE mounts; a kernel mount takes nodev, nosuid, noexec and ro of
            the options.

        Returns:
            A handle; as a context manager it unmounts at the end of the block.

        Raises:
            NotFound: no such key, or no such directory.
            FailedPrecondition: a committed snapshot without ``readonly``, or mounted for writing already.
            Unsupported: the host or user may not mount.
        """
        return self.services.mounting.mount(
            key,
            target,
            mount_type=mount_type,
            limit_engine=limit_engine,
            readonly=readonly,
            volatile=volatile,
            allow_other=allow_other,
            io=io,
            frontend=frontend,
            uid_map=uid_map,
            gid_map=gid_map,
            options=options,
            max_nodes=max_nodes,
            log=log,
            trace=trace,
            owner=owner,
            kernel_image=kernel_image,
        )

    def served_by(
        self, key: str, mount_type: str | None, engine: str | None, more: Mapping[str, Any] | None = None
    ) -> str | None:
        """The mount type, ``fuse`` or ``kernel``, of a mount requested with a type, a limit engine, or both.

        Args:
            key: of an active snapshot or a view.
            mount_type: ``fuse``, ``kernel`` or None.
            engine: a limit engine, ``auto`` or None.
            more: the other options of the mount, as of :meth:`mount`; ``auto`` respects them.

        Raises:
            NotFound: no such key.
            InvalidArgument: no such engine, one of the other type, or one that needs a missing limit.
        """
        return self.services.mounting.served_by(key, mount_type, engine, more)

    def layers_stay(self, key: str) -> AbstractContextManager[None]:
        """Keep every verb from removing a layer of a key until the block ends, by which time it is mounted.

        A context manager; a later removal finds the mount.

        Args:
            key: of the snapshot that is about to be mounted.

        Raises:
            FailedPrecondition: another verb uses the key.
        """
        return self.services.mounting.layers_stay(key)

    def spec(
        self,
        key: str,
        target: str,
        *,
        readonly: bool = False,
        foreground: bool = False,
        volatile: bool = False,
        allow_other: bool | None = None,
        io: str = "cached",
        frontend: str = "kernel",
        uid_map: IdMap = (),
        gid_map: IdMap = (),
        options: str | Iterable[str] = (),
        max_nodes: int | None = None,
        log: str | os.PathLike[str] | None = None,
        trace: bool = False,
        owner: int = 0,
    ) -> MountSpec:
        """The request of :meth:`mount` to cowfs's server. Mounts and changes nothing.

        Args:
            key, readonly, volatile, allow_other, io, frontend, uid_map, gid_map, options, max_nodes, log, trace, owner:
                as for :meth:`mount`.
            target: the mount point, absolute and without symbolic links.
            foreground: the caller will be the server itself.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot without ``readonly``, or in use.
        """
        return self.services.mounting.spec(
            key,
            target,
            readonly=readonly,
            foreground=foreground,
            volatile=volatile,
            allow_other=allow_other,
            io=io,
            frontend=frontend,
            uid_map=uid_map,
            gid_map=gid_map,
            options=options,
            max_nodes=max_nodes,
            log=log,
            trace=trace,
            owner=owner,
        )

    def paths(self, key: str) -> AbstractContextManager[Paths]:
        """A snapshot's tree for reading and writing by path in this process, without any mount.

        The snapshot is in use like a mounted one until the block ends.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot, or in use.
        """
        return self.services.mounting.paths(key)

    def unmount(self, key: str, *, lazy: bool = False, force: bool = False) -> None:
        """Unmount a snapshot in any mount namespace.

        Args:
            key: of a mounted snapshot.
            lazy: take it off the tree now; it ends with its last user.
            force: also if the server does not answer.

        Raises:
            NotFound: no such key, or it is not mounted.
            FailedPrecondition: in use; the message names the users.
        """
        self.services.mounting.unmount(key, lazy=lazy, force=force)

    def handle(self, key: str) -> LiveHandle:
        """The handle of a snapshot that cowfs's server has mounted.

        Args:
            key: an active snapshot or a view.

        Raises:
            NotFound: it is not mounted.
            FailedPrecondition: the kernel has mounted it.
        """
        return self.services.mounting.handle(key)

    def mounted_at(self, key: str) -> str | None:
        """The mount point of a snapshot, as far as this user can see; None if it is not mounted. No server is asked.

        Args:
            key: an active snapshot or a view.

        Raises:
            NotFound: no such key.
        """
        return self.services.mounted.mounted_at(key)

    def mount_of(self, key: str) -> tuple[int, str] | None:
        """The mount of a snapshot: (number of a process in its namespace, mount point there); None if there is none.

        Args:
            key: an active snapshot or a view.

        Raises:
            NotFound: no such key.
        """
        return self.services.mounted.mount_of(key)
