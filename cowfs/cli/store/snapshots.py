"""`cowfs prepare`, `view`, `commit`, `rm`, `label` and `tag`: the verbs that make, change and remove snapshots."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.cli.common import Command
from cowfs.cli.output import print_json, shown
from cowfs.cli.progress import Bars
from cowfs.cli.store.args import add_store, check_new, info_as_json, label_pairs, open_store, set_labels
from cowfs.errors import InvalidArgument

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from cowfs.model import Mount
    from cowfs.store import Store


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


def _print_mounts(mounts: Iterable[Mount], *, as_json: str) -> None:
    if as_json:
        print_json([mount_as_json(mount) for mount in mounts], as_json)
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
    with open_store(args, create=args.parent is None) as store, Bars(args, f"prepare {args.key}"):
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
    with open_store(args, create=args.parent is None) as store, Bars(args, f"view {args.key}"):
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
    add("--kernel-image", action="store_true", help="also make the image that kernel mounts of what stands on it need")
    add_store(parser)


def _commit(args: argparse.Namespace) -> int:
    check_new(args.name)
    with open_store(args, create=False) as store:
        with Bars(args, f"commit {args.key}"):
            info = store.commit(
                args.key, args.name, labels=set_labels(args.label), digests=args.digests, compact=args.compact,
                kernel_image=args.kernel_image,
            )  # fmt: skip
        if args.json:
            print_json({**info_as_json(info), "usage": _usage(store, info.name)}, args.json)
    return 0


def _configure_rm(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="+", metavar="KEY", help="a key, a name, or a tag (then only the tag goes)")
    add("--chain", action="store_true", help="also the ancestors that then have neither tag nor child")
    add("-n", "--dry-run", action="store_true", help="remove nothing, and show what would go")
    add_store(parser)


def _rm(args: argparse.Namespace) -> int:
    removed = []
    with open_store(args, create=False) as store, Bars(args, "rm") as bars:
        for at, name in enumerate(args.names):
            bars(f"rm {name}" if len(args.names) == 1 else "rm", at, 0 if len(args.names) == 1 else len(args.names))
            removed += (store.removable if args.dry_run else store.remove)(name, chain=args.chain)
    if args.json:
        print_json([{"name": name} for name in removed], args.json)
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
        print_json(info_as_json(info), args.json)
    return 0


def _configure_tag(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tag", metavar="TAG", help="the name it gets, once more")
    add("target", nargs="?", metavar="NAME", help="a committed snapshot, or a tag")
    add("-d", "--delete", action="store_true", help="drop TAG; its snapshot stays")
    add_store(parser)


def _tag(args: argparse.Namespace) -> int:
    if args.delete == (args.target is not None):
        raise InvalidArgument(
            "TAG and NAME are needed, or with -d TAG alone", remedy="cowfs tag TAG NAME, or cowfs tag -d TAG"
        )
    with open_store(args, create=False) as store:
        if args.delete:
            store.untag(args.tag)
            if args.json:
                print_json({"name": args.tag, "target": None}, args.json)
            return 0
        tag = store.tag(args.tag, args.target)
    if args.json:
        print_json({"name": tag.name, "target": tag.target}, args.json)
    return 0


def _usage(store: Store, name: str) -> dict[str, int]:
    usage = store.usage(name)
    return {"bytes": usage.bytes, "inodes": usage.inodes}


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
        ("cowfs rm work", "cowfs rm debian:12 --chain", "cowfs rm debian:12 --chain --dry-run"),
    ),
    "label": Command(
        _configure_label,
        _label,
        "Set or remove labels of a snapshot.",
        ("cowfs label base team=storage", "cowfs label base team-"),
    ),
    "tag": Command(
        _configure_tag,
        _tag,
        "Give a committed snapshot a tag.",
        ("cowfs tag app:latest app-v2", "cowfs tag -d app:latest"),
    ),
}
