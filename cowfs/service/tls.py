"""TLS at a door: one select loop for each connection, between the client's socket and a socketpair.

Strategy. OpenSSL's state of a connection is touched by this loop's thread alone, through memory buffers (two threads on one
SSLSocket crash and deadlock CPython). The other end of the pair goes to the HTTP engine, or later to a container's
supervisor, which know nothing of TLS: they have a plain socket whose halves close one by one. A closed half travels as
TLS's ``close_notify`` (RFC 8446, 6.1) in either direction.
"""

from __future__ import annotations

import select
import socket
import ssl
import time

from cowfs.errors import InvalidArgument

__all__ = ["handshake", "relay", "server_context"]

HANDSHAKE_SECONDS = 10.0
CHUNK = 64 << 10
HIGH_WATER = 256 << 10
"""Bytes that wait for a slow side before the other one is read on."""


def server_context(*, cert: str, key: str, ca: str | None, verify: bool) -> ssl.SSLContext:
    """The context of a door.

    Raises:
        InvalidArgument: a file is unreadable, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgument(
            f"TLS: {cert} with {key}: {_said(error)}", remedy="cowfs tls init DIR makes some"
        ) from None
    if verify:
        if not ca:
            raise InvalidArgument("--tlsverify needs the authority of the clients", remedy="--tlscacert FILE")
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(f"TLS: {ca}: {_said(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _said(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or str(error)


def handshake(raw: socket.socket, context: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """Shake hands within ten seconds; the TLS object with its incoming and outgoing buffers.

    Raises:
        OSError: (ssl.SSLError among them) the client failed, or took too long.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    end = time.monotonic() + HANDSHAKE_SECONDS
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            _flush(raw, outgoing, end)
            raw.settimeout(max(0.01, end - time.monotonic()))
            data = raw.recv(CHUNK)
            if not data:
                raise ConnectionResetError from None
            incoming.write(data)
            continue
        except ssl.SSLError:
            try:
                _flush(raw, outgoing, end)  # the alert with the reason
            except OSError:
                pass
            raise
        _flush(raw, outgoing, end)
        return tls, incoming, outgoing


def _flush(raw: socket.socket, outgoing: ssl.MemoryBIO, end: float) -> None:
    data = outgoing.read()
    if data:
        raw.settimeout(max(0.01, end - time.monotonic()))
        raw.sendall(data)


def relay(
    raw: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, plain: socket.socket
) -> None:
    """Pass bytes and the ends of both halves between a client and the plain end of a pair, until both are over."""
    raw.setblocking(False)
    plain.setblocking(False)
    _Relay(raw, tls, incoming, outgoing, plain).run()


class _Relay:
    """The state of one connection's loop."""

    def __init__(
        self,
        raw: socket.socket,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        plain: socket.socket,
    ) -> None:
        self.raw, self.tls, self.incoming, self.outgoing, self.plain = raw, tls, incoming, outgoing, plain
        self.to_plain = bytearray()
        self.to_raw = bytearray()
        self.client_ended = False  # no more comes from the client
        self.plain_ended = False  # no more comes from our side
        self.told_plain = self.told_client = False

    def run(self) -> None:
        self._decrypt()  # what came with the end of the handshake
        try:
            while not self._is_over():
                self._step()
        except OSError:
            pass

    def _is_over(self) -> bool:
        """Whether this side has sent everything to the client, or the client is gone and this side knows."""
        return self.told_client and not self.to_raw and (self.client_ended or self.plain_gone())

    def plain_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.plain, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    def _step(self) -> None:
        poll = select.poll()
        raw_events = (select.POLLIN if not self.client_ended and len(self.to_plain) < HIGH_WATER else 0) | (
            select.POLLOUT if self.to_raw else 0
        )
        plain_events = (select.POLLIN if not self.plain_ended and len(self.to_raw) < HIGH_WATER else 0) | (
            select.POLLOUT if self.to_plain else 0
        )
        if raw_events or not self.client_ended:
            poll.register(self.raw, raw_events)
        poll.register(self.plain, plain_events)
        ready = dict(poll.poll())
        raw_ready, plain_ready = ready.get(self.raw.fileno(), 0), ready.get(self.plain.fileno(), 0)
        if raw_ready & (select.POLLIN | select.POLLHUP | select.POLLERR) and raw_events & select.POLLIN:
            data = self.raw.recv(CHUNK)
            if data:
                self.incoming.write(data)
            else:
                self.incoming.write_eof()
            self._decrypt()
        elif raw_ready & (select.POLLHUP | select.POLLERR):
            raise ConnectionResetError
        if plain_ready & (select.POLLIN | select.POLLHUP | select.POLLERR) and plain_events & select.POLLIN:
            self._encrypt()
        elif plain_ready & (select.POLLHUP | select.POLLERR) and self.plain_ended:
            self.to_plain.clear()
            self.client_ended = True  # there is no reader
        if plain_ready & select.POLLOUT and self.to_plain:
            del self.to_plain[: self.plain.send(self.to_plain)]
        if raw_ready & select.POLLOUT and self.to_raw:
            del self.to_raw[: self.raw.send(self.to_raw)]
        self._pass_ends()

    def _decrypt(self) -> None:
        while not self.client_ended:
            try:
                data = self.tls.read(CHUNK)
            except ssl.SSLWantReadError:
                break
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                data = b""
            if not data:
                self.client_ended = True
                break
            self.to_plain += data
        self.to_raw += self.outgoing.read()

    def _encrypt(self) -> None:
        try:
            data = self.plain.recv(CHUNK)
        except ConnectionResetError:
            data = b""
        if data:
            self.tls.write(data)
        else:
            self.plain_ended = True
        self.to_raw += self.outgoing.read()

    def _pass_ends(self) -> None:
        if self.client_ended and not self.to_plain and not self.told_plain:
            self.told_plain = True
            try:
                self.plain.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        if self.plain_ended and not self.told_client:
            self.told_client = True
            try:
                self.tls.unwrap()
            except ssl.SSLError:
                pass  # it wants the client's own close_notify, which we need not wait for
            self.to_raw += self.outgoing.read()
