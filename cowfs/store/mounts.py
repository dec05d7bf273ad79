"""Mounting snapshots: by cowfs's own server, or by the kernel on request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from cowfs._log import Part
from cowfs._typed import TYPE_CHECKING, Any, TypedDict
from cowfs.errors import CowfsError, InvalidArgument, NotFound, Unsupported
from cowfs.model import Kind
from cowfs.mounting import kernel
from cowfs.mounting.kernel import KernelMount
from cowfs.store.key_lock import turn
from cowfs.store.layers import kernel_mount_of
from cowfs.store.limit_engine import MOUNT_TYPES

if TYPE_CHECKING:
    from cowfs.mounting.request import IdMap, MountSpec
    from cowfs.store.context import Context
    from cowfs.store.handle import LiveHandle
    from cowfs.store.kernel_mounts import KernelMounts
    from cowfs.store.live import Live
    from cowfs.store.lookup import Lookup
    from cowfs.store.mounted import Mounted
    from cowfs.store.plans import Plans
    from cowfs.store.reading import Reading
    from cowfs.store.recovery import Recovery
    from cowfs.union.paths import Paths

__all__ = ["Mounting"]

_log = Part("cowfs.store")


class _Asked(TypedDict):
    """The options of a mount, as of :meth:`cowfs.Store.mount`."""

    volatile: bool
    allow_other: bool | None
    io: str
    frontend: str
    uid_map: IdMap
    gid_map: IdMap
    options: str | Iterable[str]
    max_nodes: int | None
    log: str | os.PathLike[str] | None
    trace: bool
    owner: int


class Mounting:
    """Mounts, unmounts, and trees for use in this process."""

    def __init__(
        self,
        context: Context,
        reading: Reading,
        lookup: Lookup,
        plans: Plans,
        mounted: Mounted,
        recovery: Recovery,
        live: Callable[[], Live],
        kernel_mounts: Callable[[], KernelMounts],
    ) -> None:
        self.context = context
        self._reading = reading
        self._lookup = lookup
        self._plans = plans
        self._mounted = mounted
        self._recovery = recovery
        self._live = live
        self._kernel_mounts = kernel_mounts

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
        """As :meth:`cowfs.Store.mount`."""
        from cowfs.mounting.mountpoint import resolve

        if mount_type not in (None, "fuse", "kernel"):
            raise InvalidArgument(f"no mount type {mount_type!r}", remedy="kernel or fuse")
        self._recovery.recover_with_room(key)
        where = resolve(os.fspath(target))
        with self.layers_stay(key):
            more: _Asked = {
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
                return self._mount_by_kernel(key, where, readonly, more, limit_engine, make_image=kernel_image)
            return self._spawn(key, self.spec(key, where, readonly=readonly, **more))

    def served_by(
        self, key: str, mount_type: str | None, engine: str | None, more: Mapping[str, Any] | None = None
    ) -> str | None:
        """As :meth:`cowfs.Store.served_by`."""
        if engine is None or engine == mount_type == "fuse":
            return mount_type
        if engine not in (*MOUNT_TYPES, "auto"):
            raise InvalidArgument(f"no limit engine {engine!r}", remedy=f"{', '.join(MOUNT_TYPES)} or auto")
        if engine == "auto":
            if mount_type is not None:
                return mount_type
            return "fuse" if kernel.why_not(more or {}) or self._kernel_mounts().why_not_kernel(key) else "kernel"
        wanted = MOUNT_TYPES[engine]
        if mount_type not in (None, wanted):
            raise InvalidArgument(
                f"the limit engine {engine} is not one of {mount_type} mounts", remedy="leave out one of the two"
            )
        if wanted == "kernel" and self._lookup.keyed(key).limit.bytes is None:
            raise InvalidArgument(
                f"{key!r} has no limit on its size", remedy=f"cowfs limit {key} --size 1G gives it one"
            )
        return wanted

    @contextmanager
    def layers_stay(self, key: str) -> Iterator[None]:
        """As :meth:`cowfs.Store.layers_stay`."""
        if self.context.index.refused:  # a read-only store cannot change
            yield
            return
        with turn(self.context.root, key):
            yield

    def _mount_by_kernel(
        self,
        key: str,
        where: str,
        readonly: bool,
        more: Mapping[str, Any],
        engine: str | None,
        *,
        make_image: bool,
    ) -> KernelMount:
        row = self._lookup.keyed(key)
        why = kernel.why_not(more)
        if why:
            raise Unsupported(f"no mount of the kernel: {why}", remedy="leave out one of the two")
        options = kernel.words_of(more["options"])
        if (readonly or "ro" in options) and row.kind is not Kind.VIEW:
            raise Unsupported("the kernel mounts an active snapshot for writing only", remedy="leave out --mount-type")
        self._kernel_mounts().mount(row, where, engine, make_image=make_image)
        try:
            kernel.add_flags(where, options)
        except OSError:
            KernelMount(where).unmount()
            raise
        self._told("mount", key, where)
        return KernelMount(where)

    def _spawn(self, key: str, spec: MountSpec) -> LiveHandle:
        from cowfs.mounting import client
        from cowfs.store.handle import LiveHandle

        if not spec.readonly:
            self._plans.hand_limit(self._lookup.keyed(key), by_server=True)
        return LiveHandle(client.spawn(spec), self._live(), key)

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
        """As :meth:`cowfs.Store.spec`."""
        from cowfs.mounting.request import INDEXED, MountSpec

        words = options.split(",") if isinstance(options, str) else tuple(options)
        readonly = readonly or "ro" in words
        row = self._reading.resolve(key) if readonly else self._lookup.keyed(key)
        self._plans.at_rest(row)
        plan = self._plans.plan(row, committed=readonly)
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
            factory=INDEXED if self.context.knows_owners() else "",
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
        """As :meth:`cowfs.Store.paths`."""
        from cowfs.mounting.assemble import make_view
        from cowfs.mounting.resources import Stack
        from cowfs.union.paths import Paths

        with ExitStack() as held:
            with self.layers_stay(key):
                stack = Stack.open(self.spec(key, os.path.join(self.context.root, "nowhere"), io="cached"))
                held.callback(stack.close)
                view = make_view(stack)
                held.callback(view.close)
            yield Paths(view)

    def unmount(self, key: str, *, lazy: bool = False, force: bool = False) -> None:
        """As :meth:`cowfs.Store.unmount`."""
        row = self._lookup.keyed(key)
        told = self._mounted.notice_of(row)
        if told is not None:
            from cowfs.mounting import client

            client.umount(told.mountpoint, lazy=lazy, force=force, socket=told.socket)
            return
        where = kernel_mount_of(self.context.driver.tree(row.id))
        if where is None:
            raise NotFound(f"{key!r} is not mounted")
        KernelMount(where).unmount(lazy=lazy, force=force)
        self._told("unmount", key, where)

    def _told(self, action: str, key: str, where: str) -> None:
        """Record the events of kernel mounts, which have no server. No room for an event is no error: the mount stands."""
        if self.context.index.refused:
            return
        try:
            with self.context.index.write() as change:
                change.record_event("mount", action, key, {"mountpoint": where, "type": "kernel"})
        except (CowfsError, OSError) as error:
            _log.info("the event %s of %s is not recorded: %s", action, key, error)

    def handle(self, key: str) -> LiveHandle:
        """As :meth:`cowfs.Store.handle`."""
        from cowfs.mounting.client import MountHandle
        from cowfs.store.handle import LiveHandle

        row = self._lookup.keyed(key)
        server = self._mounted.server_of(row)
        if server is None:
            where = kernel_mount_of(self.context.driver.tree(row.id))
            if where is not None:
                KernelMount(where).nobody()
            raise NotFound(f"{key!r} is not mounted", remedy=f"cowfs mount --key {key} MNT")
        return LiveHandle(MountHandle(server["mountpoint"], server["pid"], server["socket"]), self._live(), key)
