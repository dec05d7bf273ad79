"""Health checks: a command that runs in a container again and again, and the health by its exit status.

Rules (Docker's, moby ``daemon/health.go``):

1. Healthy after one success. Unhealthy after ``Retries`` failures in a row. In the start period
failures do not count, until the first success. 2. A check that takes longer than its timeout is killed and has failed.
None is made while the container is paused. 3. The daemon makes the checks. A new daemon begins again at ``starting``,
without the results of its predecessor.

Threads: one for each running container that has a check.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Protocol

from cowfs.errors import CowfsError
from cowfs.service.containers.healthcheck import Check, Health, check_of
from cowfs.service.containers.records import ExecConfig
from cowfs.service.images import rfc3339
from cowfs.service.logs import log

if TYPE_CHECKING:
    from cowfs.service.containers.container import Container
    from cowfs.service.containers.execs import Execs

__all__ = ["Monitors"]

MOST_OUTPUT = 4096
_TIMED_OUT = -1


class Owner(Protocol):
    """The containers, as far as their checks ask them."""

    execs: Execs

    def tell(self, container: Container, action: str) -> None: ...


class Monitors:
    """Makes the checks of all containers that run."""

    def __init__(self, containers: Owner) -> None:
        self._containers = containers
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop all checks."""
        self._closed.set()

    def begin(self, container: Container) -> None:
        """Begin the checks of a container that has started."""
        check = check_of(container.config)
        container.health = None if check is None else Health()
        if check is not None:
            threading.Thread(
                target=self._run, args=(container, check, container.health), name=f"cowfs-health-{container.id[:8]}", daemon=True
            ).start()  # fmt: skip

    def _run(self, container: Container, check: Check, health: Health) -> None:
        began, run = time.monotonic(), container.run.get("started")

        def is_over() -> bool:
            return self._closed.is_set() or not container.running or container.run.get("started") != run

        while True:
            starting = health.status == "starting" and time.monotonic() - began < check.start_period
            if container.wait(is_over, check.start_interval if starting else check.interval):
                return
            if container.paused:
                continue
            at = time.time_ns()
            try:
                code, output = self._probe(container, check)
            except (CowfsError, OSError) as error:  # the container ended meanwhile, or cannot run one more process
                code, output = 1, str(error)
            if is_over():
                return
            health.log.append(
                {"Start": rfc3339(at), "End": rfc3339(time.time_ns()), "ExitCode": code, "Output": output}
            )
            self._judge(container, check, health, code, began)

    def _judge(self, container: Container, check: Check, health: Health, code: int, began: float) -> None:
        before = health.status
        if code == 0:
            health.passed()
        elif before == "starting" and time.monotonic() - began < check.start_period:
            return
        else:
            health.failed(check.retries)
        if health.status != before:
            log.info("container %s is %s", container.name, health.status)
            self._containers.tell(container, f"health_status: {health.status}")

    def _probe(self, container: Container, check: Check) -> tuple[int, str]:
        execs = self._containers.execs
        config = ExecConfig(Cmd=list(check.command), AttachStdout=True, AttachStderr=True)
        made = execs.new(container, config)
        try:
            ours, theirs = socket.socketpair()
            with ours:
                end = time.monotonic() + check.timeout
                execs.start(made, execs.process(made, None), sock=theirs, forget=True)
                output, ended = _read(ours, end)
                if not ended and made.pid:
                    _kill(made.pid)
                    return _TIMED_OUT, f"Health check exceeded timeout ({check.timeout:g}s): {output}"
            container.wait(lambda: made.code is not None, 5.0)
            return (1 if made.code is None else made.code), output
        finally:
            execs.drop(made)


def _kill(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _read(sock: socket.socket, end: float) -> tuple[str, bool]:
    """The output of a process without a terminal, and whether its streams ended in time."""
    data = b""
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([sock], [], [], left)[0]:
            return _text(data), False
        part = sock.recv(65536)
        if not part:
            return _text(data), True
        if len(data) < 4 * MOST_OUTPUT:
            data += part


def _text(data: bytes) -> str:
    """The payloads of frames: a byte for the stream, three of nothing, four of length (Docker's attach)."""
    out = b""
    while len(data) >= 8 and len(out) < MOST_OUTPUT:
        (length,) = struct.unpack(">I", data[4:8])
        out += data[8 : 8 + length]
        data = data[8 + length :]
    return out[:MOST_OUTPUT].decode(errors="replace")
