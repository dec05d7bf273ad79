"""The server process of one mount: its start, its control socket, its end.

Strategy: one process a mount, and everything that belongs to the mount is in it: the locks, the merged view, the FUSE
session, the control socket. So it can be killed at any moment, and the next mount clears its remains.

Start. :func:`start` forks; the child checks, locks, mounts, and reports through a pipe, either the answer to a stat of
the mount point or the error. Only then does it close the standard streams. The command forks itself (fast). The
library's caller may be threaded, so it has a process of one thread that forks servers for it
(:mod:`cowfs.mounting.prefork`).

Threads:
- main: the session's loop; sole owner of the view.
- control: accepts connections and handles signals (by the wake-up descriptor, never in a handler). It answers no request
  of the kernel and holds no lock that answering needs, so it may unmount.
- one for each question on the control socket, for as long as its answer takes (:mod:`cowfs.mounting.control`).
- ready: asks the kernel for the mount point once, then reports and ends.
- owner: where the mount belongs to a process, waits for its end and unmounts.

End. An unmount (by a verb, a signal, any umount) only takes the mount off the tree. The kernel then ends the
session, and the main thread closes everything in one place.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from cowfs._log import Part
from cowfs._record import replace
from cowfs._typed import TYPE_CHECKING, Any, NamedTuple, NoReturn
from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.mounting import mountpoint, protocol
from cowfs.mounting.assemble import explain, make_session, make_view, name_process, raise_file_limit, refused
from cowfs.mounting.chronicle import Chronicle
from cowfs.mounting.control import Control
from cowfs.mounting.counting import Counter
from cowfs.mounting.notice import Notice
from cowfs.mounting.request import MountSpec
from cowfs.mounting.resources import Stack
from cowfs.sys.threads import Thread

if TYPE_CHECKING:
    from cowfs.fuse.loop import Session
    from cowfs.fuse.portable import PortableSession
    from cowfs.union import View

__all__ = ["Report", "Server", "Started", "parse_report", "serve", "start"]

_log = Part("cowfs.mounting")

_FLUSH_SECONDS = 10.0  # seconds that SIGTERM waits for dirty pages


class Started(NamedTuple):
    """The process and the socket of a mount that answers."""

    pid: int
    socket: str


# ---------------------------------------------------------------------------------------------------------------
# Start


def start(spec: MountSpec) -> Started:
    """Fork a server for ``spec`` and wait until the mount answers.

    For a process that has one thread and ends soon: it ignores SIGINT once the mount is made.

    Raises:
        CowfsError: as raised in the server; then nothing is mounted and the server is gone.
    """
    _log.info("mount %s: layers %s, upper %s", spec.mountpoint, ":".join(reversed(spec.layers)), spec.upper or "none")
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        serve(spec, Report(writing))
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            line = pipe.read()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # too late to interrupt: the mount is made, and this process ends
    except BaseException:  # interrupted while waiting: end the started server, too
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)  # the server may just have mounted
        raise
    if not line:
        _, status = os.waitpid(pid, 0)
        raise CowfsError(f"the server ended before the mount answered (status {os.waitstatus_to_exitcode(status)})")
    started = parse_report(line)
    _log.info("mount %s: served by process %d", spec.mountpoint, started.pid)
    return started


def serve(spec: MountSpec, report: Report) -> NoReturn:
    """Run the server of a request; this process, forked for it, ends here."""
    code = 1
    try:
        os.setsid()
        code = Server(spec, report).run()
    except BaseException:  # noqa: BLE001  (never return into the caller's code)
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def parse_report(line: bytes) -> Started:
    """Read a report.

    Raises:
        CowfsError: the report is an error.
    """
    message = protocol.decode(line)
    if "error" in message:
        raise protocol.error_from(message["error"])
    return Started(message["pid"], message["socket"])


class Report:
    """The one message from a starting server to its waiting maker. Any thread may send it; the first one counts.

    Args:
        fd: a pipe or socket, whose ownership passes over.
        encode: the bytes of a message: ``{"pid", "socket"}`` once the mount answers, or ``{"error"}``.
    """

    def __init__(self, fd: int, encode: Callable[[dict[str, Any]], bytes] = protocol.encode) -> None:
        self._fd = fd
        self._encode = encode
        self._lock = threading.Lock()
        self.unheard = False
        """Whether nobody waited any more."""

    def send(self, message: dict[str, Any], before_close: Callable[[], None] | None = None) -> bool:
        """Send, unless a message was sent. ``before_close`` runs while the other side still waits."""
        with self._lock:
            if self._fd < 0:
                return False
            fd, self._fd = self._fd, -1
            try:
                os.write(fd, self._encode(message))
            except OSError:
                self.unheard = True
            if before_close:
                before_close()
            os.close(fd)
            return True


class _NoReport(Report):
    """In the foreground nobody waits."""

    def __init__(self) -> None:
        super().__init__(-1)


# ---------------------------------------------------------------------------------------------------------------
# The process


class Server:
    """One mount being served. See the module for its threads."""

    def __init__(self, spec: MountSpec, report: Report | None = None) -> None:
        self.spec = spec
        self.started = 0
        self.socket = ""
        self.log = ""
        self._stack_open = self._view_open = False
        self.stack: Stack
        self.view: View
        self.session: Session | PortableSession
        self._chronicle: Chronicle | None = None
        self.counter = Counter(self)
        self._report = report or _NoReport()
        self._owner: int | None = None  # a pidfd
        self._listener: socket.socket | None = None
        self._socket_inode = 0
        self._listens = threading.Event()
        self._ending = threading.Event()
        self._problem: CowfsError | None = None  # the refusal of the kernel; set by the ready thread before it unmounts
        self._control = Control(self, self._terminate)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread that owns the view, between two requests."""
        return self.session.call(function)

    def now(self, **changes: Any) -> None:
        """Record changes of the mount: fields of the spec and their new values."""
        self.spec = replace(self.spec, **changes)

    def pause(self, seconds: float) -> bool:
        """Wait, at most until the mount ends. Returns whether it does."""
        return self._ending.wait(seconds)

    def facts(self) -> dict[str, Any]:
        """Facts that are known only while the server runs."""
        return {
            "pid": os.getpid(),
            "socket": self.socket,
            "log": self.log,
            "started": self.started,
            "upper": self.stack.upper,
            "work": self.stack.work,
            "readonly": self.spec.readonly or self.stack.upper is None,
        }

    def run(self) -> int:
        """Serve until the mount is gone. Returns the exit status."""
        try:
            self._prepare()
        except Exception as error:
            if self._stack_open:
                self.stack.undo()
            self._close()
            problem = explain(error, self.spec)
            if problem is None:
                raise
            if not self._report.send({"error": protocol.error_to(problem)}):
                raise problem from None
            return problem.exit_code
        try:
            return self._serve()
        finally:
            self._close()

    def _prepare(self) -> None:
        spec = self.spec
        os.umask(0)
        raise_file_limit()
        if spec.owner:
            self._owner = os.pidfd_open(spec.owner)
        target = mountpoint.prepare(spec.mountpoint)
        self.spec = spec = replace(spec, mountpoint=target)
        self.stack = Stack.open(spec)
        self._stack_open = True
        os.chdir("/")
        self.view = make_view(self.stack)
        self._view_open = True
        self._chronicle = Chronicle(spec, self.stack)
        self.view.on_limit(self._chronicle.reached)
        if spec.volatile and self.stack.work and not spec.readonly:
            from cowfs.mounting.volatile import mark_volatile

            mark_volatile(self.stack.work)
        self._hear()
        self.session = make_session(spec, self.view, target)
        self.stack.commit()
        self.started = time.time_ns()
        try:
            if spec.frontend == "kernel":
                self._listen(target)
            name_process()
        except BaseException:
            mountpoint.detach(target, force=True)
            raise

    def _serve(self) -> int:
        try:
            if not (Thread(self._answer_all, "cowfs-control").start() and Thread(self._ready, "cowfs-ready").start()):
                raise CowfsError("no thread can be started", remedy="look at the limits of processes and memory")
            if self._owner is not None and not Thread(self._end_with_owner, "cowfs-owner").start():
                raise CowfsError("no thread can be started", remedy="look at the limits of processes and memory")
            gc.enable()  # a start does not need it
            self.session.run()
        except BaseException as error:
            try:
                mountpoint.detach(self.spec.mountpoint, force=True)
            except CowfsError:
                pass
            problem = explain(error, self.spec)
            if problem is not None and self._report.send({"error": protocol.error_to(problem)}):
                return problem.exit_code
            raise
        if self._problem is not None:
            if not self._report.send({"error": protocol.error_to(self._problem)}):
                raise self._problem
            return self._problem.exit_code
        gone = FailedPrecondition(
            f"{self.spec.mountpoint} was unmounted before its mount answered", remedy="mount it again"
        )
        self._report.send({"error": protocol.error_to(gone)})  # unless it had answered
        return 0

    def _close(self) -> None:
        """Close everything but the process itself, in the order in which others may rely on it."""
        self._ending.set()
        gc.disable()  # SQLite writes to the shared memory of an index when its last connection goes: SIGBUS on a full host
        if self._view_open:
            self.view.close()
        if self._stack_open:
            if self._chronicle is not None:
                self._chronicle.end()
            self.stack.close()
        if self._listener is not None:
            try:
                if (
                    os.stat(self.socket).st_ino == self._socket_inode
                ):  # else it belongs to another mount, which has this device number now
                    os.unlink(self.socket)
            except OSError:
                pass
        if self.log and not self.spec.log:
            sys.stderr.flush()
            try:
                if not os.path.getsize(self.log):
                    os.unlink(self.log)
            except OSError:
                pass
        if self.socket:
            protocol.leave_run_directory(os.path.dirname(self.socket))
        self._control.wait(2.0)  # the client of the unmount still waits for its answer

    # -- ready -----------------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        self.session.ready.wait()
        try:
            os.stat(self.spec.mountpoint)
        except OSError:
            return  # the main thread knows the reason, and reports it
        self._problem = refused(self.session, self.spec)
        if self._problem is not None:
            mountpoint.detach(self.spec.mountpoint, force=True)
            return
        self._listens.wait()
        self._report.send({"pid": os.getpid(), "socket": self.socket}, self._let_go)
        if self._report.unheard:  # who asked was killed meanwhile: nobody will unmount it
            mountpoint.detach(self.spec.mountpoint, force=True)
            return
        if self._chronicle is not None:
            self._chronicle.begin()

    def _let_go(self) -> None:
        """Close the standard streams of the starting process; diagnostics go to the log from here on."""
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        sys.stdout.flush()
        sys.stderr.flush()
        self.log = self.spec.log or self.socket.removesuffix(protocol.SUFFIX) + ".log"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if self.spec.log else os.O_TRUNC)
            fd = os.open(self.log, flags, 0o600)
        except OSError:
            self.log = ""
            fd = os.open("/dev/null", os.O_WRONLY)
        os.dup2(fd, 2)
        os.close(fd)

    def _end_with_owner(self) -> None:
        assert self._owner is not None
        waiting = select.poll()
        waiting.register(self._owner, select.POLLIN)
        waiting.poll()
        self._terminate()

    # -- control ---------------------------------------------------------------------------------------------------

    def _listen(self, target: str) -> None:
        entry = mountpoint.find(target)
        name = entry.dev.partition(":")[2] if entry else f"pid{os.getpid()}"
        self.socket = os.path.join(protocol.run_directory(), name + protocol.SUFFIX)
        self._listener = protocol.listen(self.socket)
        self._socket_inode = os.stat(self.socket).st_ino
        device = entry.dev if entry else f"0:pid{os.getpid()}"
        self.stack.announce(Notice(self.socket, os.getpid(), target, device, self.spec.label))
        self._listens.set()

    def _hear(self) -> None:
        """Pass signals to the control thread; main thread only.

        Called before the mount: a signal then waits in the socket until the control thread runs, and never ends half a start.
        """
        signal.set_wakeup_fd(self._control.signals, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the wake-up descriptor wakes the control thread
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self.spec.foreground:
            signal.signal(signal.SIGHUP, lambda *_: None)

    def _answer_all(self) -> None:
        if self._listener is None:  # a front end that mounts only when it runs
            self.session.ready.wait()
            self._listen(self.spec.mountpoint)
        assert self._listener is not None
        self._control.run(self._listener, self._ending)

    def _terminate(self) -> None:
        """Handle SIGTERM: write back the data of maps, then unmount, lazily if the mount is in use."""
        flush = Thread(partial(mountpoint.hand_over, self.spec.mountpoint), "cowfs-flush")
        if flush.start():
            flush.join(_FLUSH_SECONDS)
        try:
            mountpoint.detach(self.spec.mountpoint)
        except Exception:  # noqa: BLE001  (the mount must end in any case)
            try:
                mountpoint.detach(self.spec.mountpoint, lazy=True)
            except Exception:  # noqa: BLE001
                pass  # unmounted by another process, or impossible here: the end of the session ends the mount
            self.session.stop()
