"""The verbs of registries: pull and push."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.cli.common import Command
from cowfs.cli.output import print_json
from cowfs.cli.progress import Bars
from cowfs.cli.store.args import add_store, open_store
from cowfs.errors import CowfsError, FailedPrecondition

if TYPE_CHECKING:
    import argparse


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="[registry/]repository[:tag][@digest]; without a registry: docker.io")
    add("--insecure", action="store_true", help="speak to this registry without TLS, or without verifying it")
    add("-q", "--quiet", action="store_true", help="print the digest alone")


def _configure_pull(parser: argparse.ArgumentParser) -> None:
    _configure(parser)
    parser.add_argument("--platform", metavar="OS/ARCH", help="which of several images (default: this machine's)")
    add_store(parser)


def _configure_push(parser: argparse.ArgumentParser) -> None:
    _configure(parser)
    add_store(parser)


def _transfer(args: argparse.Namespace, *, push: bool) -> int:
    from cowfs.images.registry import credentials_for
    from cowfs.service.images import Images
    from cowfs.service.references import parse
    from cowfs.service.registry import Transfers

    reference = parse(args.name)
    credentials = credentials_for(reference.registry)
    with open_store(args) as store:
        insecure = [reference.registry] if args.insecure else []
        transfers = Transfers(store, Images(store), insecure=insecure)
        if push:
            lines: Iterable[Any] = transfers.push(args.name, credentials=credentials)
        else:
            lines = transfers.pull(args.name, platform=args.platform, credentials=credentials)
        return _tell(args, lines)


def _tell(args: argparse.Namespace, lines: Iterable[Any]) -> int:
    """Show bars during a transfer, and its result at the end.

    Raises:
        CowfsError: the error in the last line.
    """
    digest = ""
    with Bars(args) as bars:
        for line in lines:
            if line is None:
                continue
            if "error" in line:
                raise FailedPrecondition(line["error"])
            detail = line.get("progressDetail") or {}
            if detail.get("current") is not None:
                bars(line["id"], detail["current"], detail.get("total") or 0)
            digest = line.get("aux", {}).get("Digest") or digest
            status = line.get("status", "")
            if status.startswith("Digest: "):
                digest = status.removeprefix("Digest: ")
            elif status.startswith("Status: ") and not args.quiet and not args.json:
                print(status.removeprefix("Status: "))
    if not digest:
        raise CowfsError("the registry gave no digest")
    if args.json:
        print_json({"name": args.name, "digest": digest}, args.json)
    else:
        print(digest)
    sys.stdout.flush()
    return 0


COMMANDS = {
    "pull": Command(
        _configure_pull,
        lambda args: _transfer(args, push=False),
        "Pull an image from a registry: a chain of snapshots and a tag. Layers that the store has are not fetched. Credentials are those of"
        " 'docker login' (~/.docker/config.json and its helpers). Prints the digest.",
        ("cowfs pull debian:12", "cowfs pull localhost:5000/app --insecure", "cowfs pull ghcr.io/org/app@sha256:..."),
    ),
    "push": Command(
        _configure_push,
        lambda args: _transfer(args, push=True),
        "Push an image to a registry, by one of its tags. Layers that the registry has are not sent. Prints the digest.",
        ("cowfs tag localhost:5000/app:1 base && cowfs push localhost:5000/app:1",),
    ),
}
