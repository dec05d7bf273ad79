"""The TLS door: who is let in, and that a connection behaves behind it as at a plain one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import Daemon, docker_environment, wait_for

from cowfs.errors import AlreadyExists

certificates = pytest.importorskip("cowfs.service.certificates")
pytest.importorskip("cryptography", reason="the extra cowfs[daemon] is not installed")

Make = Callable[..., Daemon]


@pytest.fixture
def certs(space: Path) -> Path:
    certificates.make_certificates(str(space / "certs"), ["localhost", "127.0.0.1"])
    return space / "certs"


def options(certs: Path) -> list[str]:
    return [
        "--tlsverify",
        f"--tlscacert={certs}/ca.pem",
        f"--tlscert={certs}/server-cert.pem",
        f"--tlskey={certs}/server-key.pem",
    ]


@pytest.fixture
def server(make_daemon: Make, certs: Path) -> Daemon:
    return make_daemon("-H", "tcp://127.0.0.1:0", "-D", *options(certs)).start()


def docker(daemon: Daemon, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", f"--tlscacert={directory}/ca.pem", f"--tlscert={directory}/cert.pem", f"--tlskey={directory}/key.pem",
         "--tlsverify", *arguments],
        env=docker_environment(f"tcp://{daemon.tcp()}", daemon.base), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_docker_command_with_the_right_certificate(server: Daemon, certs: Path, docker_command: str) -> None:
    done = docker(server, certs, "version", "--format", "{{.Server.APIVersion}}")
    assert (done.returncode, done.stdout.strip()) == (0, "1.50"), done.stderr
    assert "cowfs client" in server.log  # the certificate's name is told in the log


def test_curl(server: Daemon, certs: Path) -> None:
    def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["curl", "-sS", "--cacert", f"{certs}/ca.pem", *arguments, f"https://{server.tcp()}/_ping"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    right = ["--cert", f"{certs}/cert.pem", "--key", f"{certs}/key.pem"]
    assert curl(*right).stdout == "OK"
    assert curl().returncode != 0
    assert curl(*right, "--tls-max", "1.1").returncode != 0
    assert curl(*right, "--tlsv1.2", "--tls-max", "1.2").stdout == "OK"


def test_strangers_are_kept_out(server: Daemon, certs: Path, space: Path, docker_command: str) -> None:
    """No certificate, one of another authority, one that has expired; each is told in the log, none disturbs the others."""
    certificates.make_certificates(str(space / "other"), ["localhost"])
    os.replace(certs / "ca.pem", space / "kept.pem")
    mixed = space / "mixed"  # trusts our server, but its certificate is another authority's
    mixed.mkdir()
    for name, source in (("ca.pem", space / "kept.pem"), ("cert.pem", space / "other" / "cert.pem"), ("key.pem", space / "other" / "key.pem")):  # fmt: skip
        (mixed / name).write_bytes(source.read_bytes())
    os.replace(space / "kept.pem", certs / "ca.pem")
    assert docker(server, mixed, "version").returncode != 0
    assert docker(server, space / "other", "version").returncode != 0  # it does not trust our server
    plain = subprocess.run(
        ["docker", "version"], env=docker_environment(f"tcp://{server.tcp()}", server.base), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert plain.returncode != 0
    wait_for(lambda: server.log.count("TLS with") >= 2, "the lines")
    assert docker(server, certs, "version").returncode == 0


def test_an_expired_certificate_is_refused(make_daemon: Make, space: Path) -> None:
    certificates.make_certificates(str(space / "certs"), ["localhost", "127.0.0.1"])
    certificates.make_certificates(str(space / "old"), ["localhost"], days=-0.5)
    both = (space / "certs" / "ca.pem").read_bytes() + (space / "old" / "ca.pem").read_bytes()
    (space / "certs" / "ca.pem").write_bytes(both)
    server = make_daemon("-H", "tcp://127.0.0.1:0", *options(space / "certs")).start()
    assert _get(server, space / "certs", space / "certs").startswith(b"HTTP/1.1 200")
    with pytest.raises(OSError):
        assert _get(server, space / "certs", space / "old") != b""
        raise OSError
    wait_for(lambda: "certificate has expired" in server.log, "the line that says why")


def _client(server: Daemon, trusts: Path, shows: Path | None) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(trusts / "ca.pem"))
    if shows is not None:
        context.load_cert_chain(shows / "cert.pem", shows / "key.pem")
    host, _, port = server.tcp().rpartition(":")
    return context.wrap_socket(socket.create_connection((host, int(port)), 60), server_hostname=host)


def _get(server: Daemon, trusts: Path, shows: Path | None) -> bytes:
    with _client(server, trusts, shows) as sock:
        sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while data := sock.recv(4096):
            answer += data
        return answer


def test_clients_that_never_shake_hands(server: Daemon, certs: Path) -> None:
    host, _, port = server.tcp().rpartition(":")
    with contextlib.ExitStack() as stack:
        for data in (b"", b"\x16\x03", b"GET / HTTP/1.1\r\n\r\n", os.urandom(500)):
            for _ in range(10):
                sock = stack.enter_context(socket.create_connection((host, int(port)), 60))
                sock.sendall(data)
        assert _get(server, certs, certs).startswith(b"HTTP/1.1 200")


def test_a_long_answer_and_many_requests_on_one_connection(server: Daemon, certs: Path) -> None:
    with _client(server, certs, certs) as sock:
        for _ in range(50):
            sock.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}\n"):
                answer += sock.recv(65536)
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["OSType"] == "linux"


def test_docker_py(server: Daemon, certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker_py = pytest.importorskip("docker")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    tls = docker_py.tls.TLSConfig(
        client_cert=(f"{certs}/cert.pem", f"{certs}/key.pem"), ca_cert=f"{certs}/ca.pem", verify=True
    )
    client = docker_py.DockerClient(base_url=f"tcp://{server.tcp()}", tls=tls)
    try:
        assert client.ping()
    finally:
        client.close()


def test_tls_init_prints_lines_that_work(make_daemon: Make, space: Path, docker_command: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cowfs", "tls", "init", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = run(str(space / "c"))
    assert done.returncode == 0, done.stderr
    assert f"--tlscacert={space}/c/ca.pem" in done.stdout
    assert oct((space / "c" / "key.pem").stat().st_mode & 0o777) == "0o600"
    again = run(str(space / "c"))
    assert (again.returncode, len(again.stderr.splitlines())) == (4, 1)
    with pytest.raises(AlreadyExists):
        certificates.make_certificates(str(space / "c"), ["x"])


@pytest.mark.parametrize("missing", ["ca.pem", "server-cert.pem", "server-key.pem"])
def test_a_missing_file_is_one_line(certs: Path, space: Path, missing: str, short: Path) -> None:
    (certs / missing).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "cowfs", "serve", "--root", str(space / "s"), "--run-dir", str(short), "-H", "tcp://127.0.0.1:0",
         *options(certs)], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert missing in done.stderr
