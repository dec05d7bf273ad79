"""The servers of a library's mounts, forked from one process that has imported everything already.

Strategy. A caller may have threads, so it cannot fork a server itself, and a fresh interpreter takes ten times as long to get
ready as a mount does. So the first mount of a process starts a *nursery*: a fresh interpreter that imports the server,
has one thread, and forks a server for each request. It ends with its only client, and after some time without a
request, so that a program that mounts now and then keeps no process beside its servers. A nursery inherits its client's
namespaces, credentials and environment once; when those have changed since (:func:`_context`), it is replaced.

On the socket between them: four bytes of length, a JSON document with the request and the working directory; with the
first byte come two descriptors, the pipe for the report and the client's standard error. On the pipe: the server's pid, a
newline, and the report of :mod:`cowfs.mounting.server`.

Threads: :func:`start` and :func:`close` may be called from any.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading

from cowfs._typed import NamedTuple, NoReturn
from cowfs.errors import CowfsError, Unsupported
from cowfs.mounting import protocol
from cowfs.mounting.request import MountSpec
from cowfs.mounting.server import Started, parse_report

__all__ = ["close", "start", "stay"]

#: Seconds without a request after which a nursery ends.
IDLE = 3.0

_LENGTH = struct.Struct("<I")
_PAD = " " * 1024  # room for a server's title in ps
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_CREDENTIALS = (b"Uid:", b"Gid:", b"Groups:", b"Cap", b"NoNewPrivs:", b"Seccomp:")


class _Nursery(NamedTuple):
    socket: socket.socket
    context: object


_lock = threading.Lock()
_nursery: _Nursery | None = None  # guarded by _lock


# ---------------------------------------------------------------------------------------------------------------
# The client's side


def stay(seconds: float) -> None:
    """Set the seconds without a request after which a nursery of this process ends, from the next one on."""
    global IDLE
    IDLE = seconds


def start(spec: MountSpec) -> Started:
    """Start a server, and wait until its mount answers.

    Raises:
        CowfsError: as raised in the server; then nothing is mounted and the server is gone.
    """
    for again in (True, False):
        reading, writing = os.pipe()
        try:
            sent = _send(spec, writing, fresh=not again)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        with open(reading, "rb") as pipe:
            pid = _read_pid(pipe.readline) if sent else 0
            try:
                report = pipe.read()
            except BaseException:  # interrupted while waiting: end the started server, too
                if pid:
                    os.kill(pid, signal.SIGTERM)
                raise
        if pid:
            break
    if not pid:
        raise CowfsError("the server could not be started")
    if not report:
        raise CowfsError("the server ended before the mount answered")
    return parse_report(report)


def _read_pid(readline: object) -> int:
    """The server's pid; 0 when there is none."""
    assert callable(readline)
    try:
        return int(readline() or 0)
    except KeyboardInterrupt:  # the pid is about to come, and the server has to be stopped
        pid = int(readline() or 0)
        if pid:
            os.kill(pid, signal.SIGTERM)
        raise


def _send(spec: MountSpec, report: int, *, fresh: bool) -> bool:
    """Send a request to the nursery; False if it is gone."""
    global _nursery
    message = protocol.encode({"spec": spec.to_json(), "cwd": os.getcwd()})
    with _lock:
        context = _context()
        if fresh or _nursery is None or _nursery.context != context:
            _close()
            _nursery = _Nursery(_open(), context)
        try:
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                errors = 2 if _is_open(2) else null
                socket.send_fds(_nursery.socket, [_LENGTH.pack(len(message))], [report, errors])
            finally:
                os.close(null)
            _nursery.socket.sendall(message)
        except OSError:
            _close()
            return False
    return True


def close() -> None:
    """Let the nursery end; the servers that it started go on. The next mount starts another one."""
    with _lock:
        _close()


def _close() -> None:
    global _nursery
    if _nursery is not None:
        _nursery.socket.close()
        _nursery = None


def _forget() -> None:
    """In a forked child: forget the nursery, which is the parent's."""
    global _lock
    _lock = threading.Lock()
    _close()


os.register_at_fork(after_in_child=_forget)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _context() -> object:
    """The inherited state of this thread that a mount depends on, as it is now."""
    here = "/proc/thread-self"
    try:
        with open(f"{here}/status", "rb") as file:
            credentials = [line for line in file if line.startswith(_CREDENTIALS)]
        namespaces = [os.readlink(f"{here}/ns/{name}") for name in _NAMESPACES]
        with open(f"{here}/cgroup", "rb") as file:
            groups = file.read()
    except OSError:
        return object()  # unknown without /proc: each mount gets a nursery of its own
    root = os.stat("/")
    place = (root.st_dev, root.st_ino, os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0))
    return credentials, namespaces, groups, place, dict(os.environ), list(sys.path), sys.executable


def _open() -> socket.socket:
    if not sys.executable:
        raise Unsupported("no Python interpreter known to run the server with", remedy="set sys.executable")
    ours, theirs = socket.socketpair()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, *(place for place in sys.path if place and os.pathsep not in place)])
    try:
        with theirs:  # without the module site: the path is passed on
            done = subprocess.run(
                [sys.executable, "-S", "-P", "-c", f"from cowfs.mounting.prefork import main; main({IDLE})", _PAD],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # a Ctrl-C is for the client, which then closes the connection
                check=False,
            )
    except OSError as error:
        ours.close()
        raise CowfsError(f"the server could not be started: {error.strerror}: {sys.executable}") from None
    if done.returncode:
        ours.close()
        raise CowfsError(f"the server could not be started (status {done.returncode})")
    return ours


# ---------------------------------------------------------------------------------------------------------------
# The nursery's side


def main(idle: float = IDLE) -> NoReturn:
    """Fork, so that the client has no child to wait for; then fork a server for each request.

    It ends with the client, or after ``idle`` seconds without a request.
    """
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the servers need no wait(2)
    client = socket.socket(fileno=os.dup(0))
    os.set_inheritable(client.fileno(), False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    _warm()
    while select.select([client], [], [], idle)[0]:
        head, fds, _, _ = socket.recv_fds(client, _LENGTH.size, 2)
        body = _exactly(client, _LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size and len(fds) == 2 else b""
        if not body:
            os._exit(0)
        message = protocol.decode(body)
        spec = MountSpec.from_json(message["spec"])
        if spec.factory:
            _warm_index()
        _freeze()
        if not os.fork():
            client.close()
            _serve(spec, message["cwd"], *fds)
        for fd in fds:
            os.close(fd)
    os._exit(0)


def _warm() -> None:
    """Import the modules of every server once for all of them; if that fails, the server that needs one reports it."""
    try:
        import cowfs.fuse.handshake
        import cowfs.fuse.loop
        import cowfs.union.view  # noqa: F401 - imported here once, for all servers
    except ImportError:
        pass


def _warm_index() -> None:
    """Import the modules of servers for a store's snapshots."""
    try:
        import cowfs.mounting.index_view  # noqa: F401 - imported here once, for all servers
    except ImportError:
        pass


def _freeze() -> None:
    """Keep every server's garbage collector away from the present objects, so that their memory stays shared."""
    import gc

    gc.collect()
    gc.freeze()


def _exactly(client: socket.socket, count: int) -> bytes:
    body = b""
    while len(body) < count:
        piece = client.recv(count - len(body))
        if not piece:
            return b""
        body += piece
    return body


def _serve(spec: MountSpec, cwd: str, report: int, errors: int) -> NoReturn:
    from cowfs.mounting import server

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(errors, 2)
    os.close(errors)
    try:
        os.write(report, b"%d\n" % os.getpid())
    except BrokenPipeError:
        os._exit(1)  # the client was killed: the mount is no longer wanted
    try:
        os.chdir(cwd)
    except OSError:
        pass  # all paths of a request are absolute; relative ones occur only in diagnostics
    show(f"cowfs server {spec.mountpoint}")
    server.serve(spec, server.Report(report))


def show(title: str) -> None:
    """Have ps show a title instead of the command line (proc(5), arg_start and arg_end)."""
    import ctypes

    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if start and end > start:
        shown = os.fsencode(title)[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, shown, len(shown))
