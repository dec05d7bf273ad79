"""The daemon's ways to a container's other processes: its supervisor, and the OCI runtime."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cowfs.errors import FailedPrecondition
from cowfs.service.containers.cgroups import place
from cowfs.service.containers.container import Container
from cowfs.service.containers.logs import parse_size as parse_log_size
from cowfs.service.errors import ApiError
from cowfs.sys import mounts

__all__ = ["Runtime", "ask", "asked", "dismiss", "hand_over", "settings"]


def ask(container: Container, message: dict[str, Any], fd: int | None = None) -> dict[str, Any]:
    """One verb of the supervisor.

    Raises:
        FailedPrecondition: the supervisor is gone.
    """
    with asked(container, message, fd) as answer:
        return answer


@contextmanager
def asked(container: Container, message: dict[str, Any], fd: int | None = None) -> Iterator[dict[str, Any]]:
    """The answer as :func:`ask` gives it; the connection lasts as long as the block: after ``start``, no end of the process is recorded before it.

    Raises:
        FailedPrecondition: the supervisor is gone.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(container.socket)
            data = json.dumps(message).encode() + b"\n"
            if fd is not None:
                sent = socket.send_fds(sock, [data], [fd])
                data = data[sent:]
            if data:
                sock.sendall(data)
            with sock.makefile("rb") as lines:
                answer = json.loads(lines.readline() or b"null")
        except (OSError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            raise FailedPrecondition(f"container {container.id} is not running")
        yield answer


def settings(container: Container, runtime: str, runtime_root: str, store: str) -> dict[str, Any]:
    """The request for the supervisor of a container (:class:`cowfs.service.containers.supervisor.Supervisor`)."""
    options = container.host_config.LogConfig.Config or {}
    return {
        "id": container.id,
        "folder": container.folder,
        "bundle": container.bundle,
        "socket": container.socket,
        "runtime": runtime,
        "runtime_root": runtime_root,
        "runtime_options": options_of(runtime),
        "cgroup": container.next_cgroup,
        "terminal": bool(container.config.get("Tty")),
        "open_stdin": bool(container.config.get("OpenStdin")),
        "stdin_once": bool(container.config.get("StdinOnce")),
        "log": container.host_config.LogConfig.Type != "none",
        "max_size": parse_log_size(options.get("max-size", "")),
        "max_file": max(1, int(options.get("max-file", "1") or 1)),
        "store": store,
        "attributes": container.attributes,
        "durable": container.durable,
    }


def options_of(runtime: str) -> list[str]:
    """The options of an OCI runtime that stand before its verbs: crun is told where it may make no control group, runc finds out."""
    is_crun = os.path.basename(runtime).startswith("crun")
    return ["--cgroup-manager=disabled"] if is_crun and not place().parent else []


def hand_over(container: Container, sock: socket.socket, early: bytes, streams: list[int], keys: bytes) -> None:
    """Pass a client's socket to the supervisor. The socket is closed here in any case.

    Args:
        early: bytes that came before. streams: those for the client. keys: its detach keys.
    """
    with sock:
        message = {
            "verb": "attach",
            "streams": streams,
            "early": base64.b64encode(early).decode(),
            "keys": base64.b64encode(keys).decode(),
        }
        try:
            ask(container, message, sock.fileno())
        except FailedPrecondition:
            pass  # it has ended meanwhile; the client sees the end of the stream


def dismiss(container: Container) -> None:
    """End a supervisor whose container will not be started."""
    try:
        ask(container, {"verb": "quit"})
    except FailedPrecondition:
        pass  # it is ending already


def _words(line: str) -> str:
    """The message in a line of a runtime's log, ``time="..." level=error msg="..."`` (logfmt); else the line."""
    match = re.search(r' msg=("(?:[^"\\]|\\.)*")', line)
    try:
        return str(json.loads(match[1])) if match else line
    except ValueError:
        return line


class Runtime:
    """The OCI runtime, with the state of this daemon's containers.

    Args:
        program: gives its path. root: the directory of its state.
    """

    def __init__(self, program: Callable[[], str], root: str) -> None:
        self._program = program
        self.root = root

    def __call__(self, *words: str, check: bool = True, input: str | None = None) -> str:
        """Run the OCI runtime, and return its output.

        Raises:
            ApiError: 500 with its error message.
        """
        program = self._program()
        done = subprocess.run(
            [program, *options_of(program), "--root", self.root, *words],
            capture_output=True,
            text=True,
            check=False,
            input=input,
            stdin=None if input is not None else subprocess.DEVNULL,
        )
        if check and done.returncode:
            said = done.stderr.strip().splitlines()
            raise ApiError(500, _words(said[-1]) if said else f"the runtime ended with status {done.returncode}")
        return done.stdout

    def sweep(self, run_dir: str, known: set[str]) -> None:
        """Delete the remains of removed containers in the run directory.

        Args:
            known: the first twelve characters of the ids of the existing ones.
        """
        for name in os.listdir(run_dir):
            path = os.path.join(run_dir, name)
            if name.partition(".")[0][:12] in known:
                continue
            if not os.path.isdir(path):
                os.unlink(path)
                continue
            rootfs = os.path.join(path, "rootfs")
            self("delete", "--force", name, check=False)
            if os.path.ismount(rootfs):
                mounts.umount(rootfs, mounts.MNT_DETACH)
            shutil.rmtree(path, ignore_errors=True)
