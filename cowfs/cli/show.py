"""`cowfs mounts`, `diff` and `usage`: what is there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cowfs.cli import Command
from cowfs.cli.output import (
    Tree,
    change_as_json,
    change_line,
    count_or,
    print_json,
    print_table,
    shown,
    size_or,
)
from cowfs.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from cowfs.model import Change
    from cowfs.mounting import MountHandle, MountStatus


# -- mounts ------------------------------------------------------------------------------------------------------------


def _configure_mounts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-q", "--quiet", action="store_true", help="mount points only")
    add("--json", action="store_true", help="everything known, as JSON")


def _mounts(args: argparse.Namespace) -> int:
    from cowfs import mounting

    found = mounting.mounts()
    if args.json:
        print_json([_mount_as_json(status) for status in found])
    elif args.quiet:
        for status in found:
            print(shown(status.mountpoint))
    elif found:
        print_table(
            ("MOUNT POINT", "LAYERS", "UPPER", "USED", "LIMIT", "INODES", "LIMIT", "PID"),
            [_mount_row(status) for status in found],
        )
    return 0


def _mount_row(status: MountStatus) -> tuple[str, ...]:
    where = shown(status.mountpoint)
    if not status.alive:
        return (where, "?", "server is gone: cowfs umount clears it", "", "", "", "", "")
    if status.pid is None:
        return (where, "?", "another user's", "", "", "", "", "")
    return (
        where,
        str(len(status.layers)),
        shown(status.upper or "read-only"),
        size_or(status.usage.bytes),
        size_or(status.limit.bytes),
        count_or(status.usage.inodes),
        count_or(status.limit.inodes),
        str(status.pid),
    )


def _mount_as_json(status: MountStatus) -> dict[str, object]:
    return {**status.details, "mountpoint": status.mountpoint, "alive": status.alive}


# -- usage -------------------------------------------------------------------------------------------------------------


def _configure_usage(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("mountpoint", metavar="MNT", help="mount point")
    add("--json", action="store_true", help="as JSON")


def _usage(args: argparse.Namespace) -> int:
    from cowfs import mounting

    return print_usage(mounting.attach(args.mountpoint), as_json=args.json)


def print_usage(handle: MountHandle, *, as_json: bool) -> int:
    """Use and limit of a mount."""
    answer = handle.ask("usage")
    if as_json:
        print_json({"mountpoint": handle.mountpoint, **answer})
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
    add("what", metavar="MNT|UPPER", help="a mount point, or an upper directory")
    add("--layer", action="append", default=[], metavar="DIR",
        help="a layer beneath an UPPER that cowfs has no record of; repeated, bottom first")  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--stat", action="store_true", help="sums by directory, as a tree")
    add("--depth", type=int, default=3, metavar="N", help="levels of the --stat tree (default: 3)")
    add("-q", "--quiet", action="store_true", help="print nothing; exit with 1 when there is a change, else 0")


def _diff(args: argparse.Namespace) -> int:
    found = _changes(args.what, args.layer)
    if args.quiet:
        return 1 if next(found, None) is not None else 0
    if args.json:
        import json

        for change in found:
            print(json.dumps(change_as_json(change)))
    elif args.stat:
        tree = Tree()
        for change in found:
            tree.add(change)
        if sum(tree.counts.values()):
            for line in tree.lines(args.depth):
                print(line)
    else:
        for change in found:
            print(change_line(change))
    return 0


def _changes(what: str, layers: list[str]) -> Iterator[Change]:
    from cowfs import diff, mounting, mountpoint, stack

    entry = mountpoint.find(what)
    if entry is not None and entry.fstype in mountpoint.TYPES:
        if layers:
            raise InvalidArgument("a mount knows its own layers", remedy="leave out --layer")
        return mounting.attach(what).diff()
    if not os.path.isdir(what):
        raise NotFound(f"no such mount point or upper directory: {what}")
    upper = os.path.abspath(what)
    if layers:
        return diff.changes(upper, [os.path.abspath(layer) for layer in layers])
    record = stack.lookup_record(upper)
    if record is None:
        raise NotFound(
            f"no record of what lies beneath {what}", remedy="name the layers, bottom first: --layer DIR ..."
        )
    return diff.changes(upper, record[0])


COMMANDS = {
    "mounts": Command(
        _configure_mounts,
        _mounts,
        "List the mounts of cowfs that this user can see, those whose server is gone included.",
        ("cowfs mounts", "cowfs mounts --json | jq '.[].upper'"),
    ),
    "usage": Command(
        _configure_usage,
        _usage,
        "Show what the upper layer of a mount holds: file data in units of 4 KiB, directories, large xattrs; and inodes.",
        ("cowfs usage /mnt/rootfs", "cowfs usage /mnt/rootfs --json"),
    ),
    "diff": Command(
        _configure_diff,
        _diff,
        "List what an upper layer adds (A), changes (C, with what changed) and deletes (D) in the layers beneath it.",
        (
            "cowfs diff /mnt/rootfs",
            "cowfs diff /mnt/rootfs --stat",
            "cowfs diff layers/.cowfs/upper --json",
            "cowfs diff ./changes --layer base --layer python",
        ),
    ),
}
