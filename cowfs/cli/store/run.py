"""`cowfs run` and `cowfs sh`: one command in a fresh snapshot, or in one that is there.

Strategy: the options become a request, and :mod:`cowfs.store.sandboxes` does it; what happens to the snapshot afterwards is decided here.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from cowfs._typed import TYPE_CHECKING
from cowfs.cli.common import Command
from cowfs.cli.store.args import add_store, check_new, open_store
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from cowfs.sandbox.process import Ended
    from cowfs.sandbox.request import Request
    from cowfs.store import Store


def _configure_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("parent", metavar="PARENT", help="a committed snapshot, or a tag")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--rm", action="store_true", help="remove the snapshot afterwards")
    end.add_argument("--keep", action="store_true", help="leave it there (the default)")
    add("--commit", metavar="NAME", help="commit it under a name when the command succeeds")
    add("--key", metavar="KEY", help="its key (default: run-... )")
    add("--size", metavar="S", help="limit on what it may hold: 512M, 2G")
    add("--inodes", metavar="N", help="limit on inodes")
    _add_sandbox(parser)
    add(
        "--timeout",
        type=float,
        metavar="S",
        help="end it, and all that it started, after S seconds; the exit status is then 124",
    )
    add(
        "--mount-type",
        choices=("fuse", "kernel"),
        help="cowfs's own server, or the kernel's overlayfs (default: the kernel's for an ordinary user without a limit, where it can)",
    )
    add("-q", "--quiet", action="store_true", help="do not say which snapshot it was")
    add_store(parser)
    parser.set_defaults(command=[])
    parser.usage = "cowfs run [options] PARENT [--] CMD [ARG ...]"
    _split_command(parser)


def _add_sandbox(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-v",
        "--bind",
        action="append",
        default=[],
        metavar="SRC:DST[:ro]",
        help="a file or directory of the host that it sees, to read and write or to read only; repeated",
    )
    add(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="K[=V]",
        help="environment of the command; without a value this one's; repeated",
    )
    add("-u", "--user", metavar="USER[:GROUP]", help="who it runs as (default: what the image says, else root)")
    add("-w", "--workdir", metavar="DIR", help="where it starts (default: what the image says, else /)")
    add(
        "--network",
        choices=("none", "host"),
        default="none",
        help="none: only a loopback interface of its own (the default); or the host's",
    )
    add("--memory", metavar="S", help="the most that it and all that it starts have in memory and swap: 512M, 2G")
    add("--cpus", metavar="N", help="processors that they use at once: 0.5, 2")
    add("--pids-limit", metavar="N", help="processes and threads that they are at once")
    add("--privileged", action="store_true", help="keep all privilege, devices and /proc: for commands you trust")
    add("-i", "--interactive", action="store_true", help="hand on standard input (it always is)")
    add("-t", "--tty", action="store_true", help="give it a terminal (default: where there is one)")


_FLAGS = frozenset(
    (
        "--json",
        "--jsonl",
        "--rm",
        "--keep",
        "--privileged",
        "-q",
        "--quiet",
        "-D",
        "--debug",
        "-i",
        "--interactive",
        "-t",
        "--tty",
        "-h",
        "--help",
    )
)
"""Options of run and sh that take no value."""


def _split_command(parser: argparse.ArgumentParser) -> None:
    """The words from ``--`` on, or behind the first word that is no option, belong to the command, options or not."""
    known = parser.parse_known_args

    def parse_known_args(arguments: list[str], namespace: object = None) -> tuple[argparse.Namespace, list[str]]:
        at = _command_at(arguments, _FLAGS)
        args, rest = known(arguments[:at])
        args.command = arguments[at + 1 :] if arguments[at : at + 1] == ["--"] else arguments[at:]
        return args, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


def _command_at(arguments: list[str], flags: Collection[str]) -> int:
    """Where the command begins, or the ``--`` before it; the number of words where there is none.

    Args:
        flags: options that take no value.

    >>> _command_at(["--size", "1G", "base", "ls", "-l"], ()), _command_at(["base", "--rm", "--", "sh"], ["--rm"])
    (3, 2)
    >>> _command_at(["-itu", "1", "base", "sh"], ["-i", "-t"]), _command_at(["-itu1", "base", "sh"], ["-i", "-t"])
    (3, 2)
    """
    at, words = 0, 0
    while at < len(arguments):
        word = arguments[at]
        if word == "--":
            return at
        if word.startswith("-") and word != "-":
            at += 2 if _takes_next(word, flags) else 1
            continue
        words += 1
        if words == 2:
            return at
        at += 1
    return len(arguments)


def _takes_next(word: str, flags: Collection[str]) -> bool:
    """Whether an option's value is the next word: not where it is a flag, has a value already, or is several flags in one."""
    if word.startswith("--"):
        return "=" not in word and word not in flags
    letters = word[1:]
    while letters and f"-{letters[0]}" in flags:
        letters = letters[1:]
    return len(letters) == 1


def _request(
    store: Store, name: str, args: argparse.Namespace, timeout: float | None, default: list[str] | None
) -> Request:
    from cowfs.sandbox.request import pairs_of
    from cowfs.store.sandboxes import make_request

    return make_request(
        store.config(name), name, args.command, default=default, network=args.network, binds=args.bind, env=pairs_of(args.env), user=args.user,
        workdir=args.workdir, privileged=args.privileged, timeout=timeout, terminal=True if args.tty else None,
        memory=args.memory, cpus=args.cpus, pids_limit=args.pids_limit,
    )  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    from cowfs.sandbox import process

    if args.rm and args.commit:
        raise InvalidArgument("--rm and --commit exclude each other")
    process.open_streams()
    try:
        with process.stop_on_signals():
            return _run_in_snapshot(args)
    except process.Stopped as stopped:
        return 128 + stopped.number


def _run_in_snapshot(args: argparse.Namespace) -> int:
    from cowfs.sandbox import process
    from cowfs.sandbox.request import check_timeout
    from cowfs.store.sandboxes import run_in

    key = check_new(args.key or f"run-{secrets.token_hex(4)}", "key")
    if args.commit:
        check_new(args.commit)
    check_timeout(args.timeout)
    with open_store(args, create=False, ranges=True) as store:
        request = _request(store, args.parent, args, args.timeout, None)
        made = False
        try:
            with process.held():
                store.prepare(key, args.parent, size=args.size, inodes=args.inodes)
                made = True
            with _output_apart(args):
                ended = run_in(store, key, request, mount_type=args.mount_type)
            if ended.oom_killed and not args.quiet:
                print("cowfs run: a process was ended at the limit of memory (--memory)", file=sys.stderr)
            told = _result(store, key, ended) if args.json else None
        except BaseException:
            if made:
                with process.held():
                    _drop(store, key)
            raise
        if args.commit and ended.status == 0:
            store.commit(key, args.commit)
        elif args.rm:
            _drop(store, key)
        elif not args.quiet:
            print(f"cowfs run: the snapshot is {key}", file=sys.stderr)
    if told is not None:
        from cowfs.cli.output import print_json

        print_json({**told, "committed": args.commit if ended.status == 0 else None}, args.json)
    return ended.status


@contextmanager
def _output_apart(args: argparse.Namespace) -> Iterator[None]:
    """With --json, --jsonl or --format standard output is the result's alone: the command's own goes to standard error."""
    if not args.json:
        yield
        return
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _ended(key: str, ended: Ended) -> dict[str, Any]:
    """The end of a command as programs read it, in the words of :class:`cowfs.store.running.RunResult`."""
    return {
        "key": key,
        "returncode": ended.status,
        "timed_out": ended.timed_out,
        "cpu_seconds": ended.cpu_seconds,
        "peak_memory": ended.peak_memory,
        "oom_killed": ended.oom_killed,
    }


def _result(store: Store, key: str, ended: Ended) -> dict[str, Any]:
    """The result of a command in a fresh snapshot, with what that holds now."""
    from cowfs.cli.output import change_as_json

    used = store.usage(key)
    return {
        **_ended(key, ended),
        "usage": {"bytes": used.bytes, "inodes": used.inodes},
        "changes": [change_as_json(change) for change in store.diff(key)],
    }


def _drop(store: Store, key: str) -> None:
    with suppress(NotFound):
        store.remove(key)


# -- sh ----------------------------------------------------------------------------------------------------------------


def _configure_sh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "key", metavar="KEY", help="an active snapshot or a view, mounted or not, with a command in it or not"
    )
    _add_sandbox(parser)
    add_store(parser)
    parser.set_defaults(command=[])
    parser.usage = "cowfs sh [options] KEY [[--] CMD [ARG ...]]"
    _split_command(parser)


def _sh(args: argparse.Namespace) -> int:
    from cowfs.sandbox import process
    from cowfs.store.sandboxes import run_beside

    process.open_streams()
    try:
        with process.stop_on_signals(), open_store(args, create=False, outside=True) as store:
            request = _request(store, args.key, args, None, ["/bin/sh"])
            with _output_apart(args):
                ended = run_beside(store, args.key, request)
    except process.Stopped as stopped:
        return 128 + stopped.number
    if args.json:
        from cowfs.cli.output import print_json

        print_json(_ended(args.key, ended), args.json)
    return ended.status


# -- unshare -----------------------------------------------------------------------------------------------------------


def _configure_unshare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="...", metavar="CMD [ARG ...]", help="the command (default: $SHELL)")


def _unshare(args: argparse.Namespace) -> int:
    from cowfs.cli import config
    from cowfs.sandbox import subids
    from cowfs.store.opening import default_root

    if os.geteuid() == 0:
        raise FailedPrecondition("this user is root already", remedy="leave out cowfs unshare")
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    words = words or [os.environ.get("SHELL") or "/bin/sh"]
    root = config.root(None) or default_root()  # in there, another one would be the default
    if not _join_daemon():
        subids.enter()
    try:
        os.execvpe(words[0], words, {**os.environ, "COWFS_ROOT": os.path.abspath(root)})
    except OSError as error:
        raise NotFound(f"{words[0]}: {error.strerror}", remedy="a command that is in PATH") from None


def _join_daemon() -> bool:
    """Join the namespaces of this user's daemon, whose containers are mounted there. Returns whether there is one."""
    from cowfs.mounting.protocol import run_directory
    from cowfs.service import rootless

    return rootless.join(run_directory())


COMMANDS = {
    "sh": Command(
        _configure_sh,
        _sh,
        "Run a shell, or a command, in a snapshot that is there. Where a command of cowfs run is in it, this one comes into its sandbox: same"
        " processes, network and binds. Its exit status is passed on.",
        ("cowfs sh work", "cowfs sh work -- cat /etc/os-release", "cowfs sh -u nobody --network host work make test"),
    ),
    "unshare": Command(
        _configure_unshare,
        _unshare,
        "Start a command as root of a user namespace in which this ordinary user has the ids of /etc/subuid and /etc/subgid: verbs of cowfs in there"
        " make and read files of many owners, with the same store. Where this user's cowfs serve has one, it is that namespace, with the mounts of its containers.",
        (
            "cowfs unshare cowfs import rootfs.tar base",
            "cowfs unshare cowfs run base --commit more -- apt-get install -y git",
            "cowfs unshare",
        ),
    ),
    "run": Command(
        _configure_run,
        _run,
        "Run a command in a fresh snapshot, in a sandbox (docs/security.md says what that isolates); its exit status is passed on."
        " The snapshot stays, unless --rm or --commit says otherwise.",
        (
            "cowfs run debian:12 apt-get --version",
            "cowfs run --rm --timeout 60 -v $PWD:/src:ro -w /src debian:12 sh -c 'make test'",
            "cowfs run debian:12 --rm --size 100M -- sh",
            "cowfs run --rm --memory 512M --cpus 0.5 --pids-limit 100 debian:12 sh -c 'make test'",
            "cowfs run --json --rm debian:12 touch /made",
            "cowfs run debian:12 --network host --commit with-python -- apt-get install -y python3",
        ),
    ),
}
