"""A mount server's part of a live snapshot and a rollback: the verbs ``freeze`` and ``rollback``; ``sync`` for other
readers of its upper layer; and ``readonly`` for its commit.

Order, for the first two:

1. syncfs(2) on the mount, from this thread, so that earlier stores through maps are in the upper layer;
2. in one call of the loop thread, so that no request is being answered: leave the mark in the new layer, switch;
3. after a rollback: tell the kernel what is stale, from the notifier's thread.

The *mark* (a file in the new layer's directory) is made before anything is written to the new layer. So a half-done
snapshot shows by it whether the new layer may hold data (:mod:`cowfs.store.switching`).

Threads: called in a connection's thread of the control socket, never in the loop.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.fuse.loop import Session
from cowfs.mounting.served import ServedMount
from cowfs.mounting.verbs.arguments import Counts, Nothing
from cowfs.mounting.verbs.table import verb
from cowfs.sys import btrfs, mounts
from cowfs.sys.files import syncfs
from cowfs.union.quota import UNIT

if TYPE_CHECKING:
    from cowfs.union.layers import Layer
    from cowfs.union.live import Stale

__all__ = ["at_once", "can_switch"]

_FLUSH_SECONDS = 10.0
_PATIENCE_SECONDS = 5.0  # seconds that a switch waits for a moment without held requests
_STRICT_SECONDS = 60.0  # ... when no other moment will do
_BARRIERS, _FEW = 200, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The common arguments of ``freeze`` and ``rollback``: the new upper layer, and the future names of its directories.

    Attributes:
        mark: a file that is made at the instant of the switch.
    """

    upper: str
    work: str
    final_upper: str
    final_work: str
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze(Switch):
    """``freeze``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback(Switch):
    """``rollback``: to the layer whose tree is ``layer``.

    Attributes:
        base: use outside the new layer that counts for the limit, negative.
        lowers, num, index: the layers to scan while the dropped ones go, if the view reads them from the index
            (``index`` is a path for servers that do not have it open).
    """

    layer: str
    base: Counts
    lowers: list[str] = field(default_factory=list)
    num: int | None = None
    index: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace(Switch):
    """``replace``: a rollback where the upper layer is an entire tree, and so is the new one.

    Attributes:
        base: use in the new layer that does not count for the limit.
    """

    base: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Subvolume:
    """``subvolume``: a snapshot of ``source`` called ``name`` in ``directory``."""

    source: str
    directory: str
    name: str


@verb("freeze", Freeze)
def _freeze(server: ServedMount, arguments: Freeze) -> dict[str, Any]:
    """Freeze the upper layer and go on over ``upper`` and ``work``, whose directory will get the name ``final``."""

    def switch() -> None:
        server.view.freeze(arguments.upper, arguments.work)

    return {"stalled": _switch(server, arguments, switch)}


@verb("subvolume", Subvolume)
def _subvolume(server: ServedMount, arguments: Subvolume) -> dict[str, Any]:
    """Take a snapshot of the upper layer's btrfs subvolume, while no request is answered.

    Args:
        source: the subvolume, which the upper directory is in.
        directory, name: of the snapshot.
    """
    can_switch(server)
    if not (server.stack.upper or "").startswith(os.path.realpath(arguments.source) + "/"):
        raise InvalidArgument(f"{arguments.source} does not hold the upper layer")
    _write_back(server)
    source = os.open(arguments.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        directory = os.open(arguments.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            stalled = at_once(server, lambda: btrfs.snapshot(source, directory, os.fsencode(arguments.name)))
        finally:
            os.close(directory)
    finally:
        os.close(source)
    return {"stalled": stalled}


@verb("sync", Nothing)
def _sync(server: ServedMount, arguments: Nothing) -> dict[str, Any]:
    """Bring all writes until now into the upper layer, without durability against a loss of power."""
    _write_back(server)
    return {}


@verb("readonly", Nothing)
def _readonly(server: ServedMount, arguments: Nothing) -> dict[str, Any]:
    """Refuse every change from now on, for good, with all earlier writes in the upper layer.

    A program that has a file open for writing gets EROFS at the next write, fsync or close (the kernel may keep a page
    until then). The lock of the upper layer is shared from then on.
    """
    if server.spec.readonly:
        return {}
    can_switch(server)
    _write_back(server)

    def act() -> None:
        server.view.refuse_changes()
        server.view.open_files.close_all()  # some files were open for writing

    at_once(server, act, strict=True)
    server.now(readonly=True)
    server.stack.share()
    try:  # so that the kernel refuses at once what the view would refuse later
        mounts.mount("", server.spec.mountpoint, "", mounts.MS_REMOUNT | mounts.MS_RDONLY)
    except OSError:
        pass  # files are open for writing, or this user may not remount
    return {}


@verb("rollback", Rollback)
def _rollback(server: ServedMount, arguments: Rollback) -> dict[str, Any]:
    """Drop what is above the layer ``layer`` and go on over ``upper`` and ``work``.

    Args:
        base: use outside the new layer that counts for the limit, negative (bytes, inodes).
        lowers, num, index: the layers to scan while the dropped ones go (the verb ``restack``), if the view reads them
            from the index.
    """
    stale: list[Stale] = []

    def switch() -> None:
        view = server.view
        layer = _layer(server, arguments.layer)
        if layer.index < view.indexed_layers - 1:
            from cowfs.mounting.verbs.standing import stand_on

            stand_on(view, view.index.records, arguments.lowers, arguments.num)  # type: ignore[union-attr]
        stale.append(view.rollback(layer, arguments.upper, arguments.work))
        base = arguments.base
        if view.space is not None:
            view.space.offset(-(base["bytes"] // UNIT), -base["inodes"])

    stalled = _switch(server, arguments, switch)
    _tell_kernel(server, stale[0])
    return {"stalled": stalled, "stale": len(stale[0].inodes)}


@verb("replace", Replace)
def _replace(server: ServedMount, arguments: Replace) -> dict[str, Any]:
    """Go on with the tree ``upper`` in place of the present one."""
    stale: list[Stale] = []

    def switch() -> None:
        view = server.view
        stale.append(view.replace(arguments.upper, arguments.work))
        base = arguments.base
        if view.space is not None:
            view.space.offset(-(base["bytes"] // UNIT), -base["inodes"])

    stalled = _switch(server, arguments, switch)
    _tell_kernel(server, stale[0])
    return {"stalled": stalled, "stale": len(stale[0].inodes)}


def _layer(server: ServedMount, path: str) -> Layer:
    """The view's layer at ``path``; only in the loop thread."""
    wanted = os.stat(path)
    for layer in server.view.layers:
        there = os.fstat(layer.root.open())
        if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
            return layer
    raise NotFound(f"the mount at {server.spec.mountpoint} has no layer {path}")


def can_switch(server: ServedMount, *, writing: bool = True) -> None:
    """Whether this mount's layers can be switched at one instant.

    Args:
        writing: the upper layer takes part.

    Raises:
        FailedPrecondition: no; the message says why.
    """
    if writing and (server.stack.upper is None or server.spec.readonly):
        raise FailedPrecondition("a read-only mount has no snapshots")
    if server.spec.io == "passthrough":
        raise FailedPrecondition(
            "writes pass the server with io=passthrough, so no instant can be told",
            remedy="mount without --io passthrough",
        )
    if not isinstance(server.session, Session):
        raise FailedPrecondition(
            "libfuse's requests cannot be held for an instant", remedy="mount without --frontend fusepy"
        )


def at_once(server: ServedMount, act: Callable[[], None], *, strict: bool = False) -> float:
    """Call ``act`` in the loop thread at a moment when no request waits for a copy-up, and return its duration in seconds.

    The call waits for such a moment; after some seconds any moment will do, unless ``strict``.

    Raises:
        FailedPrecondition: with ``strict``, there was no such moment for a minute.
    """
    session = server.session
    assert isinstance(session, Session)
    patience = time.monotonic() + (_STRICT_SECONDS if strict else _PATIENCE_SECONDS)

    def attempt() -> float | None:
        if session.has_held_requests():
            if time.monotonic() < patience:
                return None  # a write that came before is waiting for its copy-up
            if strict:
                raise FailedPrecondition("a big file is being copied up under the mount", remedy="try again")
        begun = time.perf_counter()
        act()
        return time.perf_counter() - begun

    while (held := server.call(attempt)) is None:
        time.sleep(0.002)
    return float(held)


def _switch(server: ServedMount, arguments: Switch, switch: Callable[[], None]) -> float:
    """Do steps 1 and 2, and return the time that the loop was held, in seconds."""
    stack = server.stack
    can_switch(server)
    _write_back(server)
    locks = stack.lock_more(arguments.upper, arguments.work)
    stack.announce_at(arguments.upper)
    mark = arguments.mark

    def act() -> None:
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            switch()
        except BaseException:
            os.unlink(mark)
            raise

    try:
        held = at_once(server, act)
    except BaseException:
        for lock in locks:
            os.close(lock)
        raise
    stack.switched(arguments.final_upper, arguments.final_work, locks)
    return held


def _write_back(server: ServedMount) -> None:
    """Wait until the server has answered every write-back of stores through maps made until now.

    syncfs(2) on a FUSE mount starts the write-back but (since Linux 6.18) does not wait for it. Requests are queued in
    order, so once a request of this function is answered, those before it were read; requests beyond the kernel's bound
    of background requests come later, and shows in the connection's count of waiting requests.
    """
    target = server.spec.mountpoint
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            syncfs(fd)
        except OSError as error:
            # Some page was refused at its write-back, now or at any time before: it is lost, and msync, fsync or close
            # of the storing program report it. The snapshot has the remaining pages.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
        connection = f"/sys/fs/fuse/connections/{os.minor(os.fstat(fd).st_dev)}/waiting"
    finally:
        os.close(fd)
    for _ in range(_BARRIERS):
        os.statvfs(target)
        try:
            with open(connection, encoding="utf-8") as file:
                if int(file.read()) <= _FEW:
                    return
        except OSError:
            return  # no fusectl here: one barrier must suffice


def _tell_kernel(server: ServedMount, stale: Stale) -> None:
    notifier = server.session.notifier
    for inode in stale.inodes:
        notifier.inval_inode(inode)
    notifier.inc_epoch()
    for parent, name in stale.entries:
        notifier.inval_entry(parent, name)
    notifier.flush(_FLUSH_SECONDS)
