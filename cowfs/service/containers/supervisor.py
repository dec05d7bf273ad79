"""The supervisor of one container: a process that outlives the daemon.

Strategy. One thread, one loop. It has the OCI runtime make the container, is the parent of its processes (a child subreaper,
prctl(2)), so their exit statuses are its own to collect, and holds their pipes and terminals. Clients' sockets are passed to it
(SCM_RIGHTS): so a stream does not go through the daemon and goes on when that is killed. Its state is in ``run.json``
in the container's folder, replaced as a whole, for later readers.

The protocol on its socket, with the daemon only: one line of JSON with a verb, perhaps with one descriptor; one line back.
``watch`` keeps the connection and gets a line for each end of a process.

Life: it begins with the first attach or start of the container; it ends with the container, or, if that was never
started, with the last connection of a daemon or client.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

from cowfs.service.containers import logs
from cowfs.service.containers.streams import DETACH_KEYS, STDERR, STDOUT, Client, Streams
from cowfs.sys.atomic import write_file
from cowfs.sys.process import start_time

__all__ = ["RUN_FILE", "main"]

RUN_FILE = "run.json"
LOST_SECONDS = 5.0
"""How long a supervisor whose container was never started waits for somebody to connect."""
RECORD_SECONDS = 30.0
"""How long the record of an end waits for that of the start, by a daemon that lives."""

_SIZES = 16
_MAX_LINE = 1 << 20


class _Process:
    """A process of the container: its streams and its state."""

    def __init__(self, streams: Streams, terminal: bool) -> None:
        self.streams = streams
        self.terminal = terminal
        self.pid: int | None = None
        self.code: int | None = None
        self.log: logs.Writer | None = None


class _Connection:
    """A connection on the supervisor's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.line = b""
        self.fds: list[int] = []


class Supervisor:
    """See the module.

    Args:
        settings: ``id``, ``folder`` (of the container), ``bundle``, ``socket`` (to listen on), ``runtime``, ``runtime_options``,
            ``runtime_root``, ``terminal``, ``open_stdin``, ``stdin_once``, ``log`` (whether one is kept), ``max_size`` and ``max_file`` (of the log), ``store``, ``name``,
            ``image``, ``durable``.
    """

    def __init__(self, settings: dict[str, Any], listening: socket.socket) -> None:
        self.settings = settings
        self.selector = selectors.DefaultSelector()
        self.listening = listening
        self.connections: list[_Connection] = []
        self.watchers: list[socket.socket] = []
        self.children: dict[int, Callable[[int], None]] = {}
        self.early_exits: dict[int, int] = {}  # statuses of processes that are not known yet
        self.main = _Process(self._streams(settings["terminal"], True, self._main_ended), settings["terminal"])
        self.execs: dict[str, _Process] = {}
        self.sizes: dict[str, tuple[int, int]] = {}  # of terminals of execs that were not started yet; the last few
        self.run: dict[str, Any] = {}
        self._terminals = 0
        self._starter: socket.socket | None = None
        self.started = False
        self.over = False
        self.lonely_since: float | None = time.monotonic()

    def _streams(self, terminal: bool, main: bool, on_end: Callable[[], None]) -> Streams:
        log = None
        if main and self.settings.get("log", True):
            log = logs.Writer(
                os.path.join(self.settings["folder"], logs.FILE),
                self.settings.get("max_size", 0),
                self.settings.get("max_file", 1),
            )
        streams = Streams(
            self.selector,
            terminal=terminal,
            log=log,
            stdin_once=self.settings["stdin_once"] if main else True,
            on_end=on_end,
        )
        if main:
            self._log = log
        return streams

    # -- the loop ---------------------------------------------------------------------------------

    def loop(self) -> None:
        """Run until the container has ended and every client has its output, or the supervisor is no longer needed."""
        wake_in, wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
        self.selector.register(wake_in, selectors.EVENT_READ, self._child_ended)
        self.listening.setblocking(False)
        self.selector.register(self.listening, selectors.EVENT_READ, self._accept)
        self._reap()
        while not self.over:
            for key, mask in self.selector.select(1.0):
                if self.selector.get_map().get(key.fd) is not None or key.fd == wake_in:
                    key.data(key.fd, mask)
            if not self.over and not self.started and self._is_lost():
                break

    def _is_lost(self) -> bool:
        self.main.streams.drop_gone()
        if self.connections or self.watchers:
            self.lonely_since = None
            return False
        if self.lonely_since is None:
            self.lonely_since = time.monotonic()
        return time.monotonic() - self.lonely_since > LOST_SECONDS

    def _child_ended(self, fd: int, mask: int) -> None:
        os.read(fd, 4096)
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            callback = self.children.pop(pid, None)
            if callback is None:
                self.early_exits[pid] = code  # perhaps a process that the runtime is about to report; perhaps an orphan
            else:
                callback(code)

    def _when_ended(self, pid: int, callback: Callable[[int], None]) -> None:
        code = self.early_exits.pop(pid, None)
        if code is not None:
            callback(code)
        else:
            self.children[pid] = callback

    # -- connections ------------------------------------------------------------------------------

    def _accept(self, fd: int, mask: int) -> None:
        try:
            sock, _ = self.listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        connection = _Connection(sock)
        self.connections.append(connection)
        self.selector.register(sock, selectors.EVENT_READ, lambda fd, mask: self._hear(connection))

    def _hear(self, connection: _Connection) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(connection.sock, 1 << 16, 4)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        connection.fds += fds
        connection.line += data
        if not data or len(connection.line) > _MAX_LINE:
            self._leave(connection)
            connection.sock.close()
            for fd in connection.fds:
                os.close(fd)
            return
        if not connection.line.endswith(b"\n"):
            return
        message = json.loads(connection.line)
        connection.line = b""
        fds, connection.fds = connection.fds, []
        self._leave(connection)
        verb = self.VERBS.get(message.pop("verb"))
        if verb is None:  # of a newer daemon, which then goes without
            self._answer(connection.sock, {"error": "no such verb"})
            return
        verb(self, connection.sock, message, fds)

    def _leave(self, connection: _Connection) -> None:
        self.connections.remove(connection)
        self.selector.unregister(connection.sock)

    def _tell(self, sock: socket.socket, message: dict[str, Any]) -> None:
        try:
            sock.setblocking(True)
            sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # it asked and left

    def _answer(self, sock: socket.socket, message: dict[str, Any]) -> None:
        self._tell(sock, message)
        sock.close()

    # -- verbs ------------------------------------------------------------------------------------

    def verb_watch(self, sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        """Keep the connection: it gets a line for each process that ends. The first line is the present state."""
        self._tell(
            sock,
            {
                "run": self.run,
                "execs": {id: {"pid": each.pid, "code": each.code} for id, each in self.execs.items()},
            },
        )
        sock.setblocking(False)
        self.watchers.append(sock)
        self.selector.register(sock, selectors.EVENT_READ, lambda fd, mask: self._watcher_left(sock))

    def _watcher_left(self, sock: socket.socket) -> None:
        self.selector.unregister(sock)
        self.watchers.remove(sock)
        sock.close()

    def _tell_watchers(self, message: dict[str, Any]) -> None:
        for sock in self.watchers:
            self._tell(sock, message)
            sock.setblocking(False)

    def verb_attach(self, sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        """Attach the client whose socket comes along."""
        self._attach(self.main, message, fds)
        self._answer(sock, {"ok": True})

    @staticmethod
    def _attach(process: _Process, message: dict[str, Any], fds: list[int]) -> None:
        wants = frozenset(message["streams"])
        keys = base64.b64decode(message["keys"]) if message.get("keys") else DETACH_KEYS
        client = Client(
            socket.socket(fileno=fds[0]),
            wants,
            base64.b64decode(message.get("early", "")),
            keys if process.terminal else b"",
        )
        process.streams.attach(client)

    def verb_resize(self, sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        """Set the size of a terminal."""
        exec, size = message.get("exec"), (message["width"], message["height"])
        process = self.execs.get(exec) if exec else self.main
        if process is not None:
            try:
                process.streams.resize(*size)
            except OSError:
                pass  # the terminal is gone
        elif exec:  # it may come before the start, by another connection
            self.sizes[exec] = size
            for older in list(self.sizes)[:-_SIZES]:
                del self.sizes[older]
        self._answer(sock, {"ok": True})

    def verb_start(self, sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        """Make and start the container by the runtime, and answer when it runs. The connection lasts until the daemon has recorded the start."""
        self.started = True
        command = ["run", "--detach", "--bundle", self.settings["bundle"]]

        def done(pid: int | None, error: str) -> None:
            if pid is None:
                self.main.streams.fail("")
                self._answer(sock, {"error": error})
                self.over = True
                return
            self.run = {"pid": pid, "ticks": start_time(pid), "started": time.time_ns(), "supervisor": os.getpid()}
            self.run["cgroup"] = self.settings["cgroup"]
            self._save()
            self._tell(sock, {"ok": self.run})
            self._starter = sock
            self._when_ended(pid, self._main_exited)

        self._spawn(self.main, command, [self.settings["id"]], self.settings["open_stdin"], done)

    def verb_quit(self, sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        """End, unless the container was started, since it is removed."""
        if not self.started:
            for client in self.main.streams.clients:
                client.sock.close()
            self.over = True
        self._answer(sock, {"ok": not self.started})

    def verb_exec(self, sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
        """Run one more process in the container, perhaps with a client."""
        terminal, id = message["terminal"], message["id"]
        forget = bool(message.get("forget"))
        process = _Process(self._streams(terminal, False, lambda: self._exec_ended(id, forget)), terminal)
        self.execs[id] = process
        if (
            id in self.sizes
        ):  # the runtime makes the terminal in that size: the process may read it before the supervisor has the terminal
            width, height = self.sizes.pop(id)
            message["process"]["consoleSize"] = {"height": height, "width": width}
            process.streams.resize(width, height)
        if fds:
            self._attach(process, message, fds)
        path = os.path.join(self.settings["bundle"], f"exec-{id[:12]}.json")

        def done(pid: int | None, error: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if pid is None:
                process.code = 126 if "permission denied" in error.lower() else 127
                process.streams.fail(f"OCI runtime exec failed: {error}")
                self._answer(sock, {"error": error, "code": process.code})
                self._tell_watchers({"exec": id, "code": process.code})
                return
            process.pid = pid
            self._answer(sock, {"ok": {"pid": pid}})
            self._when_ended(pid, lambda code: self._exec_exited(id, code))

        try:
            write_file(path, json.dumps(message["process"]).encode(), durable=False)
        except OSError as error:  # a full disk costs this process alone, not the container
            done(None, f"{path}: {error.strerror}")
            return
        self._spawn(
            process, ["exec", "--detach", "--process", path], [self.settings["id"]], message["open_stdin"], done
        )

    VERBS: ClassVar[Mapping[str, Callable[[Supervisor, socket.socket, dict[str, Any], list[int]], None]]] = {
        "attach": verb_attach,
        "exec": verb_exec,
        "quit": verb_quit,
        "resize": verb_resize,
        "start": verb_start,
        "watch": verb_watch,
    }

    # -- processes --------------------------------------------------------------------------------

    def _spawn(
        self,
        process: _Process,
        command: list[str],
        last: list[str],
        open_stdin: bool,
        done: Callable[[int | None, str], None],
    ) -> None:
        """Run the runtime with fresh pipes or a terminal; ``done`` gets the pid of the process that it started, or an error."""
        handle, name = tempfile.mkstemp(dir=self.settings["bundle"], prefix="pid-")
        os.close(handle)
        log = f"{name}.log"
        words = [*self._runtime_words(log), "--log-format", "json", *command, "--pid-file", name]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        ours: dict[int, int] = {}
        input: int | None = None
        theirs = [null, null, null]
        console: socket.socket | None = None
        address = ""
        received: list[int] = []
        if process.terminal:
            console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._terminals += 1
            address = f"{self.settings['socket']}.{self._terminals}"  # short: an address has 107 bytes
            console.bind(address)
            console.listen(1)
            words += ["--console-socket", address]
            self.selector.register(console, selectors.EVENT_READ, lambda fd, mask: received.extend(_terminal(console)))
        else:
            for number, stream in ((1, STDOUT), (2, STDERR)):
                reading, theirs[number] = os.pipe2(os.O_CLOEXEC)
                ours[reading] = stream
            if open_stdin:
                theirs[0], input = os.pipe2(os.O_CLOEXEC)
        actions = [(os.POSIX_SPAWN_DUP2, theirs[number], number) for number in range(3)]
        pid = os.posix_spawnp(
            words[0],
            [*words, *last],
            os.environ,
            file_actions=actions,
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        )
        for fd in {*theirs}:
            os.close(fd)

        def runtime_ended(code: int) -> None:
            if console is not None:
                if not received and code == 0:
                    received.extend(_terminal(console))
                self.selector.unregister(console)
                console.close()
                os.unlink(address)
            text = _read(name)
            error = (
                "" if code == 0 and text else _complaint(log) or f"{self.settings['runtime']} ended with status {code}"
            )
            for path in (name, log):
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass
            if error:
                for fd in [*ours, *([input] if input is not None else []), *received]:
                    os.close(fd)
                done(None, error)
                return
            if process.terminal:
                (fd,) = received
                process.streams.connect({fd: STDOUT}, fd)
            else:
                process.streams.connect(ours, input)
            done(int(text), "")

        self._when_ended(pid, runtime_ended)

    def _main_exited(self, code: int) -> None:
        self._wait_recorded()
        self.run |= {"finished": time.time_ns(), "code": code, "oom": self._was_oom()}
        self._save()
        self._record(code)
        self._tell_watchers({"exit": self.run})
        self.main.streams.process_ended()

    def _wait_recorded(self) -> None:
        """Wait until the daemon has recorded the start, or is gone: a short process is not to be told as ended before it has started."""
        if self._starter is not None:
            with self._starter as sock:
                sock.settimeout(RECORD_SECONDS)
                with contextlib.suppress(OSError):
                    sock.recv(1)
            self._starter = None

    def _main_ended(self) -> None:
        """Finish a process whose output is read and passed on."""
        if self._log is not None:
            self._log.close()
        self._runtime("delete", "--force", self.settings["id"])
        self.over = True

    def _exec_exited(self, id: str, code: int) -> None:
        process = self.execs[id]
        process.code = code
        self._tell_watchers({"exec": id, "code": code})
        process.streams.process_ended()

    def _exec_ended(self, id: str, forget: bool) -> None:
        if forget:  # else its status stays known until the container ends
            del self.execs[id]

    def _runtime_words(self, log: str) -> list[str]:
        """The runtime's command line, up to its verb."""
        settings = self.settings
        return [
            settings["runtime"], *settings["runtime_options"], "--root", settings["runtime_root"], "--log", log,
        ]  # fmt: skip

    def _runtime(self, *words: str) -> None:
        pid = os.posix_spawnp(
            self.settings["runtime"],
            [*self._runtime_words(os.devnull), *words],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)],
        )
        os.waitpid(pid, 0)

    def _was_oom(self) -> bool:
        from cowfs.service.containers.cgroups import oom_killed

        return oom_killed(self.settings["cgroup"])

    def _save(self) -> None:
        path = os.path.join(self.settings["folder"], RUN_FILE)
        data = json.dumps(self.run).encode()
        try:
            write_file(path, data, durable=self.settings["durable"] and "finished" in self.run)
        except OSError:
            if "finished" not in self.run:
                raise
            _overwrite(path, data)

    def _record(self, code: int) -> None:
        """Record the end in the store's log of events, since no daemon may be running."""
        from cowfs.errors import CowfsError
        from cowfs.index.database import Index
        from cowfs.service.waiting import Waiting

        store, id = self.settings["store"], self.settings["id"]
        told = [("oom", self.settings["attributes"])] if self.run["oom"] else []
        told.append(("die", {**self.settings["attributes"], "exitCode": str(code)}))
        now = time.time_ns()
        try:
            index = Index(os.path.join(store, "index.db"), fsync=self.settings["durable"])
            with index.write() as change:
                for action, attributes in told:
                    change.record_event("container", action, id, attributes, at=now)
            index.close()
        except (CowfsError, OSError):
            waiting = Waiting(store, durable=self.settings["durable"])
            for action, attributes in told:
                waiting.append(("container", action, id, attributes, now))


def _overwrite(path: str, data: bytes) -> None:
    """Write over a file of one block, on a disk without room for another one: an end must not get lost."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, data, 0)
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)
    except OSError as error:
        sys.stderr.write(f"the end of a container is not recorded: {path}: {error.strerror}\n")


def _terminal(listening: socket.socket | None) -> list[int]:
    """The terminal that the runtime sends on the console socket."""
    assert listening is not None
    sock, _ = listening.accept()
    with sock:
        _, fds, _, _ = socket.recv_fds(sock, 4096, 1)
    return fds


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _complaint(path: str) -> str:
    """The last error in a runtime's log."""
    found = ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                    found = str(entry.get("msg", ""))
    except FileNotFoundError:
        pass
    for words in ("No such file or directory", "Permission denied"):  # crun's; the docker command looks for runc's
        found = found.replace(words, words.lower())
    return found


def main(settings: dict[str, Any], listening: socket.socket) -> NoReturn:
    """The main function of the forked process."""
    from cowfs.sys.process import become_subreaper

    become_subreaper()
    supervisor = Supervisor(settings, listening)
    try:
        supervisor.loop()
    finally:
        try:
            os.unlink(settings["socket"])
        except FileNotFoundError:
            pass
    os._exit(0)
