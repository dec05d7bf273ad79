"""The state that all handlers of the daemon share."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator

from cowfs.service import rootless
from cowfs.service.board import Board
from cowfs.service.containers import seccomp
from cowfs.service.containers.cgroups import is_unified, place
from cowfs.service.containers.manager import Containers
from cowfs.service.doors import Loop
from cowfs.service.images import Images
from cowfs.service.options import Options
from cowfs.service.volumes import Volumes
from cowfs.store import Store

__all__ = ["FOLDER", "Service", "pairs"]

FOLDER = "service"
"""Folder of the store that belongs to the daemon."""

_LIMITS = ("size", "inodes")


class Service:
    """The shared state of all exchanges.

    Attributes:
        store: open. options: the present ones. debug: whether each exchange is logged.
        default_limit: ``size`` and ``inodes`` of ``--storage-opt``, as text.
        images, containers: the parts behind the routes.
    """

    def __init__(self, options: Options, store: Store, run_dir: str) -> None:
        self.options = options
        self.store = store
        self.run_dir = run_dir
        self.folder = os.path.join(store.root, FOLDER)
        self.started = time.time()
        self.debug = options.debug
        self.default_limit = {key: value for key, value in pairs(options.storage_opt) if key in _LIMITS}
        self.requests: dict[tuple[str, int], int] = {}  # guarded by _lock: (method, status) -> how many
        self.seconds = 0.0  # guarded by _lock: spent in handlers
        self.containers = Containers(self)
        self.volumes = Volumes(store, os.path.join(self.folder, "volumes"), self.containers.volume_users)
        self.images = Images(store, self.containers.users)
        self.board = Board(self)
        self.loop: Loop | None = None
        self._lock = threading.Lock()
        self._runtime: tuple[str, str, str] | None = None

    def open_to(self, loop: Loop) -> None:
        """The doors are open: exchanges come from this loop."""
        self.loop = loop

    def set_debug(self, *, on: bool) -> None:
        """Log each exchange, or no more."""
        self.debug = on

    def reconfigure(self, options: Options) -> None:
        """Take other options, as far as they can change while the daemon runs."""
        self.options, self.debug = options, options.debug

    def count(self, method: str, status: int, seconds: float) -> None:
        """Count an exchange that was answered."""
        with self._lock:
            self.requests[method, status] = self.requests.get((method, status), 0) + 1
            self.seconds += seconds

    # -- facts about the host ---------------------------------------------------------------------

    def runtime_program(self) -> str:
        """The OCI runtime: of the options, else runc, else crun; "" where there is none."""
        if self.options.runtime != "auto":
            return shutil.which(self.options.runtime) or ""
        return shutil.which("runc") or shutil.which("crun") or ""

    def runtime_version(self) -> tuple[str, str, str] | None:
        """(name, version, program) of the OCI runtime; None where there is none."""
        if self._runtime is None:
            program = self.runtime_program()
            if not program:
                return None
            done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=30)
            words = done.stdout.split()
            self._runtime = (os.path.basename(program), words[2] if len(words) > 2 else "", program)
        return self._runtime

    def security_options(self) -> list[str]:
        """The names in Docker's info."""
        found = ["name=seccomp,profile=builtin"] if seccomp.is_possible() else []
        found += ["name=rootless"] if rootless.is_rootless() else []
        return found + (["name=cgroupns"] if is_unified() else [])

    def warnings(self) -> list[str]:
        """Warnings about this host and the options."""
        found = []
        if self.options.insecure and not self.options.tlsverify:
            found.append("WARNING: a TCP door is open to anybody who can reach it (--insecure)")
        if not self.runtime_program():
            found.append("WARNING: no OCI runtime: containers cannot be started (install runc or crun)")
        if rootless.is_rootless():
            found += self._rootless_warnings()
        found.append("WARNING: no bridge network: a container has a loopback interface only, unless --network host")
        return found

    def _rootless_warnings(self) -> list[str]:
        found = []
        if os.geteuid() != 0:
            found.append("WARNING: no user namespace: containers cannot be started")
        elif not rootless.has_many_ids():
            found.append(
                "WARNING: one user id: all files of images belong to root (newuidmap and /etc/subuid give more)"
            )
        for controller in ("memory", "cpu", "pids", "io"):
            if controller not in place().controllers:
                found.append(f"WARNING: No {controller} limit support")
        return found

    @staticmethod
    def thread_count() -> int:
        return threading.active_count()

    def dump(self) -> str:
        """Threads and state, for SIGUSR1."""
        threads = threading.enumerate()
        parts = [f"{len(threads)} threads, {self.loop.connections if self.loop else 0} connections"]
        parts += [f"thread {thread.name}: {thread.ident or 0:#018x}" for thread in threads]
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            parts.append(file.read().decode(errors="replace"))
        return "\n".join(parts)


def pairs(texts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """``key=value`` of each text."""
    for text in texts:
        parts = text.split(",") if text.partition("=")[0].strip() in _LIMITS else [text]  # size=10G,inodes=100k
        for part in parts:
            key, _, value = part.partition("=")
            yield key.strip(), value.strip()
