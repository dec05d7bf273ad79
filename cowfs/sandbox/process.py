"""The processes around a command in a sandbox: each has one task, and none outlives the one above it.

    caller     waits, passes signals, carries a terminal's keys and text
      keeper   in a mount namespace of its own: has the tree mounted there, bounds the time, tells how it ended
        first  process 1 of a pid namespace: makes the sandbox, starts the command, collects orphans, passes signals
          the command

Rule 1. The caller's namespaces stay as they are: everything that is for good happens from the keeper on.
Rule 2. A process that ends, however it ends, takes those below it along: the first one gets SIGKILL with its keeper, the whole pid
namespace ends with the first one, and the keeper ends the first one when the caller is gone. Mounts live in the keeper's mount namespace,
so they are gone with its last process; nothing is mounted where others see it.
Rule 3. A failure before the command has started is an error of cowfs, told through a pipe as what it is; from then on there are statuses only.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial

from cowfs import errors
from cowfs._typed import Any, NamedTuple, NoReturn
from cowfs.errors import CowfsError, Unsupported
from cowfs.sandbox import beside, confine, subids, users
from cowfs.sandbox.request import Request
from cowfs.sandbox.terminal import Terminal
from cowfs.sys import cgroups, host, mounts, namespaces, process, seccomp

__all__ = [
    "FORWARDED",
    "TIMED_OUT",
    "Ended",
    "Mounted",
    "Stopped",
    "Tree",
    "error_of",
    "held",
    "open_streams",
    "run",
    "stop_on_signals",
    "telling",
]

TIMED_OUT = 124
"""The exit status of a command that a timeout ended, as of timeout(1)."""
_NO_SANDBOX = 125
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_END = signal.SIGALRM
"""Comes to the keeper when the command's time is over, or the caller was killed."""
_PIECE = 1 << 16

Tree = Callable[[str], AbstractContextManager[None]]
"""Has the tree mounted at a directory for the block, in the mount namespace of the process that calls."""


class Mounted(NamedTuple):
    """A mount that is there already: a process in its mount namespace, and its place there."""

    pid: int
    mountpoint: str


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        status: its exit status; 128 and the number of the signal that ended it; 124 when its time was over.
        timed_out: its time was over.
        cpu_seconds: processor time of it and of its children that were waited for.
        peak_memory: bytes that the largest of these had in memory at once.
        oom_killed: the kernel ended a process of it, since its limit of memory was reached.
    """

    status: int
    timed_out: bool = False
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    oom_killed: bool = False


class Stopped(KeyboardInterrupt):
    """A signal came before there was a command to pass it on to."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """In the block each signal that would be passed on raises :class:`Stopped`; those that nohup(1) has ignored stay so."""
    heard = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """No signal is answered in the block; those that come wait for its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def open_streams() -> None:
    """Open /dev/null for each standard stream that is closed: else the next file that is opened would become the command's."""
    for fd in range(3):
        try:
            os.set_inheritable(fd, True)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number


def telling(error: CowfsError) -> dict[str, object]:
    """An error for a pipe."""
    kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__)
    return {"error": kind, "message": error.message, "remedy": error.remedy}


def error_of(told: Mapping[str, Any]) -> CowfsError:
    """An error from a pipe."""
    kinds = {name: vars(errors)[name] for name in errors.__all__}
    made: CowfsError = kinds.get(told["error"], CowfsError)(told["message"], remedy=told["remedy"])
    return made


class _Pipes(NamedTuple):
    """The pipes between the processes. ``told``: how it ended; ``begun``: ends when the command has started."""

    told: int
    begun: int


def run(
    request: Request,
    tree: Tree | Mounted | None,
    directory: str,
    *,
    note: str = "",
    life: int | None = None,
    running: beside.Running | None = None,
) -> Ended:
    """Run a command in a sandbox, and wait for its end. The calling process has one thread.

    Args:
        request: the command and its sandbox.
        tree: mounts its root, or where that is mounted; None for a command in one that runs.
        directory: an empty directory in which the keeper makes its mount points, out of everybody's sight.
        note: a file that says, while the command runs, how its sandbox is entered; "" for none.
        life: a pipe's reading end: the command ends when all of its writing ends are closed.
        running: a sandbox to start the command in, instead of one of its own.

    Raises:
        Stopped: by a signal, before the command began.
        CowfsError: the sandbox could not be made.
    """
    why = "" if request.privileged else seccomp.why_not()
    if why:
        raise Unsupported(f"no filter of system calls: {why}", remedy="apt-get install libseccomp2, or --privileged")
    sys.stdout.flush()
    sys.stderr.flush()
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in FORWARDED}
    reading, writing = os.pipe()
    begun, begins = os.pipe()
    terminal = None
    try:
        with held():
            terminal = Terminal.wanted(request.terminal)
            ours = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.signal(_END, _stop)
                process.end_with_parent(ours, _END)
                for fd in (reading, begun, *([terminal.master] if terminal else [])):
                    os.close(fd)
                try:
                    keeper = _Keeper(request, tree, directory, note, running, _Pipes(writing, begins), terminal)
                    keeper.guarded()
                finally:
                    os._exit(1)
            _pass_on(pid, handlers)
        os.close(writing)
        os.close(begins)
        said = _attend(reading, begun, terminal, life, pid)
        _, status = os.waitpid(pid, 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if terminal is not None:
            terminal.close()
        os.close(reading)
        os.close(begun)
    return _how(said, status)


def _how(said: bytes, status: int) -> Ended:
    try:
        told = json.loads(said)
    except ValueError:
        raise CowfsError(f"the sandbox was ended by force (status {_status(status)})") from None
    if "signal" in told:
        raise Stopped(told["signal"])
    if "error" in told:
        raise error_of(told)
    return Ended(**told)


def _attend(told: int, begun: int, terminal: Terminal | None, life: int | None, pid: int) -> bytes:
    """Wait for the keeper's end, and carry a terminal's keys and text until then; what it told."""
    if terminal is not None:
        terminal.close_slave()
    said, watched = b"", {told, begun, *([terminal.master] if terminal else []), *([life] if life is not None else [])}
    while told in watched:
        ready, room, _ = select.select(
            [*watched, *(terminal.keys() if terminal else [])], terminal.typed() if terminal else [], []
        )
        if terminal is not None and room:
            terminal.write()
        if begun in ready:
            watched.discard(begun)
            if terminal is not None:
                terminal.started()
        if terminal is not None and not terminal.carry(ready):
            watched.discard(terminal.master)
        if life in ready:
            watched.discard(life)
            os.kill(pid, _END)
        if told in ready:
            part = os.read(told, _PIECE)
            said += part
            if not part:
                watched.discard(told)
    if terminal is not None:
        terminal.drain()
    return said


def _pass_on(pid: int, handlers: Mapping[int, Any]) -> None:
    """Pass signals on to a process, which is in another session: a terminal's come to us alone."""

    def send(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, send)


def _status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


@contextmanager
def _bound(place: int, target: str) -> Iterator[None]:
    mounts.mount(f"/proc/self/fd/{place}", target, "", mounts.MS_BIND)
    os.close(place)
    yield  # the mount goes on elsewhere, and ours ends with our namespace


class _Told(Exception):
    """Process 1 has told why there is no sandbox."""


class _Keeper:
    """The process between the caller and process 1 of the sandbox."""

    def __init__(
        self,
        request: Request,
        tree: Tree | Mounted | None,
        directory: str,
        note: str,
        running: beside.Running | None,
        pipes: _Pipes,
        terminal: Terminal | None,
    ) -> None:
        self._request = request
        self._tree = tree
        self._directory = directory
        self._note = note
        self._running = running
        self._pipes = pipes
        self._terminal = None if terminal is None else terminal.slave
        self._over = False
        self._group = cgroups.Group()

    def guarded(self) -> None:
        """Do it; how it ended goes to the pipe, whatever happens."""
        try:
            os.setsid()
            told: dict[str, object] = (self._beside() if self._running is not None else self._limited())._asdict()
        except _Told:
            return
        except Stopped as stopped:
            told = {"signal": stopped.number}
        except CowfsError as error:
            told = telling(error)
        except OSError as error:
            told = telling(CowfsError(f"{_text(error.filename) or 'the sandbox'}: {error.strerror}"))
        except BaseException as error:  # noqa: BLE001  (never return into the caller's code)
            told = telling(CowfsError(f"cowfs run failed in its child process: {type(error).__name__}: {error}"))
        os.write(self._pipes.told, json.dumps(told).encode())

    def _limited(self) -> Ended:
        """In a sandbox of its own, and in a control group where there are limits."""
        if not any(self._request.limits):
            return self._alone()
        try:
            pids = self._request.limits.pids
            limits = self._request.limits._replace(pids=None if pids is None else pids + 1)  # process 1 is ours
            self._group = cgroups.make(limits)
        except cgroups.NoGroup as error:
            raise Unsupported(
                f"memory, processors and processes cannot be limited here: {error}",
                remedy="run as root, or in a control group of your own: systemd-run --user --scope -p Delegate=yes cowfs run ...",
            ) from None
        try:
            ended = self._alone()
            return ended._replace(oom_killed=self._group.oom_kills() > 0)
        finally:
            self._group.remove()

    def _alone(self) -> Ended:
        """In a sandbox of its own."""
        tree = self._tree
        place = None
        try:
            if isinstance(tree, Mounted):
                beside.join(tree.pid)
                place = os.open(tree.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if host.has_cap(host.CAP_SYS_ADMIN):
                namespaces.unshare(namespaces.CLONE_NEWNS)
            elif not subids.try_enter() and not host.has_cap(host.CAP_SYS_ADMIN):
                namespaces.become_root()
            mounts.make_private()
        except OSError as error:
            raise Unsupported(
                f"no namespaces can be made: {error.strerror}",
                remedy="run as root; or allow user namespaces: cowfs doctor says how",
            ) from None
        target = beside.own_place(self._directory)
        if place is not None:
            tree = partial(_bound, place)
        assert callable(tree)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # a start can be broken off...
            with tree(target):
                signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # ... and from here on process 1 hears
                for number in signal.sigpending() & set(FORWARDED):
                    raise Stopped(number)
                return self._in_namespaces(target)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)

    def _in_namespaces(self, target: str) -> Ended:
        namespaces.unshare(namespaces.CLONE_NEWPID | namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWUTS)
        if self._request.network == "none":
            namespaces.unshare(namespaces.CLONE_NEWNET)
            namespaces.loopback_up()
        with suppress(OSError):  # a kernel that was built without
            namespaces.unshare(namespaces.CLONE_NEWCGROUP)
        made, makes = os.pipe()
        goes, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                process.end_with_parent(0, signal.SIGKILL)
                os.close(made)
                os.close(go)
                cgroups.join(self._group.doors)
                First(self._request, self._pipes, self._terminal).run(target, makes, goes)
            finally:
                os._exit(_NO_SANDBOX)
        os.close(self._pipes.begun)
        os.close(makes)
        os.close(goes)
        is_made = bool(os.read(made, 1))
        os.close(made)
        with beside.told(self._note if is_made else "", pid, self._request, self._group.doors):
            os.close(go)
            ended = self._waited(pid)
        if not is_made and not ended.timed_out:
            raise _Told
        return ended

    def _beside(self) -> Ended:
        """In a sandbox that runs already."""
        assert self._running is not None
        beside.enter(self._running)
        pid = os.fork()
        if pid == 0:
            try:
                process.end_with_parent(0, signal.SIGKILL)
                user = beside.user(self._running, self._request.user)
                become(self._request, user, self._terminal)
            except CowfsError as error:
                os.write(self._pipes.told, json.dumps(telling(error)).encode())
            finally:
                os._exit(_NO_SANDBOX)
        os.close(self._pipes.begun)
        return self._waited(pid)

    def _waited(self, pid: int) -> Ended:
        """Pass signals on until a process has ended, by itself, by its time, or with our caller."""

        def end(number: int, frame: object) -> None:
            self._over = True
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in FORWARDED}
        _pass_on(pid, handlers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        signal.signal(_END, end)
        signal.setitimer(signal.ITIMER_REAL, self._request.timeout or 0)
        try:
            _, status, used = os.wait4(pid, 0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return Ended(
            TIMED_OUT if self._over else _status(status),
            self._over,
            used.ru_utime + used.ru_stime,
            used.ru_maxrss << 10,
        )


def _text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes) else ""


class First:
    """Process 1 of the sandbox's pid namespace."""

    def __init__(self, request: Request, pipes: _Pipes, terminal: int | None) -> None:
        self._request = request
        self._pipes = pipes
        self._terminal = terminal

    def run(self, target: str, makes: int, goes: int) -> None:
        """Make the sandbox, run the command in it, and end with its status. Does not return where that went well."""
        try:
            user = confine.enter(target, self._request)
        except CowfsError as error:
            os.write(self._pipes.told, json.dumps(telling(error)).encode())
            return
        except OSError as error:
            where = _text(error.filename).removeprefix(target) or "its root"
            told = telling(CowfsError(f"the sandbox cannot be made: {where}: {error.strerror}"))
            os.write(self._pipes.told, json.dumps(told).encode())
            return
        os.close(self._pipes.told)
        os.write(makes, b"1")
        os.close(makes)
        os.read(goes, 1)  # our keeper has looked at our namespaces
        os.close(goes)
        confine.undumpable()
        pid = os.fork()
        if pid == 0:
            become(self._request, user, self._terminal)
        os.close(self._pipes.begun)
        if self._terminal is not None:
            os.close(self._terminal)

        def pass_on(number: int, frame: object) -> None:
            with suppress(ProcessLookupError):  # it has just ended, of the same signal perhaps
                os.kill(pid, number)

        for number in FORWARDED:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # those that came until now are passed on, too
        while True:
            try:
                ended, status = os.waitpid(-1, 0)
            except InterruptedError:
                continue
            if ended == pid:
                os._exit(_status(status))


def become(request: Request, user: users.User, terminal: int | None) -> NoReturn:
    """Turn this process into the command; the descriptor that tells it has begun closes with that."""
    command = request.command
    try:
        for number in (*FORWARDED, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        environment = {"HOME": user.home, **request.environment}
        confine.start(terminal, request, user)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.chdir(request.workdir)
        os.execvpe(command[0], list(command), environment)
    except FileNotFoundError as error:
        what = request.workdir if error.filename == request.workdir else command[0]
        _complain(f"{what}: not found in the snapshot", 127)
    except OSError as error:
        _complain(f"{_text(error.filename) or command[0]}: {error.strerror}", 126)
    except BaseException as error:  # noqa: BLE001  (never return into the caller's code)
        _complain(f"{type(error).__name__}: {error}", _NO_SANDBOX)


def _complain(text: str, status: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, f"cowfs run: {text}\n".encode(errors="backslashreplace"))
    os._exit(status)
