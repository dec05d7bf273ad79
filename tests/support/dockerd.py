"""A private dockerd on ``cowfs serve --docker-plugin``."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

import pytest

from . import containerd
from .containerd import Containerd, unmount_below
from .daemon import Daemon, docker_environment, wait_for

PLUGINS = Path("/run/docker/plugins")


class PluginService(Daemon):
    """A daemon whose only door is dockerd's."""

    def doors(self) -> list[str]:
        return [f"--docker-plugin=unix://{PLUGINS}/cowfs.sock", "-D"]

    @staticmethod
    def ask(name: str, **fields: Any) -> dict[str, Any]:
        """One request of a plugin; its answer."""
        return ask(name, **fields)


def ask(name: str, **fields: Any) -> dict[str, Any]:
    """One request to the plugin that is there; its answer, with the status of HTTP."""
    connection = http.client.HTTPConnection("localhost", timeout=120)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(120)
        sock.connect(f"{PLUGINS}/cowfs.sock")
        connection.sock = sock
        connection.request("POST", f"/{name}", json.dumps(fields), {"content-type": "application/json"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        assert isinstance(told, dict)
        return {**told, "status": answer.status}


def raw(name: str, body: bytes = b"", method: str = "POST") -> tuple[int, bytes]:
    """A request as bytes; (status, answer)."""
    connection = http.client.HTTPConnection("localhost", timeout=120)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"{PLUGINS}/cowfs.sock")
        connection.sock = sock
        connection.request(method, f"/{name}", body)
        answer = connection.getresponse()
        return answer.status, answer.read()


class PlainDockerd:
    """Real dockerd, with a data directory, a containerd and a socket of its own, and a driver of its own: overlay2, or vfs
    where that cannot lie on this file system.

    Attributes:
        base: its directory.
    """

    program = "dockerd"

    def __init__(self, base: Path, *arguments: str) -> None:
        self.base = base
        self.arguments = arguments
        self.log_file = base / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.containerd: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def logs(self) -> str:
        """The ends of all logs that tell of it."""
        return self.log[-3000:]

    @property
    def host(self) -> str:
        """Its address for the docker command."""
        return f"unix://{self.base}/d.sock"

    def start(self) -> Self:
        """Start it with the first driver that works here."""
        try:
            return self.start_with("-s", "overlay2")
        except AssertionError:
            return self.start_with("-s", "vfs")

    def start_with(self, *options: str) -> Self:
        """Start it, and wait until it answers. Its containerd outlives it, as on a host."""
        self.base.mkdir(exist_ok=True)
        if self.containerd is None:
            self.start_containerd()
        command = [
            self.program, *options, "--data-root", str(self.base / "data"), "--exec-root",
            str(self.base / "exec"), "-p", str(self.base / "pid"), "-H", self.host, "--bridge=none",
            "--iptables=false", "--ip6tables=false", "--default-ulimit", "nofile=4096:4096", "--containerd", self.containerd_socket(), *self.arguments,
        ]  # fmt: skip
        (self.base / "pid").unlink(missing_ok=True)
        environment = {**containerd.environment(), "DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS": "1"}
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        process = self.process
        wait_for(lambda: process.poll() is not None or self.docker("version", check=False).returncode == 0, "dockerd")
        assert process.poll() is None, self.log[-4000:]
        return self

    def containerd_socket(self) -> str:
        return f"{self.base}/c.sock"

    def start_containerd(self) -> None:
        config = self.base / "containerd.toml"
        config.write_text(
            f'version = 2\nroot = "{self.base}/c-root"\nstate = "{self.base}/c-state"\n'
            f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "{self.base}/c.sock"\n'
        )
        with open(self.base / "c-log", "wb") as log:
            self.containerd = subprocess.Popen(["containerd", "-c", config], stdout=log, stderr=log)
        wait_for((self.base / "c.sock").exists, "containerd")

    def stop(self, number: int = signal.SIGTERM) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(120)

    def docker(self, *words: object, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run the docker command."""
        done = subprocess.run(
            ["docker", *map(str, words)],
            env={**docker_environment(self.host, self.base), "DOCKER_BUILDKIT": "0"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **more,
        )
        assert not check or done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done

    def run(self, *words: object, **more: Any) -> subprocess.CompletedProcess[str]:
        """``docker run --rm`` of the image bb:1."""
        return self.docker("run", "--rm", "--network=none", *words, **more)

    def out(self, *words: object, **more: Any) -> str:
        return self.docker(*words, **more).stdout.strip()

    def clean_up(self) -> None:
        """End it, its containers and its mounts."""
        if self.process is not None and self.process.poll() is None:
            ids = self.docker("ps", "-aq", check=False).stdout.split()
            if ids:
                self.docker("rm", "-f", *ids, check=False)
        self.stop()
        if self.containerd is not None:
            self.containerd.terminate()
            self.containerd.wait(60)
        unmount_below(self.base)
        shutil.rmtree(self.base, ignore_errors=True)


class Dockerd(PlainDockerd):
    """The same on a plugin.

    Attributes:
        plugin: stores its layers.
    """

    def __init__(self, base: Path, plugin: Daemon, *arguments: str) -> None:
        super().__init__(base, *arguments)
        self.plugin = plugin

    def start(self) -> Self:
        return self.start_with("--experimental", "-s", "cowfs")

    def logs(self) -> str:
        return f"{self.log[-3000:]}\n{self.plugin.log[-3000:]}"

    @property
    def home(self) -> Path:
        """Where its layers are mounted; beside the plain one, that of mapped users."""
        places = [self.base / "data" / "cowfs", self.base / "data" / "100000.100000" / "cowfs"]
        return next((place for place in places if place.exists()), places[0])


class CurrentDockerd(Dockerd):
    """dockerd 29, which keeps images in a containerd 2 that has the snapshotter cowfs."""

    program = os.path.join(containerd.BIN, "dockerd")

    def __init__(self, base: Path, engine: Containerd, *arguments: str) -> None:
        super().__init__(base, engine.snapshotter, *arguments)
        self.engine = engine

    def containerd_socket(self) -> str:
        return f"{self.engine.base}/c.sock"

    def start_containerd(self) -> None:
        """It runs already."""


def private_plugins() -> None:
    """An empty directory where dockerd looks for plugins, for this mount namespace."""
    PLUGINS.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "plugins", PLUGINS], check=True)


def needs_dockerd() -> None:
    """Skip where there is none that has graph driver plugins."""
    for program in ("dockerd", "docker", "containerd", "runc"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here (Debian: docker.io; CI has it)")
    told = subprocess.run(["dockerd", "--version"], capture_output=True, text=True, check=True).stdout
    if not 20 <= int(told.split("version ")[1].split(".")[0]) <= 27:
        pytest.skip("dockerd has no graph driver plugins any more: " + told.strip())
    if os.geteuid():
        pytest.skip("dockerd needs root")
