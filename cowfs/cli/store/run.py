"""`cowfs run`: one command in a fresh snapshot, whose mount only the command sees.

Strategy. The process moves to a mount namespace of its own (as an ordinary user, to a user namespace in which it
is root), mounts the snapshot there with the usual server, and starts the command in new namespaces, in which there is
nothing but the snapshot (:mod:`cowfs.cli.store.confine`). In any case the namespaces end with their last process, and
so does the mount.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from cowfs.cli import common
from cowfs.cli.common import Command
from cowfs.cli.store.args import add_store, check_new, open_store
from cowfs.cli.store.terminal import Terminal
from cowfs.errors import CowfsError, FailedPrecondition, InvalidArgument, Unsupported
from cowfs.sys import process

if TYPE_CHECKING:
    import argparse

    from cowfs.store import Store

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENDED = signal.SIGALRM
"""Comes to the process in between when the command's time is over, or the one that the user sees was killed."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _configure_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("parent", metavar="PARENT", help="a committed snapshot, or a tag")
    add("--rm", action="store_true", help="remove the snapshot afterwards")
    add("--commit", metavar="NAME", help="commit it under a name when the command succeeds")
    add("--key", metavar="KEY", help="its key (default: run-... )")
    add("--size", metavar="S", help="limit on what it may hold: 512M, 2G")
    add("--inodes", metavar="N", help="limit on inodes")
    add("--env", action="append", default=[], metavar="K=V", help="environment of the command; repeated")
    add("--workdir", metavar="DIR", help="where it starts (default: what the image says, else /)")
    add("--network", choices=("host", "none"), default="host", help="the host's network (the default), or none")
    add("--privileged", action="store_true", help="keep all privilege, devices and /proc: for commands you trust")
    add(
        "--timeout",
        type=float,
        metavar="S",
        help="end it, and all that it started, after S seconds; the exit status is then 124",
    )
    add("-q", "--quiet", action="store_true", help="do not say which snapshot it was")
    add("--status-fd", type=int, metavar="N", help="write how it ended to a descriptor, as JSON")
    add_store(parser, json=False)
    parser.set_defaults(command=[])
    parser.usage = "cowfs run [options] PARENT [--] CMD [ARG ...]"
    _split_command(parser)


_FLAGS = {"--rm", "--privileged", "-h", "--help", *common.FLAGS}
"""Options of run and sh that take no value."""


def _split_command(parser: argparse.ArgumentParser) -> None:
    """The words from ``--`` on, or behind the first word that is no option, belong to the command, options or not."""
    known = parser.parse_known_args

    def parse_known_args(arguments: list[str], namespace: object = None) -> tuple[argparse.Namespace, list[str]]:
        at = _command_at(arguments)
        args, rest = known(arguments[:at])
        args.command = arguments[at + 1 :] if arguments[at : at + 1] == ["--"] else arguments[at:]
        return args, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


def _command_at(arguments: list[str]) -> int:
    """The position of the command, or of the ``--`` before it; the number of words if there is none.

    >>> _command_at(["--size", "1G", "base", "ls", "-l"]), _command_at(["base", "--rm", "--", "sh"]), _command_at(["base"])
    (3, 2, 1)
    """
    at, words = 0, 0
    while at < len(arguments):
        word = arguments[at]
        if word == "--":
            return at
        if word.startswith("-") and word != "-":
            at += 1 if word in _FLAGS or "=" in word else 2
            continue
        words += 1
        if words == 2:
            return at
        at += 1
    return len(arguments)


class _Stopped(KeyboardInterrupt):
    """A signal came before the command began."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> NoReturn:
    raise _Stopped(number)


@contextmanager
def _held() -> Iterator[None]:
    """Hold back all signals until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(args: argparse.Namespace) -> int:
    if args.rm and args.commit:
        raise InvalidArgument("--rm and --commit exclude each other")
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # nohup(1) ignores one
    before = {number: signal.signal(number, _stop) for number in heard}
    try:
        return _run_in_snapshot(args)
    except _Stopped as stopped:
        return 128 + stopped.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_in_snapshot(args: argparse.Namespace) -> int:
    if args.timeout is not None and args.timeout <= 0:
        raise InvalidArgument("a timeout is more than zero seconds")
    try:
        status = _started(args)
    except CowfsError as error:
        _tell(
            args,
            {
                "error": next(
                    each.__name__ for each in type(error).__mro__ if each.__module__ == CowfsError.__module__
                ),
                "message": error.message,
                "remedy": error.remedy,
                "code": error.exit_code,
            },
        )
        raise
    _tell(args, {"status": status})
    return status


def _tell(args: argparse.Namespace, what: dict[str, object]) -> None:
    """Write the exit status to the descriptor in the arguments."""
    if args.status_fd is not None:
        import json

        os.write(args.status_fd, json.dumps(what).encode())


def _started(args: argparse.Namespace) -> int:
    key = check_new(args.key or f"run-{secrets.token_hex(4)}", "key")
    if args.commit:
        check_new(args.commit)
    with open_store(args, create=False) as store:
        config = _config(store, args.parent)
        command = args.command or [*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())] or ["/bin/sh"]
        environment = _environment(config, args.env)
        where = args.workdir or config.get("WorkingDir") or "/"
        made = False
        try:
            with _held():
                store.prepare(key, args.parent, size=args.size, inodes=args.inodes)
                made = True
            status = _in_namespace(
                store, key, _Start(command, environment, where, args.network == "host", args.privileged, args.timeout)
            )
        except BaseException:
            if made:
                with _held():
                    _drop(store, key)
            raise
        if args.commit and status == 0:
            store.commit(key, args.commit)
        elif args.rm:
            _drop(store, key)
        elif not args.quiet:
            print(f"cowfs run: the snapshot is {key}", file=sys.stderr)
    return status


def _drop(store: Store, key: str) -> None:
    if store.exists(key):
        store.remove(key)


def _config(store: Store, parent: str) -> dict[str, Any]:
    """The ``config`` of an image (OCI image-spec, config.md), {} where there is none."""
    from cowfs.images.digests import parse_json

    document = store.config(parent)
    found = parse_json(document.encode(), f"the configuration of {parent!r}").get("config") if document else None
    config = found if isinstance(found, dict) else {}
    for key in ("Entrypoint", "Cmd", "Env"):
        listed = config.get(key) or []
        if not isinstance(listed, list) or not all(map(_can_be_passed, listed)):
            raise InvalidArgument(f"{key} of {parent!r} is no list of words that a command can be given")
    if not _can_be_passed(config.get("WorkingDir") or ""):
        raise InvalidArgument(f"WorkingDir of {parent!r} is no path")
    return config


def _can_be_passed(word: object) -> bool:
    """Whether a string of an image's configuration can be an argument, a variable or a path."""
    if not isinstance(word, str) or "\0" in word:
        return False
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        return False
    return True


def _environment(config: dict[str, Any], given: list[str]) -> dict[str, str]:
    environment = {"PATH": _PATH, "HOME": "/root", "TERM": os.environ.get("TERM", "dumb")}
    for pair in [*(config.get("Env") or ()), *given]:
        key, equals, value = str(pair).partition("=")
        if not equals or not key:
            raise InvalidArgument(f"not a variable: {pair!r}", remedy="write KEY=VALUE")
        environment[key] = value
    return environment


class Beside(NamedTuple):
    """A mount of the snapshot: its server, and its path in the server's mount namespace."""

    pid: int
    mountpoint: str


class _Start(NamedTuple):
    """The command and its environment: ``network`` means the host's, ``timeout`` is in seconds, ``beside`` is an
    existing mount."""

    command: list[str]
    environment: dict[str, str]
    where: str
    network: bool
    privileged: bool
    timeout: float | None = None
    beside: Beside | None = None


def _in_namespace(store: Store, key: str, start: _Start) -> int:
    """Mount, run and unmount in a child, since a process cannot leave its new namespaces. Returns the exit status.

    Raises:
        _Stopped: by a signal, before the command began.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    spec_target, terminal = "", None
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _FORWARDED}
    reading, writing = os.pipe()
    begun, begins = os.pipe()
    try:
        with _held():
            spec_target = tempfile.mkdtemp(prefix="cowfs-run-")
            terminal = Terminal.wanted()
            ours = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.signal(_ENDED, _stop)
                process.end_with_parent(ours, _ENDED)
                for fd in (reading, begun, *([terminal.master] if terminal else [])):
                    os.close(fd)
                code = 1
                try:
                    slave = terminal.slave if terminal else None
                    code = _guarded_child(writing, begins, store, key, spec_target, start, slave)
                finally:
                    os._exit(code)
            _pass_on(pid, handlers)
        os.close(writing)
        os.close(begins)
        if terminal is not None:
            terminal.close_slave()
            told = terminal.carry(reading, begun)
        else:
            with open(reading, "rb", closefd=False) as pipe:
                told = pipe.read()
        problem = told.decode("utf-8", "replace")
        _, status = os.waitpid(pid, 0)
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        if terminal is not None:
            terminal.close()
        os.close(reading)
        os.close(begun)
        if spec_target:
            os.rmdir(spec_target)
    if problem:
        kind, _, message = problem.partition(" ")
        if kind == "signal":
            raise _Stopped(int(message))
        failed = CowfsError(message)
        failed.exit_code = int(kind)  # type: ignore[misc]
        raise failed
    return _status(status)


def _pass_on(pid: int, handlers: Mapping[int, Any]) -> None:
    """Pass signals on to a process of another session, which a terminal's signals do not reach."""

    def send(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, send)


def _guarded_child(
    writing: int, begins: int, store: Store, key: str, target: str, start: _Start, terminal: int | None
) -> int:
    """The child; an error goes to the pipe. Returns the exit status in any case."""
    try:
        os.setsid()
        return _child(store, key, target, start, begins, terminal)
    except _Stopped as stopped:
        os.write(writing, f"signal {stopped.number}".encode())
    except CowfsError as error:
        os.write(writing, f"{error.exit_code} {error}".encode())
    except OSError as error:
        os.write(writing, f"1 {error.filename or 'namespace'}: {error.strerror}".encode())
    except BaseException:  # noqa: BLE001  (never return into the parent's code)
        os.write(writing, b"1 cowfs run failed in its child process")
    return 1


def _status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _child(store: Store, key: str, target: str, start: _Start, begins: int, terminal: int | None) -> int:
    from cowfs.sys import host, mounts, namespaces

    try:
        if start.beside is not None:
            _join(start.beside.pid)
            namespaces.unshare(namespaces.CLONE_NEWNS)
        elif host.has_cap(host.CAP_SYS_ADMIN):
            namespaces.unshare(namespaces.CLONE_NEWNS)
        else:
            namespaces.become_root()
        mounts.make_private()
    except OSError as error:
        raise Unsupported(f"no private namespace can be made: {error.strerror}", remedy="run as root") from None
    pid = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)  # a start can be broken off...
        if start.beside is None:
            store.mount(key, target)
        else:
            mounts.mount(start.beside.mountpoint, target, "", mounts.MS_BIND)
        signal.pthread_sigmask(
            signal.SIG_BLOCK, _FORWARDED
        )  # ... and from here on the command's first process gets them
        for number in signal.sigpending() & set(_FORWARDED):
            raise _Stopped(number)
        namespaces.unshare(namespaces.CLONE_NEWPID | namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWUTS)
        if not start.network:
            namespaces.unshare(namespaces.CLONE_NEWNET)
            namespaces.loopback_up()
        pid = os.fork()
        if pid == 0:
            code = 125
            process.end_with_parent(0, signal.SIGKILL)
            try:
                code = _init(target, start, begins, terminal)
            finally:
                os._exit(code)
        os.close(begins)
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _FORWARDED}
        _pass_on(pid, handlers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        with _bounded(pid, start.timeout) as ended_by_us:
            _, status = os.waitpid(pid, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        if start.beside is None:  # else the mount goes on, and this one ends with its namespace
            _unmount(target)
    return TIMED_OUT if ended_by_us else _status(status)


TIMED_OUT = 124
"""The exit status of a command that a timeout ended, as of timeout(1)."""


@contextmanager
def _bounded(pid: int, timeout: float | None) -> Iterator[list[bool]]:
    """End process 1 of the command's namespace, and with it all others in it, after a time or with this process's
    parent; the list is then not empty."""
    ended: list[bool] = []

    def end(number: int, frame: object) -> None:
        ended.append(True)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    signal.signal(_ENDED, end)
    signal.setitimer(signal.ITIMER_REAL, timeout or 0)
    try:
        yield ended
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _join(pid: int) -> None:
    """Move into the mount namespace of a mount's server, and into the user namespace that it belongs to."""
    from cowfs.sys import namespaces

    if os.stat(f"/proc/{pid}/ns/user").st_ino != os.stat("/proc/self/ns/user").st_ino:
        namespaces.join(pid, "user")
    namespaces.join(pid, "mnt")


def _unmount(target: str) -> None:
    """Unmount, if there is a mount."""
    from cowfs.mounting import client, mountpoint

    if mountpoint.find(target) is not None:
        client.umount(target)


def _init(target: str, start: _Start, begins: int, terminal: int | None) -> int:
    """Process 1 of the pid namespace: starts the command, passes signals on, collects orphans."""
    from cowfs.cli.store import confine

    try:
        confine.enter(target, privileged=start.privileged)
    except OSError as error:
        print(f"cowfs run: {error.filename or target}: {error.strerror}", file=sys.stderr)
        return 125
    pid = os.fork()
    if pid == 0:
        _become(start, terminal)
    os.close(begins)
    if terminal is not None:
        os.close(terminal)

    def pass_on(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):  # the process has just ended, perhaps by the same signal
            os.kill(pid, number)

    for number in _FORWARDED:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)  # pass on the signals held back until now, too
    while True:
        try:
            ended, status = os.waitpid(-1, 0)
        except InterruptedError:
            continue
        if ended == pid:
            return _status(status)


def _become(start: _Start, terminal: int | None) -> NoReturn:
    """Turn this process into the command; that closes the descriptor whose end means that it has begun."""
    from cowfs.cli.store import confine

    command = start.command
    for number in (*_FORWARDED, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    try:
        confine.start(terminal, privileged=start.privileged, network=start.network)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        os.chdir(start.where)
        os.execvpe(command[0], command, start.environment)
    except FileNotFoundError as error:
        what = start.where if error.filename == start.where else command[0]
        print(f"cowfs run: {what}: not found in the snapshot", file=sys.stderr)
        os._exit(127)
    except OSError as error:
        print(f"cowfs run: {command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(126)


# -- sh ----------------------------------------------------------------------------------------------------------------


def _configure_sh(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="an active snapshot or a view, mounted or not")
    add("--env", action="append", default=[], metavar="K=V", help="environment of the command; repeated")
    add("--workdir", metavar="DIR", help="where it starts (default: what the image says, else /)")
    add("--network", choices=("host", "none"), default="host", help="the host's network (the default), or none")
    add("--privileged", action="store_true", help="keep all privilege, devices and /proc: for commands you trust")
    add_store(parser, json=False)
    parser.set_defaults(command=[])
    parser.usage = "cowfs sh [options] KEY [[--] CMD [ARG ...]]"
    _split_command(parser)


def _sh(args: argparse.Namespace) -> int:
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heard}
    try:
        with open_store(args, create=False) as store:
            config = _config(store, args.key)
            start = _Start(
                args.command or ["/bin/sh"],
                _environment(config, args.env),
                args.workdir or config.get("WorkingDir") or "/",
                args.network == "host",
                args.privileged,
                beside=_beside(store, args.key),
            )
            return _in_namespace(store, args.key, start)
    except _Stopped as stopped:
        return 128 + stopped.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _beside(store: Store, key: str) -> Beside | None:
    """The existing mount of a snapshot.

    Raises:
        FailedPrecondition: a committed snapshot.
    """
    from cowfs.model import Kind

    if store.stat(key).kind is Kind.COMMITTED:
        raise FailedPrecondition(f"{key!r} is committed", remedy=f"cowfs run {key} --rm -- sh: a fresh snapshot of it")
    told = store.mount_of(key)
    return None if told is None else Beside(*told)


COMMANDS = {
    "sh": Command(
        _configure_sh,
        _sh,
        "Run a shell, or a command, in a snapshot that is there, as cowfs run would; also beside what runs in it: the files are the same, the processes"
        " of each other are not seen. Its exit status is passed on.",
        ("cowfs sh work", "cowfs sh work -- cat /etc/os-release", "cowfs sh --network none work make test"),
    ),
    "run": Command(
        _configure_run,
        _run,
        "Run a command in a fresh snapshot, in namespaces of its own; its exit status is passed on. The snapshot stays,"
        " unless --rm or --commit says otherwise.",
        (
            "cowfs run debian:12 apt-get --version",
            "cowfs run --rm --timeout 60 --network none debian:12 sh -c 'make test'",
            "cowfs run debian:12 --rm --size 100M -- sh",
            "cowfs run debian:12 --commit with-python -- apt-get install -y python3",
        ),
    ),
}
