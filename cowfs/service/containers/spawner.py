"""Supervisors are forked from one process with one thread, which has imported all their modules.

Strategy. The daemon has threads and cannot fork; a fresh interpreter for each container would cost more time and memory than the
container itself. So the daemon starts this process once, and sends it a request for each container: four bytes of length
and a JSON document; one byte comes back when the supervisor listens. It ends with the daemon; the supervisors that it
forked do not.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any, NoReturn

from cowfs.errors import CowfsError

__all__ = ["Spawner", "main"]

_LENGTH = struct.Struct("<I")


class Spawner:
    """The daemon's side.

    Threads: any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None  # guarded by _lock

    def warm_up(self) -> None:
        """Start the process, so that the first container does not wait for it."""
        with self._lock:
            if self._socket is None:
                self._socket = _open()

    def spawn(self, settings: dict[str, Any]) -> None:
        """Fork a supervisor; it listens when this returns.

        Raises:
            CowfsError: the fork or its start failed.
        """
        data = json.dumps(settings).encode()
        with self._lock:
            for _ in range(2):
                if self._socket is None:
                    self._socket = _open()
                try:
                    self._socket.sendall(_LENGTH.pack(len(data)) + data)
                    if self._socket.recv(1) == b"+":
                        return
                except OSError:
                    pass
                self._socket.close()  # it is gone, or failed: try a fresh one
                self._socket = None
        raise CowfsError("no supervisor could be started")

    def close(self) -> None:
        """Let the process end; idempotent."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _open() -> socket.socket:
    ours, theirs = socket.socketpair()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    path = os.pathsep.join([root, *(place for place in sys.path if place and os.pathsep not in place)])
    with theirs:
        done = subprocess.run(
            [sys.executable, "-S", "-P", "-c", "from cowfs.service.containers.spawner import main; main()"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    if done.returncode:
        ours.close()
        raise CowfsError(f"the process that makes supervisors could not be started (status {done.returncode})")
    return ours


def main() -> NoReturn:
    """The process's side: fork, so that the daemon has no child to wait for; then a supervisor for each request."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    client = socket.socket(fileno=os.dup(0))
    os.set_inheritable(client.fileno(), False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    import gc

    from cowfs.index import database
    from cowfs.service import waiting
    from cowfs.service.containers import cgroups, supervisor

    del cgroups, database, waiting  # imported here once, for all supervisors
    gc.collect()
    gc.freeze()
    while True:
        head = _exactly(client, _LENGTH.size)
        body = _exactly(client, _LENGTH.unpack(head)[0]) if head else b""
        if not body:
            os._exit(0)
        settings = json.loads(body)
        try:
            listening = _listen(settings["socket"])
        except OSError:
            try:
                client.sendall(b"-")
            except OSError:
                os._exit(0)
            continue
        if not os.fork():
            client.close()
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            supervisor.main(settings, listening)
        listening.close()
        try:
            client.sendall(b"+")
        except OSError:
            os._exit(0)  # the daemon was killed; its successor finds the supervisor


def _listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    old = os.umask(0o177)
    try:
        sock.bind(path)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(old)
    sock.listen(64)
    return sock


def _exactly(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            piece = client.recv(count - len(data))
        except ConnectionResetError:  # it was killed
            piece = b""
        if not piece:
            return b""
        data += piece
    return data
