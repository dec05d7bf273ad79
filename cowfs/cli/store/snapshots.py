"""`cowfs prepare`, `view`, `commit`, `rm`, `label`, and what there is: `ls`, `tree`, `log`, `stat`, `images`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cowfs.cli import Command
from cowfs.cli.output import print_json, print_table, shown, size_or
from cowfs.cli.store.args import add_store, check_new, label_pairs, open_store, paged, set_labels, when

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from cowfs.model import Info, Mount
    from cowfs.store import Store


def info_as_json(info: Info) -> dict[str, Any]:
    """A snapshot as programs read it; times in nanoseconds since 1970."""
    return {
        "name": info.name,
        "kind": info.kind.value,
        "parent": info.parent,
        "labels": dict(info.labels),
        "created": info.created,
        "updated": info.updated,
    }


def mount_as_json(mount: Mount) -> dict[str, Any]:
    """A mount record as programs read it."""
    return {"type": mount.type, "source": mount.source, "options": list(mount.options)}


def mount_line(mount: Mount, target: str = "TARGET") -> str:
    """A record as the command that would carry it out."""
    import shlex

    options = ",".join(mount.options)
    kind = ["--rbind"] if mount.type == "bind" else ["-t", mount.type]
    if mount.type == "bind":
        options = ",".join(option for option in mount.options if option != "rbind")
    return shlex.join(["mount", *kind, mount.source, target, "-o", options])


def _print_mounts(mounts: Iterable[Mount], *, as_json: bool) -> None:
    if as_json:
        print_json([mount_as_json(mount) for mount in mounts])
    else:
        for mount in mounts:
            print(mount_line(mount))


# -- making ------------------------------------------------------------------------------------------------------------


def _configure_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="the new snapshot's key")
    add("parent", nargs="?", metavar="PARENT", help="a committed snapshot, or a tag (default: an empty tree)")
    add("--size", metavar="S", help="limit on what it may hold itself: 512M, 2G")
    add("--inodes", metavar="N", help="limit on inodes: 10000, 100k")
    add("--label", action="append", default=[], metavar="K=V", help="keep a label with it; repeated")
    add("--mount-type", choices=("kernel", "fuse"), help="of the records printed (default: what fits)")
    add_store(parser)


def _prepare(args: argparse.Namespace) -> int:
    check_new(args.key, "key")
    with open_store(args, create=args.parent is None) as store:
        mounts = store.prepare(
            args.key, args.parent, size=args.size, inodes=args.inodes, labels=set_labels(args.label),
            mount_type=args.mount_type,
        )  # fmt: skip
    _print_mounts(mounts, as_json=args.json)
    return 0


def _configure_view(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="the view's key")
    add("parent", nargs="?", metavar="PARENT", help="a committed snapshot, or a tag")
    add("--label", action="append", default=[], metavar="K=V", help="keep a label with it; repeated")
    add("--mount-type", choices=("kernel", "fuse"), help="of the records printed (default: what fits)")
    add_store(parser)


def _view(args: argparse.Namespace) -> int:
    check_new(args.key, "key")
    with open_store(args, create=args.parent is None) as store:
        mounts = store.view(args.key, args.parent, labels=set_labels(args.label), mount_type=args.mount_type)
    _print_mounts(mounts, as_json=args.json)
    return 0


def _configure_commit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="an active snapshot that is not mounted")
    add("name", metavar="NAME", help="of the committed one")
    add("--label", action="append", default=[], metavar="K=V", help="keep a label with it; repeated")
    add("--digests", action="store_true", help="also compute the digest of every file in the layer")
    add("--compact", action="store_true", help="driver row: first make plain files of those that were mostly rewritten")
    add_store(parser)


def _commit(args: argparse.Namespace) -> int:
    check_new(args.name)
    with open_store(args, create=False) as store:
        info = store.commit(
            args.key, args.name, labels=set_labels(args.label), digests=args.digests, compact=args.compact
        )
        if args.json:
            print_json({**info_as_json(info), "usage": _usage(store, info.name)})
    return 0


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="+", metavar="KEY", help="a key, a name, or a tag (then only the tag goes)")
    add("--chain", action="store_true", help="also the ancestors that then have neither tag nor child")
    add_store(parser)


def _rm(args: argparse.Namespace) -> int:
    removed = []
    with open_store(args, create=False) as store:
        for name in args.names:
            removed += store.remove(name, chain=args.chain)
    if args.json:
        print_json(removed)
    else:
        for name in removed:
            print(shown(name))
    return 0


def _configure_label(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="KEY", help="a key or a name")
    add("labels", nargs="+", metavar="K=V", help="set a label; K- removes it")
    add_store(parser)


def _label(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        info = store.update(args.name, label_pairs(args.labels))
    if args.json:
        print_json(info_as_json(info))
    return 0


def _configure_tag(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tag", metavar="TAG", help="the name it gets, once more")
    add("target", metavar="NAME", help="a committed snapshot, or a tag")
    add_store(parser)


def _tag(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        tag = store.tag(args.tag, args.target)
    if args.json:
        print_json({"name": tag.name, "target": tag.target})
    return 0


# -- looking -----------------------------------------------------------------------------------------------------------


def _usage(store: Store, name: str) -> dict[str, int]:
    usage = store.usage(name)
    return {"bytes": usage.bytes, "inodes": usage.inodes}


def _configure_stat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="KEY", help="a key, a name or a tag")
    add_store(parser)


def _stat(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        info = store.stat(args.name)
        row = store.index.get(info.name)
        told: dict[str, Any] = {
            **info_as_json(info),
            "id": row.id,
            "depth": row.depth,
            "limit": {"bytes": row.limit.bytes, "inodes": row.limit.inodes},
            "usage": {"bytes": row.usage.bytes, "inodes": row.usage.inodes} if row.usage is not None else None,
            "diff_id": row.diff_id,
            "chain_id": row.chain_id,
            "damage": row.damage,
        }
    if args.json:
        print_json(told)
        return 0
    lines = [
        ("name", shown(info.name)),
        ("kind", info.kind.value),
        ("parent", shown(info.parent or "none")),
        ("layers beneath", str(row.depth)),
        ("created", when(info.created)),
        ("updated", when(info.updated)),
        ("labels", " ".join(f"{shown(key)}={shown(value)}" for key, value in sorted(info.labels.items())) or "none"),
        ("limit", f"{size_or(row.limit.bytes)}, inodes {row.limit.inodes or 'none'}"),
        ("used", f"{size_or(row.usage.bytes)}, {row.usage.inodes} inodes" if row.usage else "see: cowfs usage"),
        ("diff id", row.diff_id or "not known"),
        ("layer", row.id),
    ]
    if row.damage:
        lines.append(("damage", row.damage))
    for key, value in lines:
        print(f"{key + ':':<16}{value}")
    return 0


def _configure_ls(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "filters",
        nargs="*",
        metavar="FILTER",
        help='as in: kind==active  parent==base  name~=^web  labels."team"==storage',
    )
    add("-q", "--quiet", action="store_true", help="names only")
    add_store(parser)


def _ls(args: argparse.Namespace) -> int:
    import json

    with open_store(args, create=False) as store:
        found = store.walk(args.filters)
        if args.json:
            for info in found:
                print(json.dumps(info_as_json(info)))
            return 0
        with paged() as line:
            if args.quiet:
                for info in found:
                    line(shown(info.name))
                return 0
            line(f"{'KIND':<10} {'CREATED':<20} {'USED':>10}  NAME")
            for info in found:
                row = store.index.find(info.name)
                used = size_or(row.usage.bytes) if row is not None and row.usage is not None else "-"
                parent = f"  < {_short(info.parent)}" if info.parent else ""
                line(f"{info.kind.value:<10} {when(info.created):<20} {used:>10}  {shown(info.name)}{parent}")
    return 0


def _short(name: str) -> str:
    return shown(name[:19] if name.startswith("sha256:") else name)


def _configure_tree(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this snapshot and what is based on it")
    add_store(parser)


def _tree(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        children: dict[str | None, list[Info]] = {}
        for info in store.walk():
            children.setdefault(info.parent, []).append(info)
        tags: dict[str, list[str]] = {}
        for tag in store.tags():
            tags.setdefault(tag.target, []).append(tag.name)
        tops = children.get(None, []) if args.name is None else [store.stat(args.name)]
        if args.json:
            print_json([_as_tree(info, children, tags) for info in tops])
            return 0
        with paged() as line:
            for info in tops:
                _print_tree(info, children, tags, line)
    return 0


def _as_tree(top: Info, children: dict[str | None, list[Info]], tags: dict[str, list[str]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    todo = [(top, made)]
    while todo:
        info, into = todo.pop()
        below: list[dict[str, Any]] = [{} for _ in children.get(info.name, [])]
        into.update({**info_as_json(info), "tags": tags.get(info.name, []), "children": below})
        todo += zip(children.get(info.name, []), below, strict=True)
    return made


def _print_tree(
    top: Info, children: dict[str | None, list[Info]], tags: dict[str, list[str]], line: Callable[[str], None]
) -> None:
    """A chain of only children stays at one depth, so that a chain of 500 can be read."""
    todo = [(top, 0)]
    while todo:
        info, depth = todo.pop()
        kind = "" if info.kind.value == "committed" else f" [{info.kind.value}]"
        named = f"  ({', '.join(map(shown, tags[info.name]))})" if info.name in tags else ""
        line(f"{'  ' * depth}{_short(info.name)}{kind}{named}")
        below = children.get(info.name, [])
        deeper = depth + 1 if len(below) > 1 or depth == 0 else depth
        todo += [(child, deeper) for child in reversed(below)]


def _configure_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a key, a name or a tag")
    add_store(parser)


def _log(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        chain = store.chain(args.name)
        if args.json:
            print_json([info_as_json(info) for info in chain])
            return 0
        with paged() as line:
            for info in chain:
                row = store.index.get(info.name)
                used = f"{size_or(row.usage.bytes)}, {row.usage.inodes} inodes" if row.usage else info.kind.value
                line(f"{when(info.created)}  {used:<28} {shown(info.name)}")
    return 0


def _configure_images(parser: argparse.ArgumentParser) -> None:
    add_store(parser)


def _images(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store:
        found = []
        for tag in store.tags():
            chain = [store.index.by_num(num) for num, _ in store.index.chain(store.index.get(tag.target).num)]
            size = sum(row.usage.bytes for row in chain if row.usage)
            found.append(
                {"tag": tag.name, "target": tag.target, "layers": len(chain), "bytes": size, "created": tag.created}
            )
    if args.json:
        print_json(found)
    elif found:
        rows = [
            (shown(str(one["tag"])), str(one["layers"]), size_or(int(str(one["bytes"]))), when(int(str(one["created"]))),
             _short(str(one["target"]))) for one in found
        ]  # fmt: skip
        print_table(("TAG", "LAYERS", "SIZE", "CREATED", "SNAPSHOT"), rows)
    return 0


COMMANDS = {
    "prepare": Command(
        _configure_prepare,
        _prepare,
        "Make a writable snapshot, in constant time, and print how to mount it.",
        (
            "cowfs prepare work debian",
            "cowfs prepare box base --size 2G --inodes 100k",
            "cowfs mount --key work /mnt/rootfs",
        ),
    ),
    "view": Command(
        _configure_view, _view, "Make a read-only snapshot and print how to mount it.", ("cowfs view look base",)
    ),
    "commit": Command(
        _configure_commit,
        _commit,
        "Make an active snapshot immutable under a name. Costs what changed. The key is free again.",
        ("cowfs commit work debian-with-python", "cowfs commit work v2 --label team=storage"),
    ),
    "rm": Command(
        _configure_rm,
        _rm,
        "Remove snapshots that have no children, or drop tags; print the snapshots removed.",
        ("cowfs rm work", "cowfs rm debian:12 --chain"),
    ),
    "label": Command(
        _configure_label,
        _label,
        "Set or remove labels of a snapshot.",
        ("cowfs label base team=storage", "cowfs label base team-"),
    ),
    "tag": Command(_configure_tag, _tag, "Give a committed snapshot a tag.", ("cowfs tag app:latest app-v2",)),
    "stat": Command(
        _configure_stat, _stat, "Show all about one snapshot.", ("cowfs stat base", "cowfs stat base --json")
    ),
    "ls": Command(
        _configure_ls,
        _ls,
        "List snapshots in the order of their making; conditions in one FILTER must all hold, one of several FILTERs must.",
        ("cowfs ls", "cowfs ls kind==active", "cowfs ls 'name~=^web,labels.\"team\"==storage'"),
    ),
    "tree": Command(
        _configure_tree, _tree, "Show which snapshot is based on which.", ("cowfs tree", "cowfs tree debian:12")
    ),
    "log": Command(_configure_log, _log, "List a snapshot and its ancestors, nearest first.", ("cowfs log app-v2",)),
    "images": Command(
        _configure_images, _images, "List tags with layers and size.", ("cowfs images", "cowfs images --json")
    ),
}
