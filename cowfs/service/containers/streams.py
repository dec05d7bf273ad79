"""The input and output of one process of a container, between pipes or a terminal, the log, and clients that are attached.

Rules:

1. No output is lost: while a client is slow, no more is read from the process (as with a pipe), and at its end the rest
in pipe and terminal is read first. 2. A client is a socket. Without a terminal its output comes in frames of eight
bytes of head and data (the stream's number,
   three zeros, the length, big-endian: Docker's API, "Stream format"), with one it comes as it is.
3. A client that closes its sending half ends its input; its output goes on.

Threads: everything here belongs to the loop of :mod:`cowfs.service.containers.supervisor`.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import select
import selectors
import socket
import struct
import termios
from collections.abc import Callable
from typing import Protocol

__all__ = ["STDERR", "STDIN", "STDOUT", "Client", "Streams", "frame"]

STDIN, STDOUT, STDERR = 0, 1, 2
CHUNK = 64 << 10
HIGH_WATER = 1 << 20
"""Bytes that wait for a client, or for the process, before no more is read for them."""

_HEAD = struct.Struct(">BxxxI")

DETACH_KEYS = b"\x10\x11"  # ctrl-p ctrl-q


def frame(stream: int, data: bytes) -> bytes:
    """Data of a stream in Docker's multiplexed form."""
    return _HEAD.pack(stream, len(data)) + data


class Log(Protocol):
    """The log of output."""

    def write(self, stream: int, data: bytes) -> None: ...


class Client:
    """One attached client.

    Args:
        sock: owned from now on; not blocking.
        wants: the streams for it.
        early: input that came with the request.
        keys: bytes that detach it, where there is a terminal.
    """

    def __init__(self, sock: socket.socket, wants: frozenset[int], early: bytes = b"", keys: bytes = b"") -> None:
        sock.setblocking(False)
        self.sock = sock
        self.wants = wants
        self.early = early
        self.out = bytearray()
        self.reading = True
        self.closing = False  # once the pending output is sent
        self.detached = False
        self._keys = keys
        self._held = b""

    def without_keys(self, data: bytes) -> bytes:
        """The input without the detach keys; :attr:`detached` is set after the whole sequence."""
        if not self._keys:
            return data
        data = self._held + data
        at = data.find(self._keys)
        if at >= 0:
            self.detached = True
            self._held = b""
            return data[:at]
        kept = next((n for n in range(len(self._keys) - 1, 0, -1) if data.endswith(self._keys[:n])), 0)
        self._held = data[len(data) - kept :]
        return data[: len(data) - kept]


class Streams:
    """The streams of one process.

    Args:
        selector: of the loop; callbacks are its data.
        terminal: whether the process has one.
        log: the log of output; None for none.
        stdin_once: the end of a client's input is the end of the process's.
        on_end: called when all output was read and all clients have it.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        *,
        terminal: bool,
        log: Log | None,
        stdin_once: bool,
        on_end: Callable[[], None],
    ) -> None:
        self._selector = selector
        self.terminal = terminal
        self._log = log
        self._stdin_once = stdin_once
        self._on_end = on_end
        self.clients: list[Client] = []
        self._outputs: dict[int, int] = {}  # descriptor -> stream
        self._input: int | None = None
        self._waiting = bytearray()  # input that the process has not taken
        self._close_input = False
        self._started = False
        self._ended = False
        self._size: tuple[int, int] | None = None

    # -- the process's side -----------------------------------------------------------------------

    def connect(self, outputs: dict[int, int], input: int | None) -> None:
        """Begin: descriptors of output with their streams, and the one of input. All are owned from now on."""
        for fd in {*outputs, *([input] if input is not None else [])}:
            os.set_blocking(fd, False)
        self._outputs = outputs
        self._input = input
        self._started = True
        if self._size is not None:
            self.resize(*self._size)
        for client in self.clients:
            self._take_early(client)
        self.update()

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size, now or when it is there."""
        self._size = (width, height)
        fd = self._input if self._input is not None else next(iter(self._outputs), None)
        if self.terminal and fd is not None:
            fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def process_ended(self) -> None:
        """End the streams of an ended process: read the rest of its output."""
        self._ended = True
        for fd in list(self._outputs):
            self._read_rest(fd)
        self._shut_input()
        self._finish()

    def _read_rest(self, fd: int) -> None:
        while True:
            try:
                data = os.read(fd, CHUNK)
            except (BlockingIOError, OSError):
                break
            if not data:
                break
            self._output(self._outputs[fd], data)
        self._drop_output(fd)

    def fail(self, message: str) -> None:
        """End the streams of a process that did not start, with a message for the clients."""
        self._output(STDERR, message.encode() + (b"\r\n" if self.terminal else b"\n"))
        self._ended = True
        self._finish()

    def _drop_output(self, fd: int) -> None:
        self._outputs.pop(fd, None)
        self._unregister(fd)
        if fd != self._input:
            os.close(fd)

    def _shut_input(self) -> None:
        if self._input is not None:
            fd, self._input = self._input, None
            self._unregister(fd)
            os.close(fd)
        self._waiting.clear()

    def _output(self, stream: int, data: bytes) -> None:
        if self._log is not None:
            self._log.write(stream, data)
        for client in self.clients:
            if stream in client.wants and not client.closing:
                client.out += data if self.terminal else frame(stream, data)

    # -- clients ----------------------------------------------------------------------------------

    def attach(self, client: Client) -> None:
        """Attach a client."""
        self.clients.append(client)
        if STDIN not in client.wants:
            client.early = b""
        if self._ended:
            client.closing = True
        elif self._started:
            self._take_early(client)
        self.update()

    def _take_early(self, client: Client) -> None:
        if client.early:
            data, client.early = client.early, b""
            self._take_input(client, data)

    def _take_input(self, client: Client, data: bytes) -> None:
        if STDIN in client.wants:
            self._waiting += client.without_keys(data)
            if client.detached:
                client.closing = True

    def _drop(self, client: Client) -> None:
        self._unregister(client.sock.fileno())
        _close(client.sock)
        self.clients.remove(client)

    def drop_gone(self) -> None:
        """Close clients that left before the process began, since their input is not read until then."""
        if self._started or self._ended:
            return
        for client in list(self.clients):
            poll = select.poll()
            poll.register(client.sock, 0)
            if poll.poll(0):  # POLLHUP or POLLERR: nobody is there
                self._drop(client)

    def _finish(self) -> None:
        for client in list(self.clients):
            client.closing = True
        self.update()

    # -- the loop ---------------------------------------------------------------------------------

    def update(self) -> None:
        """Register the descriptors to wait for, by the fill of the buffers."""
        for client in list(self.clients):
            self._send(client)
        if self._ended and not self.clients and not self._outputs:
            self._started = False
            on_end, self._on_end = self._on_end, _nothing
            on_end()
            return
        full = any(len(client.out) > HIGH_WATER for client in self.clients)
        events: dict[int, int] = dict.fromkeys(self._outputs, 0 if full else selectors.EVENT_READ)
        if self._input is not None and self._waiting:
            events[self._input] = events.get(self._input, 0) | selectors.EVENT_WRITE
        elif self._input is not None and self._close_input and not self.terminal:
            self._shut_input()
        elif self._input is not None:
            events.setdefault(self._input, 0)
        for fd, wanted in events.items():
            self._register(fd, wanted, self._process_ready)
        for client in self.clients:
            wanted = selectors.EVENT_WRITE if client.out else 0
            if client.reading and self._started and len(self._waiting) < HIGH_WATER:
                wanted |= selectors.EVENT_READ
            self._register(client.sock.fileno(), wanted, functools.partial(self._client_ready, client))

    def _register(self, fd: int, events: int, callback: Callable[[int, int], None]) -> None:
        known = self._selector.get_map().get(fd)
        if not events:
            if known is not None:
                self._selector.unregister(fd)
        elif known is None:
            self._selector.register(fd, events, callback)
        elif known.events != events:
            self._selector.modify(fd, events, callback)

    def _unregister(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def _process_ready(self, fd: int, mask: int) -> None:
        if mask & selectors.EVENT_READ and fd in self._outputs:
            try:
                data = os.read(fd, CHUNK)
            except BlockingIOError:
                data = None
            except OSError as error:
                if error.errno != errno.EIO:  # a terminal whose other side is closed
                    raise
                data = b""
            if data:
                self._output(self._outputs[fd], data)
            elif data is not None:
                self._drop_output(fd)
        if mask & selectors.EVENT_WRITE and fd == self._input:
            try:
                del self._waiting[: os.write(fd, self._waiting[:CHUNK])]
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                self._shut_input()  # the process reads no more
        self.update()

    def _client_ready(self, client: Client, fd: int, mask: int) -> None:
        if client not in self.clients:
            return
        if mask & selectors.EVENT_READ:
            try:
                data = client.sock.recv(CHUNK)
            except BlockingIOError:
                data = None
            except OSError:
                self._drop(client)
                self.update()
                return
            if data:
                self._take_input(client, data)
            elif data is not None:
                self._input_ended(client)
        self.update()

    def _input_ended(self, client: Client) -> None:
        client.reading = False
        if STDIN in client.wants and self._stdin_once:
            self._close_input = True
        if not client.wants - {STDIN}:
            client.closing = True

    def _send(self, client: Client) -> None:
        try:
            while client.out:
                sent = client.sock.send(bytes(client.out[:CHUNK]))
                del client.out[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if client.closing:
            self._drop(client)


def _nothing() -> None:
    pass


def _close(sock: socket.socket) -> None:
    """Close a client's socket. Read its remaining input first, else the client gets ECONNRESET at the end of the stream
    (unix(7))."""
    try:
        sock.shutdown(socket.SHUT_WR)
        for _ in range(64):  # the capacity of a socket
            if not sock.recv(65536, socket.MSG_DONTWAIT):
                break
    except OSError:
        pass  # nothing is there, or the client is gone
    sock.close()
