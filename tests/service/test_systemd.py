"""systemd: units that it takes, sockets that it passes, the states that it is told."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command import run_module
from support.daemon import wait_for

from cowfs.errors import AlreadyExists, Unsupported
from cowfs.service import systemd

PING = b"GET /_ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def ping(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(PING)
        return sock.recv(4096)


@contextmanager
def notified(path: Path) -> Iterator[socket.socket]:
    """A socket for sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(60)
        yield sock


def test_states_are_told(space: Path, short: Path) -> None:
    """sd_listen_fds(3) and sd_notify(3) by their protocols: READY, RELOADING with the time and READY again, STOPPING."""
    pytest.importorskip("h11")
    script = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.execv(sys.executable, [sys.executable, '-m', 'cowfs', 'serve', '-H', 'fd://', *sys.argv[2:]])"
    )
    with notified(space / "notify") as told, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(space / "passed.sock"))
        listening.listen()
        where = ("--root", str(space / "s"), "--run-dir", str(short))
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(listening.fileno()), *where],
            pass_fds=[listening.fileno()], env={**os.environ, "NOTIFY_SOCKET": str(space / "notify")},
        )  # fmt: skip
        try:
            assert told.recv(4096).startswith(b"READY=1")
            assert ping(space / "passed.sock").startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGHUP)
            first, second = told.recv(4096).split(b"\n")
            assert first == b"RELOADING=1"
            assert second.startswith(b"MONOTONIC_USEC=")
            assert told.recv(4096).startswith(b"READY=1")
        finally:
            process.terminate()
            assert process.wait(60) == 0
        assert told.recv(4096) == b"STOPPING=1"


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate here (Debian: systemd)"
)
def test_the_first_client_starts_it(space: Path, short: Path) -> None:
    """systemd's own program listens, and starts the daemon when somebody connects; the socket's file stays systemd's."""
    pytest.importorskip("h11")
    path = short.parent / f"{short.name}.sock"
    serve = [sys.executable, "-m", "cowfs", "serve", "-H", "fd://", "--root", str(space / "s"), "--run-dir", str(short)]
    keep = [f"--setenv={name}" for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ]
    with open(space / "log", "wb") as log:
        process = subprocess.Popen(
            ["systemd-socket-activate", "-l", str(path), *keep, *serve],
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[2],
        )
    try:
        wait_for(path.exists, "the socket")
        assert not (space / "s").exists()
        assert ping(path).startswith(b"HTTP/1.1 200")
        wait_for(lambda: f"listening on unix://{path}" in (space / "log").read_text(), "the line about the door")
    finally:
        process.terminate()
        assert process.wait(60) == 0, (space / "log").read_text()
    assert path.exists()
    path.unlink()


def test_units_are_written_and_not_overwritten(space: Path) -> None:
    written = systemd.install(str(space))
    assert [os.path.basename(path) for path in written] == ["cowfs.socket", "cowfs.service"]
    assert "KillMode=process" in (space / "cowfs.service").read_text()
    systemd.install(str(space))
    (space / "cowfs.socket").write_text("mine")
    with pytest.raises(AlreadyExists):
        systemd.install(str(space))
    systemd.install(str(space), force=True)
    assert "/run/cowfs/docker.sock" in (space / "cowfs.socket").read_text()
    with pytest.raises(Unsupported):
        systemd.install("/proc/nowhere")


def test_no_unit_filters_system_calls(space: Path) -> None:
    """Containers would inherit it: under ProtectHostname= none could start, under SystemCallArchitectures= none has 32 bits."""
    for user in (False, True):
        for path in systemd.install(str(space), user=user, force=True):
            lines = [line for line in Path(path).read_text().splitlines() if not line.startswith("#")]
            words = ("Protect", "Restrict", "SystemCall", "NoNewPrivileges", "Lock", "Private", "MemoryDeny")
            assert [line for line in lines if line.startswith(words)] == []


def test_the_units_of_a_user(space: Path) -> None:
    pytest.importorskip("h11")
    done = run_module("cowfs", "serve", "--install", "--user", env={**os.environ, "XDG_CONFIG_HOME": str(space)})
    assert done.returncode == 0, done
    place = space / "systemd/user"
    assert done.stdout.splitlines() == [
        str(place / "cowfs.socket"), str(place / "cowfs.service"),
        "systemctl --user daemon-reload && systemctl --user enable --now cowfs.socket",
    ]  # fmt: skip
    assert "ListenStream=%t/cowfs/docker.sock" in (place / "cowfs.socket").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here (Debian: systemd)")
@pytest.mark.parametrize("user", [False, True])
def test_units_are_what_systemd_takes(space: Path, monkeypatch: pytest.MonkeyPatch, user: bool) -> None:
    """Also where the program lies in a directory with a space, a percent sign and a dollar in its name."""
    program = space / "a b%n $c" / "cowfs"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    written = systemd.install(str(space / "units"), user=user)
    words = ["systemd-analyze", *(["--user"] if user else []), "verify", "--man=no", *written]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "XDG_RUNTIME_DIR": "/tmp"}
    )
    assert [line for line in done.stderr.splitlines() if line.startswith("cowfs.")] == []


def test_a_program_that_is_a_directory_is_none(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (space / "cowfs").mkdir()
    monkeypatch.setattr(sys, "argv", [str(space / "run.py")])
    systemd.install(str(space / "units"))
    assert f"ExecStart={sys.executable} -m cowfs serve" in (space / "units/cowfs.service").read_text()
