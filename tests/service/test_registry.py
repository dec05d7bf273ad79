"""Pull and push against Debian's docker-registry, by the docker command and by cowfs's own."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import DATA, Daemon
from support.registry import Proxy, cowfs, free_port, pushed, serving, start_registry

from cowfs.errors import Corrupt, FailedPrecondition
from cowfs.images.registry import Credentials, Registry, credentials_for

ID = "sha256:9c33d969275253f462e75d433ce358a90b9551c9f65a6bcfd068744db262313d"


@pytest.fixture
def make_registry(space: Path) -> Iterator[Callable[..., str]]:
    """A function that starts a registry: its address."""
    with contextlib.ExitStack() as held:
        numbers = itertools.count()

        def make(password: str = "") -> str:
            auth = ""
            if password:
                script = "import crypt, sys; print('user:' + crypt.crypt(sys.argv[1], crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16)))"
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", script, password],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    pytest.skip("no bcrypt here to make a password file with")
                (space / "htpasswd").write_text(done.stdout)
                auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {space}/htpasswd\n"
            return held.enter_context(start_registry(space, auth, f"registry-{next(numbers)}"))

        yield make


def test_there_and_back(daemon: Daemon, make_registry: Callable[..., str]) -> None:
    """The image that comes back is the one that went, by id, tag and digest; what is there is not fetched again."""
    address = make_registry()
    digest = pushed(daemon, address)
    assert daemon.out("images", "-aq") == ""
    told = daemon.out("pull", f"{address}/a/small:1")
    assert f"Digest: {digest}" in told and "Downloaded newer image" in told
    assert daemon.out("images", "-q", "--no-trunc") == ID
    assert daemon.out("image", "inspect", "-f", "{{index .RepoDigests 0}}", ID) == f"{address}/a/small@{digest}"
    again = daemon.out("pull", f"{address}/a/small:1")
    assert "Image is up to date" in again and "Downloading" not in again
    daemon.docker("rmi", "-f", ID)
    daemon.docker("pull", f"{address}/a/small@{digest}")
    assert daemon.out("images", "-q", "--no-trunc", "--filter", "dangling=true") == ID
    pulls = [json.loads(line) for line in _events(daemon)]
    assert next(each["attributes"]["name"] for each in pulls if each["action"] == "pull") == f"{address}/a/small:1"


def _events(daemon: Daemon) -> list[str]:
    done = cowfs("events", "--since", "0.000001", "--jsonl", "--root", str(daemon.root), home=daemon.base)
    return done.stdout.splitlines()


def test_what_is_not_there(daemon: Daemon, make_registry: Callable[..., str]) -> None:
    address = make_registry()
    assert "not found" in daemon.docker("pull", f"{address}/no/such:1", check=False).stderr
    nobody = f"127.0.0.1:{free_port()}"
    assert "does not answer" in daemon.docker("pull", f"{nobody}/x", check=False).stderr
    assert "must be lowercase" in daemon.docker("pull", f"{address}/Upper", check=False).stderr
    assert daemon.docker("push", f"{address}/nothing:1", check=False).returncode == 1


def test_credentials(daemon: Daemon, make_registry: Callable[..., str], space: Path) -> None:
    """login, pull and push with a password; without and with a wrong one; nothing of it in the log; cowfs reads the same file."""
    address = make_registry("open sesame")
    daemon.docker("load", "-i", str(DATA / "small-docker.tar"))
    daemon.docker("tag", "localhost/small:1", f"{address}/a/small:1")
    refused = daemon.docker("push", f"{address}/a/small:1", check=False)
    assert refused.returncode == 1 and "docker login" in refused.stdout + refused.stderr
    wrong = daemon.docker("login", "-u", "user", "--password-stdin", address, input=b"wrong", check=False)
    assert wrong.returncode == 1
    daemon.docker("login", "-u", "user", "--password-stdin", address, input=b"open sesame")
    daemon.docker("push", f"{address}/a/small:1")
    daemon.docker("pull", f"{address}/a/small:1")
    done = cowfs("pull", f"{address}/a/small:1", "--root", str(space / "s"), home=daemon.base / "docker-config")
    assert done.returncode == 0, done.stderr
    denied = cowfs("pull", f"{address}/a/small:1", "--root", str(space / "s"), home=space / "nothing")
    assert denied.returncode == 5
    assert len(denied.stderr.splitlines()) == 1
    assert "sesame" not in daemon.log and "b3BlbiBzZXNhbWU" not in daemon.log


def test_the_commands_own_verbs(make_registry: Callable[..., str], space: Path) -> None:
    address, root = make_registry(), str(space / "s")
    assert cowfs("import", str(DATA / "small-docker.tar"), "--root", root, home=space).returncode == 0
    assert cowfs("tag", f"{address}/b/c:2", "localhost/small:1", "--root", root, home=space).returncode == 0
    sent = cowfs("push", f"{address}/b/c:2", "--root", root, home=space)
    assert sent.returncode == 0, sent.stderr
    got = cowfs("pull", f"{address}/b/c:2", "--root", str(space / "other"), home=space)
    assert got.stdout.splitlines()[-1] == sent.stdout.strip()
    missing = cowfs("pull", f"{address}/b/c:3", "--root", root, home=space)
    assert (missing.returncode, len(missing.stderr.splitlines())) == (3, 1)


@pytest.fixture
def proxy(daemon: Daemon, make_registry: Callable[..., str]) -> Iterator[tuple[type[Proxy], str]]:
    upstream = make_registry()
    pushed(daemon, upstream)
    handler = type("Spoiling", (Proxy,), {"upstream": upstream, "asked": []})
    with serving(handler) as address:
        yield handler, address


def test_a_download_that_is_cut_goes_on(proxy: tuple[type[Proxy], str], space: Path) -> None:
    handler, address = proxy
    pulled = Registry(address, spool=str(space)).pull("a/small", "1")
    handler.asked.clear()
    handler.cut = (pulled.image.layers[0].size or 0) // 3 + 1
    with pulled.image.layers[0].open() as stream:
        assert len(stream.read()) == pulled.image.layers[0].size
    assert [text.partition("=")[0] for text in handler.asked] == ["", "bytes", "bytes"]


def test_a_download_that_is_cut_for_ever_is_given_up(proxy: tuple[type[Proxy], str], space: Path) -> None:
    handler, address = proxy
    pulled = Registry(address, spool=str(space)).pull("a/small", "1")
    handler.cut = 1
    with pytest.raises(FailedPrecondition, match="was cut"):
        pulled.image.layers[0].open()


def test_a_layer_with_another_digest_never_gets_in(daemon: Daemon, proxy: tuple[type[Proxy], str], space: Path) -> None:
    handler, address = proxy
    pulled = Registry(address, spool=str(space)).pull("a/small", "1")
    handler.spoil = True
    with pytest.raises(Corrupt):
        pulled.image.layers[0].open()
    assert daemon.docker("pull", f"{address}/a/small:1", check=False).returncode == 1
    assert daemon.out("images", "-aq") == ""


def test_credentials_of_the_docker_command(space: Path) -> None:
    file = space / "config.json"
    file.write_text(
        json.dumps(
            {
                "auths": {
                    "reg:5000": {"auth": "dTpwOnc="},
                    "https://index.docker.io/v1/": {"auth": "YTpi"},
                    "t": {"identitytoken": "x"},
                }
            }
        )
    )
    assert credentials_for("reg:5000", str(file)) == Credentials(user="u", password="p:w")
    assert credentials_for("docker.io", str(file)) == Credentials(user="a", password="b")
    assert credentials_for("t", str(file)) == Credentials(token="x")
    assert credentials_for("other", str(file)) is None
    assert credentials_for("other", str(space / "none.json")) is None
    assert "p:w" not in repr(Credentials(user="u", password="p:w"))
