"""`cowfs prune`, `rename`, `copy`, `doctor` and `logs`."""

from __future__ import annotations

import os
import sys

from cowfs._typed import TYPE_CHECKING
from cowfs.cli import config
from cowfs.cli.common import Command
from cowfs.cli.output import note, print_items, print_json, print_table, shown
from cowfs.cli.progress import Bars
from cowfs.cli.store.args import add_json, add_store, check_new, open_store
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.model import format_size

if TYPE_CHECKING:
    import argparse

_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def age(text: str) -> float:
    """Seconds from ``30m``, ``12h``, ``7d``, ``2w``.

    Raises:
        InvalidArgument: not an age.
    """
    number, unit = text[:-1], text[-1:]
    if unit not in _AGES or not number.isdecimal():
        raise InvalidArgument(f"not an age: {text!r}", remedy="write 30m, 12h, 7d or 2w")
    return int(number) * _AGES[unit]


# -- prune -------------------------------------------------------------------------------------------------------------


def _configure_prune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("filters", nargs="*", metavar="FILTER", help="only what matches, as of cowfs ls: name~=^ci-  labels.team==web")
    add(
        "--older", metavar="AGE", default="0s", help="only what was made and changed at least so long ago: 30m, 12h, 7d"
    )
    add("--keep", type=int, default=0, metavar="N", help="leave the newest N of what could go")
    add(
        "--all",
        action="store_true",
        help="also snapshots with names of their own that have neither tag nor child, and all keys that are not in use",
    )
    add("-n", "--dry-run", action="store_true", help="remove nothing, and show what would go")
    add_store(parser)


def _prune(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store, Bars(args, "prune"):
        done = store.prune(args.filters, every=args.all, older=age(args.older), keep=args.keep, dry_run=args.dry_run)
    if args.json:
        told = {"removed": list(done.names), "bytes": done.bytes, "dry_run": args.dry_run,
                "kept": [{"name": name, "why": why} for name, why in done.kept]}  # fmt: skip
        print_json(told, args.json)
        return 0
    for name in done.names:
        print(shown(name))
    for name, why in done.kept:
        note(args, f"cowfs prune: left {shown(name)}: {shown(why)}")
    verb = "would remove" if args.dry_run else "removed"
    note(args, f"{verb} {len(done.names)} snapshots, {format_size(done.bytes)}")
    return 0


# -- rename, copy ------------------------------------------------------------------------------------------------------


def _configure_rename(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", help="a key that is not mounted, a name or a tag")
    parser.add_argument("new", metavar="NEW", help="what it is called from now on")
    add_store(parser)


def _rename(args: argparse.Namespace) -> int:
    check_new(args.new)
    with open_store(args, create=False) as store:
        store.rename(args.old, args.new)
    if args.json:
        print_json({"old": args.old, "name": args.new}, args.json)
    return 0


def _configure_copy(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="a committed snapshot, or a tag")
    add(
        "--to",
        required=True,
        metavar="STORE",
        help="the directory of the other store, made when it is not there; or ssh://[user@]host[:port]/path",
    )
    add("--to-driver", default="auto", metavar="NAME", help="its backend, when it is new (default: the best there)")
    ssh = os.environ.get("COWFS_SSH") or "ssh"
    add("--ssh", default=ssh, metavar="COMMAND", help="what connects to another host (default: $COWFS_SSH, else ssh)")
    add("--remote", default="cowfs", metavar="COMMAND", help="how cowfs is called there (default: cowfs)")
    add_store(parser)


def _copy(args: argparse.Namespace) -> int:
    from cowfs.store import Store

    copied: list[str] = []
    fsync = config.fsync()
    with open_store(args, create=False) as store, Bars(args) as bars:
        for name in args.names:
            store.resolve(name)  # a missing snapshot makes no store
        if args.to.startswith("ssh://"):
            from cowfs.cli.store.send import copy_over_ssh

            copied += copy_over_ssh(args, store, bars).copied or ()
        else:
            with Store.open(args.to, driver=args.to_driver, fsync=fsync) as other:
                for name in args.names:
                    copied += store.copy_to(name, other, progress=bars if bars.on else None)
    if args.json:
        print_json([{"name": name} for name in copied], args.json)
    else:
        for name in copied:
            print(shown(name))
    return 0


# -- doctor ------------------------------------------------------------------------------------------------------------


def _configure_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", metavar="DIR", help="where the store is, or would be")
    add_json(parser)


def _doctor(args: argparse.Namespace) -> int:
    from cowfs.store.doctor import examine
    from cowfs.store.opening import default_root

    found = list(examine(os.path.abspath(config.root(args.root) or default_root())))
    missing = any(one.state == "missing" for one in found)
    if args.json:
        print_items((one._asdict() for one in found), args.json)
    elif not args.quiet:
        print_table(("", "ABOUT", "FOUND"), [(one.state, one.about, shown(one.what)) for one in found])
        remedies = [one for one in found if one.remedy]
        if remedies:
            print()
        for one in remedies:
            print(f"{one.about}: {shown(one.remedy)}")
    return 8 if missing else 0


# -- logs --------------------------------------------------------------------------------------------------------------


def _configure_logs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("mount", metavar="MNT|KEY", help="a mount point, or a snapshot of the store that is mounted")
    add("-n", "--lines", type=int, metavar="N", help="the last N lines only")
    add("-f", "--follow", action="store_true", help="go on with what is written from now on, until the mount ends")
    add_store(parser)


def _logs(args: argparse.Namespace) -> int:
    path = _log_of(args)
    if not path:
        raise FailedPrecondition(f"{args.mount} keeps no log", remedy="mount it with --log FILE")
    try:
        file = open(path, "rb")  # noqa: SIM115  closed by the with below
    except FileNotFoundError:
        raise NotFound(f"the log {path} is gone") from None
    with file:
        lines = file.read().splitlines(keepends=True)
        _write_lines(args, lines if args.lines is None else lines[max(0, len(lines) - max(0, args.lines)) :])
        if args.follow:
            _follow(args, file)
    return 0


def _write_lines(args: argparse.Namespace, lines: list[bytes]) -> None:
    """Print lines as they are, or each as an object."""
    if args.json:
        told = ({"line": line.rstrip(b"\n").decode("utf-8", "surrogateescape")} for line in lines)
        print_items(told, "lines" if args.json == "array" and args.follow else args.json)
        sys.stdout.flush()
        return
    sys.stdout.buffer.writelines(lines)
    sys.stdout.buffer.flush()


def _log_of(args: argparse.Namespace) -> str:
    from cowfs.cli.common import is_path
    from cowfs.cli.store.args import known_in_store
    from cowfs.mounting import client

    if not is_path(args.mount) and known_in_store(args, args.mount):
        with open_store(args, create=False) as store:
            return str(store.handle(args.mount).ask("info")["log"])
    return str(client.attach(args.mount).ask("info")["log"])


def _follow(args: argparse.Namespace, file: object) -> None:
    import time
    from typing import BinaryIO, cast

    from cowfs.errors import CowfsError

    stream = cast("BinaryIO", file)
    while True:
        piece = stream.read()
        if piece:
            _write_lines(args, piece.splitlines(keepends=True))
            continue
        try:
            _log_of(args)
        except CowfsError:
            return
        time.sleep(0.2)


COMMANDS = {
    "prune": Command(
        _configure_prune,
        _prune,
        "Remove what nothing needs: layers of images without tag and child, and what runs left. Never what is mounted or in use, and nothing"
        " that the service or a container engine made. --all goes further.",
        ("cowfs prune --dry-run", "cowfs prune --older 7d", "cowfs prune --all --keep 5 'name~=^ci-'"),
    ),
    "rename": Command(
        _configure_rename,
        _rename,
        "Give a key, a name or a tag another one. Its children stay.",
        ("cowfs rename work work-old", "cowfs rename app:1 app:stable"),
    ),
    "copy": Command(
        _configure_copy,
        _copy,
        "Copy committed snapshots with their ancestors to another store, whatever its driver; layers that it has are not copied again."
        " Over ssh the other host needs cowfs, and only what it lacks is sent. Prints the layers that were copied.",
        (
            "cowfs copy base --to /mnt/backup/store",
            "cowfs copy debian:12 app:1 --to ./store2 --to-driver vfs",
            "cowfs copy v2 --to ssh://backup/srv/store",
        ),
    ),
    "doctor": Command(
        _configure_doctor,
        _doctor,
        "Look at what this host and user can do with cowfs, and say how to get what is missing. The exit status is 8 where something is"
        " missing that cowfs is for.",
        ("cowfs doctor", "cowfs doctor --root /srv/store", "cowfs doctor --json"),
    ),
    "logs": Command(
        _configure_logs,
        _logs,
        "Print what the server of a mount wrote: its diagnostics, and a trace where it was mounted with --trace.",
        ("cowfs logs /mnt/rootfs", "cowfs logs work --follow", "cowfs logs /mnt/rootfs -n 20"),
    ),
}
