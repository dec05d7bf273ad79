"""Doors: the listening sockets for clients, and the loop that waits at all of them.

Strategy. One thread waits for everything that is idle: listening sockets and connections between two requests. A
readable connection goes to a thread of its own until it is idle again; so a thousand idle clients cost a thousand
descriptors and no thread. A TLS connection has one more thread for its whole life (:mod:`cowfs.service.tls`), which
hands the plain end of a socketpair in here as if it had been accepted.

Threads: :class:`Loop` is driven by the thread in :meth:`Loop.run`; :meth:`Loop.stop` may be called from any.
"""

from __future__ import annotations

import errno
import grp
import os
import selectors
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.mounting.protocol import listen, short
from cowfs.service import systemd, tls
from cowfs.service.http import Connection, Handler
from cowfs.service.logs import log
from cowfs.service.options import Options
from cowfs.sys.threads import Thread

__all__ = ["Door", "Loop", "answers", "open_door", "open_doors"]

PLAIN_PORT, TLS_PORT = 2375, 2376
_UCRED = struct.Struct("3i")


@dataclass(slots=True, kw_only=True)
class Door:
    """One listening socket.

    Attributes:
        name: in a client's spelling (``unix:///run/cowfs/docker.sock``).
        context: of TLS, or None for plain. path: of a unix socket that goes when the door is closed, or "".
        inode: of that socket.
    """

    name: str
    sock: socket.socket
    context: ssl.SSLContext | None = None
    path: str = ""
    inode: int = 0

    def close(self) -> None:
        """Close the door, and remove the socket's file if it is still this daemon's."""
        if self.path:
            try:
                if os.lstat(self.path).st_ino == self.inode:
                    os.unlink(self.path)
            except FileNotFoundError:
                pass
        self.sock.close()


def open_doors(options: Options, default: str) -> list[Door]:
    """Open all doors of the options, or the default one; none stays open when one fails.

    Raises:
        InvalidArgument: a malformed address, or a door open to everybody.
        FailedPrecondition: another process listens there.
    """
    context = None
    if options.tls or options.tlsverify:
        context = tls.server_context(
            cert=options.tlscert, key=options.tlskey, ca=options.tlscacert, verify=options.tlsverify
        )
    doors: list[Door] = []
    try:
        for text in options.host or (f"unix://{default}",):
            doors += _open(text, options, context)
    except BaseException:
        for door in doors:
            door.close()
        raise
    return doors


def open_door(text: str, option: str) -> Door:
    """Open the unix socket that an engine uses, for its owner alone.

    Args:
        text: unix:///PATH.
        option: that says so, for messages.

    Raises:
        InvalidArgument: no unix socket, or none that can be listened at.
        FailedPrecondition: somebody else has it.
    """
    path = text.removeprefix("unix://")
    if not path.startswith("/"):
        raise InvalidArgument(f"{option} {text}: not the address of a unix socket", remedy=f"{option} unix:///PATH")
    return _unix(path, "", option)


def _open(text: str, options: Options, context: ssl.SSLContext | None) -> list[Door]:
    scheme, colon, rest = text.partition("://")
    if not colon:
        scheme, rest = ("unix", text) if text.startswith("/") else ("tcp", text)
    if scheme == "unix":
        if not rest.startswith("/"):
            raise InvalidArgument(f"-H {text}: not an absolute path", remedy="-H unix:///run/cowfs/docker.sock")
        return [_unix(rest, options.group)]
    if scheme == "fd":
        return [_passed(sock, options, context) for sock in systemd.listening()]
    if scheme != "tcp":
        raise InvalidArgument(f"-H {text}: no such kind of door", remedy="unix:///PATH, tcp://ADDR:PORT or fd://")
    return [_tcp(text, rest, options, context)]


def _unix(path: str, group: str, option: str = "-H") -> Door:
    gid = -1
    if group:
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise NotFound(f"--group {group}: no such group") from None
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, mode=0o755 if group else 0o700, exist_ok=True)
        if answers(path):
            raise FailedPrecondition(
                f"another process listens at {path}", remedy=f"end it, or choose another place: {option}"
            )
        sock = listen(path, group=gid, backlog=1024)
    except OSError as error:
        raise InvalidArgument(f"{option} unix://{path}: {error.strerror or error}") from None
    return Door(name=f"unix://{path}", sock=sock, path=path, inode=os.stat(path).st_ino)


def answers(path: str) -> bool:
    """Whether a process listens at a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(2.0)
        try:
            with short(path) as address:
                sock.connect(address)
        except OSError as error:
            return isinstance(error, TimeoutError | BlockingIOError)
    return True


def _tcp(text: str, rest: str, options: Options, context: ssl.SSLContext | None) -> Door:
    host, _, port_text = (
        rest.rstrip("/").rpartition(":") if ":" in rest.rpartition("]")[2] else (rest.rstrip("/"), "", "")
    )
    host = host.strip("[]") or "127.0.0.1"
    if port_text and not port_text.isdecimal():
        raise InvalidArgument(f"-H {text}: no such port: {port_text}")
    port = int(port_text) if port_text else TLS_PORT if context is not None else PLAIN_PORT
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, OverflowError) as error:
        raise InvalidArgument(f"-H {text}: {getattr(error, 'strerror', error)}") from None
    _refuse_open(str(address[0]), text, options)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise FailedPrecondition(f"-H {text}: another process listens there") from None
        raise InvalidArgument(f"-H {text}: {error.strerror}") from None
    sock.listen(1024)
    at = sock.getsockname()
    shown = f"[{at[0]}]" if ":" in at[0] else at[0]
    return Door(name=f"tcp://{shown}:{at[1]}", sock=sock, context=context)


def _refuse_open(address: str, text: str, options: Options) -> None:
    import ipaddress

    if options.tlsverify or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return
    if not options.insecure:
        raise InvalidArgument(
            f"-H {text} would let anybody who can reach it be root on this machine",
            remedy="--tlsverify with --tlscacert, --tlscert and --tlskey; or --insecure",
        )
    log.warning("%s lets anybody who can reach it be root on this machine (--insecure)", text)


def _passed(sock: socket.socket, options: Options, context: ssl.SSLContext | None) -> Door:
    at = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return Door(name=f"unix://{at}", sock=sock)
    _refuse_open(at[0], f"fd:// ({at[0]}:{at[1]})", options)
    return Door(name=f"tcp://{at[0]}:{at[1]}", sock=sock, context=context)


class Loop:
    """Waits at the doors and at idle connections.

    Args:
        handle: answers an exchange; raises nothing.
        new_id: makes ids of exchanges.
        most: connections at once.
    """

    def __init__(self, doors: list[Door], handle: Handler, new_id: Callable[[], str], most: int) -> None:
        self.doors = doors
        self._handle, self._new_id, self._most = handle, new_id, most
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lock = threading.Lock()
        self._parked: list[Connection] = []  # guarded by _lock: on their way back to the loop
        self._open = 0  # guarded by _lock: connections
        self._busy = 0  # guarded by _lock: exchanges in work
        self._stopping = False

    @property
    def connections(self) -> int:
        """Connections that are open now; taken-over ones count as long as TLS relays them."""
        return self._open

    def run(self) -> None:
        """Wait until :meth:`stop`."""
        for door in self.doors:
            door.sock.setblocking(False)
            self._selector.register(door.sock, selectors.EVENT_READ, door)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        swept = time.monotonic()
        while not self._stopping:
            for key, _ in self._selector.select(timeout=1.0):
                if isinstance(key.data, Door):
                    self._accept(key.data)
                elif isinstance(key.data, Connection):
                    self._selector.unregister(key.fileobj)
                    self._work(key.data)
                else:
                    os.read(self._wake_in, 4096)
            with self._lock:
                back, self._parked = self._parked, []
            for connection in back:
                self._selector.register(connection.sock, selectors.EVENT_READ, connection)
            if time.monotonic() - swept >= 1.0:
                swept = time.monotonic()
                self._sweep(swept)

    def stop(self, patience: float = 5.0) -> None:
        """Close the doors, and wait a little for the exchanges in work."""
        self._stopping = True
        self._wake()
        for door in self.doors:
            door.close()
        end = time.monotonic() + patience
        while self._busy and time.monotonic() < end:
            time.sleep(0.01)

    def _is_stopping(self) -> bool:
        return self._stopping

    def _wake(self) -> None:
        try:
            os.write(self._wake_out, b"x")
        except BlockingIOError:
            pass  # the loop is awake already

    def _accept(self, door: Door) -> None:
        for _ in range(64):
            try:
                sock, address = door.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("%s: no connection can be accepted: %s", door.name, error.strerror)
                time.sleep(0.05)  # out of descriptors: the queue would spin
                return
            with self._lock:
                full = self._open >= self._most
                if not full:
                    self._open += 1
            if full:
                log.warning("%s: a connection was refused: %d are open", door.name, self._most)
                sock.close()
                continue
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = _peer(sock, address)
            if door.context is None:
                named = sock.family != socket.AF_UNIX
                made = Connection(sock, peer, named=named, is_ending=self._is_stopping)
                self._selector.register(sock, selectors.EVENT_READ, made)
            else:
                thread = Thread(partial(self._relay, sock, door.context, peer), "cowfs-tls")
                if not thread.start():
                    self._refuse(sock, "no thread can be started")

    def _relay(self, raw: socket.socket, context: ssl.SSLContext, peer: str) -> None:
        try:
            try:
                found = tls.handshake(raw, context)
            except OSError as error:
                reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error.strerror or error
                log.info("TLS with %s failed: %s", peer, reason)
                return
            ours, theirs = socket.socketpair()
            certificate = found[0].getpeercert() or {}
            subject: Any = certificate.get("subject", ())
            names = [value for part in subject for key, value in part if key == "commonName"]
            with self._lock:
                made = Connection(theirs, " ".join([peer, *map(str, names)]), is_ending=self._is_stopping)
                self._parked.append(made)
                self._open += 1
            self._wake()
            with ours:
                tls.relay(raw, *found, ours)
        finally:
            raw.close()
            self._closed()

    def _work(self, connection: Connection) -> None:
        with self._lock:
            self._busy += 1
        if not Thread(partial(self._serve, connection), "cowfs-exchange").start():
            with self._lock:
                self._busy -= 1
            self._refuse(connection.sock, "no thread can be started")

    def _refuse(self, sock: socket.socket, why: str) -> None:
        """Close a connection that counts as open; the doors go on."""
        log.warning("a connection was closed: %s", why)
        sock.close()
        self._closed()

    def _serve(self, connection: Connection) -> None:
        again = False
        try:
            again = connection.serve(self._handle, self._new_id) and not self._stopping
            if again:
                connection.sock.setblocking(False)
                with self._lock:
                    self._parked.append(connection)
                self._wake()
        finally:
            with self._lock:
                self._busy -= 1
            if not again:
                self._closed()

    def _closed(self) -> None:
        with self._lock:
            self._open -= 1

    def _sweep(self, now: float) -> None:
        """Close connections that have been idle for too long."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Connection) and key.data.idle_until < now:
                self._selector.unregister(key.fileobj)
                key.data.close()
                self._closed()


def _peer(sock: socket.socket, address: object) -> str:
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return f"pid={pid} uid={uid}"
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
