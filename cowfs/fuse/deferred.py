"""Deferred requests: those with a slow answer, from their run on a worker to the requests that they held back.

Strategy: the handlers hand over slow work (:class:`cowfs.fuse.handlers.data.Host` is this module's face to
them); :mod:`cowfs.fuse.workers` has the threads and the rules of order. The life of such a request ends here:

* a **copy-up** runs on a worker, is published in the loop, and then its request is served again, like a new one;
  if it failed, that is the request's answer, and the next one in the queue tries again;
* a **look** (cold read) and a job **aside** (fsync) are answered by the worker itself;
* the wait of a **killed** process ends: the copy it caused is cancelled, a queued request is answered EINTR.
  Other signals interrupt nothing, because programs do not expect EINTR of a file.

Ownership: everything here belongs to the loop thread, but for the jobs themselves.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from cowfs._typed import TYPE_CHECKING, Any, Protocol
from cowfs.fuse import abi, codec
from cowfs.fuse.workers import Gates, Workers

if TYPE_CHECKING:
    from cowfs.fuse.tree import Tree


class Owner(Protocol):
    """The interface of the session for this module."""

    view: Tree

    def report(self) -> int: ...

    def post(self, fn: Callable[[], None], wake: Callable[[], bool] | None = None) -> None: ...

    def reply(self, unique: int, opcode: int, reply: codec.Reply) -> None: ...

    def dispatch(self, request: bytes) -> None: ...

    def drop_attributes(self, nodeid: int) -> None: ...


class Errands:
    """The deferred requests of one session, which replies, dispatches and posts for them."""

    def __init__(self, session: Owner, workers: int, most_jobs: int) -> None:
        self.gates = Gates()
        self.workers = Workers(workers, session.report, most_jobs)
        self.watched: dict[int, int] = {}  # unique -> pid of interrupted requests that still wait
        self._session = session
        self._jobs: dict[int, _Job] = {}  # unique -> copy-up under way

    @property
    def pending(self) -> bool:
        """Whether requests wait for a copy-up or another job of their node."""
        return bool(self._jobs) or bool(self.gates.nodes)

    def copy_up(self, nodeid: int, request: bytes, stage: Any) -> None:
        """Run a stage on a worker, publish it, then serve ``request`` again."""
        unique = abi.HEAD.unpack_from(request)[2]
        job = _Job(stage, abi.CALLER.unpack_from(request, abi.CALLER_AT)[2])
        self._jobs[unique] = job
        self.gates.enter(nodeid, exclusive=True)

        def run() -> None:
            try:
                stage.run()
            except MemoryError:
                stage.fail(OSError(errno.ENOMEM, "no memory"))
            except Exception:  # noqa: BLE001 - a bug must not end the server, nor publish half a copy; it is logged
                stage.fail(OSError(self._session.report(), "bug"))
            self._session.post(done)

        def done() -> None:
            del self._jobs[unique]
            self.watched.pop(unique, None)
            failure: OSError | None = None
            try:
                self._session.view.publish(stage)
            except OSError as error:
                failure = error
            except MemoryError:
                failure = OSError(errno.ENOMEM, "no memory")
            except Exception:  # noqa: BLE001 - a bug must not end the server; it is logged
                failure = OSError(self._session.report(), "bug")
            if failure is not None:
                opcode = abi.HEAD.unpack_from(request)[1]
                self._session.reply(unique, opcode, codec.failure(unique, failure))
            self._left(nodeid, exclusive=True, first=None if failure else request)

        self.workers.submit(run)

    def look(self, nodeid: int, unique: int, job: Callable[[], codec.Reply]) -> None:
        """Run ``job`` on a worker as a shared job of the node, and send its result."""
        gate = self.gates.enter(nodeid, exclusive=False)

        def run() -> None:
            self._answer(unique, job)
            # a gate that holds nothing back need not wake the loop, which reads its mail before each request
            self._session.post(lambda: self._left(nodeid, exclusive=False), wake=lambda: bool(gate.queue))

        self.workers.submit(run)

    def wait_behind(self, nodeid: int, request: memoryview) -> bool:
        """Queue ``request`` behind the node's copy-up, if one is under way."""
        gate = self.gates.nodes.get(nodeid)
        if gate is None or not gate.exclusive:
            return False
        gate.queue.append(bytes(request))
        return True

    def aside(self, unique: int, job: Callable[[], codec.Reply]) -> None:
        """Run ``job`` on a worker and send its result, without holding back other requests."""
        self.workers.submit(lambda: self._answer(unique, job))

    def attributes_changed(self, nodeid: int) -> None:
        """Have the kernel drop a node's attributes before the request at hand is answered; loop thread.

        The one notification that the loop sends itself: without a range the kernel touches no page and waits for nothing
        (Linux fs/fuse/inode.c, ``fuse_reverse_inval_inode``), and the request at hand holds the node.
        """
        self._session.drop_attributes(nodeid)

    def meanwhile(self, job: Callable[[], None]) -> None:
        """Run ``job`` on a worker, without a reply."""
        self.workers.submit(job)

    def _answer(self, unique: int, job: Callable[[], codec.Reply]) -> None:
        try:
            reply = job()
        except OSError as error:
            reply = codec.failure(unique, error)
        except MemoryError:
            reply = codec.error(unique, errno.ENOMEM)
        except Exception:  # noqa: BLE001 - the same
            reply = codec.error(unique, self._session.report())
        self._session.reply(unique, 0, reply)

    def _left(self, nodeid: int, *, exclusive: bool, first: bytes | None = None) -> None:
        self.gates.leave(nodeid, exclusive=exclusive, first=first)
        while (request := self.gates.next(nodeid)) is not None:
            self._session.dispatch(request)

    def interrupt(self, buf: memoryview, n: int, unique: int, nodeid: int) -> None:
        """Handle a signal to a waiting process. Only the wait of a killed one ends, since programs do not expect EINTR
        of a file. A request that is already being answered needs nothing."""
        (target,) = abi.INTERRUPT_IN.unpack_from(buf, 40)
        job = self._jobs.get(target)
        if job is not None:
            self.watched[target] = job.pid
        for gate in self.gates.nodes.values():
            for request in gate.queue:
                if abi.HEAD.unpack_from(request)[2] == target:
                    self.watched[target] = abi.CALLER.unpack_from(request, abi.CALLER_AT)[2]
        self.check_watched()

    def check_watched(self) -> None:
        """End the waits of interrupted requests whose process is dying."""
        for unique, pid in list(self.watched.items()):
            if not _killed(pid):
                continue
            request = self.gates.withdraw(unique)
            if request is not None:
                self._session.reply(unique, 0, codec.error(unique, errno.EINTR))
            elif unique in self._jobs:
                self._jobs[unique].stage.cancel()
            del self.watched[unique]


class _Job:
    """One copy-up under way."""

    __slots__ = ("pid", "stage")

    def __init__(self, stage: Any, pid: int) -> None:
        self.stage = stage
        self.pid = pid


def _killed(pid: int) -> bool:
    """Whether a thread is about to die of a signal (SIGKILL is what every fatal one becomes)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & 1 << 8:
                    return True
    except OSError:
        return True
    return False
