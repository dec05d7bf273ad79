"""The mount service and its clients, for tests: start one, ask it as the command does, or otherwise."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cowfs.mounting import standby

from .command import ROOT, environment

HANDOVER = ROOT / "cowfs/cli/handover.py"
CLIENT = [sys.executable, "-I", "-S", "-E", str(HANDOVER)]
"""The command, as :func:`command` calls it; tests marked ``both`` replace it."""
SOCKET = f"/run/cowfs/{standby.NAME}"

both = pytest.mark.parametrize("client", ["python", "c"], indirect=True)
"""With the client as it is in Python, and as the C compiler makes it."""


class Service:
    """`cowfs serve --mounts` as root, of one copy of the package."""

    def __init__(self, root: Path = ROOT) -> None:
        variables = {**environment(), "PYTHONPATH": f"{root}:{environment()['PYTHONPATH']}"}
        self.told = Path("/run/cowfs/told")
        with self.told.open("wb") as told:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cowfs", "serve", "--mounts"], env=variables, cwd="/", stderr=told
            )
        end = time.monotonic() + 60
        while not listens():
            assert self.process.poll() is None, "the service ended"
            assert time.monotonic() < end
            time.sleep(0.02)

    @property
    def children(self) -> list[int]:
        """Its servers; not the processes that wait for a connection."""
        pid = self.process.pid
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in found if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"cowfs server")]

    def end(self) -> str:
        """Kill it; what it wrote."""
        self.process.kill()
        self.process.wait()
        return self.told.read_text()


def listens() -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(SOCKET)
        except OSError:
            return False
    return True


def options(tree: Path, more: str = "") -> list[str]:
    return ["-o", f"lowerdir={tree / 'base'},upperdir={tree / 'up'},workdir={tree / 'work'}{more}", str(tree / "mnt")]


def command(*arguments: object, before: tuple[str, ...] = (), **more: object) -> subprocess.CompletedProcess[str]:
    """The command as installed: the script that hands over."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [*before, *CLIENT, *map(str, arguments)],
        **{"env": environment(), "cwd": "/", "capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL, **more},  # type: ignore[call-overload]
    )  # fmt: skip
    return done


def server_of(tree: Path) -> int:
    """The process that serves the mount."""
    found = subprocess.run(
        [sys.executable, "-m", "cowfs", "mounts", "--json"], env=environment(), capture_output=True, check=True
    )
    return int(next(each["pid"] for each in json.loads(found.stdout) if each["mountpoint"] == str(tree / "mnt")))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


def ask(sock: socket.socket, nonce: bytes, arguments: list[str], **wrong: object) -> None:
    """Send a question as the command does; ``wrong``: parts of it replaced."""
    body = b"".join(os.fsencode(word) + b"\0" for word in ["overlayfs", *arguments]) + b"PATH=/usr/bin:/bin\0"
    head = standby.HEADER.pack(
        nonce, int(str(wrong.get("size", len(body)))), int(str(wrong.get("words", len(arguments) + 1))), 1
    )
    fds = struct.pack("=3i", 0, 1, 2)[: int(str(wrong.get("fds", 12)))]
    sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
    sock.sendall(body)


def refused(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True
