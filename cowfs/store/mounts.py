"""Mounting snapshots: by our own server, or by the kernel where the caller asks for it.

Strategy: a mount by our server holds a flock on the layer's tree for as long as it lives, which is
all that the other verbs need to know. A mount by the kernel holds nothing; it is found in
mountinfo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import EllipsisType, MappingProxyType
from typing import TYPE_CHECKING, Any

from cowfs.driver.plan import MountPlan
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.format.mount_options import split_layers, unescape
from cowfs.index.database import Row
from cowfs.model import SMALLEST_LIMIT, Kind, Limit, Mount, Usage, parse_count, parse_size
from cowfs.mounting import kernel
from cowfs.mounting.kernel import KernelMount
from cowfs.store import limit_loop
from cowfs.store.layers import hold, is_locked, kernel_mount_of, kernel_mounts_of
from cowfs.store.limit_loop import ENGINES, LOOP
from cowfs.store.queries import LookVerbs
from cowfs.sys import loop, mounts as sys_mounts

if TYPE_CHECKING:
    from cowfs.mounting.client import MountHandle
    from cowfs.mounting.notice import Notice
    from cowfs.mounting.request import MountSpec
    from cowfs.union.paths import Paths

NOTHING: Mapping[str, Any] = MappingProxyType({})

__all__ = ["KernelMount", "MountVerbs", "mount_record"]


class MountVerbs(LookVerbs):
    """The verbs that mount."""

    def mount(
        self,
        key: str,
        target: str | os.PathLike[str],
        *,
        mount_type: str | None = None,
        limit_engine: str | None = None,
        readonly: bool = False,
        **more: Any,
    ) -> MountHandle | KernelMount:
        """Mount a snapshot.

        Args:
            key: of an active snapshot or a view; with ``readonly`` also a name or a tag.
            target: an existing directory.
            mount_type: ``fuse`` (the default) or ``kernel``.
            limit_engine: ``fuse``, ``loop`` (a kernel mount) or ``auto``: the kernel's where it can be had, cowfs's own server
                otherwise; left out: what fits the type (:mod:`cowfs.store.limit_engine`).
            readonly: nobody may write. An active snapshot may be mounted for writing at the same time: what it holds now is
                shown, and what is changed there later may show or not.
            more: as for :func:`cowfs.mount`: volatile, allow_other, io, options, trace and so on.

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
        where = resolve(os.fspath(target))
        if readonly:
            more["readonly"] = True
        with self.layers_stay(key):
            return self._mount(key, where, self.served_by(key, mount_type, limit_engine, more), more)

    def served_by(
        self, key: str, mount_type: str | None, engine: str | None, more: Mapping[str, Any] = NOTHING
    ) -> str | None:
        """The mount type, ``fuse`` or ``kernel``, of a mount that is asked for with a type, a limit engine, or both.

        Raises:
            NotFound: no such key.
            InvalidArgument: no such engine, one of the other type, or one that needs a limit where there is none.
        """
        if engine is None or engine == mount_type == "fuse":
            return mount_type
        if engine not in (*ENGINES, "auto"):
            raise InvalidArgument(f"no limit engine {engine!r}", remedy=f"{', '.join(ENGINES)} or auto")
        if engine == "auto":
            if mount_type is not None:
                return mount_type
            return "fuse" if kernel.why_not(more) or self.why_not_kernel(key) else "kernel"
        wanted = "kernel" if ENGINES[engine].kernel else "fuse"
        if mount_type not in (None, wanted):
            raise InvalidArgument(
                f"the limit engine {engine} is not one of {mount_type} mounts", remedy="leave out one of the two"
            )
        if wanted == "kernel" and self._keyed(key).limit.bytes is None:
            raise InvalidArgument(
                f"{key!r} has no limit on its size", remedy=f"cowfs limit {key} --size 1G gives it one"
            )
        return wanted

    def why_not_kernel(self, key: str) -> str:
        """Why ``mount_type="kernel"`` cannot mount a snapshot here, as this user, as far as can be told; "" where it can."""
        row = self._keyed(key)
        plan = self._plan(row)
        if self._needs_engine(row):
            return LOOP.why_not(self.driver) or (
                "" if row.limit.bytes is not None else "it has a limit on inodes alone"
            )
        if not plan.why_not_kernel:
            return ""
        return plan.why_not_image or loop.why_no_images(self.root, devices=bool(plan.row))

    def _needs_engine(self, row: Row) -> bool:
        """Whether a kernel mount of a snapshot needs an engine to be kept to a limit."""
        return bool(row.limit) and row.kind is Kind.ACTIVE and not self.driver.capabilities.own_limit

    @contextmanager
    def layers_stay(self, key: str) -> Iterator[None]:
        """No verb takes a layer of the key away until it is mounted, and whoever wants to then finds the mount."""
        from cowfs.store.key_lock import turn

        if self.index.refused:  # nobody can change a store that can only be read
            yield
            return
        with turn(self.root, key):
            yield

    def _mount(self, key: str, where: str, mount_type: str | None, more: dict[str, Any]) -> MountHandle | KernelMount:
        from cowfs.mounting import client

        if mount_type == "kernel":
            row = self._keyed(key)
            why = kernel.why_not(more)
            if why:
                raise Unsupported(f"no mount of the kernel: {why}", remedy="leave out one of the two")
            options = kernel.words_of(more.get("options", ()))
            if (more.get("readonly") or "ro" in options) and row.kind is not Kind.VIEW:
                raise Unsupported(
                    "the kernel mounts an active snapshot for writing only", remedy="leave out --mount-type"
                )
            self._mount_kernel(row, where)
            try:
                kernel.add_flags(where, options)
            except OSError:
                KernelMount(where).unmount()
                raise
            self._told("mount", key, where)
            return KernelMount(where)
        spec = self.spec(key, where, **more)
        if not spec.readonly:
            self._hand_limit(self._keyed(key), by_server=True)
        return client.spawn(spec)

    def _mount_kernel(self, row: Row, where: str) -> None:
        self._mountable(row)
        limited = self._needs_engine(row)
        why = LOOP.why_not(self.driver) if limited else ""
        if why:
            raise Unsupported(f"a kernel mount with a limit is not possible: {why}", remedy="leave out --mount-type")
        plan = self._plan(row)
        with ExitStack() as held:
            with hold(self.driver, row, "mount", at_rest=not limited):
                if plan.row and not plan.readonly and not limit_loop.has_image(self.driver, row.id):
                    self._refuse_redirects(row, plan.upper)
                if limited:
                    plan = held.enter_context(LOOP.limited(self.driver, row.id, plan))
            try:
                self._mount_image(row, plan, where)
            except (
                OSError,
                Unsupported,
            ) as error:  # what an image cannot hold, or this host cannot mount: layer by layer
                self._mount_layers(row, plan, where, error)

    def _mount_layers(self, row: Row, plan: MountPlan, where: str, no_image: Exception) -> None:
        """Mount a snapshot with each layer as a lower one of its own; what no image could be made or mounted for is told."""
        try:
            if self._needs_engine(row):
                record = plan.record("kernel")
            elif plan.row and row.parent is None and not plan.why_not_image:  # nothing beneath could be redirected
                record = plan.kernel()
            else:
                (record,) = self._mounts(row, "kernel")
        except Unsupported as error:
            if isinstance(no_image, OSError):
                raise Unsupported(
                    f"{error}, and no image of them can be mounted: {no_image.strerror}", remedy=error.remedy
                ) from no_image
            raise error from no_image
        mount_record(record, where, source=f"cowfs:{row.id}")

    def _mount_image(self, row: Row, plan: MountPlan, where: str) -> None:
        """Mount a snapshot as one lower layer: the image of its parent's metadata, with the layers as data beneath.

        Raises:
            Unsupported: the driver's layers, or this tree, are not mounted so.
            OSError: the host or its kernel cannot.
        """
        from cowfs.store import kernel_blocks, kernel_image

        if plan.why_not_image:
            raise Unsupported(f"no image: {plan.why_not_image}")
        if row.parent is None or self.driver.capabilities.whole or not plan.trusted:
            raise Unsupported("no image: nothing is beneath it, or its layers are not deltas of the trusted form")
        path = kernel_image.build(self.driver, self.index, self.index.by_num(row.parent))
        with ExitStack() as held:
            devices: list[str] = []
            if plan.row:
                devices = held.enter_context(kernel_blocks.opened_devices(path, f"{self.root}/layers"))
            root = loop.image_mount(path, devices)
        try:
            sys_mounts.overlay_mount(
                where,
                [root],
                None if plan.readonly else plan.upper,
                None if plan.readonly else plan.work,
                ("index=off", "redirect_dir=on", "metacopy=on"),
                data=[f"{self.root}/layers"],
                source=f"cowfs:{row.id}",
                readonly=plan.readonly,
            )
        finally:
            os.close(root)

    def _refuse_redirects(self, row: Row, upper: str) -> None:
        """The kernel would show a redirect file of the upper as the sparse file that it is."""
        from cowfs.row import layer

        for path, _ in layer.redirects(upper, self.driver.form):
            raise FailedPrecondition(
                f"{row.name!r} holds redirected blocks of {os.fsdecode(path)!r}, which the kernel cannot read in an upper layer",
                remedy=f"cowfs compact --share 0 {row.name} makes whole files of them; or commit it and mount what stands on that",
            )

    def spec(self, key: str, target: str, *, readonly: bool = False, **more: Any) -> MountSpec:
        """The wish that our server gets for a snapshot (:class:`cowfs.mounting.request.MountSpec`)."""
        from cowfs.mounting.request import INDEXED, MountSpec

        words = more.pop("options", ())
        words = words.split(",") if isinstance(words, str) else tuple(words)
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
            **more,
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
        """Where a snapshot is mounted, as far as this user can see; None when nowhere. No server is asked."""
        row = self._keyed(key)
        told = self._notice_of(row)
        return told.mountpoint if told is not None else kernel_mount_of(self.driver.tree(row.id))

    def _notice_of(self, row: Row) -> Notice | None:
        """What a mount's server left beside a layer that it has in use: one look-up, no server is asked."""
        from cowfs.mounting import notice

        if not is_locked(self.driver, row):
            return None
        told = [one for one in notice.found([self.driver.directory(row.id)]) if os.path.exists(one.socket)]
        if told:
            return told[0]
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

    def handle(self, key: str) -> MountHandle:
        """The handle of a snapshot that our server has mounted.

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
        return MountHandle(server["mountpoint"], server["pid"], server["socket"])

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
        server = self._server_of(row)
        if server is not None:
            from cowfs.mounting import protocol

            protocol.ask(server["socket"], "limit", bytes=limit.bytes, inodes=limit.inodes)
        elif limit_loop.has_image(self.driver, row.id) and limit_loop.is_mounted(self.driver, row.id):
            LOOP.change(self.driver, row.id, self._limit_of(replace(row, limit=limit)))
            with self.index.write() as change:
                self._active(name, row.num)
                change.set_limit(row.num, limit)
        elif self.driver.capabilities.own_limit and kernel_mount_of(self.driver.tree(row.id)) is not None:
            why = self.driver.plan(row.id, [], limit=limit).why_not_kernel
            if why:
                raise FailedPrecondition(f"{name!r} is mounted by the kernel: {why}", remedy="unmount it first")
            self.driver.limit(row.id, limit)
            with self.index.write() as change:
                self._active(name, row.num)
                change.set_limit(row.num, limit)
        else:
            with hold(self.driver, row, "limit", at_rest=False), self.index.write() as change:
                self._active(name, row.num)
                if limit != row.limit:
                    change.set_limit(row.num, limit)
        return self.index.get(name).limit

    def limit_engine(self, name: str) -> str | None:
        """Which engine keeps a snapshot to its limit now (:mod:`cowfs.store.limit_engine`); None where it has none, or nobody does.

        Raises:
            NotFound: no such snapshot.
        """
        row = self.resolve(name)
        if row.kind is not Kind.ACTIVE or not row.limit:
            return None
        if self.driver.capabilities.own_limit:
            return "driver"
        if limit_loop.has_image(self.driver, row.id):
            return LOOP.name
        return "fuse" if is_locked(self.driver, row) else None

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


def mount_record(record: Mount, target: str, *, source: str = "overlay") -> None:
    """Do what a kernel record says, with any number of layers; ``source`` is what the mount shows as its own.

    Raises:
        InvalidArgument: not a record that the kernel can do.
        OSError: what the kernel said.
    """
    readonly = "ro" in record.options
    if record.type == "bind":
        sys_mounts.mount(record.source, target, "", sys_mounts.MS_BIND | sys_mounts.MS_REC)
        if readonly:
            flags = sys_mounts.MS_BIND | sys_mounts.MS_REMOUNT | sys_mounts.MS_RDONLY
            sys_mounts.mount("", target, "", flags)
        return
    if record.type != "overlay":
        raise InvalidArgument(f"the kernel cannot mount the type {record.type}")
    values = dict(option.partition("=")[::2] for option in record.options)
    others = [option for option in record.options if option.partition("=")[0] not in _PLACES]
    sys_mounts.overlay_mount(
        target,
        split_layers(values["lowerdir"]),
        _plain(values.get("upperdir")),
        _plain(values.get("workdir")),
        others,
        readonly=readonly,
        source=source,
    )


_PLACES = frozenset({"lowerdir", "upperdir", "workdir", "ro"})


def _plain(text: str | None) -> str | None:
    return None if text is None else unescape(text)
