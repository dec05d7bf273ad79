"""What container engines ask of a store: records that they may extend, and whose a directory is.

Strategy. An engine carries out a record itself and adds options of its own: BuildKit adds ``redirect_dir=off``, with which the
kernel refuses ``metacopy=on``. So an engine's records carry no metacopy, and of ``redirect_dir`` the last word counts: directories of
lower layers can be renamed unless the engine forbids it (redirects are followed anyway, by most kernels' default). A mount without
metacopy cannot read what one with it may have written. So a layer has a mark, the file ``cowfs-plain`` in its directory, from the
moment an engine gets the first record of it, empty as it is then, until anything else may write in it. A chain of marked layers is
the kernel's; any other is a mount of our own server.
"""

from __future__ import annotations

import contextlib
import os

from cowfs.driver.interface import Driver
from cowfs.errors import NotFound
from cowfs.index.database import Row
from cowfs.model import Info, Kind, Mount
from cowfs.store.layers import PLAIN, is_locked, kernel_mount_of
from cowfs.store.live import LiveVerbs

__all__ = ["EngineVerbs"]


class EngineVerbs(LiveVerbs):
    """Records for engines; look-up by directory."""

    def engine_mounts(self, key: str) -> tuple[Mount, ...]:
        """How an engine may mount an active snapshot or a view: records that it may extend with options of its own.

        A bind of the only directory; the kernel's overlayfs; or, where there is a limit or a layer that such a mount could not
        read, a record of the type ``fuse.cowfs-overlayfs``.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot.
        """
        row = self._keyed(key)
        self._mountable(row)
        id, *parents = [id for _, id in self.index.chain(row.num)]
        plan = self.driver.plan(id, parents, readonly=row.kind is Kind.VIEW, limit=row.limit.over(row.base))
        plain = self.driver.capabilities.whole or (
            all(self._is_plain(one) for one in parents)
            and (row.kind is Kind.VIEW or bool(plan.why_not_kernel) or self._is_plain(id) or self._mark_plain(row))
        )
        if type(self.driver).mounts is not Driver.mounts:  # it has records of its own
            return self._mounts(row, "fuse" if plan.why_not_kernel else "kernel")
        record = plan.record(None if plain else "fuse", plain=True)
        self._hand_limit(row, by_server=record.type.startswith("fuse."))
        return (record,)

    def _is_plain(self, id: str) -> bool:
        return os.path.exists(f"{self.driver.directory(id)}/{PLAIN}")

    def _mark_plain(self, row: Row) -> bool:
        """Mark a layer in which nobody has written yet; whether that is so."""
        tree = self.driver.tree(row.id)
        if os.listdir(tree) or is_locked(self.driver, row) or kernel_mount_of(tree) is not None:
            return False
        with contextlib.suppress(FileExistsError):
            os.close(os.open(f"{self.driver.directory(row.id)}/{PLAIN}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        return True

    def at(self, path: str | os.PathLike[str]) -> Info:
        """Find the snapshot that a directory of the host belongs to: its layer's, or a mount point of it.

        Args:
            path: any path in the layer or below the mount point.

        Raises:
            NotFound: it belongs to none of this store.
        """
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
        before = os.path.realpath(f"{self.root}/layers") + "/"
        row = self.index.find_id(inside.removeprefix(before).partition("/")[0]) if inside.startswith(before) else None
        if row is None:
            raise NotFound(f"{where} belongs to no snapshot of the store {self.root}")
        return row.info()
