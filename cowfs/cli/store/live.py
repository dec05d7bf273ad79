"""`cowfs snapshot`, `rollback`, `squash` and `fork`: snapshots of active snapshots."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING
from cowfs.cli.common import Command
from cowfs.cli.output import print_json, shown
from cowfs.cli.progress import Bars
from cowfs.cli.store.args import add_store, check_new, info_as_json, open_store, set_labels
from cowfs.cli.store.snapshots import mount_as_json

if TYPE_CHECKING:
    import argparse

    from cowfs.model import Info


def _print_info(info: Info, *, as_json: str) -> int:
    if as_json:
        print_json(info_as_json(info), as_json)
    return 0


def _configure_snapshot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="an active snapshot, mounted or not")
    add("name", metavar="NAME", help="of the committed one")
    add("--label", action="append", default=[], metavar="K=V", help="keep a label with it; repeated")
    add_store(parser)


def _snapshot(args: argparse.Namespace) -> int:
    check_new(args.name)
    with open_store(args, create=False) as store:
        with Bars(args, f"snapshot {args.key}"):
            info = store.snapshot(args.key, args.name, labels=set_labels(args.label))
        return _print_info(info, as_json=args.json)


def _configure_rollback(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="an active snapshot, mounted or not")
    add("name", metavar="NAME", help="an ancestor of it, or a tag of one")
    add("--keep", metavar="NAME", help="first make a snapshot of what is discarded")
    add_store(parser)


def _rollback(args: argparse.Namespace) -> int:
    if args.keep is not None:
        check_new(args.keep)
    with open_store(args, create=False) as store:
        with Bars(args, f"rollback {args.key}"):
            info = store.rollback(args.key, args.name, keep=args.keep)
        return _print_info(info, as_json=args.json)


def _configure_squash(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a committed snapshot with exactly one child, and no tag")
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="merge nothing, and show the child that it would be merged into"
    )
    add_store(parser)


def _squash(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store, Bars(args, f"squash {args.name}"):
        info = store.squash(args.name, dry_run=args.dry_run)
    if args.dry_run and not args.json:
        print(shown(info.name))
    return _print_info(info, as_json=args.json)


def _configure_fork(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="a committed snapshot, or a tag")
    add("keys", nargs="+", metavar="KEY", help="keys of the new active snapshots")
    add("--size", metavar="S", help="limit on what each may hold itself: 512M, 2G")
    add("--inodes", metavar="N", help="limit on inodes: 10000, 100k")
    add_store(parser)


def _fork(args: argparse.Namespace) -> int:
    for key in args.keys:
        check_new(key, "key")
    with open_store(args, create=False) as store, Bars(args, f"fork {args.name}"):
        made = store.fork(args.name, *args.keys, size=args.size, inodes=args.inodes)
    if args.json:
        told = [{"key": key, "mounts": [mount_as_json(mount) for mount in mounts]} for key, mounts in made.items()]
        print_json(told, args.json)
    return 0


COMMANDS = {
    "snapshot": Command(
        _configure_snapshot,
        _snapshot,
        "Make what KEY holds at this instant a committed snapshot NAME. KEY goes on over it; processes that write to its\n"
        "mount are held for a moment and notice nothing.",
        ("cowfs snapshot work before-upgrade", "cowfs snapshot work v2 --label by=ci"),
    ),
    "rollback": Command(
        _configure_rollback,
        _rollback,
        "Put KEY back to an ancestor; what is newer is discarded. Under a mount, descriptors on files that changed\n"
        "answer ESTALE; all others go on.",
        ("cowfs rollback work before-upgrade", "cowfs rollback work before-upgrade --keep failed-upgrade"),
    ),
    "squash": Command(
        _configure_squash,
        _squash,
        "Merge NAME into its only child, and remove it. Mounts above it go on: their layers are switched at one instant.",
        ("cowfs squash before-upgrade",),
    ),
    "fork": Command(
        _configure_fork,
        _fork,
        "Prepare many active snapshots of one parent.",
        ("cowfs fork base sandbox-1 sandbox-2 sandbox-3 --size 1G",),
    ),
}
