"""`cowfs mount`, `umount` and `limit`.

Strategy: `mount` forks the server from this very process once the arguments are parsed: no second interpreter starts.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import ExitStack

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.cli.common import Command
from cowfs.errors import CowfsError, InvalidArgument

if TYPE_CHECKING:
    import argparse

    from cowfs.mounting.request import IdMap, MountSpec


# -- mount -------------------------------------------------------------------------------------------------------------


def _configure_mount(parser: argparse.ArgumentParser) -> None:
    from cowfs.cli.store.args import add_json

    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="LAYERS ... MNT",
        help="one directory of layers, or layers bottom first; then the mount point",
    )
    add("--layer", action="append", default=[], metavar="DIR", help="a layer; repeated, bottom first")
    add("--key", metavar="KEY", help="instead of layers: an active snapshot or a view of the store")
    add("--root", metavar="DIR", help="the store of KEY (default: $COWFS_ROOT, else /var/lib/cowfs or the user's data)")
    add(
        "--mount-type",
        choices=("fuse", "kernel"),
        help="of KEY: cowfs's own server (the default), or the kernel's overlayfs",
    )
    add(
        "--limit-engine",
        choices=("fuse", "loop", "loop-xfs", "auto"),
        help="of KEY: what holds its limit: cowfs's own server, an ext4 or XFS image of its size (kernel mounts), or the quickest here",
    )
    add("--upper", metavar="DIR", help="where changes go (default: LAYERS/.cowfs/upper, used again next time)")
    add("--work", metavar="DIR", help="work directory, on the same file system as the upper (default: beside it)")
    add("--ephemeral", action="store_true", help="an upper of its own, dropped at unmount")
    add("--memory", action="store_true", help="with --ephemeral: the upper is in memory; as root a mount of the kernel")
    add("-r", "--read-only", action="store_true", help="no changes; an --upper is then the topmost layer")
    add("--size", metavar="SIZE", help="limit on bytes: 512M, 2G, 1.5T")
    add("--inodes", metavar="N", help="limit on inodes: 10000, 100k")
    add("--row", metavar="SIZE", help="redirect on write: of a big file only the blocks of SIZE that are written go to the upper"
        " (4K to 1M; docs/row.md)")  # fmt: skip
    add("--volatile", action="store_true", help="never sync; after a crash of the host the upper cannot be used")
    add("--allow-other", action="store_true", default=None, help="let other users in (default as root)")
    add("--io", choices=("cached", "passthrough"), default="cached",
        help="cached: nothing is asked twice; passthrough: data goes past the server, for databases (root, no limit)")  # fmt: skip
    add("--frontend", choices=("kernel", "fusepy"), default="kernel", help="cowfs's own protocol engine, or libfuse 2")
    add(
        "--uid-map",
        action="append",
        default=[],
        metavar="IN:OUT:N",
        help="uids IN.. of the layers show as OUT..; may be repeated",
    )
    add("--gid-map", action="append", default=[], metavar="IN:OUT:N", help="the same for groups")
    add(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="mount options: ro,nodev,nosuid,noexec,noatime...",
    )
    add("--max-nodes", type=int, metavar="N", help="bound on the nodes that the server keeps")
    add("-f", "--foreground", action="store_true", help="serve from this process; diagnostics on standard error")
    add("--trace", action="store_true", help="one line a request, in the log (with -f on standard error)")
    add("--log", metavar="FILE", help="file for diagnostics and trace")
    add_json(parser)


def parse_map(texts: list[str]) -> IdMap:
    """Ranges as containers write them: ``0:100000:65536``, several separated by commas.

    >>> parse_map(["0:1000:1,1:100000:65536"])
    ((0, 1000, 1), (1, 100000, 65536))
    """
    ranges = []
    for part in ",".join(texts).split(","):
        if not part:
            continue
        numbers = part.split(":")
        if (
            len(numbers) != 3
            or not all(number.isdecimal() and len(number) <= 20 for number in numbers)
            or int(numbers[2]) == 0
        ):
            raise InvalidArgument(f"not a range of ids: {part!r}", remedy="write IN:OUT:COUNT, as in 0:100000:65536")
        first, shown, count = map(int, numbers)
        if max(first, shown) + count > 1 << 32:
            raise InvalidArgument(f"the range of ids {part} passes the last id, {(1 << 32) - 1}")
        ranges.append((first, shown, count))
    return tuple(ranges)


def _spec(args: argparse.Namespace) -> MountSpec:
    from cowfs.mounting.spec import block_size, make_spec

    if args.layer:
        if len(args.paths) != 1:
            raise InvalidArgument("with --layer there is one more argument: the mount point")
        layers: str | list[str] = args.layer
    elif len(args.paths) < 2:
        raise InvalidArgument("layers and a mount point are needed", remedy="cowfs mount LAYERS MNT")
    else:
        layers = args.paths[0] if len(args.paths) == 2 else args.paths[:-1]
    return make_spec(
        layers,
        args.paths[-1],
        upper=args.upper,
        work=args.work,
        readonly=args.read_only,
        ephemeral=args.ephemeral,
        memory=args.memory,
        size=args.size,
        inodes=args.inodes,
        options=[word for text in args.options for word in text.split(",")],
        volatile=args.volatile,
        allow_other=args.allow_other,
        io=args.io,
        frontend=args.frontend,
        uid_map=parse_map(args.uid_map),
        gid_map=parse_map(args.gid_map),
        row=block_size(args.row) if args.row else 0,
        max_nodes=args.max_nodes,
        foreground=args.foreground,
        trace=args.trace,
        log=os.path.abspath(args.log) if args.log else "",
    )


def _mount_key(args: argparse.Namespace) -> int:
    """Mount a snapshot of the store with the limit from its record."""
    from cowfs.cli.store.args import open_store
    from cowfs.mounting.mountpoint import resolve

    refused = [
        name
        for name in ("layer", "upper", "work", "ephemeral", "memory", "size", "inodes", "row")
        if getattr(args, name)
    ]
    if len(args.paths) != 1 or refused:
        raise InvalidArgument(
            "with --key there is one more argument, the mount point" + "".join(f"; no --{name}" for name in refused)
        )
    args.driver = "auto"
    with ExitStack() as held:
        store = held.enter_context(open_store(args, create=False, outside=True))
        words = [word for text in args.options for word in text.split(",")] + (["ro"] if args.read_only else [])
        more: dict[str, Any] = {
            "volatile": args.volatile,
            "allow_other": args.allow_other,
            "io": args.io,
            "frontend": args.frontend,
            "uid_map": parse_map(args.uid_map),
            "gid_map": parse_map(args.gid_map),
            "options": [word for word in words if word],
            "max_nodes": args.max_nodes,
            "foreground": args.foreground,
            "trace": args.trace,
            "log": os.path.abspath(args.log) if args.log else "",
        }
        if store.served_by(args.key, args.mount_type, args.limit_engine, more) == "kernel":
            del more["foreground"]  # a kernel mount has no server
            handle = store.mount(args.key, args.paths[0], mount_type="kernel", **more)
            return _by_kernel(handle.mountpoint, args.json)
        if not args.foreground:
            held.enter_context(store.layers_stay(args.key))
        spec = store.spec(args.key, resolve(args.paths[0]), **more)
        store.index.close()  # a database connection must not cross a fork; the driver's trees stay until the server has them
        return serve(spec, as_json=args.json)


def _mount(args: argparse.Namespace) -> int:
    if args.key is not None:
        return _mount_key(args)
    spec = _spec(args)
    if spec.memory:
        from cowfs.mounting import kernel

        if not kernel.why_not_in_memory(spec):
            kernel.mount_in_memory(spec)
            return _by_kernel(spec.mountpoint, args.json)
    return serve(spec, as_json=args.json)


def _by_kernel(mountpoint: str, as_json: str) -> int:
    """Report a mount that has no server."""
    if as_json:
        from cowfs.cli.output import print_json

        print_json({"mountpoint": mountpoint, "pid": None, "socket": None}, as_json)
    return 0


def serve(spec: MountSpec, *, as_json: str = "") -> int:
    """Start the server of a mount request, in the background unless the request says foreground. Returns the exit status."""
    gc.disable()  # a start leaves nothing to collect; the server turns it on before it serves
    try:
        from cowfs.mounting import server

        if spec.foreground:
            return server.Server(spec).run()
        started = server.start(spec)
    finally:
        gc.enable()
    if as_json:
        from cowfs.cli.output import print_json

        print_json({"mountpoint": spec.mountpoint, **started._asdict()}, as_json)
    return 0


# -- umount ------------------------------------------------------------------------------------------------------------


def _configure_umount(parser: argparse.ArgumentParser) -> None:
    from cowfs.cli.store.args import add_json

    add = parser.add_argument
    add("mountpoints", nargs="*", metavar="MNT", help="mount points")
    add("-l", "--lazy", action="store_true", help="off the tree now; the server ends with the last user")
    add("--force", action="store_true", help="cut the connection to a server that hangs")
    add("-a", "--all", action="store_true", help="all mounts of cowfs in this mount namespace")
    add_json(parser)


def _umount(args: argparse.Namespace) -> int:
    from cowfs.cli.output import print_json
    from cowfs.cli.progress import Bars
    from cowfs.mounting import client

    targets = list(args.mountpoints)
    if args.all:
        targets += [status.mountpoint for status in reversed(client.mounts())]
    elif not targets:
        raise InvalidArgument("which mount point?", remedy="cowfs umount MNT; cowfs mounts lists them")
    code = 0
    told: list[dict[str, Any]] = []
    with Bars(args) as bars:
        for at, target in enumerate(targets):
            bars(f"umount {target}" if len(targets) == 1 else "umount", at, 0 if len(targets) == 1 else len(targets))
            try:
                client.umount(target, lazy=args.lazy, force=args.force)
                told.append({"mountpoint": target, "unmounted": True, "error": None})
            except CowfsError as error:
                if len(targets) == 1:
                    raise
                sys.stderr.write(f"cowfs: {error}\n")
                code = error.exit_code
                told.append({"mountpoint": target, "unmounted": False, "error": str(error)})
    if args.json:
        print_json(told, args.json)
    return code


# -- limit -------------------------------------------------------------------------------------------------------------


def _configure_limit(parser: argparse.ArgumentParser) -> None:
    from cowfs.cli.store.args import add_store

    add = parser.add_argument
    add("mountpoint", metavar="MNT|KEY|CONTAINER",
        help="a mount point, an active snapshot of the store, or a container of it by name or id; mounted or not")  # fmt: skip
    add("bytes", nargs="?", metavar="SIZE", help="the same as --size")
    add("--size", metavar="SIZE", help="bytes: 512M, 4G; none: no limit")
    add("--inodes", metavar="N", help="inodes: 100k; none: no limit")
    add_store(parser)


def _limit(args: argparse.Namespace) -> int:
    from cowfs.cli import show
    from cowfs.cli.common import is_path
    from cowfs.cli.store.args import known_in_store, open_store
    from cowfs.mounting import client

    if args.bytes is not None and args.size is not None:
        raise InvalidArgument("the size is given twice")
    changes = {
        name: None if text.lower() == "none" else text
        for name, text in (("size", args.bytes if args.size is None else args.size), ("inodes", args.inodes))
        if text is not None
    }
    if not is_path(args.mountpoint) and not known_in_store(args, args.mountpoint):
        args.mountpoint = _container(args) or args.mountpoint
    if not is_path(args.mountpoint) and known_in_store(args, args.mountpoint):
        with open_store(args, create=False) as store:
            store.limit(args.mountpoint, **changes)
        return show.print_store_usage(args)
    handle = client.attach(args.mountpoint)
    handle.limit(**changes)
    return show.print_usage(handle, args)


def _container(args: argparse.Namespace) -> str | None:
    """The key of the container with a name or id, if the store has it."""
    from cowfs.cli.store.args import open_store
    from cowfs.errors import NotFound
    from cowfs.service.containers.known import key_of

    try:
        with open_store(args, create=False) as store:
            return key_of(store.root, args.mountpoint)
    except NotFound:
        return None


COMMANDS = {
    "mount": Command(
        _configure_mount,
        _mount,
        "Mount a stack of layers as one tree. LAYERS is a directory whose sub-directories are the layers, bottom first\n"
        "(00-base, 10-python, ...; numbers count as numbers, hidden ones do not count), or several layers are given one by\n"
        "one. Returns when the mount answers, and leaves one server process.",
        (
            "cowfs mount layers/ /mnt/rootfs",
            "cowfs mount layers/ /mnt/rootfs --size 2G --inodes 100k",
            "cowfs mount --layer /srv/debian /mnt/rootfs --ephemeral",
            "cowfs mount base python app /mnt/rootfs --upper changes",
            "cowfs mount layers/ /mnt/rootfs --read-only -o nodev,nosuid",
        ),
    ),
    "umount": Command(
        _configure_umount,
        _umount,
        "Unmount, and wait until the server has closed everything. A mount whose server was killed is cleared.",
        ("cowfs umount /mnt/rootfs", "cowfs umount --lazy /mnt/rootfs", "cowfs umount --all"),
    ),
    "limit": Command(
        _configure_limit,
        _limit,
        "Show the limit of a mount or an active snapshot, or change it at once. Data already written stays, whatever the limit.\n"
        "A store keeps it for the mounts to come, whichever way it was changed.",
        (
            "cowfs limit /mnt/rootfs",
            "cowfs limit /mnt/rootfs --size 4G",
            "cowfs limit /mnt/rootfs --inodes none",
            "cowfs limit build --size 8G",
            "cowfs limit web 10G",
        ),
    ),
}
