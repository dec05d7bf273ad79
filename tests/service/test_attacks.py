"""Attacks of containers, archives and registries through the daemon: nothing outside is touched, no traceback, the daemon lives."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import http.server
import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from support.daemon import Daemon, wait_for


def talk(daemon: Daemon, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """(status, body) of one request with a body of any kind; what came of an answer that was cut, as a failed stream is."""
    connection = http.client.HTTPConnection("localhost", timeout=120)
    connection.sock = daemon.raw()
    connection.request(method, path, body, {"Content-Type": "application/x-tar"})
    with contextlib.closing(connection):
        answer = connection.getresponse()
        try:
            data = answer.read()
        except http.client.IncompleteRead as error:
            data = error.partial
        return answer.status, data


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """A tar of (name, type, link or text)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, text in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o6777
            data = text.encode() if kind == tarfile.REGTYPE else b""
            info.linkname, info.size = ("" if data else text), len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def outside(space: Path) -> Iterator[Path]:
    """A directory of the host with one file, which must stay as it is."""
    place = space / "outside"
    place.mkdir()
    (place / "canary").write_text("untouched")
    (place / "canary").chmod(0o640)
    yield place
    assert [each.name for each in place.iterdir()] == ["canary"]
    assert (place / "canary").read_text() == "untouched"
    assert (place / "canary").stat().st_mode & 0o7777 == 0o640


def test_copies_beside_a_container_that_swaps_a_directory_for_a_link(shared: Daemon, outside: Path) -> None:
    """CVE-2018-15664 and its kind: neither reads nor writes follow a link out of the container's tree, at any moment."""
    script = (
        f"mkdir -p /data/real /data/x; echo inside > /data/real/canary; ln -s {outside} /data/out; echo ready;"
        "while :; do mv /data/x /data/y; mv /data/out /data/x; mv /data/x /data/out; mv /data/y /data/x; done"
    )
    shared.docker("run", "-d", "--name", "swapper", "bb", "sh", "-c", script)
    try:
        wait_for(lambda: "ready" in shared.out("logs", "swapper"), "the first swap")
        sent = archive(("canary", tarfile.REGTYPE, "overwritten"), ("new", tarfile.REGTYPE, "x"))
        for _ in range(40):
            for path in ("/data/x", "/data/out", "/data/x/../out"):
                status, _ = talk(shared, "PUT", f"/containers/swapper/archive?path={quote(path)}", sent)
                assert status in (200, 400, 404, 500), status
                _, data = talk(shared, "GET", f"/containers/swapper/archive?path={quote(path + '/canary')}")
                assert b"untouched" not in data
    finally:
        shared.docker("rm", "-f", "swapper")


def test_archives_that_lead_outside(shared: Daemon, outside: Path) -> None:
    """`docker cp - CONTAINER:` of archives with names and links that lead out: refused, or within the container's tree."""
    target = str(outside)
    up = "../" * 20
    hostile = [
        archive((f"{up}{target[1:]}/new", tarfile.REGTYPE, "x")),
        archive((f"{target}/new", tarfile.REGTYPE, "x")),
        archive(("link", tarfile.SYMTYPE, target), ("link/new", tarfile.REGTYPE, "x"), ("link/canary", tarfile.REGTYPE, "y")),
        archive(("link", tarfile.SYMTYPE, f"{up}{target[1:]}"), ("link/new", tarfile.REGTYPE, "x")),
        archive(("hard", tarfile.LNKTYPE, f"{target}/canary"), ("hard", tarfile.REGTYPE, "overwritten")),
        archive(("hard", tarfile.LNKTYPE, f"{up}{target[1:]}/canary"), ("hard", tarfile.REGTYPE, "overwritten")),
        archive(("..", tarfile.DIRTYPE, ""), ("../..", tarfile.DIRTYPE, "")),
        archive(("new\nname", tarfile.REGTYPE, "x"), ("n" * 4000, tarfile.REGTYPE, "x")),
        archive(("data/file", tarfile.REGTYPE, "x"))[:700],
        b"\x1f\x8b" + bytes(1000), b"nonsense" * 1000, b"",
    ]  # fmt: skip
    shared.docker("create", "--name", "victim", "bb", "true")
    try:
        for data in hostile:
            status, told = talk(shared, "PUT", "/containers/victim/archive?path=/data", data)
            assert status in (200, 400, 403, 404, 409, 500), told
            assert b"internal error" not in told
            for path in ("/images/load", "/images/create?fromSrc=-&repo=evil"):
                status, told = talk(shared, "POST", path, data)
                assert b"internal error" not in told, (path, told)
        assert shared.request("GET", "/_ping")[0] == 200
        assert shared.docker("run", "--rm", "bb", "cat", "/data/file").stdout == "of the image\n"
    finally:
        shared.docker("rm", "-f", "victim")
        shared.docker("rmi", "-f", "evil", check=False)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Hostile(http.server.BaseHTTPRequestHandler):
    """A registry whose images are attacks: the name of the repository says which one."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        kind = self.path.split("/")[2] if self.path.count("/") > 2 else ""
        if not kind:
            self._send(b"{}")
        elif kind == "endless" and "/manifests/" in self.path:
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for _ in range(4096):  # 256 MiB, unless the client has had enough
                self.wfile.write(b"10000\r\n" + b"[" * 65536 + b"\r\n")
        elif kind == "loop":
            self.send_response(307)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "file":
            self.send_response(307)
            self.send_header("Location", "file:///etc/passwd")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "nested":
            self._send(b"[" * 200_000)
        elif "/manifests/" in self.path:
            self._send(json.dumps(self._manifest(kind)).encode(), "application/vnd.oci.image.manifest.v1+json")
        else:
            self._send(self._blob(kind, self.path.rpartition("/")[2]))

    def _send(self, data: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    CONFIG = json.dumps(
        {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}}
    ).encode()  # fmt: skip
    BOMB = gzip.compress(bytes(1 << 20), 9) * 64

    def _manifest(self, kind: str) -> object:
        layer = _digest(self.BOMB)
        if kind == "path":
            layer = "sha256:../../../../etc/passwd"
        size = -5 if kind == "size" else len(self.BOMB)
        return {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _digest(self.CONFIG), "size": len(self.CONFIG)},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": layer, "size": size}],
        }  # fmt: skip

    def _blob(self, kind: str, digest: str) -> bytes:
        if digest == _digest(self.CONFIG):
            return b"{}" if kind == "config" else self.CONFIG
        return b"other bytes" if kind == "layer" else self.BOMB


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["endless", "loop", "file", "nested", "path", "size", "config", "layer", "bomb"])
def test_a_hostile_registry(shared: Daemon, registry: str, kind: str) -> None:
    """Each is one sentence; no image appears, and the memory of the daemon does not grow with what was sent."""
    before = _resident(shared.pid)
    done = shared.docker("pull", f"{registry}/{kind}:latest", check=False)
    assert done.returncode != 0
    assert done.stderr.strip()
    assert "internal error" not in done.stderr
    assert "root:" not in done.stderr
    assert kind not in shared.out("images", "--format", "{{.Repository}}").split("/")
    assert _resident(shared.pid) - before < 64 << 20


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_an_upgrade_without_a_body(shared: Daemon) -> None:
    """A client that asks for a connection of its own and leaves: the exec ends, and the daemon answers others."""
    shared.docker("run", "-d", "--name", "up", "bb", "sleep", "1000")
    try:
        for path in (
            "/containers/up/attach?stream=1&stdout=1",
            "/containers/up/attach?stream=1&stdin=1&stdout=1&stderr=1",
        ):
            for tail in (b"", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"):
                with shared.raw() as sock:
                    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n".encode()
                    sock.sendall(head + tail + b"\r\n")
                    sock.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(TimeoutError, ConnectionError):
                        sock.settimeout(2)
                        sock.recv(4096)
        assert shared.request("GET", "/containers/up/json")[0] == 200
    finally:
        shared.docker("rm", "-f", "up")
