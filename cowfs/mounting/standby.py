"""The mount service: a process that has imported everything, and forks a server for each command that asks.

Strategy. `cowfs-overlayfs` is called two to four times in a `podman diff`, and Python's start with its imports costs each of them more than the mount. So
a process of one thread waits at a socket of its user, and forks a child for each connection. The child makes sure who asks, becomes what the client
is (:mod:`cowfs.mounting.adopt`), gets its standard streams, and then does what the command would have done: it is the mount's server, with
nothing between it and the kernel. So the service holds nothing of a mount, and may be killed, stopped or replaced at any moment. The client
(:mod:`cowfs.cli.handover`) is a small program that imports nothing of this package.

Conversation, on a stream socket:

1. The service's child: ``cowfs-mounts VERSION CODE NONCE`` and a newline. CODE names the file that the code was loaded from
   (:func:`code`): another version, or another copy of cowfs, is no partner, and the client does the work itself.
2. The client: a header of :data:`HEADER` (nonce; bytes, arguments and variables that follow), then those, each ended by a NUL: the program's name
   and arguments, the environment. With the header come its three standard streams.
3. The child: the exit status in decimal and a newline, once the mount answers, or after an error, whose line the child has written to the client's standard
   error.

A connection that ends without a status: nobody will mount, and the client does it. That is also how the service refuses. A client that ends first takes its
mount with it.

The client's identity. The socket is its owner's alone (0600, in a directory of 0700), and the service serves only its own user. That is not enough: a process of the same
user may have fewer rights (in a container, say). The kernel says with each message which process sent it (SCM_CREDENTIALS, unix(7)); the child holds that process by a pidfd
that it opened before it sent the nonce. So the one whose facts are read in /proc is the one that sent the nonce back, and not another that was given its number.

An upgrade is noticed before the next connection is taken: the service executes itself anew, with the same process id and socket.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

from cowfs._typed import NoReturn
from cowfs.errors import FailedPrecondition
from cowfs.mounting import prefork, protocol
from cowfs.mounting.adopt import Client, Unequal
from cowfs.sys import process

__all__ = ["HEADER", "NAME", "Program", "Standby", "address", "code", "open_socket"]

NAME = "mounts.socket"
"""The socket, in the run directory of its user (:func:`cowfs.mounting.protocol.run_directory`)."""
VERSION = 1
HEADER = struct.Struct("=16sIII")
_UCRED = struct.Struct("=3i")  # struct ucred, unix(7): pid, uid, gid
_PATIENCE = 10  # seconds that a client may take to say what it wants
_WAITING = 4  # children that wait for a connection: podman mounts up to four times for one command
_QUIET = 0.03  # seconds without a connection after which one more is started, while there still are some
_TAKEN, _REPLACED = b"t", b"r"  # the last words of a waiting child
_MOST = 8 << 20  # bytes of arguments and environment: ARG_MAX is less

Program = Callable[[list[str], int], int | None]
"""A function of arguments and connection. It returns the exit status, or None: the client shall do it itself; or never, where the process
becomes a server, which then tells the status on the connection."""


def code() -> str:
    """Identity of the code: of the file that `import cowfs` reads. The client computes the same of the file beside itself."""
    status = os.stat(os.path.join(os.path.dirname(os.path.dirname(__file__)), "__init__.py"))
    return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}"


def address() -> str:
    """Path of the socket of this user."""
    return os.path.join(protocol.run_directory(), NAME)


def open_socket(path: str) -> socket.socket:
    """Listen at a path, for its owner only.

    Raises:
        FailedPrecondition: another process listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            with protocol.short(path) as short:
                sock.connect(short)
        except OSError:
            pass
        else:
            raise FailedPrecondition(f"another process listens at {path}", remedy="end it first")
    return protocol.listen(path)


class Standby:
    """The service.

    Args:
        listener: an inherited or fresh socket; its ownership passes over.
        path: of the socket, if it is to be removed in the end; else "".
        programs: what may be asked for.
        rehearse: run in each child while it waits, so that what it will use is its own already.
        again: executes this program anew, with the listener; called when the code on disk is another.
        idle: seconds without a connection after which the service ends, or None.
    """

    def __init__(
        self,
        listener: socket.socket,
        path: str,
        programs: dict[str, Program],
        rehearse: Callable[[], None],
        again: Callable[[], NoReturn],
        idle: float | None = None,
    ) -> None:
        self._listener, self._path, self._programs, self._again, self._idle = listener, path, programs, again, idle
        self._rehearse = rehearse
        self._code = code()
        self._inode = os.stat(path).st_ino if path else 0
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._waiting: dict[int, int] = {}  # the end of a pipe that says what became of a child -> its process

    def run(self) -> None:
        """Have children wait for connections, until SIGTERM or SIGINT."""
        self._listener.setblocking(False)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        while True:
            missing = len(self._waiting) < _WAITING
            ready = select.select([self._wake_in, *self._waiting], [], [], self._patience(missing))[0]
            if self._wake_in in ready or not (ready or missing):
                break
            for fd in ready:
                self._hear(fd)
            if missing and not ready:
                self._fork()
        self._dismiss()
        if self._path:
            try:
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)
            except OSError:
                pass
        self._listener.close()

    def _patience(self, missing: bool) -> float | None:
        """Seconds without news after which there is something to do: a mount that is being made has the processor first."""
        if not missing:
            return self._idle
        return _QUIET if self._waiting else 0

    def _hear(self, fd: int) -> None:
        """A child tells that it took a connection, or that the code on disk is another; or it is gone."""
        told = os.read(fd, 1)
        os.close(fd)
        del self._waiting[fd]
        if told == _REPLACED:
            self._dismiss()
            self._again()
        if not told:
            time.sleep(0.05)  # killed, or out of memory: not faster than that

    def _dismiss(self) -> None:
        for fd, pid in self._waiting.items():
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
            os.close(fd)
        self._waiting.clear()

    def _fork(self) -> bool:
        """Have one more child wait; False where there is no room for it."""
        told, tells = os.pipe2(os.O_CLOEXEC)
        mother = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(told)
            os.close(tells)
            time.sleep(0.05)  # clients wait, or do it themselves
            return bool(self._waiting)
        if pid:
            os.close(tells)
            self._waiting[told] = pid
            return True
        try:
            self._wait(mother, tells)
        except ConnectionError:
            pass  # the client is gone
        except (Unequal, OSError) as error:
            sys.stderr.write(f"cowfs: a command was left to do its work itself: {error}\n")
            sys.stderr.flush()
        except BaseException:  # noqa: BLE001  (never return into the loop)
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)

    def _wait(self, mother: int, tells: int) -> None:
        """Be the child: wait for a connection, and answer it."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        process.end_with_parent(mother, signal.SIGKILL)  # while it waits: a service that is killed leaves none behind
        for fd in (self._wake_in, self._wake_out, *self._waiting):
            os.close(fd)
        if not self._is_asked(0):
            self._rehearse()
        while True:
            self._is_asked(None)
            if self._is_replaced():
                os.write(tells, _REPLACED)
                os._exit(0)
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue  # another one has it
            if _peer(sock)[1] == os.geteuid():
                break
            sock.close()
        process.go_on_without_parent()
        os.write(tells, _TAKEN)
        os.close(tells)
        self._listener.close()
        signal.alarm(_PATIENCE)
        self._answer(sock)

    def _is_asked(self, seconds: float | None) -> bool:
        """Whether a connection waits; ``seconds`` is the most that is waited for one."""
        return bool(select.select([self._listener.fileno()], [], [], seconds)[0])

    def _is_replaced(self) -> bool:
        try:
            return code() != self._code
        except OSError:
            return False  # about to be replaced

    def _answer(self, sock: socket.socket) -> None:
        """One connection, in a process of its own."""
        words, environment, streams = _heard(sock)
        try:
            prefork.show(" ".join(["cowfs server", *words[-1:]]))
        except OSError:
            pass  # without /proc ps shows nothing anyway
        signal.alarm(0)
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
            os.close(fd)
        os.environb.clear()
        os.environb.update(variable.partition(b"=")[::2] for variable in environment if variable[:1] != b"=")
        program = self._programs.get(words[0])
        if program is None:
            return
        answers = sock.detach()
        status = program(words[1:], answers)
        if status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(answers, b"%d\n" % status)


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user id at the other end, as they were when it connected (unix(7), SO_PEERCRED)."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def _heard(sock: socket.socket) -> tuple[list[str], list[bytes], list[int]]:
    """The question: words, environment, streams; this process has become its equal.

    Raises:
        Unequal: it is not to be served. OSError: it does not go on.
    """
    client = Client(_peer(sock)[0])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    nonce = os.urandom(8).hex().encode()
    sock.sendall(b"cowfs-mounts %d %s %s\n" % (VERSION, code().encode(), nonce))
    space = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(3 * 4)
    head, messages, _, _ = sock.recvmsg(HEADER.size, space, socket.MSG_CMSG_CLOEXEC)
    if not head:
        raise ConnectionResetError("the client is gone")
    streams: list[int] = []
    sender = None
    for level, kind, data in messages:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            streams += struct.unpack(f"={len(data) // 4}i", data[: len(data) // 4 * 4])
        elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            sender = _UCRED.unpack(data)[0]
    if len(head) != HEADER.size or len(streams) != 3 or sender != client.pid:
        raise Unequal("not the beginning of a question")
    echoed, size, words, variables = HEADER.unpack(head)
    if echoed != nonce or size > _MOST or not words:
        raise Unequal("not the beginning of a question")
    parts = _exactly(sock, size).split(b"\0")
    if len(parts) != words + variables + 1:
        raise Unequal("not a question")
    client.become()
    return [os.fsdecode(word) for word in parts[:words]], parts[words:-1], streams


def _exactly(sock: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = sock.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionResetError("the client is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
