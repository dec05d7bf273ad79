"""One ``cowfs serve --containerd``, a gRPC client of it, and real containerd with ctr."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from . import images
from .daemon import Daemon, busybox_tar, wait_for


class Snapshotter(Daemon):
    """A daemon whose only door is containerd's, and its verbs through gRPC."""

    def doors(self) -> list[str]:
        return ["--containerd", f"unix://{self.socket}", "-D"]

    def call(self, name: str, /, **fields: Any) -> Any:
        """One call; the answer, of List all infos. Raises grpc.RpcError."""
        import grpc

        from cowfs.service.containerd.messages import METHODS, SERVICE, message

        request, answer = (message(each) for each in METHODS[name])
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            make = channel.unary_stream if name == "List" else channel.unary_unary
            method = make(
                f"/{SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=answer.FromString,
            )
            told = method(request(**fields), timeout=120, wait_for_ready=True)
            return [info for part in told for info in part.info] if name == "List" else told

    def code(self, name: str, /, **fields: Any) -> str:
        """The status code of a call: OK, NOT_FOUND..."""
        import grpc

        try:
            self.call(name, **fields)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    def names(self, *filters: str) -> list[str]:
        return [info.name for info in self.call("List", filters=filters)]

    def clean_up(self) -> None:
        """End it and everything it left, for the next test."""
        self.stop(signal.SIGKILL)
        unmount_below(self.base)
        assert "Traceback" not in self.log, self.log


def mount_records(records: Iterable[Any], target: Path) -> None:
    """Do what containerd does with mounts: mount(8) of each."""
    for record in records:
        options = [each for each in record.options if each != "rbind"]
        if record.type == "bind":
            subprocess.run(["mount", "--rbind", record.source, target], check=True)
            if "ro" in options:
                subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        else:
            subprocess.run(["mount", "-t", record.type, record.source, target, "-o", ",".join(options)], check=True)


@contextmanager
def mounted(snapshotter: Snapshotter, answer: Any, name: str = "mnt") -> Iterator[Path]:
    """The mounts of an answer, mounted."""
    target = snapshotter.base / "m" / name
    target.mkdir(parents=True, exist_ok=True)
    mount_records(answer.mounts, target)
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)


def layer(snapshotter: Snapshotter, name: str, parent: str, *steps: Callable[[Path], object]) -> None:
    """Prepare, change, commit."""
    key = f"extract-{name}"
    with mounted(snapshotter, snapshotter.call("Prepare", key=key, parent=parent)) as root:
        for step in steps:
            step(root)
    snapshotter.call("Commit", key=key, name=name)


def text(path: str, data: str, mode: int = 0o644) -> Callable[[Path], object]:
    def step(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(data)
        os.chmod(root / path, mode)

    return step


def unmount_below(base: Path) -> None:
    """Unmount everything below a directory."""
    for _ in range(3):
        with open("/proc/self/mounts", encoding="utf-8") as file:
            targets = [line.split()[1].encode().decode("unicode_escape") for line in file]
        for target in reversed([each for each in targets if each.startswith(f"{base}/")]):
            subprocess.run(["umount", "-l", target], check=False, capture_output=True)


LIMIT = "containerd.io/snapshot/max-size"
IMAGE = "docker.io/library/bb:1"

BIN = os.environ.get("COWFS_CONTAINERD_BIN", "")
"""A directory with other programs of containerd than the system's: ``go install`` of 2.x, say."""

CONFIG = """\
version = {version}
root = "{base}/root"
state = "{base}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{base}/c.sock"
[proxy_plugins.cowfs]
  type = "snapshot"
  address = "{snapshotter}"
  {capabilities}
"""

CONFIG_2 = """\
  [proxy_plugins.cowfs.exports]
    root = "{root}"
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_unpacks = 3
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "cowfs"
  differ = "walking"
"""
"""The additional settings of containerd 2.x: the place of the snapshots, and the unpacker of imported and pulled images."""


class Containerd:
    """Real containerd with the snapshotter ``cowfs``, and ctr as its client."""

    def __init__(self, base: Path, snapshotter: Snapshotter) -> None:
        self.base = base
        self.snapshotter = snapshotter
        self.log_file = base / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Containerd:
        self.base.mkdir(exist_ok=True)
        config = self.base / "config.toml"
        config.write_text(self.config())
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(["containerd", "-c", config], stdout=log, stderr=log, env=environment())
        wait_for(lambda: self.ctr("version", check=False).returncode == 0, "containerd")
        return self

    def config(self) -> str:
        """As docs/containerd.md has it, with other places."""
        version = 2 if self.version() < (2, 0) else 3
        text = CONFIG + (CONFIG_2 if version == 3 else "")
        snapshotter = self.snapshotter
        known = 'capabilities = ["remap-ids", "rebase"]' if self.has_capabilities() else ""
        return text.format(
            base=self.base, snapshotter=snapshotter.socket, root=snapshotter.root, version=version, capabilities=known
        )

    @staticmethod
    def version() -> tuple[int, ...]:
        """As (2, 4)."""
        told = subprocess.run(
            ["containerd", "--version"], check=True, capture_output=True, text=True, env=environment()
        )
        return tuple(map(int, told.stdout.split()[2].lstrip("v").split(".")[:2]))

    @classmethod
    def has_capabilities(cls) -> bool:
        """Whether a proxy plugin can have some."""
        return cls.version() >= (1, 7)

    def stop(self, number: int = signal.SIGTERM) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(60)

    def ctr(
        self, *arguments: object, check: bool = True, namespace: str = "default", **more: Any
    ) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "-a", str(self.base / "c.sock"), "-n", namespace, *map(str, arguments)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=300, env=environment(), **more
        )
        log = self.log_file.read_text()[-3000:] if self.log_file.exists() else ""
        assert not check or done.returncode == 0, (
            f"{command}: {done.stdout}{done.stderr}\n{log}\n{self.snapshotter.log[-3000:]}"
        )
        return done

    def run(
        self, name: str, *command: str, options: Iterable[str] = (), **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """``ctr run --rm``; cgroups of this container alone, no network."""
        words = ["run", "--rm", "--snapshotter", "cowfs", *options, "docker.io/library/bb:1", name, *command]
        return self.ctr(*words, **more)

    def clean_up(self) -> None:
        """End it, its containers and its mounts."""
        if self.process is not None:
            with suppress(AssertionError, subprocess.TimeoutExpired):
                for namespace in self.ctr("namespaces", "ls", "-q").stdout.split():
                    for task in self.ctr("tasks", "ls", "-q", namespace=namespace).stdout.split():
                        self.ctr("tasks", "rm", "-f", task, namespace=namespace, check=False)
        self.stop(signal.SIGKILL)
        self._end_shims()
        unmount_below(self.base)
        shutil.rmtree(self.base, ignore_errors=True)

    def _end_shims(self) -> None:
        """A containerd that was killed while it made a task may have left its shim."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
                if b"containerd-shim" in words[0] and os.fsencode(self.base / "c.sock") in words:
                    os.kill(int(name), signal.SIGKILL)


def environment() -> dict[str, str]:
    """One in which the programs of containerd are those of :data:`BIN`, if there are any."""
    path = os.pathsep.join(filter(None, (BIN, os.environ.get("PATH", ""))))
    return {**os.environ, "PATH": path, "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS": "1"}


def image_of_busybox(*more: bytes) -> bytes:
    """docker save's archive of docker.io/library/bb:1: busybox, and more layers."""
    layers = [busybox_tar(), *more]
    fields = {"config": {"Cmd": ["sh"], "Env": ["PATH=/bin"]}}
    return images.docker((layers, ["docker.io/library/bb:1"], images.config(layers, **fields)))


def check(root: Path) -> list[str]:
    """The output of ``cowfs check`` for a store without a server."""
    done = subprocess.run(
        [sys.executable, "-m", "cowfs", "check", "--root", root, "--json"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(done.stdout)[0].get("problems", []))


def collect(engine: Containerd) -> bool:
    """Have containerd's garbage collector look at the snapshotter: it does so only after a removal, and forgets one that failed."""
    words = ["snapshots", "--snapshotter", "cowfs"]
    made = engine.ctr(*words, "prepare", "gone", check=False).returncode == 0
    return engine.ctr(*words, "rm", "gone", check=False).returncode == 0 and made


def lasting(snapshotter: Snapshotter) -> int:
    """How many snapshots there are, without the one of :func:`collect`."""
    return len(
        [name for name in snapshotter.names() if not name.endswith("/gone")]
    )  # 2.x removes that one when it likes


def nothing_left(engine: Containerd, layers: int = 2) -> None:
    """No container, no mount, no file of one; the store is whole."""
    snapshotter = engine.snapshotter
    wait_for(lambda: collect(engine) and lasting(snapshotter) == layers, "the snapshots of containers to go")

    def last_one_gone() -> bool:
        """containerd collects after a removal only, and may have been at it when the last one came."""
        for _ in range(50):
            if len(snapshotter.names()) == layers:
                return True
            time.sleep(0.1)
        collect(engine)
        return False

    wait_for(last_one_gone, "the last one to go")
    wait_for(lambda: not [each for each in os.listdir(snapshotter.root) if each.startswith("rm-")], "their files to go")
    wait_for(lambda: os.listdir(snapshotter.run_dir / "held") == [], "held mounts to go")
    assert len(os.listdir(snapshotter.root / "layers")) == layers
    with open("/proc/self/mounts", encoding="utf-8") as file:
        left = [line for line in file if str(snapshotter.base) in line]
    assert not left
    engine.stop()
    assert snapshotter.stop() == 0
    assert check(snapshotter.root) == []


def needs_containerd() -> None:
    """Skip where the real thing is not there."""
    for program in ("containerd", "ctr", "runc"):
        if shutil.which(program, path=environment()["PATH"]) is None:
            pytest.skip(f"no {program} here (Debian: containerd, runc; CI has them)")
    if os.geteuid():
        pytest.skip("containerd needs root")
