"""One ``cowfs serve``, and the real clients of it: the docker command, and HTTP without any library of theirs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "tests" / "data"


def docker_major() -> int:
    """The docker command's version: 20 (Debian 12) knows fewer options, and asks for API 1.41."""
    told = subprocess.run(["docker", "--version"], capture_output=True, text=True, check=True).stdout
    return int(told.split("version ")[1].split(".")[0])


def prune_all_volumes() -> list[str]:
    """The words for that: before API 1.42 named volumes are pruned like those without a name."""
    return ["volume", "prune", "-f", *(["--all"] if docker_major() >= 23 else [])]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> Any:
    """The first true answer; fails after a long time (the bound is for hangs, not for speed)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.02)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


class Daemon:
    """One ``cowfs serve``.

    Attributes:
        base: its directory. socket: the unix door. log: what it told.
    """

    def __init__(self, base: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.base = base
        self.arguments = arguments
        self.environment = environment or {}
        self.root = base / "store"
        self.run_dir = base / "run"
        self.socket = base / "d.sock"
        self.log_file = base / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def doors(self) -> list[str]:
        """The options that say where it listens."""
        return ["-H", f"unix://{self.socket}"]

    def command(self) -> list[str]:
        """The words that start it, without further options."""
        where = ["--root", str(self.root), "--run-dir", str(self.run_dir)]
        return [sys.executable, "-m", "cowfs", "serve", *where, *self.doors()]

    def start(self, *more: str) -> Self:
        """Start it, and wait until its doors are open."""
        self.base.mkdir(exist_ok=True)
        already = len(self.log)
        environment = {**os.environ, "COWFS_FSYNC": "0", **self.environment}
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                [*self.command(), *self.arguments, *more], stdout=log, stderr=log, env=environment
            )
        process = self.process
        wait_for(lambda: "listening on" in self.log[already:] or process.poll() is not None, "the daemon")
        assert process.poll() is None, self.log
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(60)

    def tcp(self) -> str:
        """ADDR:PORT of its TCP door."""
        (line,) = [line for line in self.log.splitlines() if "listening on tcp://" in line][-1:]
        return line.partition("tcp://")[2].split()[0]

    def docker(
        self, *arguments: str, check: bool = True, input: bytes | None = None, host: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the docker command against it."""
        done = subprocess.run(
            ["docker", *arguments],
            env=docker_environment(host or f"unix://{self.socket}", self.base, **environment),
            capture_output=True,
            input=input,
            timeout=300,
            check=False,
        )
        told = subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )
        assert not check or told.returncode == 0, f"{told.args}: {told.stdout}{told.stderr}\n{self.log[-4000:]}"
        return told

    def out(self, *arguments: str, **options: Any) -> str:
        """The output of the docker command, without white space at its ends."""
        return self.docker(*arguments, **options).stdout.strip()

    def json(self, *arguments: str) -> Any:
        """The output of the docker command, as one JSON document."""
        return json.loads(self.out(*arguments))

    def cowfs(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the cowfs command on its store."""
        done = subprocess.run(
            [sys.executable, "-m", "cowfs", *words, "--root", str(self.root)],
            env={**os.environ, "COWFS_FSYNC": "0"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
        return done

    def raw(self) -> socket.socket:
        """A connection to the unix door."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(str(self.socket))
        return sock

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request without any client library: (status, document or text)."""
        import http.client

        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = self.raw()
        connection.request(
            method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, json.loads(data) if answer.getheader(
            "content-type"
        ) == "application/json" and data else data


def docker_environment(host: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a docker command that sees nothing of this machine's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    return {**kept, "DOCKER_HOST": host, "HOME": str(home), "DOCKER_CONFIG": str(home / "docker-config"), **more}


def clean_up(daemon: Daemon) -> None:
    """End a daemon and everything that it started."""
    if daemon.process is not None and daemon.process.poll() is None and shutil.which("docker"):
        ids = daemon.docker("ps", "-aq", check=False).stdout.split()
        if ids:
            daemon.docker("rm", "-f", *ids, check=False)
    daemon.stop()


APPLETS = [
    "sh",
    "ls",
    "cat",
    "echo",
    "sleep",
    "true",
    "false",
    "id",
    "env",
    "df",
    "dd",
    "stty",
    "touch",
    "rm",
    "mkdir",
    "head",
    "wc",
    "seq",
    "kill",
    "hostname",
    "chmod",
    "stat",
    "test",
    "pwd",
    "find",
    "readlink",
    "printf",
    "tty",
    "ln",
    "yes",
    "mv",
    "grep",
]


def is_static(program: bytes) -> bool:
    """Whether a 64-bit ELF program needs no loader: it has no PT_INTERP header (elf(5))."""
    import struct

    if program[:5] != b"\x7fELF\x02":
        return False
    (start,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    return all(struct.unpack_from("<I", program, start + size * at)[0] != 3 for at in range(count))


def busybox_tar() -> bytes:
    """A root file system of busybox alone, with two users; skips where this host has no static busybox."""
    import io
    import tarfile

    program = shutil.which("busybox")
    if program is None or not is_static(Path(program).read_bytes()):
        pytest.skip("no static busybox here (Debian: busybox-static)")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, data: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.type, info.linkname, info.mtime = len(data), mode, kind, link, 1_700_000_000
            tar.addfile(info, io.BytesIO(data))

        for name, mode in (("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777), ("data", 0o755)):
            add(name, kind=tarfile.DIRTYPE, mode=mode)
        add("bin/busybox", Path(program).read_bytes(), 0o755)
        for applet in APPLETS:
            add(f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n")
        add("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
        add("data/file", b"of the image\n")
    return out.getvalue()
