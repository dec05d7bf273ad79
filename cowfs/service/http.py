"""HTTP/1.1 on one connection, with h11 for the protocol.

Rules:

1. Everything kept for a client is bounded: a head of 64 KiB, a JSON document of 4 MiB, ten seconds for a head, a
   minute for each part of a body, five minutes of idleness. Streams (an image, an archive) are never held.
2. An answer is a value: :class:`Reply` with bytes, or with an iterator of parts, or with a function that takes the socket
   over (``Upgrade: tcp``). The engine writes it; a handler never sees the socket.
3. A stream without data yields ``b""`` at least twice a second, so that the engine notices that its client left.
4. After a takeover the handler owns the socket, with the bytes that came early; either side may close its half.

Threads: a :class:`Connection` belongs to one thread at a time.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

import h11

from cowfs.errors import CowfsError
from cowfs.service.errors import ApiError
from cowfs.service.logs import log

__all__ = ["Body", "Connection", "Exchange", "Reply", "empty", "json_reply", "lines"]

MAX_HEAD = 64 << 10
MAX_JSON = 4 << 20
MAX_DRAIN = 1 << 20
"""Bytes of an unread body that are read away so that the connection can be used again."""

HEAD_SECONDS = 10.0
PART_SECONDS = 60.0
IDLE_SECONDS = 300.0
CHUNK, HEAD_CHUNK = 256 << 10, 8 << 10

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"

_FOR_BROWSERS = (("x-content-type-options", "nosniff"), ("cross-origin-resource-policy", "same-origin"))
"""No answer is ever taken for a page or a script, or shown to a page of another origin (Fetch standard, "CORP check")."""

Take = Callable[[socket.socket, bytes], None]


@dataclass(slots=True, kw_only=True)
class Reply:
    """An answer.

    Attributes:
        status: of HTTP. headers: beside those that the engine makes. type: of the content, "" where there is none.
        body: bytes; or parts that are written as they come (chunked), whose headers are written before the first one.
        take: instead of a body: a function of the socket and the bytes that came early, the owner of both.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    type: str = "application/json"
    body: bytes | Iterable[bytes] = b""
    take: Take | None = None


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A document."""
    return Reply(status=status, body=_compact(value).encode() + b"\n", headers=headers or {})


def empty(status: int = 204) -> Reply:
    """A success without content."""
    return Reply(status=status, type="")


_compact = json.JSONEncoder(separators=(",", ":")).encode
"""One encoder for all lines: json.dumps would make another one for each event."""


def lines(values: Iterable[Any]) -> Iterator[bytes]:
    """One JSON document a line; None is a sign of life."""
    for value in values:
        yield b"" if value is None else _compact(value).encode() + b"\r\n"


class Body:
    """The body of a request as a stream that is read once.

    Raises from :meth:`read`:
        ApiError: the client stopped, or took too long.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rest = b""
        self._ended = False

    def read(self, count: int = -1) -> bytes:
        """Up to ``count`` bytes, at least one; ``b""`` at the end."""
        if not self._rest and not self._ended:
            self._rest = self._connection.next_part()
            self._ended = not self._rest
        if count < 0 or count >= len(self._rest):
            data, self._rest = self._rest, b""
            return data
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def whole(self, limit: int = MAX_JSON) -> bytes:
        """All of it.

        Raises:
            ApiError: 413 where it is longer than ``limit`` bytes.
        """
        parts, size = [], 0
        while data := self.read():
            size += len(data)
            if size > limit:
                raise ApiError(413, f"the body has more than {limit >> 20} MiB")
            parts.append(data)
        return b"".join(parts)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request.

    Attributes:
        id: of this exchange, for its lines of the log.
        path: decoded, without the query. query: the last value of each name, queries: all. headers: by lower-case name.
        peer: the client, as far as the door knows it.
        named: whether the name in Host has to be checked: the request came over TCP without TLS.
    """

    id: str
    method: str
    path: str
    query: Mapping[str, str]
    queries: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: Body
    peer: str
    wants_upgrade: bool
    named: bool = False

    def all(self, name: str) -> list[str]:
        """All values of a name in the query."""
        return self.queries.get(name, [])

    def document(self) -> dict[str, Any]:
        """The JSON object in the body; {} where there is none.

        Raises:
            ApiError: 400 for anything else, 413 where it is too long.
        """
        data = self.body.whole()
        if not data.strip():
            return {}
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is no JSON document") from None
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ApiError(400, "the body is no JSON object")
        return value

    def number(self, name: str) -> int:
        """A whole number of the query; 0 where there is none.

        Raises:
            ApiError: 400: it is none of 64 bits.
        """
        text = self.query.get(name) or "0"
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ApiError(400, f"{name} is no number: {text[:40]!r}")
        return int(text)

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean of the query, as Docker reads it."""
        value = self.query.get(name)
        if value is None:
            return default
        return value.lower() not in ("", "0", "no", "false", "none")


Handler = Callable[[Exchange], Reply]


class Connection:
    """A client's connection: read a request, have it handled, write the answer, and again.

    Args:
        sock: owned from now on.
        peer: for the log.
        named: see :class:`Exchange`.
        is_ending: whether streams are to be cut, since the daemon ends.
    """

    def __init__(
        self, sock: socket.socket, peer: str, *, named: bool = False, is_ending: Callable[[], bool] = lambda: False
    ) -> None:
        self.sock = sock
        self.peer = peer
        self._named = named
        self._is_ending = is_ending
        self.idle_until = time.monotonic() + HEAD_SECONDS
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._deadline: float | None = None

    # -- what the loop of the doors calls ---------------------------------------------------------

    def serve(self, handle: Handler, new_id: Callable[[], str]) -> bool:
        """Serve a request. Returns True when the connection waits for its next one, else it is closed or taken over."""
        try:
            while True:
                exchange = self._read_head(new_id)
                if exchange is None:
                    break
                if not self._answer(exchange, handle(exchange)):
                    return False
                if not self._ready_again():
                    break
                if not self._h11.trailing_data[0]:
                    self.idle_until = time.monotonic() + IDLE_SECONDS
                    return True
        except h11.RemoteProtocolError as error:
            self._complain(error.error_status_hint or 400, str(error))
        except ApiError as error:
            self._complain(error.status, error.message)
        except (OSError, h11.LocalProtocolError):
            pass  # the client left; or the answer cannot be completed any more
        except CowfsError as error:  # in the middle of a stream: its reader sees the cut
            log.warning("a stream to %s was cut: %s", self.peer, error)
        except Exception:  # noqa: BLE001  a fault of cowfs costs this connection, and is told
            log.exception("a connection of %s failed", self.peer)
            self._complain(500, "an internal error; the log tells more")
        self.close()
        return False

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self.sock.close()

    # -- reading ----------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Feed the parser the next bytes, or the end of the stream."""
        left = PART_SECONDS if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0:
            raise ApiError(408, "the request took too long")
        self.sock.settimeout(left)
        try:
            # a head is read in small pieces: h11 bounds only incomplete ones
            data = self.sock.recv(CHUNK if self._deadline is None else HEAD_CHUNK)
        except TimeoutError:
            raise ApiError(408, "the request took too long") from None
        self._h11.receive_data(data)

    def _read_head(self, new_id: Callable[[], str]) -> Exchange | None:
        self._deadline = time.monotonic() + HEAD_SECONDS
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._receive()
        self._deadline = None
        if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None
        assert isinstance(event, h11.Request)
        path, query = _split(event.target.decode("latin-1"))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        wants = "upgrade" in headers.get("connection", "").lower() and "upgrade" in headers
        queries = parse_qs(query, keep_blank_values=True, errors="surrogateescape")
        return Exchange(
            id=new_id(),
            method=event.method.decode("latin-1"),
            path=unquote(path, errors="surrogateescape"),
            query={name: values[-1] for name, values in queries.items()},
            queries=queries,
            headers=headers,
            body=Body(self),
            peer=self.peer,
            wants_upgrade=wants,
            named=self._named,
        )

    def next_part(self) -> bytes:
        """The next part of the request's body, ``b""`` at its end."""
        while True:
            if self._h11.they_are_waiting_for_100_continue:
                self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                raise ApiError(error.error_status_hint or 400, str(error)) from None
            if event is h11.NEED_DATA:
                self._receive()
            elif isinstance(event, h11.Data):
                if event.data:
                    return bytes(event.data)
            else:
                return b""

    # -- writing ----------------------------------------------------------------------------------

    def _send(self, *events: Any) -> None:
        data = b"".join(self._h11.send(event) or b"" for event in events)
        if data:
            self.sock.settimeout(PART_SECONDS)
            self.sock.sendall(data)

    def _answer(self, exchange: Exchange, reply: Reply) -> bool:
        """Write an answer; False when the socket was taken over."""
        headers = [*_FOR_BROWSERS, *reply.headers.items()]
        if reply.take is not None:
            self._take_over(exchange, reply, headers)
            return False
        if reply.type:
            headers.append(("content-type", reply.type))
        if not isinstance(reply.body, bytes):
            self._stream(exchange, reply, headers)
            return True
        if reply.status not in (204, 304):
            headers.append(("content-length", str(len(reply.body))))
        head = h11.Response(status_code=reply.status, headers=headers, reason=_reason(reply.status))
        body = [h11.Data(data=reply.body)] if exchange.method != "HEAD" and reply.body else []
        self._send(head, *body, h11.EndOfMessage())
        return True

    def _stream(self, exchange: Exchange, reply: Reply, headers: list[tuple[str, str]]) -> None:
        assert not isinstance(reply.body, bytes)
        parts = iter(reply.body)
        try:
            self._send(h11.Response(status_code=reply.status, headers=headers, reason=_reason(reply.status)))
            for part in parts:
                if part:
                    self._send(h11.Data(data=part))
                elif self._is_gone() or self._is_ending():
                    raise ConnectionResetError
            self._send(h11.EndOfMessage())
        finally:
            if isinstance(parts, Generator):  # it lets go of what it holds
                parts.close()

    def _is_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return any(event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    def _take_over(self, exchange: Exchange, reply: Reply, headers: list[tuple[str, str]]) -> None:
        assert reply.take is not None
        while exchange.body.read():
            pass
        if exchange.wants_upgrade:
            upgrade = [("content-type", reply.type), ("connection", "Upgrade"), ("upgrade", "tcp"), *headers]
            self._send(h11.InformationalResponse(status_code=101, headers=upgrade, reason=b"UPGRADED"))
        else:  # an older client reads a raw body
            self.sock.settimeout(PART_SECONDS)
            self.sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: {reply.type}\r\n\r\n".encode())
        early = self._h11.trailing_data[0]
        self.sock.settimeout(None)
        reply.take(self.sock, early)

    def _ready_again(self) -> bool:
        """Whether another request may follow on this connection; the rest of this one's body is read first."""
        drained = 0
        while self._h11.their_state is h11.SEND_BODY and drained <= MAX_DRAIN:
            if self._h11.they_are_waiting_for_100_continue:
                return False
            data = self.next_part()
            if not data:
                break
            drained += len(data)
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            return True
        return False

    def _complain(self, status: int, message: str) -> None:
        """Answer a malformed request."""
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        data = json.dumps({"message": message}).encode() + b"\n"
        headers = [("content-type", "application/json"), ("content-length", str(len(data))), ("connection", "close")]
        try:
            head = h11.Response(status_code=status, headers=headers, reason=_reason(status))
            self._send(head, h11.Data(data=data), h11.EndOfMessage())
            self.sock.shutdown(socket.SHUT_WR)
            self._linger()
        except (OSError, h11.LocalProtocolError):
            pass

    def _linger(self) -> None:
        """Read a little of a client's remaining data: closing at once would make its kernel drop the answer (RST)."""
        self.sock.settimeout(0.5)
        end = time.monotonic() + 1.0
        read = 0
        while read < MAX_DRAIN and time.monotonic() < end:
            data = self.sock.recv(CHUNK)
            if not data:
                return
            read += len(data)


def _split(target: str) -> tuple[str, str]:
    """Path and query of a request's target in origin form (RFC 9112, section 3.2.1); of any other form, the root.

    It is no URL: what follows ``//`` is part of the path, not a host.

    >>> _split("//[x?a=b?c#d"), _split("*")
    (('//[x', 'a=b?c'), ('/', ''))
    """
    if not target.startswith("/"):
        return "/", ""
    path, _, query = target.partition("#")[0].partition("?")
    return path, query


def _reason(status: int) -> bytes:
    from http import HTTPStatus

    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
