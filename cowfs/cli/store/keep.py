"""`cowfs init`, `info`, `df`, `check`, `gc`: the store itself."""

from __future__ import annotations

from cowfs.cli import config
from cowfs.cli.common import Command
from cowfs.cli.output import print_json, print_table, shown, size_or
from cowfs.cli.store.args import add_json, add_store, look_at_store, open_store
from cowfs.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from cowfs.store.look import Look


def _configure_info(parser: argparse.ArgumentParser) -> None:
    add_store(parser)


def _configure_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", metavar="DIR", help="the store's directory, in place of --root")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the driver, as in block=64k; may be given several times (docs/drivers.md)",
    )
    add_store(parser)


def _init(args: argparse.Namespace) -> int:
    options: dict[str, str] = {}
    if args.directory is not None:
        if args.root is not None:
            raise InvalidArgument("the store's directory was given twice", remedy="DIR or --root DIR")
        args.root = args.directory
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in ("root", "form", "fsync", "driver", "create"):
            raise InvalidArgument(f"no option of a driver: {text!r}", remedy="--option NAME=VALUE")
        options[name] = value
    with open_store(args, options=options) as store:
        told = store.describe()
        probes = {name: {"usable": probe.usable, "reasons": list(probe.reasons)} for name, probe in store.why.items()}
    if args.json:
        print_json({**told, "probes": probes}, args.json)
        return 0
    print(f"{shown(told['root'])}: driver {told['driver']} ({told['why']})")
    for name, probe in sorted(probes.items()):
        if name != told["driver"]:
            state = "possible too" if probe["usable"] else "not possible"
            print(f"  {name}: {state}: {'; '.join(probe['reasons'])}")  # type: ignore[arg-type]
    return 0


def _info(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        told: dict[str, Any] = store.describe()
        told["alternatives"], told["not possible"] = store.other_drivers()
        totals = store.totals()
    told["snapshots"] = totals.count
    if args.json:
        print_json(told, args.json)
        return 0
    count = totals.count
    lines = [
        ("store", shown(told["root"])),
        ("uuid", told["uuid"]),
        ("driver", told["driver"]),
        ("why", told["why"]),
        ("layer form", told["form"]),
        ("host", told["host"]),
        ("mounts", told["mounts"]),
        ("mount records", f"{told['records']} (without a limit)"),
        ("kernel mounts", told["kernel mounts"]),
        ("cowfs run", told["runs"]),
        ("limits", told["limits"]),
        ("project quotas", told["project quotas"]),
        ("snapshots", ", ".join(f"{count.get(kind, 0)} {kind}" for kind in ("committed", "active", "view"))),
    ]
    known = {"root", "form", "records", "runs", "alternatives", "not possible", *(key for key, _ in lines)}
    lines += [(key, value) for key, value in told.items() if key not in known]
    for key, value in lines:
        print(f"{key + ': ':<15}{value}")
    for name, why in told["alternatives"].items():
        print(f"{'other driver:':<15}{name} ({why})")
    for name, why in told["not possible"].items():
        print(f"{'not possible:':<15}{name} ({why})")
    return 0


def _configure_df(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="each snapshot: own, shared and reclaimable")
    add_store(parser)


def _df(args: argparse.Namespace) -> int:
    with look_at_store(args) as store:
        totals = store.totals()
        each = _each(store) if args.verbose else []
    if args.json:
        told: dict[str, Any] = {
            "committed": {"bytes": totals.committed.bytes, "inodes": totals.committed.inodes},
            "reclaimable": {"bytes": totals.reclaimable.bytes, "inodes": totals.reclaimable.inodes},
            "count": totals.count,
            "host": {"bytes": totals.host_bytes, "free": totals.host_free},
        }
        if args.verbose:
            told["snapshots"] = each
        print_json(told, args.json)
        return 0
    if args.verbose:
        print_table(
            ("OWN", "INODES", "SHARED", "RECLAIMABLE", "NAME"),
            [
                (size_or(one["own"], "?"), str(one["inodes"] if one["inodes"] is not None else "?"), size_or(one["shared"]),
                 size_or(one["reclaimable"]), shown(one["name"])) for one in each
            ],
        )  # fmt: skip
        print()
    print_table(
        ("", "BYTES", "INODES"),
        [
            ("committed", size_or(totals.committed.bytes), f"{totals.committed.inodes:,}"),
            ("reclaimable", size_or(totals.reclaimable.bytes), f"{totals.reclaimable.inodes:,}"),
            ("host file system", size_or(totals.host_bytes), ""),
            ("free on it", size_or(totals.host_free), ""),
        ],
    )
    return 0


def _each(store: Look) -> list[dict[str, Any]]:
    """Own: its layer. Shared: its ancestors' layers. Reclaimable: its layer, when neither child nor tag needs it."""
    below: dict[int, int] = {}
    told = []
    tagged = {tag.target for tag in store.tags()}
    rows = list(store.index.rows())
    parents = {row.parent for row in rows}
    for row in rows:
        own = row.usage.bytes if row.usage is not None else None
        shared = below.get(row.parent, 0) if row.parent is not None else 0
        below[row.num] = shared + (own or 0)
        free = own if own is not None and row.num not in parents and row.name not in tagged else 0
        told.append(
            {"name": row.name, "kind": row.kind.value, "own": own, "inodes": row.usage.inodes if row.usage else None,
             "shared": shared, "reclaimable": free}
        )  # fmt: skip
    return told


def _configure_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--content", action="store_true", help="also read every file whose digest is known, and list those without one")
    add(
        "--repair", action="store_true", help="delete garbage, rebuild records, put in quarantine what cannot be helped"
    )
    add_store(parser)


def _check(args: argparse.Namespace) -> int:
    from cowfs.cli.progress import Bars

    with open_store(args, create=False) as store, Bars(args) as bars:
        report = store.check(content=args.content, repair=args.repair, progress=bars if bars.on else None)
        quarantined = store.quarantined()
    if args.json:
        from dataclasses import asdict

        print_json(
            {
                "problems": [asdict(problem) for problem in report.problems],
                "quarantined": [{"name": name, "why": why} for name, why in quarantined],
                "snapshots": report.snapshots,
                "records": report.records,
                "files": report.files,
                "undigested": [
                    {"name": name, "path": path.decode("utf-8", "surrogateescape")} for name, path in report.undigested
                ],
            },
            args.json,
        )
    else:
        for problem in report.problems:
            where = f"{shown(problem.name)}: " if problem.name else ""
            done = f" ({problem.repaired})" if problem.repaired else ""
            print(f"{problem.kind}: {where}{shown(problem.what)}{done}")
        for name, path in report.undigested:
            print(f"no digest: {shown(name)}: {shown(path)}")
        for name, why in quarantined:
            print(f"in quarantine: {shown(name)}: {shown(why)}")
        files = f", {report.files:,} files" if args.content else ""
        print(f"{report.snapshots:,} snapshots, {report.records:,} records{files}: ", end="")
        fine = (
            "no damage, but links to look into"
            if any(each.kind == "links" for each in report.problems)
            else "no damage"
        )
        print(fine if not report.damage and not quarantined else "DAMAGED")
    return 0 if not report.damage and not quarantined else 7


def _configure_gc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--dry-run", action="store_true", help="delete nothing, and show what would go")
    add_store(parser)


def _gc(args: argparse.Namespace) -> int:
    if args.dry_run:
        return _garbage(args)
    from cowfs.cli.progress import Bars

    with open_store(args, create=False) as store, Bars(args, "gc"):
        done = store.gc()
    if args.json:
        print_json({"directories": list(done.directories), "records": done.records}, args.json)
    else:
        for name in done.directories:
            print(f"deleted {shown(name)}")
        print(f"{len(done.directories)} directories, {done.records:,} records")
    return 0


def _configure_migrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "target", nargs="?", metavar="DIR", help="make the new store here, and keep the old one (default: in its place)"
    )
    add("--root", metavar="DIR", help="the store to move (default: as for 'cowfs info')")
    add("--to", required=True, metavar="DRIVER", help="the driver that it is to have")
    add("--cut-times", action="store_true", help="leave out fractions of seconds where the new layers cannot hold them")
    add_json(parser)


def _migrate(args: argparse.Namespace) -> int:
    from cowfs.cli.progress import Bars
    from cowfs.store import Store

    root = config.root(args.root)
    with Bars(args) as bars:
        made = Store.migrate(
            root,
            args.to,
            args.target,
            cut_times=args.cut_times,
            progress=lambda _, at, of: bars("snapshots", at, of),
        )
    if args.json:
        told = {"root": made.root, "driver": made.driver, "snapshots": made.snapshots, "copied": made.copied}
        print_json(told, args.json)
        return 0
    print(f"{shown(made.root)}: driver {made.driver}, {made.snapshots} snapshots ({made.copied} copied now)")
    return 0


def _garbage(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        paths, records = store.garbage()
    if args.json:
        print_json({"directories": paths, "records": records, "dry_run": True}, args.json)
        return 0
    for path in paths:
        print(f"would delete {shown(path)}")
    print(f"{len(paths)} directories, {records:,} records")
    return 0


COMMANDS = {
    "init": Command(_configure_init, _init, "Make a store and say which driver it got, and why.",
                    ("cowfs init /srv/store", "cowfs init --driver vfs", "cowfs init --driver block --option filesystem=xfs --option size=100g")),
    "info": Command(_configure_info, _info, "Show driver, mount type, host file system, and why they were chosen.",
                    ("cowfs info", "cowfs info --json")),
    "df": Command(_configure_df, _df, "Show what the store holds, from its records: no walk.", ("cowfs df", "cowfs df -v")),
    "check": Command(
        _configure_check, _check, "Verify records, directories and, with --content, files. Exits with 7 on damage.",
        ("cowfs check", "cowfs check --content", "cowfs check --repair"),
    ),
    "gc": Command(_configure_gc, _gc, "Delete directories and tree records that nothing records. Never a snapshot.",
                  ("cowfs gc",)),
    "migrate": Command(
        _configure_migrate, _migrate,
        "Move the store to another driver, with all snapshots, tags, labels, limits and times. Run it again after a kill: it goes on.",
        ("cowfs migrate --to btrfs", "cowfs migrate --to zfs /tank/cowfs"),
    ),
}  # fmt: skip
