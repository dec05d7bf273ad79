"""`cowfs send` and `receive`, and `copy --to ssh://...`: snapshots to the store of another host.

Strategy. Over ssh the other side is ``cowfs receive --ask``, which says of each snapshot what it has; so only missing layers are sent. Its
standard error: its last error is ours, everything else (host keys, banners) is passed on.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from urllib.parse import unquote, urlsplit

from cowfs._typed import IO, TYPE_CHECKING, BinaryIO, NamedTuple, cast
from cowfs.cli.common import Command
from cowfs.cli.output import print_json, shown
from cowfs.cli.progress import Bars
from cowfs.cli.store.args import add_store, open_store
from cowfs.errors import Corrupt, CowfsError, InvalidArgument, Unsupported

if TYPE_CHECKING:
    import argparse

    from cowfs.store import Store
    from cowfs.store.sending import Sent

__all__ = ["COMMANDS", "Place", "copy_over_ssh"]


# -- send and receive --------------------------------------------------------------------------------------------------


def _configure_send(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="a committed snapshot, or a tag; its ancestors go along")
    add("--since", metavar="ANCESTOR", help="leave out ANCESTOR and what is beneath it: the other store has them")
    add_store(parser, json=False)


def _send(args: argparse.Namespace) -> int:
    if sys.stdout.isatty():
        raise InvalidArgument("a stream does not go to a terminal", remedy="cowfs send NAME | ssh HOST cowfs receive")
    with open_store(args, create=False) as store, Bars(args) as bars:
        store.send(args.names, sys.stdout.buffer, since=args.since, progress=bars if bars.on else None)
    sys.stdout.buffer.flush()
    return 0


def _configure_receive(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--owners", choices=("fail", "xattr", "ignore"), default="fail",
        help="what to do about owners and devices that this user cannot make (default: fail)")  # fmt: skip
    add("--max-size", metavar="SIZE", help="refuse a layer that unpacks to more (default: 64G)")
    add(
        "--ask",
        action="store_true",
        help="answer on standard output what is here already, for 'cowfs copy --to ssh://...'",
    )
    add_store(parser)


def _receive(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from cowfs.archive import ApplyOptions
    from cowfs.model import parse_size

    if sys.stdin.isatty():
        raise InvalidArgument("a stream does not come from a terminal", remedy="cowfs send NAME | cowfs receive")
    options = ApplyOptions(owners=args.owners)
    if args.max_size:
        options = replace(options, max_bytes=parse_size(args.max_size))
    answers = sys.stdout.buffer if args.ask else None
    with open_store(args) as store, Bars(args) as bars:
        copied = store.receive(
            sys.stdin.buffer, answers=answers, options=options, progress=bars if bars.on and not args.ask else None
        )
    if not args.ask:
        print_names(args, copied)
    return 0


def print_names(args: argparse.Namespace, names: list[str] | tuple[str, ...]) -> None:
    """The layers that were copied."""
    if args.json:
        print_json([{"name": name} for name in names], args.json)
    else:
        for name in names:
            print(shown(name))


# -- copy over ssh -----------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A store of another host.

    Attributes:
        host: as ssh takes it, ``[user@]host``. port: "" for ssh's own choice. root: its directory; "" for the default one there.
    """

    host: str
    port: str
    root: str

    @classmethod
    def parse(cls, text: str) -> Place:
        """Of ``ssh://[user@]host[:port][/path]``; ``/~/path`` is below the home directory there.

        Raises:
            InvalidArgument: no such place.

        >>> Place.parse("ssh://me@box:2222/srv/store"), Place.parse("ssh://box/~/store").root
        (Place(host='me@box', port='2222', root='/srv/store'), 'store')
        """
        remedy = "ssh://[user@]host[:port]/path"
        try:
            parts = urlsplit(text)
            port = "" if parts.port is None else str(parts.port)
        except ValueError:
            raise InvalidArgument(f"not a place: {text!r}", remedy=remedy) from None
        user, host = unquote(parts.username or ""), parts.hostname or ""
        if parts.scheme != "ssh" or parts.query or parts.fragment or parts.password or not host:
            raise InvalidArgument(f"not a place: {text!r}", remedy=remedy)
        if any(
            word.startswith("-") or not word.isprintable() or set(word) & set(" @'\"$`\\")
            for word in (user, host)
            if word
        ):
            raise InvalidArgument(f"{text!r} names no host", remedy=remedy)
        root = unquote(parts.path)
        if "\0" in root or "\n" in root:
            raise InvalidArgument(f"not a place: {text!r}", remedy=remedy)
        root = "" if root == "/" else root.removeprefix("/~/") if root.startswith("/~/") else root
        return cls(f"{user}@{host}" if user else host, port, root)


def copy_over_ssh(args: argparse.Namespace, store: Store, bars: Bars) -> Sent:
    """Send ``args.names`` to the store ``args.to`` names.

    Raises:
        CowfsError: of either side.
        Unsupported: there is no ssh.
    """
    place = Place.parse(args.to)
    there = [*shlex.split(args.remote), "receive", "--ask"]
    if place.root:
        there += ["--root", place.root]
    if args.to_driver != "auto":
        there += ["--driver", args.to_driver]
    command = [
        *shlex.split(args.ssh),
        "-T",
        *(["-p", place.port] if place.port else []),
        "--",
        place.host,
        shlex.join(there),
    ]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise Unsupported(
            f"there is no {command[0]}", remedy="apt-get install openssh-client, or --ssh COMMAND"
        ) from None
    said = _Said(process.stderr)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pipe, answers = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
        sent = store.send(args.names, pipe, answers=answers, progress=bars if bars.on else None)
        process.stdin.close()
    except (BrokenPipeError, Corrupt) as error:
        raise _other_side(error, place.host, process, said) from None
    finally:
        _end(process)
    said.join()
    if process.returncode:
        raise _other_side(None, place.host, process, said)
    return sent


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:
            pass  # what was not taken is not missed
    process.wait()


class _Said(threading.Thread):
    """The standard error of the other side: errors of cowfs are kept, the rest is passed on."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        super().__init__(name="cowfs-ssh", daemon=True)
        assert pipe is not None
        self._pipe = pipe
        self.error = ""
        self.start()

    def run(self) -> None:
        for line in self._pipe:
            if line.startswith(b"cowfs: "):
                self.error = line.decode("utf-8", "replace").strip().removeprefix("cowfs: ")
            else:
                os.write(2, line)


def _other_side(error: BaseException | None, host: str, process: subprocess.Popen[bytes], said: _Said) -> BaseException:
    """The error of the other side where it ended, as its own message says; else the one that was seen here."""
    _end(process)
    said.join()
    if said.error:
        kinds = {kind.exit_code: kind for kind in CowfsError.__subclasses__()}
        return kinds.get(process.returncode, CowfsError)(f"{host}: {said.error}")
    if isinstance(error, Corrupt) and not process.returncode:
        return error
    return CowfsError(
        f"{host}: the other side ended with status {process.returncode}",
        remedy="--remote COMMAND where cowfs has another name there",
    )


COMMANDS = {
    "send": Command(
        _configure_send,
        _send,
        "Write committed snapshots, with their ancestors, to standard output, for 'cowfs receive'. Of a row store only the blocks that changed are"
        " sent. --since leaves out what the other store has; 'cowfs copy --to ssh://HOST/PATH' asks it.",
        (
            "cowfs send debian:12 | ssh backup cowfs receive --root /srv/store",
            "cowfs send v2 --since v1 > v2.cowfs",
            "cowfs send base app:1 | zstd > both.cowfs.zst",
        ),
    ),
    "receive": Command(
        _configure_receive,
        _receive,
        "Bring in what 'cowfs send' wrote to standard input; print the layers that were new here. Each layer is checked against its digest before it is"
        " there; those that came whole stay when the rest is cut.",
        ("cowfs receive < v2.cowfs", "zstdcat both.cowfs.zst | cowfs receive --root /srv/store"),
    ),
}
