"""Registries for tests: Debian's docker-registry, and a proxy that spoils its answers as it is told."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import DATA, Daemon, wait_for


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return False
    return True


def start(space: Path, name: str, more: str = "") -> tuple[subprocess.Popen[bytes], str]:
    """Start Debian's docker-registry, without TLS, at a port of this host; (its process, ADDR:PORT).

    Args:
        space: the place of its data. name: of the files there. more: lines of its configuration.
    """
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no registry here (Debian: docker-registry; CI has it)")
    address = f"127.0.0.1:{free_port()}"
    config = space / f"{name}.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {space}/{name}\nhttp:\n  addr: {address}\n{more}"
    )
    with open(space / "registry.log", "ab") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    wait_for(lambda: listens(address), "the registry")
    return process, address


@contextlib.contextmanager
def start_registry(space: Path, more: str = "", name: str = "registry") -> Iterator[str]:
    """A registry that ends with the block: its address. Arguments are those of :func:`start`."""
    process, address = start(space, name, more)
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of our own on this machine: its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def pushed(daemon: Daemon, address: str, name: str = "a/small:1") -> str:
    """Push the small image; its digest."""
    daemon.docker("load", "-i", str(DATA / "small-docker.tar"))
    daemon.docker("tag", "localhost/small:1", f"{address}/{name}")
    told = daemon.out("push", f"{address}/{name}")
    daemon.docker("rmi", "localhost/small:1", f"{address}/{name}")
    return next(word for word in told.split() if word.startswith("sha256:"))


def cowfs(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the cowfs command with a directory of Docker's configuration."""
    return subprocess.run(
        [sys.executable, "-m", "cowfs", *words], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "DOCKER_CONFIG": str(home)},
    )  # fmt: skip


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a registry, and spoils what it gives as it is told.

    Attributes:
        cut: bytes of a blob after which the connection ends; 0: never. spoil, spoil_manifests: whether bytes are changed.
        together: layers are given when so many are asked for at once. asked: the ranges of blobs that were asked for.
    """

    upstream = ""
    cut = 0
    spoil = False
    spoil_manifests = False
    together: threading.Barrier | None = None
    asked: list[str]

    def do_GET(self) -> None:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() in ("accept", "range")}
        connection.request("GET", self.path, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_blob = "/blobs/" in self.path
        if self.together is not None and is_blob and data[:2] == b"\x1f\x8b":  # not the configuration, which is no gzip
            with contextlib.suppress(threading.BrokenBarrierError):
                self.together.wait(60)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if is_blob:
            self.asked.append(self.headers.get("Range", ""))
        if (self.spoil and is_blob) or (self.spoil_manifests and "/manifests/" in self.path):
            data = bytes(byte ^ 1 for byte in data)
        if is_blob and self.cut and len(data) > self.cut:
            self.wfile.write(data[: self.cut])
            self.close_connection = True
            return
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
