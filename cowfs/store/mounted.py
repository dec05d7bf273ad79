"""Finding the mount of a layer, and excluding other users of it.

Strategy: a mount by cowfs's server holds a flock on the layer's tree for its lifetime, and leaves a notice beside the
layer for the other verbs. A mount by the kernel holds nothing; it is found in mountinfo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.index.database import Row
from cowfs.model import Usage
from cowfs.store import limit_loop
from cowfs.store.layers import hold, is_locked, kernel_mount_of, kernel_mounts_of
from cowfs.sys import mounts as sys_mounts, process

if TYPE_CHECKING:
    from cowfs.mounting.notice import Notice
    from cowfs.store.context import Context
    from cowfs.store.lookup import Lookup

__all__ = ["Mounted"]


class Mounted:
    """Mounts of layers."""

    def __init__(self, context: Context, lookup: Lookup) -> None:
        self.context = context
        self._lookup = lookup

    def mounted_at(self, key: str) -> str | None:
        """As :meth:`cowfs.Store.mounted_at`."""
        found = self.mount_of(key)
        return None if found is None else found[1]

    def mount_of(self, key: str) -> tuple[int, str] | None:
        """As :meth:`cowfs.Store.mount_of`."""
        row = self._lookup.keyed(key)
        told = self.notice_of(row)
        if told is not None:
            return told.pid, told.mountpoint
        where = kernel_mount_of(self.context.driver.tree(row.id))
        return None if where is None else (os.getpid(), where)

    def notice_of(self, row: Row) -> Notice | None:
        """The notice that a mount's server left beside its layer: one look-up, without asking a server."""
        from cowfs.mounting import notice

        if not is_locked(self.context.driver, row):
            return None
        told = [one for one in notice.found([self.context.driver.directory(row.id)]) if os.path.exists(one.socket)]
        if told:
            if process.start_time(told[0].pid) is None:  # of another pid namespace, or gone meanwhile
                return told[0] if is_locked(self.context.driver, row) else None
            return None if process.is_ending(told[0].pid) else told[0]
        server = self._server_without_notice(row)
        if server is None:
            return None
        return notice.Notice(server["socket"], server["pid"], server["mountpoint"], "", server["label"])

    def server_of(self, row: Row, *, made_by: str | None = None) -> dict[str, Any] | None:
        """The answer of a mounted snapshot's server about itself; no other server is asked.

        Args:
            made_by: ``store`` for mounts that a store made, which know the index; None to include mounts by a record.

        Raises:
            FailedPrecondition: the server hangs.
        """
        from cowfs.mounting import protocol

        told = self.notice_of(row)
        if told is None or not protocol.is_trusted(told.socket):
            return None
        try:
            answer = protocol.ask(told.socket, "info")
        except FailedPrecondition:
            if not is_locked(self.context.driver, row) or not os.path.exists(told.socket):
                return None  # it ended
            raise FailedPrecondition(
                f"the server of {row.name!r} at {told.mountpoint} (process {told.pid}) does not answer",
                remedy=f"cowfs umount --force {told.mountpoint} ends it",
            ) from None
        except CowfsError:
            return None  # its mount is gone, and it is about to end
        if os.path.realpath(str(answer.get("upper"))) != os.path.realpath(self.context.driver.tree(row.id)):
            return None  # another mount has its device number now, and it is about to end
        if made_by == "store" and answer.get("label") != row.name:
            return None
        return {**answer, "socket": told.socket}

    def _server_without_notice(self, row: Row) -> dict[str, Any] | None:
        """The server of a layer, searched among all servers: for a mount without a notice, or of an older cowfs."""
        from cowfs.mounting import protocol

        tree = os.path.realpath(self.context.driver.tree(row.id))
        for path, answer in protocol.ask_all(protocol.sockets(), "info"):
            if not isinstance(answer, OSError) and os.path.realpath(str(answer.get("upper"))) == tree:
                return {**answer, "socket": path}
        return None

    def usage_of(self, row: Row) -> Usage | None:
        """The use of a mounted snapshot by its server's count, without copied data, for :meth:`cowfs.Store.usage`."""
        from cowfs.mounting.client import MountHandle

        server = self.server_of(row)
        if server is None:
            return None
        try:
            used = MountHandle(server["mountpoint"], server["pid"], server["socket"]).usage()
        except CowfsError:
            if self.mounted_at(row.name) is not None:
                raise
            return None  # unmounted meanwhile: the tree says it all
        if not server["label"]:  # a mount by a record, whose server counts the whole layer
            return used
        return Usage(bytes=used.bytes + row.base.bytes, inodes=used.inodes + row.base.inodes)

    @contextmanager
    def alone(self, row: Row, verb: str, *, mounted: bool, missing_ok: bool = False) -> Iterator[bool]:
        """Be the only writer of a layer. Yields whether it is unmounted, too.

        Args:
            mounted: allow a mount, which becomes read-only for a commit.

        Raises:
            FailedPrecondition: a mount or another verb uses it.
        """
        with ExitStack() as held:
            alone = True
            try:
                held.enter_context(
                    hold(
                        self.context.driver,
                        self.context.index,
                        row,
                        verb,
                        missing_ok=missing_ok,
                        at_rest=verb != "remove",
                    )
                )
            except FailedPrecondition:
                kept_apart = verb == "commit" and limit_loop.has_image(self.context.driver, row.id)
                if not mounted or kept_apart or self.mounted_at(row.name) is None:
                    raise
                alone = False
                if verb == "commit":
                    self._let_nobody_write(row)
            yield alone

    def _let_nobody_write(self, row: Row) -> None:
        """Make the mounts of a snapshot read-only, for good; all writes are in its layer then.

        Raises:
            FailedPrecondition: files are open for writing in a mount of the kernel; or the server fails.
        """
        server = self.server_of(row)
        if server is not None:
            from cowfs.mounting import protocol

            protocol.ask(server["socket"], "readonly", timeout=600.0)
            return
        tree = self.context.driver.tree(row.id)
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
