"""Registries that want tokens: a token server in front of Debian's docker-registry; blobs that are mounted; mirrors; downloads side by side."""

from __future__ import annotations

import base64
import datetime
import http.server
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.daemon import DATA, Daemon
from support.registry import Proxy, cowfs, pushed, serving, start_registry

from cowfs.images.registry import Credentials, Registry

PASSWORD, IDENTITY = "open sesame", "identity-of-user"


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Tokens(http.server.BaseHTTPRequestHandler):
    """A token server (distribution: spec/auth/token.md): everybody pulls from ``public/``, the user does everything but in ``closed/``."""

    key: Any
    certificate: bytes
    asked: list[tuple[str, str, list[str]]]  # method, user, scopes

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        header = self.headers.get("Authorization", "")
        user = ""
        if header:
            user, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
            if (user, password) != ("user", PASSWORD):
                return self._refuse()
        return self._grant(user, query)

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form.get("grant_type") != ["refresh_token"] or form.get("refresh_token") != [IDENTITY]:
            return self._refuse()
        return self._grant("user", form)

    def _refuse(self) -> None:
        self._answer(401, {"errors": [{"code": "UNAUTHORIZED", "message": "incorrect username or password"}]})

    def _grant(self, user: str, query: dict[str, list[str]]) -> None:
        scopes = [each for text in query.get("scope", []) for each in text.split(" ")]
        self.asked.append((self.command, user, scopes))
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            mine = (
                {"pull", "push"}
                if user and not name.startswith("closed/")
                else {"pull"}
                if name.startswith("public/")
                else set()
            )
            access.append({"type": kind, "name": name, "actions": sorted(mine & set(actions.split(",")))})
        now = int(time.time())
        claims = {
            "iss": "tests", "sub": user, "aud": query.get("service", [""])[0], "exp": now + 300, "nbf": now - 300, "iat": now,
            "jti": secrets.token_hex(8), "access": access,
        }  # fmt: skip
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(self.certificate).decode()]}
        signed = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(claims).encode())}"
        self._answer(200, {"token": f"{signed}.{encoded(self._sign(signed.encode()))}"})

    def _sign(self, data: bytes) -> bytes:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        signature: bytes = self.key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        return signature

    def _answer(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def guarded(space: Path) -> Iterator[tuple[str, type[Tokens]]]:
    """A registry with a token server: its address, and the server's handler."""
    pytest.importorskip("cryptography", reason="the extra cowfs[daemon] is not installed")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    (space / "tokens.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    members = {"key": key, "certificate": certificate.public_bytes(serialization.Encoding.DER), "asked": []}
    handler = type("Handler", (Tokens,), members)
    with serving(handler) as realm:
        auth = (
            f"auth:\n  token:\n    realm: http://{realm}/token\n    service: the-registry\n    issuer: tests\n"
            f"    rootcertbundle: {space}/tokens.pem\n"
        )
        with start_registry(space, auth) as address:
            yield address, handler


def login(daemon: Daemon, address: str, password: str = PASSWORD, *, check: bool = True) -> int:
    return daemon.docker(
        "login", "-u", "user", "--password-stdin", address, input=password.encode(), check=check
    ).returncode  # fmt: skip


def test_the_docker_command_with_tokens(daemon: Daemon, guarded: tuple[str, type[Tokens]]) -> None:
    """Denied without and with a wrong password; login, push, pull; anybody pulls what is public; no secret in the log."""
    address, server = guarded
    daemon.docker("load", "-i", str(DATA / "small-docker.tar"))
    for name in ("public/small:1", "own/small:1", "closed/small:1"):
        daemon.docker("tag", "localhost/small:1", f"{address}/{name}")
    refused = daemon.docker("push", f"{address}/own/small:1", check=False)
    assert refused.returncode == 1 and "denies access" in refused.stdout + refused.stderr
    assert login(daemon, address, "wrong", check=False) == 1
    login(daemon, address)
    for name in ("public/small:1", "own/small:1"):
        daemon.docker("push", f"{address}/{name}")
    closed = daemon.docker("push", f"{address}/closed/small:1", check=False)
    assert closed.returncode == 1 and "denies access" in closed.stdout + closed.stderr
    daemon.docker("rmi", f"{address}/own/small:1", f"{address}/public/small:1")
    assert "Digest: sha256:" in daemon.out("pull", f"{address}/own/small:1")
    daemon.docker("logout", address)
    assert daemon.docker("pull", f"{address}/own/small:1", check=False).returncode == 1
    server.asked.clear()
    assert "Digest: sha256:" in daemon.out("pull", f"{address}/public/small:1")
    assert server.asked == [("GET", "", ["repository:public/small:pull"])]  # one token for the whole pull
    for secret in ("sesame", base64.b64encode(f"user:{PASSWORD}".encode()).decode(), "Bearer", "eyJ"):
        assert secret not in daemon.log


def configured(space: Path, document: dict[str, Any]) -> Path:
    home = space / secrets.token_hex(4)
    home.mkdir()
    (home / "config.json").write_text(json.dumps(document))
    return home


def test_the_commands_credentials(
    guarded: tuple[str, type[Tokens]], space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password in config.json, an identity token there, a credential helper for one registry and for all, and a helper that knows nothing."""
    address, server = guarded
    root = str(space / "s")
    assert cowfs("import", str(DATA / "small-docker.tar"), "--root", root, home=space).returncode == 0
    assert cowfs("tag", f"{address}/own/small:1", "localhost/small:1", "--root", root, home=space).returncode == 0
    auth = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    helper = space / "docker-credential-trial"
    helper.write_text(
        f'#!/bin/sh\nread host\n[ "$1 $host" = "get {address}" ] || {{ echo "credentials not found in native keychain"; exit 1; }}\n'
        f'echo \'{{"ServerURL": "", "Username": "user", "Secret": "{PASSWORD}"}}\'\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{space}:{os.environ['PATH']}")
    ways: list[tuple[dict[str, Any], bool]] = [
        ({"auths": {address: {"auth": auth}}}, True),
        ({"auths": {address: {"auth": base64.b64encode(b"user:wrong").decode()}}}, False),
        ({"auths": {address: {"auth": base64.b64encode(b"user:").decode(), "identitytoken": IDENTITY}}}, True),
        ({"auths": {address: {"identitytoken": "of somebody else"}}}, False),
        ({"credHelpers": {address: "trial"}}, True),
        ({"credsStore": "trial"}, True),
        ({"credHelpers": {"elsewhere": "trial"}}, False),
        ({"credsStore": "missing", "auths": {address: {"auth": auth}}}, True),
        ({}, False),
    ]  # fmt: skip
    for document, is_right in ways:
        home = configured(space, document)
        sent = cowfs("push", f"{address}/own/small:1", "--root", root, home=home)
        assert (sent.returncode == 0) == is_right, (document, sent.stderr)
        assert is_right or (sent.returncode, len(sent.stderr.splitlines())) == (5, 1), sent.stderr
        assert PASSWORD not in sent.stderr
    assert {method for method, user, _ in server.asked if user} == {"GET", "POST"}


def test_a_blob_is_mounted_from_a_repository_that_has_it(daemon: Daemon, guarded: tuple[str, type[Tokens]]) -> None:
    """A push under another name of the same registry sends nothing; where the other repository may not be read, it is sent."""
    address, server = guarded
    login(daemon, address)
    daemon.docker("load", "-i", str(DATA / "small-docker.tar"))
    for name in ("own/first:1", "own/second:1", "own/third:1"):
        daemon.docker("tag", "localhost/small:1", f"{address}/{name}")
    told = daemon.out("push", f"{address}/own/first:1")
    assert "Pushed" in told and "Mounted" not in told
    digest = next(word for word in told.split() if word.startswith("sha256:"))
    told = daemon.out("push", f"{address}/own/second:1")
    assert "Mounted from own/first" in told and "Pushed" not in told
    assert digest in told
    asked = {scope for _, _, scopes in server.asked for scope in scopes}
    asked = {":".join((*scope.split(":")[:2], ",".join(sorted(scope.split(":")[2].split(","))))) for scope in asked}
    assert asked >= {
        "repository:own/second:pull,push",
        "repository:own/first:pull",
    }  # the registry names actions in any order
    told = daemon.out("push", f"{address}/own/second:1")
    assert "Layer already exists" in told and "Mounted" not in told


def test_a_mount_that_is_not_allowed_is_an_upload(daemon: Daemon, guarded: tuple[str, type[Tokens]]) -> None:
    """A name by digest of a repository that the user may not read: the blobs are sent, and nothing is told of it."""
    address, server = guarded
    login(daemon, address)
    daemon.docker("load", "-i", str(DATA / "small-docker.tar"))
    daemon.cowfs("tag", f"{address}/closed/secret@sha256:{'1' * 64}", "localhost/small:1")
    daemon.docker("tag", "localhost/small:1", f"{address}/own/y:1")
    told = daemon.out("push", f"{address}/own/y:1")
    assert "digest: sha256:" in told and "Pushed" in told and "Mounted" not in told
    assert any("repository:closed/secret:pull" in scopes for _, _, scopes in server.asked)


def test_a_mirror_is_asked_first(make_daemon: Callable[..., Daemon], docker_command: str, space: Path) -> None:
    """Images of docker.io come from a mirror, also where an earlier mirror is gone, has not the image, or lies about it; pushes do not go there."""
    with start_registry(space, "") as full, start_registry(space, "", "other") as empty:
        first = make_daemon("-D").start()
        pushed(first, full, "library/small:1")

        class Liar(Proxy):
            upstream = full
            spoil_manifests = True
            asked = []  # noqa: RUF012  the base class declares it

        with serving(Liar) as liar:
            mirrors = ["http://127.0.0.1:1", f"http://{empty}", f"http://{liar}", f"http://{full}"]
            daemon = make_daemon("-D", *(word for each in mirrors for word in ("--registry-mirror", each))).start()
            assert daemon.json("info", "-f", "{{json .RegistryConfig.Mirrors}}") == mirrors
            told = daemon.out("pull", "small:1")
            assert "Downloaded newer image for small:1" in told
            assert daemon.out("images", "--format", "{{.Repository}}:{{.Tag}}") == "small:1"
            missing = daemon.docker("pull", "nothing:1", check=False)
            assert missing.returncode == 1


def test_layers_come_side_by_side(daemon: Daemon, space: Path) -> None:
    """Two downloads are under way at once: each waits for the other."""
    with start_registry(space, "", "plain") as plain:
        tar = space / "many.tar"
        build_layers(daemon, tar)
        daemon.docker("load", "-i", str(tar))
        daemon.docker("tag", "many:1", f"{plain}/a/many:1")
        daemon.docker("push", f"{plain}/a/many:1")
        daemon.docker("rmi", "-f", "many:1", f"{plain}/a/many:1")

        class Slow(Proxy):
            upstream = plain
            asked = []  # noqa: RUF012  the base class declares it
            together = threading.Barrier(2)

        with serving(Slow) as slow:
            daemon.docker("pull", f"{slow}/a/many:1")
        assert not Slow.together.broken
        assert len(Slow.asked) == 5  # a configuration and four layers, each once


def build_layers(daemon: Daemon, path: Path) -> None:
    """An image of four layers with a file each, as ``docker save`` writes it."""
    import hashlib
    import io
    import tarfile

    layers = []
    for number in range(4):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            info = tarfile.TarInfo(f"file{number}")
            info.size = 1 << 16
            tar.addfile(info, io.BytesIO(os.urandom(1 << 16)))
        layers.append(data.getvalue())
    config = {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(each).hexdigest() for each in layers]},
    }  # fmt: skip
    files = {"config.json": json.dumps(config).encode(), **{f"{at}.tar": each for at, each in enumerate(layers)}}
    manifest = [{"Config": "config.json", "RepoTags": ["many:1"], "Layers": [f"{at}.tar" for at in range(len(layers))]}]
    files["manifest.json"] = json.dumps(manifest).encode()
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_credentials_do_not_go_where_a_registry_redirects(guarded: tuple[str, type[Tokens]], space: Path) -> None:
    """A blob that lies elsewhere is fetched without the token."""
    seen: list[str | None] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Elsewhere) as elsewhere:

        class Redirecting(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v2/" or self.headers.get("Authorization"):
                    self.send_response(307 if "/blobs/" in self.path else 200)
                    self.send_header("Location", f"http://{elsewhere}/there")
                else:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="x"')
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        with serving(Redirecting) as address:
            registry = Registry(address, credentials=Credentials(user="u", password="p"), spool=str(space))
            with registry.download(
                "a/b", "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", 2
            ) as got:
                assert got.read() == b"{}"
    assert seen == [None]
