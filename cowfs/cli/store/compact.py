"""`cowfs compact`: redirect files that were mostly written become plain files."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING
from cowfs.cli.common import Command
from cowfs.cli.output import print_json
from cowfs.cli.progress import Bars
from cowfs.cli.store.args import add_store, open_store
from cowfs.errors import InvalidArgument

if TYPE_CHECKING:
    import argparse


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", metavar="KEY", help="an active snapshot, mounted or not")
    add(
        "--share", metavar="PERCENT", default="75", help="only files of which so much was written (default: 75; 0: all)"
    )
    add_store(parser)


def _share(text: str) -> float:
    number = text.removesuffix("%")
    if not number.isdecimal() or int(number) > 100:
        raise InvalidArgument(f"--share is a number from 0 to 100, not {text!r}")
    return int(number) / 100


def _compact(args: argparse.Namespace) -> int:
    from cowfs.model import format_size

    share = _share(args.share)
    with open_store(args, create=False) as store, Bars(args) as bars:
        done = store.compact(args.key, share=share, on_progress=lambda path, done, todo: bars(path, done, done + todo))
    if args.json:
        from dataclasses import asdict

        print_json(asdict(done), args.json)
        return 0
    left = f", {done.skipped} left as they are" if done.skipped else ""
    print(f"{done.files} files compacted, {format_size(done.bytes)} copied{left}")
    return 0


COMMANDS = {
    "compact": Command(
        _configure,
        _compact,
        "Turn redirect files, most of which was written, into plain files: the rest is copied from the layers beneath.\n"
        "Works under a mount; reading and writing go on. For stores with the driver row.",
        ("cowfs compact work", "cowfs compact work --share 0"),
    ),
}
