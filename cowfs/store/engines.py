"""A store's verbs for container engines: records that they may extend, and the snapshot of a directory.

Strategy. An engine carries out a record itself and adds options of its own: BuildKit adds ``redirect_dir=off``, with which the
kernel refuses ``metacopy=on``. So an engine's records carry no metacopy, and of ``redirect_dir`` the last word counts:
directories of lower layers can be renamed unless the engine forbids it (redirects are followed anyway, by most kernels'
default). A mount without metacopy cannot read what one with it may have written. So a layer has a mark, the file
``cowfs-plain`` in its directory, from the first record for an engine, when the layer is empty, until another writer may
use it. The kernel mounts a chain of marked layers by a record.

Any other chain, and one that a record cannot hold (mount(2) takes one page of options, some seventy layers), is mounted for the
engine, which gets a bind mount of that. :meth:`Engines.held_by` says who serves it: the kernel, over an image of the chain where it
can, since nothing of this passes through the engine; cowfs's own server where there is a limit, and where writes are to be
redirected. A record of the image itself (``lowerdir=IMAGE::LAYERS``) would be mounted as well, but containerd's
``Apply`` takes each part between colons for the directory of a parent (core/diff/apply/apply_linux.go, 1.6 to 2.4), and so
the empty one for the host's root.
"""

from __future__ import annotations

import contextlib
import os

from cowfs._typed import TYPE_CHECKING
from cowfs.driver.interface import Driver
from cowfs.errors import NotFound
from cowfs.index.database import Row
from cowfs.model import Info, Kind, Mount
from cowfs.store.layers import PLAIN, is_locked, kernel_mount_of
from cowfs.store.lookup import must_be_mountable

if TYPE_CHECKING:
    from cowfs.store.context import Context
    from cowfs.store.kernel_mounts import KernelMounts
    from cowfs.store.lookup import Lookup
    from cowfs.store.plans import Plans

__all__ = ["Engines"]


class Engines:
    """Records for engines, and the engine of what is held for them; look-up by directory."""

    def __init__(self, context: Context, lookup: Lookup, plans: Plans, kernel_mounts: KernelMounts) -> None:
        self.context = context
        self._lookup = lookup
        self._plans = plans
        self._kernel_mounts = kernel_mounts

    def engine_mounts(self, key: str) -> tuple[Mount, ...]:
        """As :meth:`cowfs.Store.engine_mounts`."""
        row = self._lookup.keyed(key)
        must_be_mountable(row)
        id, *parents = [id for _, id in self.context.index.chain(row.num)]
        plan = self.context.driver.plan(id, parents, readonly=row.kind is Kind.VIEW, limit=row.limit.over(row.base))
        alone = row.kind is Kind.VIEW and len(parents) == 1  # a bind; the lowest layer has nothing to be a metacopy of
        plain = (
            alone
            or self.context.driver.capabilities.whole
            or (
                all(self._is_plain(one) for one in parents)
                and (row.kind is Kind.VIEW or bool(plan.why_not_kernel) or self._is_plain(id) or self._mark_plain(row))
            )
        )
        if type(self.context.driver).mounts is not Driver.mounts:  # it has records of its own
            return self._plans.records(row, "fuse" if plan.why_not_kernel else "kernel")
        record = plan.record(None if plain else "fuse", plain=True)
        self._plans.hand_limit(row, by_server=record.type.startswith("fuse."))
        return (record,)

    def held_by(self, key: str) -> str:
        """As :meth:`cowfs.Store.held_by`."""
        row = self._lookup.keyed(key)
        must_be_mountable(row)
        return "fuse" if self._why_not_held(row) else "kernel"

    def _why_not_held(self, row: Row) -> str:
        """The reason why the kernel does not serve a mount that is held for an engine; "" if it does."""
        if row.limit and row.kind is Kind.ACTIVE and not self.context.driver.capabilities.own_limit:
            return "it has a limit"
        if self.context.driver.capabilities.row and row.kind is Kind.ACTIVE:
            return "the driver row redirects writes, which the kernel cannot"
        return self._kernel_mounts.why_not_kernel(row.name)

    def _is_plain(self, id: str) -> bool:
        return os.path.exists(f"{self.context.driver.directory(id)}/{PLAIN}")

    def _mark_plain(self, row: Row) -> bool:
        """Mark an empty layer. Returns False for a layer with any content."""
        tree = self.context.driver.tree(row.id)
        if os.listdir(tree) or is_locked(self.context.driver, row) or kernel_mount_of(tree) is not None:
            return False
        with contextlib.suppress(FileExistsError):
            os.close(
                os.open(f"{self.context.driver.directory(row.id)}/{PLAIN}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            )
        return True

    def at(self, path: str | os.PathLike[str]) -> Info:
        """As :meth:`cowfs.Store.at`."""
        from cowfs.mounting import mountpoint, protocol

        where = os.path.realpath(os.fspath(path))
        entry = mountpoint.find(where)
        inside = where
        if entry is not None and entry.fstype in mountpoint.TYPES:
            socket = protocol.socket_of(entry.dev)
            inside = os.path.realpath(str(protocol.ask(socket, "info")["upper"])) if socket is not None else ""
        elif entry is not None and entry.fstype == "overlay":
            uppers = [one for one in entry.super_options.split(b",") if one.startswith(b"upperdir=")]
            inside = os.fsdecode(uppers[0].partition(b"=")[2]) if uppers else ""
        before = os.path.realpath(f"{self.context.root}/layers") + "/"
        row = (
            self.context.index.find_id(inside.removeprefix(before).partition("/")[0])
            if inside.startswith(before)
            else None
        )
        if row is None:
            raise NotFound(f"{where} belongs to no snapshot of the store {self.context.root}")
        return row.info()
