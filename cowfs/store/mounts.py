"""Mounting snapshots: by our own server, or by the kernel where the caller asks for it.

Strategy: a mount by our server holds a flock on the layer's tree for as long as it lives, which is
all that the other verbs need to know. A mount by the kernel holds nothing; it is found in
mountinfo.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import EllipsisType, MappingProxyType
from typing import TYPE_CHECKING, Any

from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.index.database import Row
from cowfs.model import SMALLEST_LIMIT, Kind, Limit, Usage, parse_count, parse_size
from cowfs.mounting import kernel
from cowfs.mounting.kernel import KernelMount
from cowfs.store import limit_loop
from cowfs.store.kernel_mounts import KernelMountVerbs
from cowfs.store.layers import hold, is_locked, kernel_mount_of, kernel_mounts_of
from cowfs.store.limit_engine import MOUNT_TYPES, DriverEngine, LimitEngine, ServerEngine
from cowfs.store.limit_loop import LoopEngine
from cowfs.sys import mounts as sys_mounts, process

if TYPE_CHECKING:
    from cowfs.mounting.client import MountHandle
    from cowfs.mounting.notice import Notice
    from cowfs.mounting.request import IdMap, MountSpec
    from cowfs.store.handle import LiveHandle
    from cowfs.union.paths import Paths

__all__ = ["MountVerbs"]

NOTHING: Mapping[str, Any] = MappingProxyType({})


class MountVerbs(KernelMountVerbs, ABC):
    """The verbs that mount."""

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
    ) -> LiveHandle | KernelMount:
        """Mount a snapshot; returns when the mount answers, some 0.1 s later (a kernel mount of row layers makes an image first).

        The mount is made in one step: it is there, whole, or the error left nothing. Until the mount ends no other process can
        mount the key for writing, commit or remove it. The server is a process of its own and outlives the caller.

        Args:
            key: of an active snapshot or a view; with ``readonly`` also a name or a tag.
            target: an existing directory.
            mount_type: ``fuse`` (the default) or ``kernel``.
            limit_engine: ``fuse``, ``loop`` (a kernel mount) or ``auto``: the kernel's where it can be had, cowfs's own server
                otherwise; left out: what fits the type (:mod:`cowfs.store.limit_engine`).
            readonly: nobody may write. An active snapshot may be mounted for writing at the same time: what it holds now is
                shown, and what is changed there later may show or not.
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

            Those from ``volatile`` on are of the FUSE mount; a kernel mount takes nodev, nosuid, noexec and ro of the options.

        Returns:
            A handle; as a context manager it unmounts at the end of the block.

        Raises:
            NotFound: no such key, or no such directory.
            FailedPrecondition: a committed snapshot without ``readonly``, or mounted for writing already.
            Unsupported: the host or user may not mount.
        """
        from cowfs.mounting.mountpoint import resolve

        if mount_type not in (None, "fuse", "kernel"):
            raise InvalidArgument(f"no mount type {mount_type!r}", remedy="kernel or fuse")
        self.recover_with_room(key)
        where = resolve(os.fspath(target))
        with self.layers_stay(key):
            more: dict[str, Any] = {
                "volatile": volatile,
                "allow_other": allow_other,
                "io": io,
                "frontend": frontend,
                "uid_map": uid_map,
                "gid_map": gid_map,
                "options": options,
                "max_nodes": max_nodes,
                "log": log or "",
                "trace": trace,
                "owner": owner,
            }
            if self.served_by(key, mount_type, limit_engine, more) == "kernel":
                return self._mount_by_kernel(key, where, readonly, more)
            return self._spawn(key, self.spec(key, where, readonly=readonly, **more))

    def served_by(
        self, key: str, mount_type: str | None, engine: str | None, more: Mapping[str, Any] = NOTHING
    ) -> str | None:
        """The mount type, ``fuse`` or ``kernel``, of a mount that is asked for with a type, a limit engine, or both.

        Args:
            key: of an active snapshot or a view.
            mount_type: ``fuse``, ``kernel`` or None.
            engine: a limit engine, ``auto`` or None.
            more: what else is asked of the mount, as of :meth:`mount`: ``auto`` takes what can do that.

        Raises:
            NotFound: no such key.
            InvalidArgument: no such engine, one of the other type, or one that needs a limit where there is none.
        """
        if engine is None or engine == mount_type == "fuse":
            return mount_type
        if engine not in (*MOUNT_TYPES, "auto"):
            raise InvalidArgument(f"no limit engine {engine!r}", remedy=f"{', '.join(MOUNT_TYPES)} or auto")
        if engine == "auto":
            if mount_type is not None:
                return mount_type
            return "fuse" if kernel.why_not(more) or self.why_not_kernel(key) else "kernel"
        wanted = MOUNT_TYPES[engine]
        if mount_type not in (None, wanted):
            raise InvalidArgument(
                f"the limit engine {engine} is not one of {mount_type} mounts", remedy="leave out one of the two"
            )
        if wanted == "kernel" and self._keyed(key).limit.bytes is None:
            raise InvalidArgument(
                f"{key!r} has no limit on its size", remedy=f"cowfs limit {key} --size 1G gives it one"
            )
        return wanted

    @contextmanager
    def layers_stay(self, key: str) -> Iterator[None]:
        """Keep every verb from taking a layer of a key away until the block ends, by which time it is mounted.

        A context manager; whoever wants to take one away after that finds the mount.

        Args:
            key: of the snapshot that is about to be mounted.

        Raises:
            FailedPrecondition: another verb uses the key.
        """
        from cowfs.store.key_lock import turn

        if self.index.refused:  # nobody can change a store that can only be read
            yield
            return
        with turn(self.root, key):
            yield

    def _mount_by_kernel(self, key: str, where: str, readonly: bool, more: Mapping[str, Any]) -> KernelMount:
        row = self._keyed(key)
        why = kernel.why_not(more)
        if why:
            raise Unsupported(f"no mount of the kernel: {why}", remedy="leave out one of the two")
        options = kernel.words_of(more["options"])
        if (readonly or "ro" in options) and row.kind is not Kind.VIEW:
            raise Unsupported("the kernel mounts an active snapshot for writing only", remedy="leave out --mount-type")
        self._mount_kernel(row, where)
        try:
            kernel.add_flags(where, options)
        except OSError:
            KernelMount(where).unmount()
            raise
        self._told("mount", key, where)
        return KernelMount(where)

    def _spawn(self, key: str, spec: MountSpec) -> LiveHandle:
        from cowfs.mounting import client

        if not spec.readonly:
            self._hand_limit(self._keyed(key), by_server=True)
        return self._live(client.spawn(spec), key)

    @abstractmethod
    def _live(self, handle: MountHandle, key: str) -> LiveHandle:
        """The handle of a key's mount, with the verbs of live snapshots."""

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
        """What :meth:`mount` asks our server for. Nothing is mounted or changed.

        Args:
            key, readonly, volatile, allow_other, io, frontend, uid_map, gid_map, options, max_nodes, log, trace, owner: as
                for :meth:`mount`.
            target: the mount point, absolute and without symbolic links.
            foreground: the caller will be the server itself.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot without ``readonly``, or in use.
        """
        from cowfs.mounting.request import INDEXED, MountSpec

        words = options.split(",") if isinstance(options, str) else tuple(options)
        readonly = readonly or "ro" in words
        row = self.resolve(key) if readonly else self._keyed(key)
        self._at_rest(row)
        plan = self._plan(row, committed=readonly)
        readonly = readonly or plan.readonly
        return MountSpec(
            layers=plan.lowers[::-1] or (plan.empty,),
            mountpoint=target,
            upper=plan.upper,
            work=plan.work,
            record=False,
            readonly=readonly,
            size=None if readonly else row.limit.bytes,
            inodes=None if readonly else row.limit.inodes,
            options=tuple(word for word in words if word not in ("ro", "rw")),
            row=plan.row,
            factory=INDEXED,
            label=key,
            checked=True,
            foreground=foreground,
            volatile=volatile,
            allow_other=allow_other,
            io=io,
            frontend=frontend,
            uid_map=uid_map,
            gid_map=gid_map,
            max_nodes=max_nodes,
            log=os.path.abspath(log) if log else "",
            trace=trace,
            owner=owner,
        )

    @contextmanager
    def paths(self, key: str) -> Iterator[Paths]:
        """A snapshot's tree for reading and writing by path in this process, without any mount.

        The snapshot is in use like a mounted one until the block ends.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot, or in use.
        """
        from cowfs.mounting.assemble import make_view
        from cowfs.mounting.resources import Stack
        from cowfs.union.paths import Paths

        with ExitStack() as held:
            with self.layers_stay(key):
                stack = Stack.open(self.spec(key, os.path.join(self.root, "nowhere"), io="cached"))
                held.callback(stack.close)
                view = make_view(stack)
                held.callback(view.close)
            yield Paths(view)

    @contextmanager
    def _alone(self, row: Row, verb: str, *, mounted: bool, missing_ok: bool = False) -> Iterator[bool]:
        with ExitStack() as held:
            alone = True
            try:
                held.enter_context(super()._alone(row, verb, mounted=False, missing_ok=missing_ok))
            except FailedPrecondition:
                kept_apart = verb == "commit" and limit_loop.has_image(self.driver, row.id)
                if not mounted or kept_apart or self.mounted_at(row.name) is None:
                    raise
                alone = False
                if verb == "commit":
                    self._let_nobody_write(row)
            yield alone

    def _let_nobody_write(self, row: Row) -> None:
        """Make the mounts of a snapshot read-only, for good; what was written is in its layer then.

        Raises:
            FailedPrecondition: files are open for writing in a mount of the kernel; or the server cannot.
        """
        server = self._server_of(row)
        if server is not None:
            from cowfs.mounting import protocol

            protocol.ask(server["socket"], "readonly", timeout=600.0)
            return
        tree = self.driver.tree(row.id)
        for entry in kernel_mounts_of(tree):
            flags = sys_mounts.MS_REMOUNT | sys_mounts.MS_RDONLY
            try:
                sys_mounts.mount(
                    "", entry.target, "", flags if entry.fstype == "overlay" else flags | sys_mounts.MS_BIND
                )
            except OSError as error:
                where = os.fsdecode(entry.target)
                raise FailedPrecondition(
                    f"{row.name!r} is mounted by the kernel at {where}, which cannot be made read-only: {error.strerror}",
                    remedy="end who writes there, or unmount it",
                ) from None

    def unmount(self, key: str, *, lazy: bool = False, force: bool = False) -> None:
        """Unmount a snapshot, wherever it is mounted.

        Args:
            key: of a mounted snapshot.
            lazy: take it off now, and let those inside end when they will.
            force: also when the server does not answer.

        Raises:
            NotFound: no such key, or it is not mounted.
            FailedPrecondition: in use; the message names who.
        """
        row = self._keyed(key)
        told = self._notice_of(row)
        if told is not None:
            from cowfs.mounting import client

            client.umount(told.mountpoint, lazy=lazy, force=force, socket=told.socket)
            return
        where = kernel_mount_of(self.driver.tree(row.id))
        if where is None:
            raise NotFound(f"{key!r} is not mounted")
        KernelMount(where).unmount(lazy=lazy, force=force)
        self._told("unmount", key, where)

    def _told(self, action: str, key: str, where: str) -> None:
        """Record what the kernel's mounts have no server to record for."""
        if not self.index.refused:
            with self.index.write() as change:
                change.record_event("mount", action, key, {"mountpoint": where, "type": "kernel"})

    def mounted_at(self, key: str) -> str | None:
        """Where a snapshot is mounted, as far as this user can see; None when nowhere. No server is asked.

        Args:
            key: an active snapshot or a view.

        Raises:
            NotFound: no such key.
        """
        found = self.mount_of(key)
        return None if found is None else found[1]

    def mount_of(self, key: str) -> tuple[int, str] | None:
        """The mount of a snapshot: (number of a process in its namespace, mount point there); None where there is none.

        Args:
            key: an active snapshot or a view.

        Raises:
            NotFound: no such key.
        """
        row = self._keyed(key)
        told = self._notice_of(row)
        if told is not None:
            return told.pid, told.mountpoint
        where = kernel_mount_of(self.driver.tree(row.id))
        return None if where is None else (os.getpid(), where)

    def _notice_of(self, row: Row) -> Notice | None:
        """What a mount's server left beside a layer that it has in use: one look-up, no server is asked."""
        from cowfs.mounting import notice

        if not is_locked(self.driver, row):
            return None
        told = [one for one in notice.found([self.driver.directory(row.id)]) if os.path.exists(one.socket)]
        if told:
            if process.start_time(told[0].pid) is None:  # of another pid namespace, or gone meanwhile
                return told[0] if is_locked(self.driver, row) else None
            return None if process.is_ending(told[0].pid) else told[0]
        server = self._server_without_notice(row)
        if server is None:
            return None
        return notice.Notice(server["socket"], server["pid"], server["mountpoint"], "", server["label"])

    def _server_of(self, row: Row, *, made_by: str | None = None) -> dict[str, Any] | None:
        """What the server of a mounted snapshot says of itself; no other server is asked.

        Args:
            made_by: ``store`` for mounts that a store made, which know the index; None for those of a record, too.

        Raises:
            FailedPrecondition: it hangs.
        """
        from cowfs.mounting import protocol

        told = self._notice_of(row)
        if told is None or not protocol.is_trusted(told.socket):
            return None
        try:
            answer = protocol.ask(told.socket, "info")
        except FailedPrecondition:
            if not is_locked(self.driver, row) or not os.path.exists(told.socket):
                return None  # it ended
            raise FailedPrecondition(
                f"the server of {row.name!r} at {told.mountpoint} (process {told.pid}) does not answer",
                remedy=f"cowfs umount --force {told.mountpoint} ends it",
            ) from None
        except CowfsError:
            return None  # its mount is gone, and it is about to end
        if os.path.realpath(str(answer.get("upper"))) != os.path.realpath(self.driver.tree(row.id)):
            return None  # another mount has its device number now, and it is about to end
        if made_by == "store" and answer.get("label") != row.name:
            return None
        return {**answer, "socket": told.socket}

    def _server_without_notice(self, row: Row) -> dict[str, Any] | None:
        """The server of a layer, among all: of a mount that could leave no notice, or was made by an older cowfs."""
        from cowfs.mounting import protocol

        tree = os.path.realpath(self.driver.tree(row.id))
        for path, answer in protocol.ask_all(protocol.sockets(), "info"):
            if not isinstance(answer, OSError) and os.path.realpath(str(answer.get("upper"))) == tree:
                return {**answer, "socket": path}
        return None

    def handle(self, key: str) -> LiveHandle:
        """The handle of a snapshot that our server has mounted.

        Args:
            key: an active snapshot or a view.

        Raises:
            NotFound: it is not mounted.
            FailedPrecondition: the kernel has mounted it.
        """
        from cowfs.mounting.client import MountHandle

        row = self._keyed(key)
        server = self._server_of(row)
        if server is None:
            where = kernel_mount_of(self.driver.tree(row.id))
            if where is not None:
                KernelMount(where).nobody()
            raise NotFound(f"{key!r} is not mounted", remedy=f"cowfs mount --key {key} MNT")
        return self._live(MountHandle(server["mountpoint"], server["pid"], server["socket"]), key)

    def limit(
        self,
        name: str,
        *,
        size: str | int | EllipsisType | None = ...,
        inodes: str | int | EllipsisType | None = ...,
    ) -> Limit:
        """The limit of a snapshot, mounted or not; with arguments, change it first, for this mount and all to come.

        Args:
            name: a key; to look, also a name or a tag.
            size: bytes, or "4G"; None for no limit; left out: as it was.
            inodes: a count, or "100k"; likewise.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: not a size or count.
            FailedPrecondition: not active, mounted by the kernel or with ``io="passthrough"``, or in use by another verb.
        """
        if isinstance(size, EllipsisType) and isinstance(inodes, EllipsisType):
            return self.resolve(name).limit
        row = self._active(name)
        limit = Limit(
            bytes=row.limit.bytes
            if isinstance(size, EllipsisType)
            else None
            if size is None
            else parse_size(size, least=SMALLEST_LIMIT),
            inodes=row.limit.inodes
            if isinstance(inodes, EllipsisType)
            else None
            if inodes is None
            else parse_count(inodes),
        )
        with ExitStack() as held:
            engine = self._limit_engine_of(row)
            if engine is not None:
                engine.change(limit)
            else:
                held.enter_context(hold(self.driver, row, "limit", at_rest=False))
            with self.index.write() as change:
                now = self._active(name, row.num)
                if limit != now.limit:  # a server has recorded it already
                    change.set_limit(row.num, limit)
        return self.index.get(name).limit

    def limit_engine(self, name: str) -> str | None:
        """Which engine keeps a snapshot to its limit now (:mod:`cowfs.store.limit_engine`); None where it has none, or nobody does.

        Args:
            name: a key, a name or a tag.

        Raises:
            NotFound: no such snapshot.
        """
        row = self.resolve(name)
        if row.kind is not Kind.ACTIVE or not row.limit:
            return None
        engine = self._limit_engine_of(row)
        return None if engine is None else engine.name

    def _limit_engine_of(self, row: Row) -> LimitEngine | None:
        """What keeps an active snapshot to its limit now: the engine of its mount; None where it is not mounted."""
        server = self._server_of(row)
        if server is not None:
            return ServerEngine(server["socket"])
        if limit_loop.has_image(self.driver, row.id):
            return LoopEngine(self.driver, row.id, row.base) if limit_loop.is_mounted(self.driver, row.id) else None
        if self.driver.capabilities.own_limit and kernel_mount_of(self.driver.tree(row.id)) is not None:
            return DriverEngine(self.driver, row.id, row.name)
        return None

    def _live_usage(self, row: Row) -> Usage | None:
        """What the server of a mounted snapshot counts; without what was copied, as :meth:`usage` wants it."""
        from cowfs.mounting.client import MountHandle

        server = self._server_of(row)
        if server is None:
            return None
        used = MountHandle(server["mountpoint"], server["pid"], server["socket"]).usage()
        if not server["label"]:  # of a record, whose server counts the whole layer
            return used
        return Usage(bytes=used.bytes + row.base.bytes, inodes=used.inodes + row.base.inodes)
