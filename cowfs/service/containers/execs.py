"""Further processes in a running container: ``docker exec``."""

from __future__ import annotations

import base64
import os
import secrets
import socket
import threading
from typing import Any, Protocol

from cowfs.errors import FailedPrecondition, NotFound
from cowfs.service.containers import bundle
from cowfs.service.containers.checking import check_working_directory
from cowfs.service.containers.container import Container, Exec
from cowfs.service.containers.records import ExecConfig
from cowfs.service.containers.supervision import ask
from cowfs.service.containers.users import find_user
from cowfs.service.errors import ApiError

__all__ = ["Execs"]


class Owner(Protocol):
    """The containers, as far as their processes ask them."""

    def get(self, reference: str) -> Container: ...

    def tell(self, container: Container, action: str, **more: str) -> None: ...


class Execs:
    """The further processes of all containers; ended ones are kept as long as their container.

    Threads: any.
    """

    def __init__(self, containers: Owner) -> None:
        self._containers = containers
        self._lock = threading.Lock()
        self._execs: dict[str, Exec] = {}  # guarded by _lock

    def found(self, id: str, container: Container, pid: int | None, code: int | None) -> None:
        """Take over a process that a supervisor reports."""
        with self._lock:
            self._execs.setdefault(id, Exec(id, container.id, ExecConfig(), pid, code, code is None))

    def ended(self, id: str, code: int) -> None:
        """Record the end of a process."""
        with self._lock:
            made = self._execs.get(id)
        if made is not None:
            made.code, made.running = code, False
            try:
                self._containers.get(made.container).tell()
            except NotFound:
                pass  # it has just been removed

    def settle(self, made: Exec) -> None:
        """Learn of the end of a process now, if it has ended: a client that saw the end of its stream may ask before
        the watching thread knows."""
        if not made.running:
            return
        try:
            known = ask(self._containers.get(made.container), {"verb": "watch"})["execs"]
            code = known[made.id]["code"]
        except (FailedPrecondition, NotFound, KeyError):
            return
        if code is not None:
            self.ended(made.id, code)

    def drop(self, made: Exec) -> None:
        """Forget a process."""
        with self._lock:
            self._execs.pop(made.id, None)

    def forget(self, container: Container) -> None:
        """Forget the processes of a removed container."""
        with self._lock:
            for id in [id for id, each in self._execs.items() if each.container == container.id]:
                del self._execs[id]

    def new(self, container: Container, config: ExecConfig) -> Exec:
        """Register one more process; it begins with :meth:`start`.

        Raises:
            FailedPrecondition: the container does not run, or is paused.
        """
        container.must_run()
        if not config.Cmd:
            raise ApiError(400, "No exec command specified")
        check_working_directory(config.WorkingDir)
        made = Exec(secrets.token_hex(32), container.id, config)
        with self._lock:
            self._execs[made.id] = made
        self._containers.tell(container, f"exec_create: {' '.join(config.Cmd)}", execID=made.id)
        return made

    def running_in(self, container: Container) -> list[str] | None:
        """Ids of the further processes that run in a container."""
        with self._lock:
            found = [each.id for each in self._execs.values() if each.container == container.id and each.running]
        return found or None

    def get(self, id: str) -> Exec:
        """Raises NotFound."""
        with self._lock:
            found = self._execs.get(id)
        if found is None:
            raise NotFound(f"No such exec instance: {id}")
        return found

    def process(self, made: Exec, console: list[int] | None) -> dict[str, Any]:
        """The runtime's form of a requested process.

        Args:
            console: rows and columns of its terminal, if the start gives them.

        Raises:
            FailedPrecondition: the container does not run. InvalidArgument: no such user in it.
        """
        container = self._containers.get(made.container)
        container.must_run()
        config: ExecConfig = made.config
        root = os.open(container.rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            user = find_user(root, config.User or container.config.get("User") or "", [])
        finally:
            os.close(root)
        process = bundle.exec_process(config, container.config, container.host_config, user, container.hostname)
        if console and config.Tty:
            process["consoleSize"] = {"height": console[0], "width": console[1]}
        return process

    def start(
        self,
        made: Exec,
        process: dict[str, Any],
        *,
        sock: socket.socket | None = None,
        early: bytes = b"",
        forget: bool = False,
    ) -> None:
        """Begin one more process, with a client's socket or without; the socket is closed here in any case.

        Args:
            process: of :meth:`process`.
            forget: the supervisor reports its end, and forgets it.

        Raises:
            FailedPrecondition: the container does not run any more. ApiError: the process cannot be started (both only
                without a client, which gets the error on its stream, and by the status).
        """
        container = self._containers.get(made.container)
        config: ExecConfig = made.config
        attached = (config.AttachStdin, config.AttachStdout, config.AttachStderr)
        message = {
            "verb": "exec",
            "id": made.id,
            "process": process,
            "terminal": config.Tty,
            "open_stdin": config.AttachStdin and sock is not None,
            "streams": [number for number, wanted in enumerate(attached) if wanted],
            "early": base64.b64encode(early).decode(),
            "keys": "",
            "forget": forget,
        }
        made.running = True
        self._containers.tell(container, f"exec_start: {' '.join(config.Cmd or ())}", execID=made.id)
        try:
            answer = ask(container, message, sock.fileno() if sock is not None else None)
        except FailedPrecondition:
            made.running, made.code = False, 126
            if sock is None:
                raise
            return
        finally:
            if sock is not None:
                sock.close()
        if "ok" in answer:
            made.pid = answer["ok"]["pid"]
            return
        made.running, made.code = False, answer["code"]
        if sock is None:
            raise ApiError(400, f"OCI runtime exec failed: {answer['error']}")
