"""The verbs ``restack`` and ``absorb``: other layers beneath a mount that goes on.

Strategy: the caller gives the new layers and the snapshot of their tree in the index; the rest is found as by
:mod:`cowfs.mounting.index_view` at the start. A snapshot's tree covers its own layers; layers above those are scanned.

*restack* is one call of the loop thread, so that no request is being answered. *absorb*, for a squash into the mounted key
itself, first copies the content of the layer beneath, between requests; once none of it is visible any more, one call
of the loop thread leaves the mark (:data:`cowfs.mounting.switch_mark.MARK`) in that layer's directory and drops the
layer. From then on the upper layer may hold objects that are right only without it.

Threads: verbs are called in a connection's thread of the control socket, never in the loop.
"""

from __future__ import annotations

import os
import threading
from dataclasses import asdict, dataclass
from typing import Any

from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.index.database import Index
from cowfs.index.mounted import IndexTree
from cowfs.mounting.served import ServedMount
from cowfs.mounting.switch_mark import leave_mark
from cowfs.mounting.verbs.arguments import Counts
from cowfs.mounting.verbs.live import at_once, can_switch
from cowfs.mounting.verbs.standing import stand_on
from cowfs.mounting.verbs.table import verb
from cowfs.union.absorb import absorb, complete
from cowfs.union.quota import UNIT

_PASSES = 5
_one = threading.Lock()  # one take-over at a time: the first caller may be gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Restack:
    """``restack``: other layers beneath.

    Attributes:
        lowers: the layers, topmost first.
        num: the snapshot in ``index`` whose tree they are; None: they are scanned.
        upper: the upper layer that the caller knows.
        freed: use that no longer counts for the limit.
    """

    lowers: list[str]
    num: int | None
    index: str
    upper: str
    freed: Counts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorb:
    """``absorb``: take over the content of the topmost of ``lowers``; fields as of :class:`Restack`.

    Attributes:
        empty: the layer to use when none is left.
        held: the layer's use for the limit, if it counted.
        mark: a file made at the instant of the switch, with the figures as JSON.
    """

    lowers: list[str]
    num: int | None
    index: str
    upper: str
    empty: str
    mark: str
    held: Counts | None = None


def _index(server: ServedMount, path: str) -> Index:
    """The index that the view reads already, if it does."""
    there = server.view.index
    return there.records if isinstance(there, IndexTree) and isinstance(there.records, Index) else Index(path)


@verb("restack", Restack)
def _restack(server: ServedMount, arguments: Restack) -> dict[str, Any]:
    """Switch to the layers ``lowers``, with the tree of the snapshot ``num`` of ``index``; they show the same tree as
    the present ones.

    Returns:
        stalled: seconds during which no request was answered.
    """
    can_switch(server, writing=False)
    lowers, num = arguments.lowers, arguments.num

    def switch() -> None:
        _same_upper(server, arguments.upper)
        try:
            stand_on(server.view, _index(server, arguments.index), lowers, num)
        except OSError as error:
            raise _explained(server, error) from None
        server.now(layers=tuple(reversed(lowers)))
        freed = arguments.freed
        if freed is not None and server.view.space is not None:
            server.view.space.offset(-(freed["bytes"] // UNIT), -freed["inodes"])

    return {"stalled": at_once(server, switch, strict=True)}


def _same_upper(server: ServedMount, path: str) -> None:
    """Check, in the loop thread, that the caller knows the view's present upper layer.

    Raises:
        FailedPrecondition: the upper layer was switched meanwhile.
    """
    assert server.view.upper is not None
    here = os.fstat(server.view.upper.root.open())
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    if there is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
        raise FailedPrecondition(
            f"the mount at {server.spec.mountpoint} got another layer meanwhile", remedy="try again"
        )


def _explained(server: ServedMount, error: OSError) -> CowfsError:
    where = f": {os.fsdecode(error.filename)}" if error.filename else ""
    return CowfsError(f"the mount at {server.spec.mountpoint} cannot use its new layers: {error.strerror}{where}")


@verb("absorb", Absorb)
def _absorb(server: ServedMount, arguments: Absorb) -> dict[str, Any]:
    """Take over the content of the topmost of ``lowers``, then switch to the others; ``num`` is their snapshot.

    Args:
        held: the layer's use for the limit (bytes, inodes), if it counted.
        mark: a file made at the instant of the switch, with the figures as JSON.

    Returns:
        moved: additional bytes and inodes in the upper layer; stalled: as above.
    """
    can_switch(server, writing=True)
    view, lowers, num = server.view, arguments.lowers, arguments.num
    rest = lowers[1:] or [arguments.empty]

    def prepare() -> None:
        _same_upper(server, arguments.upper)
        stand_on(view, _index(server, arguments.index), lowers, num)

    moved = {"bytes": 0, "inodes": 0}

    def switch() -> bool:
        if not complete(view):
            return False
        try:
            leave_mark(arguments.mark, {"moved": moved})
        except FileExistsError:
            raise FailedPrecondition("this squash was taken back meanwhile", remedy="try again") from None
        try:
            stand_on(view, _index(server, arguments.index), rest, num)
        except BaseException:
            os.unlink(arguments.mark)
            raise
        held = arguments.held or moved  # the use that did not count before does not count now
        if view.space is not None:
            view.space.take_later()
            view.space.offset(-(held["bytes"] // UNIT), -held["inodes"])
        server.now(layers=tuple(reversed(rest)))
        return True

    with _one:
        try:
            at_once(server, prepare, strict=True)
            for _ in range(_PASSES):
                for name, value in asdict(absorb(view, server.call)).items():
                    moved[name] += value
                done: list[bool] = []
                stalled = at_once(server, lambda: done.append(switch()), strict=True)  # noqa: B023 - called at once
                if done[0]:
                    return {"moved": moved, "stalled": stalled}
        except OSError as error:
            raise _explained(server, error) from None
        finally:
            server.call(lambda: view.space.take_later() if view.space is not None else None)  # unless it was switched
    raise FailedPrecondition(f"too much is being renamed in {server.spec.mountpoint}", remedy="try again")
