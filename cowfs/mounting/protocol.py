"""The control socket of a mount's server: its place, its protocol, and the asking side.

Strategy: one unix stream socket a server, in a directory only its owner can enter. A client sends one line of JSON,
``{"verb": "usage", "version": 1, ...arguments}``, and gets one line back: ``{"ok": {...}}`` or ``{"error": {"type", "message",
"remedy"}}``; then the server may keep the connection until it ends, which is how a client waits for that end. With
``"stream": true`` any number of lines ``{"more": {...}}`` come before, from verbs that have news. The answering side is
:mod:`cowfs.mounting.control`; the arguments of each verb are a record beside it in :mod:`cowfs.mounting.verbs`.

Versions: a server answers messages of its own version and of older ones; 0 had no ``version`` and no streams. A server of version
0 ignores both words, so a client of any version can ask it, and gets the answer alone.

The socket's name is the minor number of the mount's device (FUSE file systems have anonymous devices, major 0), so it is
found from a mount point through mountinfo alone, without touching a mount whose server may hang.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress

from cowfs import errors
from cowfs._typed import Any
from cowfs.errors import CowfsError, FailedPrecondition
from cowfs.sys import host, process

__all__ = [
    "VERSION",
    "ask",
    "ask_all",
    "connect",
    "decode",
    "directories",
    "encode",
    "is_private",
    "listen",
    "run_directory",
    "sockets",
]

VERSION = 1
SUFFIX = ".sock"
MAX_LINE = 64 << 20
_UCRED = struct.Struct("3i")  # struct ucred, unix(7): pid, uid, gid
TIMEOUT = 10.0
"""Seconds that a client waits for an answer."""
SHORT = 2.0
"""Seconds that a client waits for many answers together, of which it needs none."""


def directories() -> list[str]:
    """The possible directories of sockets, the preferred one first.

    ``/run/cowfs`` as root; ``$XDG_RUNTIME_DIR/cowfs`` otherwise; a private directory below the temporary directory where
    neither can be written (root in a user namespace, a login without a session).
    """
    places = ["/run/cowfs"] if os.geteuid() == 0 else []
    if os.environ.get("XDG_RUNTIME_DIR"):
        places.append(os.path.join(os.environ["XDG_RUNTIME_DIR"], "cowfs"))
    for owner in dict.fromkeys((host.outer_uid(), os.geteuid())):
        places.append(os.path.join(os.environ.get("TMPDIR") or "/tmp", f"cowfs-{owner}"))
    return places


def run_directory() -> str:
    """The first usable place, made if need be: owned by this user, and closed to others.

    Raises:
        FailedPrecondition: there is none, and none can be made.
    """
    for place in directories():
        try:
            os.makedirs(place, mode=0o700, exist_ok=True)
        except OSError:
            continue
        if is_private(place) and os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            return place
    raise FailedPrecondition(
        f"no place for the control socket: {', '.join(directories())}",
        remedy="set XDG_RUNTIME_DIR to a directory of yours",
    )


def leave_run_directory(place: str) -> None:
    """Remove a run directory that is empty, where it was made below the temporary directory."""
    if os.path.basename(place).startswith("cowfs-"):
        try:
            os.rmdir(place)
        except OSError:
            pass


def is_private(place: str) -> bool:
    """Whether a directory is this user's, and nobody else may write in it."""
    try:
        status = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def sockets() -> Iterator[str]:
    """Paths of all control sockets that this user may see, those of dead servers included."""
    for place in directories():
        if not is_private(place):
            continue
        try:
            names = os.listdir(place)
        except OSError:
            continue
        for name in sorted(names):
            if name.endswith(SUFFIX):
                yield os.path.join(place, name)


def socket_of(device: str) -> str | None:
    """The socket of the mount with this device ("0:85", as mountinfo writes it), or None."""
    name = device.partition(":")[2] + SUFFIX
    for place in directories():
        path = os.path.join(place, name)
        if is_private(place) and os.path.exists(path):
            return path
    return None


def device_of(path: str) -> str:
    """The device, as mountinfo writes it ("0:85"), of the mount whose socket this is; that of no mount for another name."""
    return "0:" + os.path.basename(path).removesuffix(SUFFIX)


def encode(message: dict[str, Any]) -> bytes:
    """One line. Bytes and file names that are not UTF-8 travel as surrogates."""
    import json

    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Inverse of :func:`encode`.

    Raises:
        ValueError: not one JSON object.
    """
    import json

    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


@contextmanager
def short(path: str) -> Iterator[str]:
    """The same place, named in the 107 bytes that an address has room for (unix(7)), through its directory's descriptor."""
    if len(os.fsencode(path)) < 100:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def listen(path: str, *, group: int = -1, backlog: int = 128) -> socket.socket:
    """Listen at a path, for its owner only, or a group as well; whatever is there is replaced.

    A client never finds the socket with another mode or group, or before it listens.

    Raises:
        OSError: the directory cannot be written.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        unfinished = f"{path}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(unfinished)  # of a process that was killed and had this number
        before = os.umask(0o177)
        try:
            with short(unfinished) as address:
                sock.bind(address)
        finally:
            os.umask(before)
        if group >= 0:
            os.chown(unfinished, -1, group)
            os.chmod(unfinished, 0o660)
        sock.listen(backlog)
        os.rename(unfinished, path)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: str, timeout: float = TIMEOUT) -> socket.socket:
    """A connection to a server.

    A killed server listens until the kernel has closed its files; the call waits for that.

    Raises:
        OSError: no server answers there (ECONNREFUSED, ENOENT: the server is gone).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        for attempt in range(100):
            try:
                with short(path) as address:
                    sock.connect(address)
                break
            except BlockingIOError:  # many clients at once: the queue is full (unix(7), EAGAIN)
                if attempt == 99:
                    raise
                time.sleep(timeout / 100)
        pid = peer(sock)
        if pid and process.is_ending(pid):
            process.wait(pid, timeout)
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except BaseException:
        sock.close()
        raise
    return sock


def peer(sock: socket.socket) -> int:
    """The process that listens at the other end of a connection, 0 if it is outside this pid namespace (unix(7))."""
    pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def read_line(sock: socket.socket) -> bytes:
    """One line, without its newline. Raises OSError: timeout, or more than 64 MiB."""
    return _next_line(sock, b"")[0]


def _next_line(sock: socket.socket, rest: bytes) -> tuple[bytes, bytes]:
    """The next line, without its newline, and the bytes after it; ``rest`` are the bytes received before. If the other
    side stops, the bytes so far.

    Raises:
        OSError: timeout, or more than 64 MiB.
    """
    parts, size = [rest], len(rest)
    while b"\n" not in parts[-1]:
        part = sock.recv(1 << 16)
        if not part:
            return b"".join(parts), b""
        parts.append(part)
        size += len(part)
        if size > MAX_LINE:
            raise OSError("the message is too long")
    line, _, after = b"".join(parts).partition(b"\n")
    return line, after


def talk(sock: socket.socket, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Ask one verb on an open connection.

    Raises:
        CowfsError: as the server raised it, by class.
        FailedPrecondition: the server ended or did not answer.
    """
    told = lines(sock, verb, arguments)
    while True:
        try:
            next(told)
        except StopIteration as end:
            answer: dict[str, Any] = end.value
            return answer


def lines(sock: socket.socket, verb: str, arguments: dict[str, Any]) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """Ask one verb on an open connection: yields its news as they come, and returns its answer. Errors as of :func:`talk`."""
    rest = b""
    try:
        sock.sendall(encode({"verb": verb, "version": VERSION, **arguments}))
    except TimeoutError:
        raise _silent() from None
    except OSError as error:
        raise _gone(error) from None
    while True:
        try:
            line, rest = _next_line(sock, rest)
        except TimeoutError:
            raise _silent() from None
        except OSError as error:
            raise _gone(error) from None
        if not line:
            raise FailedPrecondition("the server ended without an answer")
        try:
            answer = decode(line)
        except ValueError:
            raise FailedPrecondition("the server sent something else than an answer") from None
        if "error" in answer:
            raise error_from(answer["error"])
        news = answer.get("more")
        if isinstance(news, dict):
            yield news
            continue
        result = answer.get("ok")
        if not isinstance(result, dict):
            raise FailedPrecondition("the server sent something else than an answer")
        return result


def _silent() -> FailedPrecondition:
    return FailedPrecondition("the server does not answer", remedy="cowfs umount --force MNT ends it")


def _gone(error: OSError) -> FailedPrecondition:
    return FailedPrecondition(f"the server is gone: {error.strerror or error}")


def stream(
    path: str, verb: str, *, timeout: float = TIMEOUT, **arguments: Any
) -> Generator[dict[str, Any], None, dict[str, Any]]:
    """Connect, ask one verb for its news, disconnect: yields them as they come, and returns the answer.

    Closing the generator ends the verb where it is, as of :mod:`cowfs.mounting.verbs.table`.

    Args:
        timeout: seconds that a client waits for the next line.

    Raises:
        CowfsError: as the server raised it, by class.
        FailedPrecondition: no server answers at the socket.
    """
    with _connected(path, timeout) as sock:
        return (yield from lines(sock, verb, {**arguments, "stream": True}))


def ask(path: str, verb: str, *, timeout: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
    """Connect, ask one verb, disconnect.

    Raises:
        CowfsError: as the server raised it, by class.
        FailedPrecondition: no server answers at the socket.
    """
    with _connected(path, timeout) as sock:
        return talk(sock, verb, arguments)


def _connected(path: str, timeout: float) -> socket.socket:
    try:
        return connect(path, timeout)
    except OSError as error:
        raise FailedPrecondition(
            f"no server at {path}: {error.strerror or error}", remedy="cowfs umount MNT clears what it left"
        ) from None


def ask_all(
    paths: Iterable[str], verb: str, *, timeout: float = SHORT
) -> Iterator[tuple[str, dict[str, Any] | OSError]]:
    """Ask one verb of several servers at once, and wait for all of them together.

    Yields:
        (socket, answer), its ``pid`` as this process's pid namespace numbers it (None: not at all), and (socket, TimeoutError) for a server that did not answer in time, (socket, ConnectionError) for one
        that is gone. Servers that answer with an error are left out.
    """
    import selectors

    waiting = selectors.DefaultSelector()
    try:
        for path in paths:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                with short(path) as address:
                    sock.connect(address)
                sock.sendall(encode({"verb": verb, "version": VERSION}))
            except OSError as error:  # EAGAIN: its queue is full, so it accepts no connection
                sock.close()
                yield path, TimeoutError(*error.args) if isinstance(error, BlockingIOError) else error
                continue
            pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            waiting.register(sock, selectors.EVENT_READ, (path, [], pid or None))
        end = time.monotonic() + timeout
        while waiting.get_map():
            ready = waiting.select(max(0.0, end - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                path, parts, pid = key.data
                try:
                    parts.append(key.fileobj.recv(1 << 16))
                except OSError as error:
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()
                    yield path, error
                    continue
                if parts[-1] and not parts[-1].endswith(b"\n"):
                    continue
                waiting.unregister(key.fileobj)
                key.fileobj.close()
                if not parts[-1]:
                    yield path, ConnectionResetError("the server ended without an answer")
                    continue
                answer = _answer(b"".join(parts))
                if answer is not None:
                    yield path, {**answer, "pid": pid} if "pid" in answer else answer
        for key in list(waiting.get_map().values()):
            yield key.data[0], TimeoutError("the server does not answer")
    finally:
        for key in list(waiting.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        waiting.close()


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        answer = decode(line).get("ok")
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def is_trusted(path: str) -> bool:
    """Whether a control socket is in a directory that only this user can write."""
    return is_private(os.path.dirname(path))


def error_to(error: CowfsError) -> dict[str, str]:
    """The encoding of an error in an answer."""
    return {"type": type(error).__name__, "message": error.message, "remedy": error.remedy}


def error_from(data: object) -> CowfsError:
    """Inverse of :func:`error_to`; an unknown class becomes its base."""
    fields = data if isinstance(data, dict) else {}
    kind = getattr(errors, str(fields.get("type")), CowfsError)
    if not (isinstance(kind, type) and issubclass(kind, CowfsError)):
        kind = CowfsError
    return kind(str(fields.get("message", "unknown error")), remedy=str(fields.get("remedy", "")))
