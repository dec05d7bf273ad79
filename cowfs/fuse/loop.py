"""The session: one connection to the kernel, from INIT to unmount.

Strategy: one thread, the loop, reads requests from the device into one reused buffer, finds the handler in a list
indexed by opcode, and writes the reply. The round trip is the price of FUSE, so the loop does not sleep while requests
are likely: the device is non-blocking, and only after a few empty reads does it poll the device and a wake-up
descriptor. Nothing is logged for a request; counting it is one list item.

Threads:
    loop      runs :meth:`Session.run`; owns the view, the gates and every handler.
    workers   run copy-ups, fsyncs and cold reads; talk to the loop by :meth:`post`, and write replies themselves
              (one write(2) is one reply, so the device needs no lock).
    notifier  writes invalidations (``cowfs.fuse.notify`` has the reason).
    others    use :meth:`call`, :meth:`post`, :meth:`stop`, :attr:`counters` and :attr:`notifier` only.

Errors: OSError from a handler is the answer. Anything else is a bug: its traceback is logged, the request is answered
EIO, and the loop goes on.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING, Any, Final, TextIO, TypeVar
from cowfs.errors import CowfsError, FailedPrecondition, Unsupported
from cowfs.fuse import abi, buffers, codec, device, handshake, log
from cowfs.fuse.codec import ProtocolError
from cowfs.fuse.deferred import Errands
from cowfs.fuse.handlers.data import Data
from cowfs.fuse.notify import Notifier
from cowfs.fuse.patience import Patience
from cowfs.fuse.timing import Timing, looked_into
from cowfs.fuse.trace import traced
from cowfs.fuse.workers import HELD_OPCODES
from cowfs.union.bound import Awaited

if TYPE_CHECKING:
    from cowfs.fuse.handlers.names import Handler
    from cowfs.fuse.tree import Tree

__all__ = ["Session", "SessionOptions"]

_T = TypeVar("_T")

#: Empty reads after a reply, each followed by sched_yield(2), before the loop sleeps. Yielding lets a client that waits
#: for this very processor go on without the server falling asleep and being woken: a look-up took 10.8 us instead of
#: 12.4 (fuse-overlayfs 2: 11.2), and between two processors, where sleeping costs most, 15-20 instead of 50.
TRIES: Final = 20
#: A yield that took this long met a process that computes, and gave up a whole time slice to it (which the scheduler
#: then holds against us); so for this many requests the loop does not yield, and tries less, before it sleeps.
CROWDED_NS: Final = 200_000
CROWDED_REQUESTS: Final = 256
#: Each vain attempt to yield again doubles the number, up to this one.
CROWDED_MOST: Final = 16384
#: The same where no request came in all tries: a yield gives the time slice up, so on a busy machine the next request finds a server that waits
#: for its turn. Among 20 processes that compute, a walk of two trees with their xattrs took 0.56 s instead of 0.29 (fuse-overlayfs: 0.20).
VAIN_REQUESTS: Final = 16
VAIN_MOST: Final = 1024
CROWDED_TRIES: Final = 1
#: Bytes the kernel reads ahead: a quarter of the requests of its default, and not yet much for a fault in a map.
READ_AHEAD: Final = 512 << 10
#: Seconds between two checks for killed waiting processes.
INTERRUPT_TICK: Final = 0.1
#: Seconds a thread may keep the interpreter while another waits for it. The loop answers in ~10 us, so the default
#: of 5 ms would be an age for it.
SWITCH_INTERVAL: Final = 0.0005
#: Young garbage is collected as ever, the oldest generation never: it is the view's nodes, which reference counts free,
#: and a look through 100,000 of them takes 90 ms without an answer.
NEVER: Final = 1 << 30

#: Requests after which a request that waits for pending FORGETs is answered even though others keep coming.
PATIENCE: Final = 64

_SAID_MOST: Final = 1000
_GONE: Final = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN)
#: Requests that a worker answers, when the loop does not: then the loop sleeps at once, which leaves the interpreter to the worker.
HANDED_OVER: Final = frozenset((abi.FSYNC, abi.FSYNCDIR, abi.SYNCFS))
_SHORT: Final = (errno.EMFILE, errno.ENFILE)


@record(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """The options of a session.

    Attributes:
        max_write: largest READ and WRITE, bytes; a multiple of 4096 up to 1 MiB.
        io: "cached" (no opens, the page cache in front) or "passthrough" (data goes past the server; root only).
        writeback: with ``io="cached"``: gather small writes in the page cache. No limit can be exact then.
        trace: the file for one line a request, or None.
        max_nodes: the nodes that the kernel may keep before it is asked to forget some; None: no bound.
        workers: threads for slow work.
        most_jobs: the jobs that may wait for them, each with two descriptors of its own.
        patience: seconds that a write waits for room on the host (:mod:`cowfs.fuse.patience`); 0: it fails at once.
    """

    max_write: int = 1 << 20
    io: str = "cached"
    writeback: bool = False
    trace: TextIO | None = None
    max_nodes: int | None = None
    workers: int = 4
    most_jobs: int = 256
    patience: float = 0.0


class Session:
    """Serves one view on one FUSE connection.

    Args:
        fd: the connection, as ``cowfs.fuse.device.mount_fuse`` returns it; the session closes it at the end of
            :meth:`run`.
        view: the merged view; only :meth:`run`'s thread touches it.

    Raises:
        FailedPrecondition: the view has a limit, and the options would let writes pass it.
    """

    def __init__(self, fd: int, view: Tree, *, options: SessionOptions | None = None) -> None:
        self.options = options or SessionOptions()
        if view.limit is not None and (self.options.writeback or self.options.io == "passthrough"):
            raise FailedPrecondition(
                "no limit can hold with io=passthrough or writeback", remedy="use --io cached, or take the limit off"
            )
        self.view = view
        self.notifier = Notifier(fd)
        self.ready = threading.Event()  # set once INIT is answered: the mount answers from now on
        self.agreement: handshake.Agreement | None = None
        self._fd = fd
        self._counts = [0] * abi.OPCODE_END
        self._mail: deque[Callable[[], None]] = deque()  # appended by any thread, emptied by the loop
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._said: set[str] = set()  # lines of damage that were logged
        self.timing: Timing
        self._errands = Errands(self, self.options.workers, self.options.most_jobs)
        self._stopping = False
        self._ended = False
        self._thread: int | None = None
        self._prune_mark = 0
        self._handlers: list[Handler] = []
        self._awaiting: list[Callable[[], None]] = []  # requests deferred by bound.Awaited; the loop's
        self._low: list[int] = []
        self._high: list[int] = []

    # -- for other threads --------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """Requests served so far, by opcode name; only those that came."""
        return {abi.NAMES[opcode]: count for opcode, count in enumerate(self._counts) if count}

    def post(self, fn: Callable[[], None], wake: Callable[[], bool] | None = None) -> None:
        """Queue ``fn`` for the loop thread, between two requests. Any thread; does not wait.

        Args:
            wake: called once ``fn`` is in the loop's mail: whether a sleeping loop must run it before the next request.
        """
        self._mail.append(fn)
        if wake is not None and not wake():
            return
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:
            if not self._ended:
                raise

    def call(self, fn: Callable[[], _T]) -> _T:
        """Run ``fn`` in the loop thread, between two requests, and return what it returns (or raise what it raises).

        Raises:
            OSError: ENODEV when the session has ended.
        """
        if threading.get_ident() == self._thread:
            return fn()
        done = threading.Event()
        outcome: list[Any] = []  # [None, result] or [exception]

        def run() -> None:
            try:
                if self._ended:
                    raise OSError(errno.ENODEV, "the mount is gone")
                outcome[:] = None, fn()
            except Awaited:
                self._awaiting.append(run)
                return
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                outcome[:] = (error,)
            done.set()

        self.post(run)
        if self._ended:
            self._empty_mail()
        done.wait()
        failure = outcome[0]
        if failure is not None:
            raise failure
        return outcome[1]  # type: ignore[no-any-return]

    @property
    def connected(self) -> bool:
        """Whether the kernel still has the file system: false from its unmount on, also before :meth:`run` noticed. Any thread."""
        if self._ended:
            return False
        poll = select.poll()
        poll.register(self._fd, 0)
        return not any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))

    def has_held_requests(self) -> bool:
        """Whether requests wait for a copy-up or another job of their node. In the loop thread (see :meth:`call`)."""
        return self._errands.pending

    def stop(self) -> None:
        """Make :meth:`run` return soon, without unmounting. Any thread, also a signal handler."""
        self._stopping = True
        self.post(lambda: None)

    # -- the loop -----------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the file system is unmounted (or :meth:`stop`), then close the connection.

        Raises:
            Unsupported: the kernel is too old, or cannot do what the options ask for.
            ProtocolError: the kernel sent a malformed request.
            OSError: the device failed otherwise than by unmount.
        """
        self._thread = threading.get_ident()
        interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
        sys.setswitchinterval(min(interval, SWITCH_INTERVAL))
        gc.set_threshold(*thresholds[:2], NEVER)
        try:
            if self._handshake():
                self._serve()
        finally:
            sys.setswitchinterval(interval)
            gc.set_threshold(*thresholds)
            self._errands.workers.close()
            self._ended = True
            self._empty_mail()
            self._answer_awaiting()
            self.view.wait_for_forgets(False)
            os.close(self._fd)
            self.notifier.close()
            os.close(self._wake)

    def _handshake(self) -> bool:
        """Answer INIT; False when the connection ended before."""
        buffer = buffers.lazy(max(abi.MIN_READ_BUFFER, (1 << 20) + 4096))
        os.set_blocking(self._fd, False)
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        mode = handshake.CACHED
        if self.options.io == "passthrough":
            mode = handshake.PASSTHROUGH
        elif self.options.writeback:
            mode = handshake.WRITEBACK
        while not self._stopping:
            poll.poll()
            try:
                n = os.readv(self._fd, [buffer])
            except BlockingIOError:
                self._sleepless()
                self._empty_mail()
                continue
            except OSError as error:
                if error.errno in _GONE:
                    return False
                raise
            request = memoryview(buffer)[:n]
            if n < codec.HEADER_SIZE:
                raise ProtocolError(f"{n} bytes are no request")
            length, opcode, unique, _ = abi.HEAD.unpack_from(request)
            if length != n or opcode != abi.INIT:
                raise ProtocolError(f"the first request is opcode {opcode} of {length} bytes, not INIT")
            self._counts[abi.INIT] += 1
            try:
                body, agreement = handshake.negotiate(
                    request[codec.HEADER_SIZE :], mode=mode, max_write=self.options.max_write
                )
            except (ProtocolError, Unsupported):
                os.write(self._fd, codec.error(unique, errno.EPROTO))
                raise
            if agreement is not None:
                self._agree(agreement)
            os.write(self._fd, codec.payload(unique, body))
            if agreement is not None:
                if self.options.io == "passthrough":
                    self._check_passthrough(agreement)
                device.widen_read_ahead(self._fd, min(READ_AHEAD, agreement.max_write))
                self.ready.set()
                return True
        return False

    def _check_passthrough(self, agreement: handshake.Agreement) -> None:
        """Raises Unsupported where no file could be passed through."""
        if agreement.mode != handshake.PASSTHROUGH:
            raise Unsupported("the kernel has no FUSE passthrough", remedy="Linux 6.9 or newer, or --io cached")
        from cowfs.fuse.handlers.passthrough import probe

        probe(self._fd)

    def _agree(self, agreement: handshake.Agreement) -> None:
        self.agreement = agreement
        if agreement.mode == handshake.PASSTHROUGH:
            from cowfs.fuse.handlers.passthrough import Passthrough

            adapter: Data = Passthrough(self.view, self._errands, agreement.max_write, self._fd)
        else:
            adapter = Data(self.view, self._errands, agreement.max_write)
        adapter.agree(agreement)
        self._low, self._high = codec.bounds(agreement.max_write, setxattr_ext=adapter.setxattr_ext)
        table = adapter.table()
        table[abi.INTERRUPT] = self._errands.interrupt
        if self.options.patience:
            patience = Patience(self.options.patience, self.post, self.dispatch)
            for opcode in (abi.WRITE, abi.FALLOCATE):
                table[opcode] = patience.around(opcode, table[opcode])
        self._handlers = [table.get(opcode, _enosys) for opcode in range(abi.OPCODE_END)]
        if self.options.trace is not None:
            trace, ext = self.options.trace, adapter.setxattr_ext
            self._handlers = [traced(handler, trace, setxattr_ext=ext) for handler in self._handlers]
        self.timing = Timing(self._handlers, looked_into(self.view))

    def _serve(self) -> None:
        fd = self._fd
        buffer = buffers.lazy(self.agreement.max_write + 4096 if self.agreement else 1 << 21)
        buf = memoryview(buffer)
        channel = io.FileIO(fd, "r+b", closefd=False)
        readinto, write, writev = channel.readinto, os.write, os.writev
        unpack = abi.HEAD.unpack_from
        counts, handlers, low, high = self._counts, self._handlers, self._low, self._high
        gates, hold = self._errands.gates.nodes, self._errands.gates.hold
        mail, end = self._mail, abi.OPCODE_END
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        sched_yield, clock = os.sched_yield, time.perf_counter_ns
        crowded, crowd = 0, VAIN_REQUESTS
        nodes, most = self.view.nodes, self.options.max_nodes
        awaiting, patience = self._awaiting, PATIENCE
        self.view.wait_for_forgets(True)
        tries = TRIES
        while True:
            if mail:
                self._empty_mail()
                if self._stopping:
                    return
            try:
                n = readinto(buffer)
            except OSError as error:
                if error.errno in _GONE:
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # the request was interrupted while it was copied
                raise
            if n is None:
                if awaiting:
                    self._answer_awaiting()
                    patience = PATIENCE
                if tries:
                    tries -= 1
                    if crowded:
                        tries = min(tries, CROWDED_TRIES)
                        continue
                    start = clock()
                    sched_yield()
                    if clock() - start > CROWDED_NS:
                        crowded = max(crowd, CROWDED_REQUESTS)
                        crowd = min(2 * crowded, CROWDED_MOST)
                    continue
                if most:
                    most = self._prune()
                crowded, crowd = crowded or crowd, crowd if crowded else max(crowd, min(2 * crowd, VAIN_MOST))
                self._idle(poll)
                tries = TRIES
                continue
            tries = TRIES
            if crowded:
                crowded -= 1
            elif crowd > VAIN_REQUESTS:
                crowd -= 1  # the longer yielding goes well, the sooner it is tried again after it did not
            if most and len(nodes) > most:
                most = self._prune()
            length, opcode, unique, nodeid = unpack(buf)
            if length != n or n < 40:
                raise ProtocolError(f"a request of {length} bytes arrived as {n}")
            if opcode >= end:
                write(fd, codec.error(unique, errno.ENOSYS))
                continue
            counts[opcode] += 1
            if not low[opcode] <= n <= high[opcode]:
                self._refuse(opcode, unique)
                continue
            if gates and opcode in HELD_OPCODES and hold(opcode, nodeid, buf[:n]):
                continue
            if awaiting:
                patience -= 1
                if not patience:
                    self._answer_awaiting()
                    patience = PATIENCE
            try:
                reply = handlers[opcode](buf, n, unique, nodeid)
            except Awaited:
                self._put_off(bytes(buf[:n]))
                continue
            except OSError as error:
                reply = self._failure(opcode, unique, error, buf[:n])
            except Exception:  # noqa: BLE001 - a bug must not end the server; it is logged
                reply = self._bug(opcode, unique)
            if reply is None:
                if opcode in HANDED_OVER:
                    tries = 0  # the worker needs the interpreter, and its client sends nothing meanwhile
                continue
            try:
                if reply.__class__ is bytes:
                    write(fd, reply)
                else:
                    writev(fd, reply)
            except OSError as error:
                self._unsent(opcode, reply, error)

    def _failure(
        self, opcode: int, unique: int, error: OSError, request: memoryview | None = None
    ) -> codec.Reply | None:
        """The reply to an OSError. After a lack of descriptors, all idle ones are closed, and ``request`` is served once more."""
        if opcode in abi.NO_REPLY:
            log.warning("%s: %s", abi.NAMES[opcode], error)
            return None
        if error.errno in _SHORT and request is not None:
            self.view.give_back()
            self.dispatch(bytes(request), again=False)
            return None
        return codec.failure(unique, error)

    def _bug(self, opcode: int, unique: int) -> bytes | None:
        """The reply to a request after an unforeseen error; call inside ``except``."""
        code = self.report(f"{abi.NAMES[opcode]} failed: answered EIO")
        return None if opcode in abi.NO_REPLY else codec.error(unique, code)

    def _refuse(self, opcode: int, unique: int) -> None:
        log.warning("%s: a request of the wrong length was refused", abi.NAMES[opcode])
        if opcode not in abi.NO_REPLY:
            self.reply(unique, opcode, codec.error(unique, errno.EINVAL))

    def reply(self, unique: int, opcode: int, reply: codec.Reply) -> None:
        """Send the ``reply`` of the request ``unique`` with ``opcode``. Any thread; one that carries look-ups: the loop only. Never raises OSError."""
        try:
            if isinstance(reply, bytes):
                os.write(self._fd, reply)
            else:
                os.writev(self._fd, reply)
        except OSError as error:
            self._unsent(opcode, reply, error)

    def _unsent(self, opcode: int, reply: codec.Reply, error: OSError) -> None:
        """Take back the look-ups of a reply that the kernel did not accept, since its request is gone (ENOENT)."""
        if error.errno in _GONE:
            return
        if error.errno != errno.ENOENT:
            log.error("reply to %s was refused: %s", abi.NAMES[opcode] or opcode, error)
        for nodeid in codec.looked_up(opcode, reply):
            self.view.forget(nodeid, 1)

    def dispatch(self, request: bytes, *, again: bool = True) -> None:
        """Serve a request that waited; loop thread. ``again``: once more where descriptors were short."""
        _, opcode, unique, nodeid = abi.HEAD.unpack_from(request)
        try:
            reply = self._handlers[opcode](memoryview(request), len(request), unique, nodeid)
        except Awaited:
            self._put_off(request)
            return
        except OSError as error:
            reply = self._failure(opcode, unique, error, memoryview(request) if again else None)
        except Exception:  # noqa: BLE001 - a bug must not end the server; it is logged
            reply = self._bug(opcode, unique)
        if reply is not None:
            self.reply(unique, opcode, reply)

    def _put_off(self, request: bytes) -> None:
        """Serve a request again, for the last time, once all FORGETs that the kernel has sent by now are handled."""

        def again() -> None:
            _, opcode, _, nodeid = abi.HEAD.unpack_from(request)
            if opcode not in HELD_OPCODES or not self._errands.gates.hold(opcode, nodeid, memoryview(request)):
                self.dispatch(request)

        self._awaiting.append(again)

    def _answer_awaiting(self) -> None:
        """Serve the requests that waited for FORGETs: the device is empty, or enough requests came since."""
        put_off = self._awaiting[:]
        self._awaiting.clear()
        self.view.wait_for_forgets(False)
        for again in put_off:
            try:
                again()
            except Exception:  # noqa: BLE001 - a bug must not end the server; it is logged
                self.report()
        self.view.wait_for_forgets(True)

    def _empty_mail(self) -> None:
        mail = self._mail
        while mail:
            try:
                fn = mail.popleft()
            except IndexError:  # another thread emptied it at the end of the session
                return
            try:
                fn()
            except Exception:  # noqa: BLE001 - a bug must not end the server; it is logged
                self.report()

    def _idle(self, poll: select.poll) -> None:
        self.view.trim()
        timeout = None
        if self._errands.watched:
            self._errands.check_watched()
            timeout = INTERRUPT_TICK * 1000
        for fd, _ in poll.poll(timeout):
            if fd == self._wake:
                self._sleepless()

    def _sleepless(self) -> None:
        """Consume a wake-up."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass

    def report(self, what: str = "an unforeseen error outside of any request") -> int:
        """Log an unforeseen error and return the errno that answers its request; call inside ``except``. Any thread.

        A :class:`~cowfs.errors.CowfsError` means damage beneath the view, as of its index: one line, once. A lack of memory
        is one line, too. Anything else is a bug: its traceback.

        Args:
            what: the failed action, for the log.
        """
        error = sys.exception()
        if isinstance(error, MemoryError):
            log.no_memory("%s", what)
            return errno.ENOMEM
        if not isinstance(error, CowfsError):
            log.exception("%s", what)
            return errno.EIO
        line = str(error)
        if line not in self._said:
            if len(self._said) < _SAID_MOST:
                self._said.add(line)
            log.error("%s", line)
        return error.errno

    # -- the kernel's cache -------------------------------------------------------------------

    def drop_attributes(self, nodeid: int) -> None:
        """Have the kernel forget the attributes of the node ``nodeid``, now; its pages stay.

        Loop thread, or one that answers nothing. Raises OSError, except for a node that the kernel does not know, and at the end of the mount.
        """
        try:
            os.write(self._fd, codec.notify_inval_inode(nodeid, -1))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # nothing of it is cached; the mount is going away
                raise

    def _prune(self) -> int:
        """Past ``max_nodes``: ask the kernel to forget the nodes it has known longest, children before parents.

        Returns the number of nodes for the next check: the FORGETs come a little later, and nodes in use stay.
        """
        limit = self.options.max_nodes or 0
        nodes = self.view.nodes
        extra = len(nodes) - limit
        if extra <= 0 or abi.NOTIFY_PRUNE in self.notifier.unsupported:
            self._prune_mark = 0
            return limit
        if self._prune_mark >= len(nodes):
            self._prune_mark = 0
        batch = list(islice(nodes, self._prune_mark, self._prune_mark + extra + limit // 8 + 64))
        self._prune_mark += len(batch)
        batch.reverse()
        self.notifier.prune([node for node in batch if node != abi.ROOT_ID])
        return len(nodes) + limit // 8 + 64


def _enosys(buf: memoryview, n: int, unique: int, nodeid: int) -> codec.Reply:
    """The reply to opcodes without a handler: OPEN, OPENDIR, CREATE, FLUSH, STATX, ACCESS, locks... The kernel asks
    once and then goes without."""
    return codec.error(unique, errno.ENOSYS)
