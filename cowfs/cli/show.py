"""`cowfs mounts`, `diff` and `usage`."""

from __future__ import annotations

import os

from cowfs.cli.common import Command, is_path
from cowfs.cli.output import (
    Tree,
    change_as_json,
    change_line,
    count_or,
    print_items,
    print_json,
    print_table,
    shown,
    size_or,
)
from cowfs.cli.store.args import add_store, known_in_store, look_at_store, open_store, template
from cowfs.errors import InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from cowfs.cli.late import Late
    from cowfs.model import Change
    from cowfs.mounting.client import MountHandle, MountStatus


# -- mounts ------------------------------------------------------------------------------------------------------------


def _configure_mounts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", nargs="?", metavar="KEY", help="instead: how an active snapshot or a view of the store would be mounted")
    add("--mount-type", choices=("kernel", "fuse"), help="of a KEY's records (default: what fits)")
    add("-q", "--quiet", action="store_true", help="mount points only")
    add("--everywhere", action="store_true", help="also mounts of other mount namespaces (containers)")
    add_store(parser)


def _mounts(args: argparse.Namespace) -> int:
    from cowfs.mounting import client

    if args.key is not None:
        return _records(args)
    found = client.mounts(everywhere=args.everywhere)
    if args.json:
        print_json([_mount_as_json(status) for status in found], args.json)
    elif args.quiet:
        for status in found:
            print(shown(status.mountpoint))
    elif found:
        print_table(
            ("MOUNT POINT", "LAYERS", "UPPER", "USED", "LIMIT", "INODES", "LIMIT", "PID"),
            [_mount_row(status) for status in found],
        )
    return 0


def _records(args: argparse.Namespace) -> int:
    from cowfs.cli.store.snapshots import mount_as_json, mount_line

    with open_store(args, create=False) as store:
        records = store.mounts(args.key, mount_type=args.mount_type)
    if args.json:
        print_json([mount_as_json(record) for record in records], args.json)
    else:
        for record in records:
            print(mount_line(record))
    return 0


def _mount_row(status: MountStatus) -> tuple[str, ...]:
    where = shown(status.mountpoint) + ("" if status.here else " (another namespace)")
    if not status.alive:
        return (where, "?", "server is gone: cowfs umount clears it", "", "", "", "", "")
    if not status.answers:
        return (where, "?", "server does not answer: cowfs umount --force ends it", "", "", "", "", "")
    if status.details.get("engine") == "kernel":
        return (where, "-", shown(status.upper or "read-only"), "-", "-", "-", "-", "kernel")
    if not status.socket:
        return (where, "?", "another user's", "", "", "", "", "")
    return (
        where,
        str(len(status.layers)),
        shown(status.upper or "read-only"),
        size_or(status.usage.bytes) if status.usage is not None else "...",
        size_or(status.limit.bytes),
        count_or(status.usage.inodes) if status.usage is not None else "...",
        count_or(status.limit.inodes),
        "?" if status.pid is None else str(status.pid),
    )


def _mount_as_json(status: MountStatus) -> dict[str, object]:
    return {
        **status.details,
        "mountpoint": status.mountpoint,
        "alive": status.alive,
        "answers": status.answers,
        "here": status.here,
    }


# -- usage -------------------------------------------------------------------------------------------------------------


def _configure_usage(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("mountpoint", metavar="MNT|KEY", help="a mount point, or a snapshot of the store")
    add_store(parser)


def _usage(args: argparse.Namespace) -> int:
    if not is_path(args.mountpoint) and known_in_store(args, args.mountpoint):
        return print_store_usage(args)
    if _is_of_a_store(args):
        return print_store_usage(args)
    from cowfs.mounting import client

    return print_usage(client.attach(args.mountpoint), args)


def _is_of_a_store(args: argparse.Namespace) -> bool:
    """Whether the kernel serves a store's snapshot at the mount point; if so, the arguments get its key and store."""
    from cowfs.mounting import client, mountpoint

    where = mountpoint.resolve(args.mountpoint)
    for status in client.kernel_mounts():
        if status.mountpoint == where and status.details["store"]:
            args.root = status.details["store"]
            with open_store(args, create=False) as store:
                row = store.index.find_id(status.details["id"])
            if row is not None:
                args.mountpoint = row.name
                return True
    return False


def print_store_usage(args: argparse.Namespace) -> int:
    """Use and limit of a snapshot of the store."""
    engine = None
    with look_at_store(args) as look:
        row = look.resolve(args.mountpoint)
        if row.usage is not None and row.kind.value != "active":
            used, limit = row.usage, row.limit
        else:
            from cowfs.cli.late import Late  # what the record tells is told without it

            with Late(args, f"usage {args.mountpoint}"):
                store = look.store()
                used, limit = store.usage(args.mountpoint), store.limit(args.mountpoint)
                engine = store.limit_engine(args.mountpoint)
    if args.json:
        print_json(
            {
                "name": args.mountpoint,
                "usage": {"bytes": used.bytes, "inodes": used.inodes},
                "limit": {"bytes": limit.bytes, "inodes": limit.inodes},
                "engine": engine,
            },
            args.json,
        )
        return 0
    rows = [
        ("bytes", size_or(used.bytes), size_or(limit.bytes), _percent(used.bytes, limit.bytes)),
        ("inodes", count_or(used.inodes), count_or(limit.inodes), _percent(used.inodes, limit.inodes)),
    ]
    print_table(("", "USED", "LIMIT", "USE%"), rows)
    if engine is not None:
        print(f"the limit is held by {engine}")
    return 0


def print_usage(handle: MountHandle, args: argparse.Namespace) -> int:
    """Use and limit of a mount."""
    from cowfs.cli.late import Late
    from cowfs.mounting.client import COUNTING

    with Late(args, f"usage {handle.mountpoint}"):
        answer = handle.ask("usage", timeout=COUNTING)
    if args.json:
        print_json({"mountpoint": handle.mountpoint, **answer}, args.json)
        return 0
    used, limit = answer["usage"], answer["limit"]
    rows = [
        ("bytes", size_or(used["bytes"]), size_or(limit["bytes"]), _percent(used["bytes"], limit["bytes"])),
        ("inodes", count_or(used["inodes"]), count_or(limit["inodes"]), _percent(used["inodes"], limit["inodes"])),
    ]
    print_table(("", "USED", "LIMIT", "USE%"), rows)
    return 0


def _percent(used: int, limit: int | None) -> str:
    return f"{-(-used * 100 // limit)}%" if limit else ""


# -- diff --------------------------------------------------------------------------------------------------------------


def _configure_diff(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", metavar="MNT|UPPER|A", help="a mount point, an upper directory, or a snapshot of the store")
    add(
        "other",
        nargs="?",
        metavar="B",
        help="another snapshot: what changed from A to B (default: from A's parent to A)",
    )
    add("--root", metavar="DIR", help="the store that A and B are in")
    add("--layer", action="append", default=[], metavar="DIR",
        help="a layer beneath an UPPER that cowfs has no record of; repeated, bottom first")  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="array", default="", help="as JSON: an array of objects")
    form.add_argument("--jsonl", action="store_const", const="lines", dest="json", help="as JSON, an object a line")
    form.add_argument(
        "--format", dest="json", metavar="TEMPLATE", type=template, help="each change by a template of its JSON fields"
    )
    form.add_argument("--stat", action="store_true", help="sums by directory, as a tree")
    add("--depth", type=int, default=3, metavar="N", help="levels of the --stat tree (default: 3)")
    add("-q", "--quiet", action="store_true", help="print nothing; exit with 1 when there is a change, else 0")


def _diff(args: argparse.Namespace) -> int:
    from cowfs.cli.late import Late

    args.driver = "auto"
    if args.other is not None or (not is_path(args.what) and known_in_store(args, args.what)):
        if args.layer:
            raise InvalidArgument("snapshots know their layers", remedy="leave out --layer")
        with look_at_store(args) as store, Late(args, f"diff {args.what}") as late:
            return _print_changes(args, store.diff(args.what, args.other), late)
    with Late(args, f"diff {args.what}") as late:
        return _print_changes(args, _changes(args.what, args.layer), late)


def _print_changes(args: argparse.Namespace, found: Iterator[Change], late: Late) -> int:
    if args.quiet:
        return 1 if next(found, None) is not None else 0
    if not args.stat:
        found = late.until_shown(found)
    if args.json:
        print_items(map(change_as_json, found), args.json)
    elif args.stat:
        tree = Tree()
        for change in found:
            tree.add(change)
        late.stop()
        if sum(tree.counts.values()):
            for line in tree.lines(args.depth):
                print(line)
    else:
        for change in found:
            print(change_line(change))
    return 0


def _changes(what: str, layers: list[str]) -> Iterator[Change]:
    from cowfs.diff import changes
    from cowfs.mounting import client, mountpoint, upper_state

    entry = mountpoint.find(what)
    if entry is not None and entry.fstype in mountpoint.TYPES:
        if layers:
            raise InvalidArgument("a mount knows its own layers", remedy="leave out --layer")
        return client.attach(what).diff()
    if not os.path.isdir(what):
        from cowfs.cli.common import is_path

        kinds = "mount point or upper directory" if is_path(what) else "snapshot, tag, mount point or upper directory"
        raise NotFound(f"no such {kinds}: {what}", remedy="cowfs mounts, ls and images show what there is")
    upper = os.path.abspath(what)
    if layers:
        return changes.changes(upper, [os.path.abspath(layer) for layer in layers])
    known = upper_state.lookup_record(upper)
    if known is None:
        raise NotFound(
            f"no record of what lies beneath {what}", remedy="name the layers, bottom first: --layer DIR ..."
        )
    return changes.changes(upper, known[0])


COMMANDS = {
    "mounts": Command(
        _configure_mounts,
        _mounts,
        "List the mounts of cowfs that this user can see, those whose server is gone included.",
        ("cowfs mounts", "cowfs mounts --json | jq '.[].upper'", "cowfs mounts work"),
    ),
    "usage": Command(
        _configure_usage,
        _usage,
        "Show what the upper layer of a mount holds: file data in units of 4 KiB, directories, large xattrs; and inodes.",
        ("cowfs usage /mnt/rootfs", "cowfs usage work --json"),
    ),
    "diff": Command(
        _configure_diff,
        _diff,
        "List what an upper layer adds (A), changes (C, with what changed) and deletes (D) in the layers beneath it.",
        (
            "cowfs diff /mnt/rootfs",
            "cowfs diff /mnt/rootfs --stat",
            "cowfs diff layers/.cowfs/upper --jsonl",
            "cowfs diff ./changes --layer base --layer python",
            "cowfs diff app-v1 app-v2",
        ),
    ),
}
