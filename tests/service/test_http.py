"""Slow, broken and hostile clients cost their own connection, and no more."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import threading
from collections.abc import Callable

import pytest
from support.daemon import Daemon, wait_for

Make = Callable[..., Daemon]


@pytest.fixture
def server(make_daemon: Make) -> Daemon:
    return make_daemon("-D").start()


def talk(daemon: Daemon, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes and read until the daemon closes."""
    with daemon.raw() as sock:
        try:
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough already
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
        return answer


def alive(daemon: Daemon) -> bool:
    return daemon.request("GET", "/_ping")[0] == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /_ping HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /_ping HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /_ping HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (b"GET /_ping HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /_ping HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /_ping HTTP/1.1\r\nHost: x\r\n" + b"".join(b"H%d: v\r\n" % n for n in range(10_000)) + b"\r\n", 431),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"POST /images/load HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFFF\r\n", 400),
        (b"POST /images/load HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"x" * 200_000 + b"\r\nhello\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)), 400),  # TLS at a plain door
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_read(server: Daemon, data: bytes, status: int) -> None:
    answer = talk(server, data, end=True)
    assert answer.startswith(b"HTTP/1.1 %d" % status), answer[:200]
    assert alive(server)


@pytest.mark.parametrize("cut", [1, 10, 30, 60, 90])
def test_a_request_that_is_cut(server: Daemon, cut: int) -> None:
    whole = b"POST /containers/create HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n{"
    talk(server, whole[:cut], end=True)
    talk(server, whole, end=True)
    assert alive(server)


def test_a_document_of_64_mib_is_refused_without_being_read(server: Daemon) -> None:
    """Its length is known; no more than a few MiB of it are taken in."""
    with server.raw() as sock:
        sock.sendall(
            b"POST /containers/create HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 67108864\r\n\r\n"
        )
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 64 << 20:
                sock.sendall(b" " * (1 << 20))
                sent += 1 << 20
        assert sent < 32 << 20
    assert alive(server)


def test_a_document_in_a_million_chunks_is_refused(server: Daemon) -> None:
    head = b"POST /containers/create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = talk(server, head + b"8\r\n        \r\n" * 1_000_000)
    assert answer.startswith(b"HTTP/1.1 413") or not answer
    assert alive(server)


@pytest.mark.parametrize(
    "body", [b"[]", b"[" * 100_000, b'{"a":', b"\xff\xfe", b'"x"', b"1e999999", b'{"Image": 5}', b'{"HostConfig": []}']
)
def test_documents_that_are_none(server: Daemon, body: bytes) -> None:
    answer = talk(
        server,
        b"POST /containers/create HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body),
    )
    assert answer.split(b" ")[1] in (b"400", b"501"), answer
    assert "message" in json.loads(answer.partition(b"\r\n\r\n")[2])


def test_a_thousand_idle_connections(server: Daemon) -> None:
    """They cost descriptors, no threads, and nobody else waits for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server.raw()) for _ in range(1000)]
        for sock in sockets[:500]:
            sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        assert alive(server)
        info = server.request("GET", "/info")[1]
        assert info["NGoroutines"] < 20
        for sock in sockets[:500]:  # the same connections go on
            sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")


def test_more_connections_than_allowed_are_refused(make_daemon: Make) -> None:
    daemon = make_daemon("--max-connections", "16").start()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(daemon.raw()) for _ in range(30)]
        wait_for(lambda: "a connection was refused" in daemon.log, "the refusal")
        assert sockets[-1].recv(1) == b""
    wait_for(lambda: _pings(daemon), "the others to be gone")


def _pings(daemon: Daemon) -> bool:
    try:
        return alive(daemon)
    except (OSError, ConnectionError):
        return False


def test_a_half_sent_head_does_not_hold_others_up(server: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            sock = stack.enter_context(server.raw())
            sock.sendall(b"GET /_ping HTTP/1.1\r\nHo")
        assert alive(server)


def test_requests_one_behind_the_other(server: Daemon) -> None:
    """Pipelined requests are answered in order, one that was taken over not at all."""
    answer = talk(
        server,
        b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\nGET /v1.45/nonsense HTTP/1.1\r\nHost: x\r\n\r\n"
        b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answer)
    assert statuses == [b"200", b"404", b"200"]


def test_expect_100_continue(server: Daemon) -> None:
    with server.raw() as sock:
        sock.sendall(
            b"POST /containers/create HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n"
            b"Content-Type: application/json\r\n\r\n"
        )
        assert sock.recv(4096).startswith((b"HTTP/1.1 100", b"HTTP/1.1 5"))


def test_a_client_that_leaves_a_stream_is_noticed(server: Daemon) -> None:
    with server.raw() as sock:
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        assert server.request("GET", "/info")[1]["NEventsListener"] == 1
    wait_for(lambda: server.request("GET", "/info")[1]["NEventsListener"] == 0, "the follower to end")


def test_a_browser_on_another_site_is_refused(server: Daemon) -> None:
    def status(*lines: bytes) -> bytes:
        head = b"".join(line + b"\r\n" for line in lines)
        return talk(server, b"GET /info HTTP/1.1\r\nConnection: close\r\n" + head + b"\r\n").split(b" ")[1]

    assert status(b"Host: localhost:2375") == b"200"
    assert status(b"Host: localhost:2375", b"Origin: http://localhost:2375") == b"200"
    assert status(b"Host: localhost:2375", b"Origin: http://evil.example") == b"403"
    assert status(b"Host: localhost:2375", b"Origin: null") == b"403"
    assert status(b"Host: localhost:2375", b"Sec-Fetch-Site: cross-site") == b"403"
    assert status(b"Host: evil.example", b"Sec-Fetch-Site: same-origin") == b"403"  # a name that was rebound
    assert status(b"Host: 127.0.0.1:2375", b"Sec-Fetch-Site: same-origin") == b"200"


def test_many_clients_at_once(server: Daemon) -> None:
    failed: list[object] = []

    def ask() -> None:
        for _ in range(20):
            if server.request("GET", "/version")[0] != 200:
                failed.append(1)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed


def test_random_bytes_never_end_the_daemon(server: Daemon) -> None:
    import random

    chance = random.Random(20_261_128)
    pieces = [b"GET ", b"POST ", b"/_ping", b"/events", b" HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n", b"Content-Length: 3\r\n",
              b"Transfer-Encoding: chunked\r\n", b"Upgrade: tcp\r\nConnection: Upgrade\r\n", b"5\r\n", b"0\r\n\r\n", b"\x00", b"{}"]  # fmt: skip
    for _ in range(300):
        with server.raw() as sock, contextlib.suppress(OSError):
            sock.sendall(
                b"".join(chance.choice(pieces) for _ in range(chance.randrange(12)))
                + chance.randbytes(chance.randrange(20))
            )
            if chance.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
    assert alive(server)
    assert server.process is not None and server.process.poll() is None


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"//[::1/x", 404),  # a URL would have a host with half of an address
        (b"//[x]/_ping", 404),
        (b"//a/_ping", 404),
        (b"/_ping?a=[", 200),
        (b"/_ping?//[", 200),
        (b"/v" + b"9" * 5000 + b".1/info", 404),
        (b"/v9.1/info", 400),
        ("/v\u0661.50/info".encode(), 400),  # a digit, of another script
        (b"/containers/%00/json", 404),
        (b"/containers/%ff%fe/json", 404),
    ],
)
def test_a_target_that_is_strange_is_answered(server: Daemon, target: bytes, status: int) -> None:
    answer = talk(server, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d" % status), answer[:200]
    assert alive(server)


@pytest.mark.parametrize("value", ["x=", "1" * 5000, "9" * 20, "²", "1.5", "0x10", "nan"])
def test_numbers_of_a_query_that_are_none(server: Daemon, value: str) -> None:
    from urllib.parse import quote

    for path in ("/containers/json?limit=", "/ui/data/overview?after="):
        status, told = server.request("GET", path + quote(value))
        assert status == 400, told
        assert "is no number" in told["message"]
    for path in ("/events?since=0&until=", "/events?until=1&since=") if value != "1.5" else ():
        status, told = server.request("GET", path + quote(value))
        assert status == 400, told
        assert "is no time" in told["message"]
