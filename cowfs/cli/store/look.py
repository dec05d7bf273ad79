"""`cowfs ls`, `tree`, `log`, `stat` and `images`: the content of the store, by the index alone."""

from __future__ import annotations

from cowfs.cli.common import Command
from cowfs.cli.output import age_of, print_items, print_json, print_table, shown, size_or, table_lines
from cowfs.cli.store.args import Places, add_store, info_as_json, look_at_store, paged, when

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from typing import Any

    from cowfs.model import Info
    from cowfs.store.look import Look


# -- looking -----------------------------------------------------------------------------------------------------------


def _configure_stat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="KEY", help="a key, a name or a tag")
    add_store(parser)


def _stat(args: argparse.Namespace) -> int:
    with look_at_store(args) as store:
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
        print_json(told, args.json)
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
        metavar="FILTER|NAME:PATH",
        help='as in: kind==active  parent==base  name~=^web  labels."team"==storage; or a directory in a snapshot',
    )
    add("-l", "--long", action="store_true", help="of NAME:PATH: mode, names, owner, size and time")
    add("-q", "--quiet", action="store_true", help="names only, whole")
    add("--no-trunc", action="store_true", help="digests as they are, not their first twelve digits")
    add_store(parser)


def _is_place(text: str) -> bool:
    """Whether an argument of ls is NAME:PATH; a filter has an operator, or no colon outside of quotes."""
    return ":" in text.partition('"')[0] and not any(sign in text for sign in ("==", "!=", "~="))


def _ls(args: argparse.Namespace) -> int:
    if any(map(_is_place, args.filters)):
        from cowfs.cli.store.files import list_files

        return list_files(args, args.filters)
    with look_at_store(args) as store:
        if args.quiet:
            with paged() as line:
                for info in store.walk(args.filters):
                    line(shown(info.name))
            return 0
        found = _described(store, args.filters)
        if args.json:
            print_items(found, args.json)
            return 0
        short = shown if args.no_trunc else _short
        with paged() as line:
            head = ("KIND", "AGE", "USED", "LIMIT", "NAME", "TAGS", "BASED ON", "MOUNTED AT")
            for text in table_lines(head, (_ls_row(one, short) for one in found)):
                line(text)
    return 0


def _described(store: Look, filters: list[str]) -> Iterator[dict[str, Any]]:
    """All fields of each snapshot that need no server."""
    tags: dict[str, list[str]] = {}
    for tag in store.tags():
        tags.setdefault(tag.target, []).append(tag.name)
    places = Places(store.root)
    for row in store.walk_rows(filters):
        usage = row.usage
        yield {
            **info_as_json(row.info()),
            "id": row.id,
            "tags": tags.get(row.name, []),
            "usage": None if usage is None else {"bytes": usage.bytes, "inodes": usage.inodes},
            "limit": {"bytes": row.limit.bytes, "inodes": row.limit.inodes},
            "mountpoint": None if row.kind.value == "committed" else places.of(row.id),
        }


def _ls_row(one: dict[str, Any], short: Callable[[str], str]) -> tuple[str, ...]:
    return (
        one["kind"],
        age_of(one["created"]),
        "-" if one["usage"] is None else size_or(one["usage"]["bytes"]),
        size_or(one["limit"]["bytes"], "-"),
        short(one["name"]),
        ", ".join(map(shown, one["tags"])) or "-",
        short(one["parent"]) if one["parent"] else "-",
        shown(one["mountpoint"]) if one["mountpoint"] else "-",
    )


def _short(name: str) -> str:
    return shown(name[:19] if name.startswith("sha256:") else name)  # twelve digits: "cowfs stat" takes them, too


def _configure_tree(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this snapshot and what is based on it")
    add_store(parser)


def _tree(args: argparse.Namespace) -> int:
    with look_at_store(args) as store:
        children: dict[str | None, list[Info]] = {}
        for info in store.walk():
            children.setdefault(info.parent, []).append(info)
        tags: dict[str, list[str]] = {}
        for tag in store.tags():
            tags.setdefault(tag.target, []).append(tag.name)
        tops = children.get(None, []) if args.name is None else [store.stat(args.name)]
        if args.json:
            print_json([_as_tree(info, children, tags) for info in tops], args.json)
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
    """An only child stays at its parent's depth, behind ``>``, so that a chain of 500 can be read."""
    todo = [(top, 0, "")]
    while todo:
        info, depth, mark = todo.pop()
        kind = "" if info.kind.value == "committed" else f" [{info.kind.value}]"
        named = f"  ({', '.join(map(shown, tags[info.name]))})" if info.name in tags else ""
        line(f"{'  ' * depth}{mark}{_short(info.name)}{kind}{named}")
        below = children.get(info.name, [])
        if len(below) == 1 and depth:
            todo.append((below[0], depth, "> "))
        else:
            todo += [(child, depth + 1, "") for child in reversed(below)]


def _configure_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a key, a name or a tag")
    add_store(parser)


def _log(args: argparse.Namespace) -> int:
    with look_at_store(args) as store:
        chain = store.chain(args.name)
        if args.json:
            print_json([info_as_json(info) for info in chain], args.json)
            return 0
        with paged() as line:
            for info in chain:
                if args.quiet:
                    line(shown(info.name))
                    continue
                row = store.index.get(info.name)
                used = f"{size_or(row.usage.bytes)}, {row.usage.inodes} inodes" if row.usage else info.kind.value
                line(f"{when(info.created)}  {used:<28} {shown(info.name)}")
    return 0


def _configure_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="tags only")
    add_store(parser)


def _images(args: argparse.Namespace) -> int:
    with look_at_store(args) as store:
        if args.quiet:
            for tag in store.tags():
                print(shown(tag.name))
            return 0
        found = []
        for tag in store.tags():
            chain = [store.index.by_num(num) for num, _ in store.index.chain(store.index.get(tag.target).num)]
            size = sum(row.usage.bytes for row in chain if row.usage)
            found.append(
                {"tag": tag.name, "target": tag.target, "layers": len(chain), "bytes": size, "created": tag.created}
            )
    if args.json:
        print_json(found, args.json)
    elif found:
        rows = [
            (shown(str(one["tag"])), str(one["layers"]), size_or(int(str(one["bytes"]))), when(int(str(one["created"]))),
             _short(str(one["target"]))) for one in found
        ]  # fmt: skip
        print_table(("TAG", "LAYERS", "SIZE", "CREATED", "SNAPSHOT"), rows)
    return 0


COMMANDS = {
    "stat": Command(
        _configure_stat, _stat, "Show all about one snapshot.", ("cowfs stat base", "cowfs stat base --json")
    ),
    "ls": Command(
        _configure_ls,
        _ls,
        "List snapshots in the order of their making; conditions in one FILTER must all hold, one of several FILTERs must.",
        (
            "cowfs ls",
            "cowfs ls kind==active",
            "cowfs ls --format '{name}\\t{created:age}\\t{usage.bytes:size}'",
            "cowfs ls base:/etc -l",
            "cowfs ls 'name~=^web,labels.\"team\"==storage'",
        ),
    ),
    "tree": Command(
        _configure_tree,
        _tree,
        "Show which snapshot is based on which: deeper is based on what is above, > on the line above alone.",
        ("cowfs tree", "cowfs tree debian:12"),
    ),
    "log": Command(_configure_log, _log, "List a snapshot and its ancestors, nearest first.", ("cowfs log app-v2",)),
    "images": Command(
        _configure_images,
        _images,
        "List tags with layers and size.",
        ("cowfs images", "cowfs images --json", "cowfs images -q"),
    ),
}
