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
from typing import NoReturn

from cowfs.errors import FailedPrecondition
from cowfs.mounting import prefork, protocol
from cowfs.mounting.adopt import Client, Unequal

__all__ = ["HEADER", "NAME", "Program", "Standby", "address", "code", "open_socket"]

NAME = "mounts.socket"
"""The socket, in the run directory of its user (:func:`cowfs.mounting.protocol.run_directory`)."""
VERSION = 1
HEADER = struct.Struct("=16sIII")
_UCRED = struct.Struct("=3i")  # struct ucred, unix(7): pid, uid, gid
_PATIENCE = 10  # seconds that a client may take to say what it wants
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
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        try:
            with protocol.short(path) as short:
                sock.connect(short)
        except OSError:
            pass
        else:
            raise FailedPrecondition(f"another process listens at {path}", remedy="end it first")
        fresh = f"{path}.{os.getpid()}"  # never seen with another mode, or before it listens
        before = os.umask(0o177)
        try:
            with protocol.short(fresh) as short:
                sock.bind(short)
        finally:
            os.umask(before)
        sock.listen(128)
        os.rename(fresh, path)
    except BaseException:
        sock.close()
        raise
    return sock


class Standby:
    """The service.

    Args:
        listener: an inherited or fresh socket; its ownership passes over.
        path: of the socket, if it is to be removed in the end; else "".
        programs: what may be asked for, by name.
        again: executes this program anew, with the listener; called when the code on disk is another.
        idle: seconds without a connection after which the service ends, or None.
    """

    def __init__(
        self,
        listener: socket.socket,
        path: str,
        programs: dict[str, Program],
        again: Callable[[], NoReturn],
        idle: float | None = None,
    ) -> None:
        self._listener, self._path, self._programs, self._again, self._idle = listener, path, programs, again, idle
        self._code = code()
        self._inode = os.stat(path).st_ino if path else 0
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> None:
        """Fork for each connection, until SIGTERM or SIGINT."""
        self._listener.setblocking(False)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        while True:
            ready = select.select([self._listener.fileno(), self._wake_in], [], [], self._idle)[0]
            if not ready or self._wake_in in ready:
                break
            if self._is_replaced():
                self._again()
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError:
                time.sleep(0.05)  # out of descriptors or memory: clients wait, or do it themselves
                continue
            with sock:
                if _peer(sock)[1] == os.geteuid():
                    self._fork(sock)
        self._close()

    def _is_replaced(self) -> bool:
        try:
            return code() != self._code
        except OSError:
            return False  # about to be replaced

    def _close(self) -> None:
        if self._path:
            try:
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)
            except OSError:
                pass
        self._listener.close()

    def _fork(self, sock: socket.socket) -> None:
        try:
            pid = os.fork()
        except OSError:
            return  # no room for a process: the client sees its connection close
        if pid:
            return
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._listener.close()
            os.close(self._wake_in)
            os.close(self._wake_out)
            signal.alarm(_PATIENCE)
            self._answer(sock)
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
