"""`cowfs send | cowfs receive`, and `cowfs copy --to ssh://...` through a real sshd of our own."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command import ROOT, environment, one_line, run_module

from cowfs.cli.store.send import Place
from cowfs.errors import InvalidArgument
from cowfs.store import Store

Cowfs = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cowfs(space: Path) -> Cowfs:
    """The command over a store with v1, v2 on it, and the tag app of v2."""
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        for name, parent in (("v1", None), ("v2", "v1")):
            store.prepare("k", parent)
            with store.paths("k") as paths:
                paths.write_bytes(name.encode(), name.encode() * 1000)
            store.commit("k", name)
        store.tag("app", "v2")
        store.prepare("work", "v2")

    def run(*arguments: object, status: int = 0, **more: object) -> subprocess.CompletedProcess[str]:
        env = {**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
        done = run_module("cowfs", *arguments, env=env, cwd=space, **{"stdin": subprocess.DEVNULL, **more})
        assert done.returncode == status, done.stderr
        return done

    return run


def sent(space: Path, *arguments: str) -> bytes:
    env = {**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
    return subprocess.run(
        [sys.executable, "-m", "cowfs", "send", *arguments], env=env, capture_output=True, check=True
    ).stdout


def test_send_and_receive(cowfs: Cowfs, space: Path) -> None:
    (space / "all").write_bytes(sent(space, "app"))
    (space / "more").write_bytes(sent(space, "v2", "--since", "v1"))
    other = ("--root", space / "other")
    with open(space / "more", "rb") as stream:
        assert "--since" in one_line(cowfs("receive", *other, status=5, stdin=stream))
    with open(space / "all", "rb") as stream:
        assert cowfs("receive", *other, stdin=stream).stdout.split() == ["v1", "v2"]
    with open(space / "more", "rb") as stream:
        assert cowfs("receive", *other, "--json", stdin=stream).stdout.strip() == "[]"
    assert cowfs("cat", "app:/v2", *other).stdout == "v2" * 1000


WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "send of nothing": (("send", "nope"), ("'nope'", "cowfs ls"), 3),
    "send of what is active": (("send", "work"), ("'work'", "commit it"), 2),
    "send since a stranger": (("send", "v1", "--since", "v2"), ("'v2'", "no ancestor"), 2),
    "receive of nothing": (("receive", "--root", "./x"), ("cut short",), 7),
    "receive of a size that is none": (("receive", "--max-size", "much"), ("'much'",), 2),
    "copy to no host": (("copy", "v1", "--to", "ssh:///srv"), ("ssh:///srv", "ssh://[user@]host"), 2),
    "copy to an option": (("copy", "v1", "--to", "ssh://-oProxyCommand=x/srv"), ("-oProxyCommand",), 2),
    "copy to no port": (("copy", "v1", "--to", "ssh://host:x/srv"), ("host:x",), 2),
    "copy without ssh": (
        ("copy", "v1", "--to", "ssh://host/srv", "--ssh", "./nowhere"),
        ("./nowhere", "openssh-client"),
        8,
    ),
    "copy to where nothing answers": (
        ("copy", "v1", "--to", "ssh://host/srv", "--ssh", "false"),
        ("host", "status 1"),
        1,
    ),
    "copy of nothing": (("copy", "nope", "--to", "ssh://host/srv", "--ssh", "false"), ("'nope'",), 3),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usages_are_one_line(cowfs: Cowfs, case: str) -> None:
    arguments, words, status = WRONG[case]
    line = one_line(cowfs(*arguments, status=status))
    for word in words:
        assert word in line


def test_places() -> None:
    assert Place.parse("ssh://u@h:22/a%20b") == Place("u@h", "22", "/a b")
    assert Place.parse("ssh://[::1]/x").host == "::1"
    for text in ("ssh://h/x?y", "ssh://u:p@h/x", "ssh://h$(x)/", "ssh://h/a%0Ab", "ssh://", "ssh://h:0x/"):
        with pytest.raises(InvalidArgument):
            Place.parse(text)


@pytest.fixture
def here_as_there(cowfs: Cowfs, space: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A copy through a program in place of ssh that runs what ssh would run, by a shell as sshd does."""
    program = space / "ssh"
    program.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift 2\necho banner >&2\nexec sh -c "$*"\n')
    program.chmod(0o755)

    def copy(
        *names: str, to: str, status: int = 0, remote: str = f"{sys.executable} -m cowfs"
    ) -> subprocess.CompletedProcess[str]:
        return cowfs("copy", *names, "--to", to, "--ssh", program, "--remote", remote, status=status)

    return copy


def test_copy_asks_the_other_side(here_as_there: Callable[..., subprocess.CompletedProcess[str]], space: Path) -> None:
    place = f"ssh://host{space}/a store's %24HOME"
    done = here_as_there("v1", to=place.replace(" ", "%20"))
    assert done.stdout.split() == ["v1"]
    assert done.stderr == "banner\n"
    assert here_as_there("app", to=place.replace(" ", "%20")).stdout.split() == ["v2"]
    with Store.open(space / "a store's $HOME", create=False) as other:
        assert other.resolve("app").name == "v2"


def test_errors_of_the_other_side_are_told_as_its_own(
    here_as_there: Callable[..., subprocess.CompletedProcess[str]], space: Path
) -> None:
    (space / "full").mkdir()
    (space / "full/file").write_text("x")
    done = here_as_there("v1", to=f"ssh://host{space}/full", status=2)
    assert done.stderr.splitlines()[-1].startswith("cowfs: host: ")
    assert "not a store" in done.stderr
    done = here_as_there("v1", to=f"ssh://host{space}/x", remote="/nowhere/cowfs", status=1)
    assert "status 127 (--remote" in done.stderr.splitlines()[-1]
    assert not (space / "x").exists()


# -- a real sshd -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sshd(space: Path) -> Iterator[tuple[int, str]]:
    """Port of a server of our own with keys of its own, and the client's command for it."""
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    if not os.path.exists(program) or not shutil.which("ssh"):
        pytest.skip("openssh-server and openssh-client are not installed")
    keys = space / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (keys / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nUsePAM no\n"
        f"PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\nSetEnv PYTHONPATH={ROOT} COWFS_FSYNC=0\n"
    )
    os.makedirs("/run/sshd", exist_ok=True)
    known = (keys / "host.pub").read_text().split()
    (keys / "known").write_text(f"[127.0.0.1]:{port} {known[0]} {known[1]}\n")
    client = (
        f"ssh -F /dev/null -i {keys}/user -o IdentitiesOnly=yes -o BatchMode=yes -o UserKnownHostsFile={keys}/known"
    )
    with subprocess.Popen([program, "-D", "-e", "-f", keys / "config"], stderr=subprocess.PIPE) as server:
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end and server.poll() is None:
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.05)
            test = subprocess.run(
                [*client.split(), "-p", str(port), f"{getpass.getuser()}@127.0.0.1", "true"],
                capture_output=True,
                text=True,
            )
            if test.returncode:
                pytest.skip(f"sshd lets nobody in: {test.stderr.strip()}")
            yield port, client
        finally:
            server.terminate()


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd as root")
def test_copy_over_ssh(cowfs: Cowfs, space: Path, sshd: tuple[int, str]) -> None:
    port, client = sshd
    options = ("--ssh", client, "--remote", f"{sys.executable} -m cowfs", "--to-driver", "vfs")
    place = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{space}/other"
    assert cowfs("copy", "v1", "--to", place, *options).stdout.split() == ["v1"]
    done = cowfs("copy", "app", "v1", "--to", place, *options, "--progress", "json")
    assert done.stdout.split() == ["v2"]
    assert cowfs("copy", "app", "--to", place, *options).stdout == ""
    with Store.open(space / "other", create=False) as other:
        assert other.driver.name == "vfs"
        assert other.resolve("app").name == "v2"
        assert other.check(content=True).problems == []
    wrong = cowfs("copy", "app", "--to", place, *options[:-1], "row", status=2)
    assert "127.0.0.1: " in one_line(wrong)
    wrong_key = client.replace("/user ", "/host ")
    assert "255" in cowfs("copy", "v1", "--to", place, "--ssh", wrong_key, status=1).stderr.splitlines()[-1]
