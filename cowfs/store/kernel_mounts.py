"""Mounts of snapshots that the kernel serves: from their layers, from an image of the chain, or from one that bounds the upper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from cowfs._typed import TYPE_CHECKING
from cowfs.driver.interface import Driver
from cowfs.driver.plan import MountPlan
from cowfs.errors import FailedPrecondition, InvalidArgument, Unsupported
from cowfs.format.mount_options import split_layers, unescape
from cowfs.index.database import Row
from cowfs.model import Kind, Mount
from cowfs.store import limit_loop
from cowfs.store.layers import hold
from cowfs.store.limit_image import KINDS
from cowfs.store.lookup import must_be_mountable
from cowfs.sys import loop, mounts as sys_mounts

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup
    from cowfs.store.plans import Plans

__all__ = ["KernelMounts", "mount_record"]


class KernelMounts:
    """Mounts by the kernel."""

    def __init__(self, context: Context, lookup: Lookup, plans: Plans) -> None:
        self.context = context
        self._lookup = lookup
        self._plans = plans

    def why_not_kernel(self, key: str) -> str:
        """As :meth:`cowfs.Store.why_not_kernel`."""
        row = self._lookup.keyed(key)
        plan = self._plans.plan(row)
        if self._needs_engine(row):
            return limit_loop.why_not(self.context.driver) or (
                "" if row.limit.bytes is not None else "it has a limit on inodes alone"
            )
        if not plan.why_not_kernel:
            return ""
        return plan.why_not_image or loop.why_no_images(self.context.root, devices=bool(plan.row))

    def _needs_engine(self, row: Row) -> bool:
        """Whether a kernel mount of a snapshot needs an engine for its limit."""
        return bool(row.limit) and row.kind is Kind.ACTIVE and not self.context.driver.capabilities.own_limit

    def mount(self, row: Row, where: str, engine: str | None = None, *, make_image: bool = True) -> None:
        """Mount an active snapshot or a view by the kernel; one with a limit in an image of the limit's size.

        Args:
            engine: the limit engine that was asked for; None: the best one.
            make_image: make the image of its parent's metadata if it is missing; otherwise all layers are mounted then.

        Raises:
            FailedPrecondition: in use, or the kernel cannot read its upper.
            Unsupported: the host, the user or the driver cannot.
        """
        must_be_mountable(row)
        limited = self._needs_engine(row)
        kind = KINDS.get(engine or "")
        why = limit_loop.why_not(self.context.driver, kind or KINDS["loop"]) if limited else ""
        if why:
            raise Unsupported(f"a kernel mount with a limit is not possible: {why}", remedy="leave out --mount-type")
        chain = self.context.index.chain(row.num)
        plan = self._plans.plan(row, chain=chain)
        with ExitStack() as held:
            with hold(self.context.driver, self.context.index, row, "mount", at_rest=not limited):
                if plan.row and not plan.readonly and not limit_loop.has_image(self.context.driver, row.id):
                    self._refuse_redirects(row, plan.upper)
                if limited:
                    plan = held.enter_context(limit_loop.limited(self.context.driver, row.id, plan, kind))
            try:
                self._mount_image(row, plan, where, chain[1:], make=make_image)
            except (
                OSError,
                Unsupported,
            ) as error:  # the image failed: mount layer by layer
                self._mount_layers(row, plan, where, error)

    def _mount_layers(self, row: Row, plan: MountPlan, where: str, no_image: Exception) -> None:
        """Mount a snapshot with each layer as a lower one of its own; ``no_image`` is the failure of the mount through
        an image."""
        try:
            if self._needs_engine(row):
                record = plan.record("kernel")
            elif plan.row and row.parent is None and not plan.why_not_image:  # no lower file could be redirected
                record = plan.kernel()
            elif type(self.context.driver).plan is not Driver.plan:  # trees exist for a plan, and longer for a record
                self._plans.hand_limit(row, by_server=False)
                record = self._plans.plan(row).record("kernel")
            else:
                (record,) = self._plans.records(row, "kernel")
        except Unsupported as error:
            if isinstance(no_image, OSError):
                raise Unsupported(
                    f"{error}, and no image of them can be mounted: {no_image.strerror}", remedy=error.remedy
                ) from no_image
            raise error from no_image
        mount_record(record, where, source=f"cowfs:{row.id}")

    def _mount_image(
        self, row: Row, plan: MountPlan, where: str, chain: Sequence[tuple[int, str]], *, make: bool
    ) -> None:
        """Mount a snapshot as one lower layer: the image of its parent's metadata, with the layers as data beneath.

        Raises:
            Unsupported: the driver's layers, or this tree, cannot be mounted so.
            OSError: the host or its kernel cannot.
        """
        from cowfs.store import kernel_blocks, kernel_image

        if plan.why_not_image:
            raise Unsupported(f"no image: {plan.why_not_image}")
        if row.parent is None or self.context.driver.capabilities.whole or not plan.trusted:
            raise Unsupported("no image: nothing is beneath it, or its layers are not deltas of the trusted form")
        image = kernel_image.build if make else kernel_image.existing
        path = image(self.context.driver, self.context.index, self.context.index.by_num(row.parent), chain)
        with ExitStack() as held:
            devices: list[str] = []
            if plan.row:
                devices = held.enter_context(kernel_blocks.opened_devices(path, f"{self.context.root}/layers"))
            root = loop.image_mount(path, devices)
        try:
            sys_mounts.overlay_mount(
                where,
                [root],
                None if plan.readonly else plan.upper,
                None if plan.readonly else plan.work,
                ("index=off", "redirect_dir=on", "metacopy=on"),
                data=[f"{self.context.root}/layers"],
                source=f"cowfs:{row.id}",
                readonly=plan.readonly,
            )
        finally:
            os.close(root)

    def _refuse_redirects(self, row: Row, upper: str) -> None:
        """Refuse redirect files in the upper, which the kernel would show as sparse files."""
        from cowfs.row import layer

        for path, _ in layer.redirects(upper, self.context.driver.form):
            raise FailedPrecondition(
                f"{row.name!r} holds redirected blocks of {os.fsdecode(path)!r}, which the kernel cannot read in an upper layer",
                remedy=f"cowfs compact --share 0 {row.name} makes whole files of them; or commit it and mount what stands on that",
            )


def mount_record(record: Mount, target: str, *, source: str = "overlay") -> None:
    """Carry out a kernel record with any number of layers; ``source`` is shown as the mount's source.

    Raises:
        InvalidArgument: not a record for the kernel.
        OSError: an error of the kernel.
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
