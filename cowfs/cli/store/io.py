"""`cowfs import`, `export`, `apply`: images and archives in and out of the store."""

from __future__ import annotations

import os
import sys

from cowfs._typed import TYPE_CHECKING, BinaryIO
from cowfs.cli.common import Command
from cowfs.cli.output import note, print_json, shown
from cowfs.cli.progress import Bars
from cowfs.cli.store.args import add_store, open_store, set_labels
from cowfs.errors import InvalidArgument, NotFound
from cowfs.sys.atomic import replacing

if TYPE_CHECKING:
    import argparse

    from cowfs.archive import ApplyOptions
    from cowfs.diff.blocks import Counts
    from cowfs.store import Store


def _source(name: str) -> str | BinaryIO:
    return sys.stdin.buffer if name == "-" else name


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--owners", choices=("fail", "xattr", "ignore"), default="fail",
        help="what to do about owners and devices that this user cannot make (default: fail)")  # fmt: skip
    add("--max-size", metavar="SIZE", help="refuse an archive that unpacks to more (default: 64G)")
    add("--max-entries", metavar="N", help="refuse an archive with more members (default: 1M)")


def _bounds(args: argparse.Namespace) -> ApplyOptions:
    from dataclasses import replace

    from cowfs.archive import ApplyOptions
    from cowfs.model import parse_count, parse_size

    options = ApplyOptions(owners=args.owners)
    if args.max_size:
        options = replace(options, max_bytes=parse_size(args.max_size))
    if args.max_entries:
        options = replace(options, max_entries=parse_count(args.max_entries))
    return options


def _configure_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="OCI layout (directory or tar), docker-archive, root file system tar, directory; - is a pipe",
    )
    add("name", nargs="?", metavar="NAME", help="tag that it gets here (default: those that the source has)")
    add("--tag", metavar="TAG", help="which image, where the source has several")
    add("--platform", metavar="OS/ARCH[/VARIANT]", help="likewise, by platform (default: this machine's)")
    add("--as", dest="form", choices=("image", "rootfs", "layer"),
        help="what SOURCE is, where looking at it does not tell; in a layer, names that begin with .wh. delete")  # fmt: skip
    for name in ("aufs", "overlay2"):
        add(f"--from-docker-{name}", metavar="DIR",
            help=f"instead: all images of the Docker data directory DIR, whose driver is {name}")  # fmt: skip
    add("--label", action="append", default=[], metavar="K=V", help="label of the new snapshots; repeated")
    _add_bounds(parser)
    add_store(parser)


def _import_host(args: argparse.Namespace, root: str, driver: str) -> int:
    refused = [name for name in ("source", "name", "tag", "platform", "form") if getattr(args, name)]
    if refused or (args.from_docker_aufs and args.from_docker_overlay2):
        raise InvalidArgument(f"--from-docker-{driver} brings over all images", remedy="leave out what chooses one")
    with open_store(args) as store, Bars(args) as bars:
        tops, faults = store.import_docker_host(
            root, driver, options=_bounds(args), labels=set_labels(args.label), progress=bars if bars.on else None,
            told=lambda line: note(args, f"cowfs: note: {shown(line)}"),
        )  # fmt: skip
        tags = {top: [tag.name for tag in store.tags() if tag.target == top] for top in tops}
    if args.json:
        print_json([{"name": top, "tags": names} for top, names in tags.items()], args.json)
    else:
        for top, names in tags.items():
            print(shown(" ".join([top, *names])))
    return 1 if faults else 0


def _import(args: argparse.Namespace) -> int:
    for driver, root in (("aufs", args.from_docker_aufs), ("overlay2", args.from_docker_overlay2)):
        if root is not None:
            return _import_host(args, root, driver)
    if args.source is None:
        raise InvalidArgument("nothing to import is named", remedy="cowfs import SOURCE; - is a pipe")
    with open_store(args) as store, Bars(args) as bars:
        top = store.import_image(
            _source(args.source), args.name, tag=args.tag, platform=args.platform, form=args.form,
            options=_bounds(args), labels=set_labels(args.label), progress=bars if bars.on else None,
            told=lambda line: note(args, f"cowfs: note: {shown(line)}"),
        )  # fmt: skip
        tags = [tag.name for tag in store.tags() if tag.target == top]
    if args.json:
        print_json({"name": top, "tags": tags}, args.json)
    else:
        print(shown(top))
    return 0


def _configure_apply(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="an active snapshot that is not mounted")
    add("tar", metavar="TAR", help="an OCI layer tar, plain or compressed; - is a pipe")
    add("--diff-id", metavar="DIGEST", help="refuse an archive with another digest")
    add("--blocks", action="store_true", help="TAR is what 'cowfs export --blocks' wrote")
    _add_bounds(parser)
    add_store(parser)


def _apply(args: argparse.Namespace) -> int:
    with open_store(args, create=False) as store, Bars(args) as bars:
        source = _source(args.tar)
        try:
            stream = open(source, "rb") if isinstance(source, str) else source  # noqa: SIM115  (closed by the with below)
        except FileNotFoundError:
            raise NotFound(f"no such file: {args.tar}") from None
        if args.blocks:
            with stream:
                return _told(store.apply_blocks(args.key, stream), as_json=args.json)
        with stream:
            applied = store.apply(
                args.key, stream, options=_bounds(args), diff_id=args.diff_id, progress=bars if bars.on else None
            )
    if args.json:
        from dataclasses import asdict

        print_json(
            {key: dict(value) if key == "dropped" else value for key, value in asdict(applied).items()}, args.json
        )
    else:
        print(applied.diff_id)
    return 0


def _told(counts: Counts, *, as_json: str) -> int:
    from dataclasses import asdict

    from cowfs.model import format_size

    if as_json:
        print_json(asdict(counts), as_json)
    else:
        print(f"{counts.paths} paths, {format_size(counts.data)} of data in {format_size(counts.size)}")
    return 0


def _configure_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="a snapshot or a tag")
    add("file", metavar="FILE", help="where to; - is a pipe")
    add("--format", choices=("oci", "docker", "tar", "layer"), default="oci",
        help="OCI layout in a tar; docker-archive; the whole tree as a tar; the changes as a layer tar (default: oci)")  # fmt: skip
    add("--compression", choices=("none", "gzip", "zstd"), help="(default: gzip for oci, else none)")
    add("--directory", action="store_true", help="an OCI layout directory instead of a tar")
    add(
        "--blocks",
        action="store_true",
        help="only the blocks that changed, for 'cowfs apply --blocks' in another store",
    )
    add(
        "--disk",
        choices=("raw", "qcow2"),
        help="a disk for a virtual machine: a file system with the tree for its root (driver block)",
    )
    add("--size", metavar="SIZE", help="with --disk: of the disk (default: that of the store's images)")
    add("--base", metavar="NAME", help="with --blocks: against this snapshot (default: the parent)")
    add_store(parser, form=False)


def _export(args: argparse.Namespace) -> int:
    if args.file == "-" and sys.stdout.isatty():
        raise InvalidArgument("an archive does not go to a terminal", remedy="redirect it, or name a file")
    with open_store(args, create=False) as store, Bars(args) as bars:
        progress = bars if bars.on else None
        if args.blocks:
            return _export_blocks(args, store)
        if args.disk:
            return _export_disk(args, store)
        target: str | BinaryIO = sys.stdout.buffer if args.file == "-" else os.path.abspath(args.file)
        told = store.export(
            args.name,
            target,
            format=args.format,
            compression=args.compression,
            directory=args.directory,
            progress=progress,
        )
    if args.file == "-":
        sys.stdout.buffer.flush()
    elif args.json:
        print_json({"exported": told, "file": args.file, "format": args.format}, args.json)
    return 0


def _export_blocks(args: argparse.Namespace, store: Store) -> int:
    if args.file == "-":
        store.export_blocks(args.name, sys.stdout.buffer, base=args.base)
        sys.stdout.buffer.flush()
        return 0
    with replacing(args.file, mode=0o644, durable=False) as file:
        counts = store.export_blocks(args.name, file, base=args.base)
    return _told(counts, as_json=args.json)


def _export_disk(args: argparse.Namespace, store: Store) -> int:
    if args.file == "-":
        store.export_disk(args.name, sys.stdout.buffer, format=args.disk, size=args.size)
        return 0
    from dataclasses import asdict

    from cowfs.model import format_size

    with replacing(args.file, mode=0o644, durable=False) as file:
        told = store.export_disk(args.name, file, format=args.disk, size=args.size)
    if args.json:
        print_json({**asdict(told), "file": args.file, "format": args.disk}, args.json)
    else:
        print(f"a disk of {format_size(told.size)}, {format_size(told.written)} written")
    return 0


COMMANDS = {
    "import": Command(
        _configure_import,
        _import,
        "Bring an image or a tree into the store, as a chain of snapshots; print the name of the top one.",
        (
            "cowfs import debian.tar debian:12",
            "skopeo copy docker-archive:x.tar oci:layout && cowfs import layout app",
            "cowfs import ./rootfs base",
        ),
    ),
    "apply": Command(
        _configure_apply,
        _apply,
        "Unpack an OCI layer tar into an active snapshot; print its diff id.",
        (
            "cowfs apply work layer.tar.gz",
            "zstdcat layer.tar.zst | cowfs apply work -",
            "cowfs apply work changed.blocks --blocks",
        ),
    ),
    "export": Command(
        _configure_export,
        _export,
        "Write a snapshot out as an image, a tree or a layer.",
        (
            "cowfs export app app.tar",
            "cowfs export app - --format docker | podman load",
            "cowfs export work changes.tar --format layer",
            "cowfs export v2 changed.blocks --blocks --base v1",
            "cowfs export vm vm.qcow2 --disk qcow2 --size 20G",
        ),
    ),
}
