"""The common part of the verbs over a store: its options, opening it, paging."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from cowfs.cli import config
from cowfs.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from cowfs.model import Info
    from cowfs.store import Store
    from cowfs.store.look import Look

ROOT = "COWFS_ROOT"


def add_store(parser: argparse.ArgumentParser, *, json: bool = True, form: bool = True) -> None:
    """``--root``, ``--driver``, ``--json``, ``--jsonl`` and ``--format``."""
    add = parser.add_argument
    add(
        "--root", metavar="DIR", help=f"the store (default: ${ROOT}, else /var/lib/cowfs as root, else the user's data)"
    )
    add("--driver", default="auto", metavar="NAME", help="its backend, when the store is new (default: the best here)")
    if json:
        add_json(parser, form=form)


def add_json(parser: argparse.ArgumentParser, *, form: bool = True) -> None:
    """``--json``, ``--jsonl`` and ``--format``: ``args.json`` is ``array``, ``lines`` or a template, empty without them."""
    add = parser.add_argument
    add("--json", action="store_const", const="array", default="", help="as JSON: an array of objects")
    add("--jsonl", action="store_const", const="lines", dest="json", help="as JSON, an object a line")
    if form:
        add(
            "--format",
            dest="json",
            metavar="TEMPLATE",
            type=template,
            help="each object by a template of its JSON fields: '{name} {created:age}'",
        )


def template(text: str) -> str:
    """A way to print, of an argument of --format."""
    from cowfs.cli.output import TEMPLATE

    return TEMPLATE + text


class Places:
    """The mount points of a store's snapshots, from mountinfo and the records of servers, without asking a server.

    Args:
        root: the store's directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._by_kernel: dict[str, str] | None = None

    def of(self, id: str) -> str | None:
        """The mount point of a layer; None if unknown."""
        from cowfs.mounting import notice

        for told in notice.found([f"{self._root}/layers/{id}"]):
            if os.path.exists(told.socket):
                return told.mountpoint
        if self._by_kernel is None:
            self._by_kernel = _kernel_mounts(self._root)
        return self._by_kernel.get(id)


def _kernel_mounts(root: str) -> dict[str, str]:
    """Layer -> mount point of the kernel's mounts of a store.

    Overlays have the layer in their source. A bind shows a directory whose path ends as a layer's tree does, or, of drivers that mount
    a layer's file system in its directory, the tree in the file system that is mounted there.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        text = file.read()
    if b" cowfs:" not in text and b"/fs " not in text:
        return {}
    from cowfs.sys.mounts import mountinfo

    entries = mountinfo()
    own = os.fsencode(os.path.realpath(root)) + b"/layers/"
    by_device = {
        one.dev: one.target.removeprefix(own).partition(b"/")[0] for one in entries if one.target.startswith(own)
    }
    import re

    found: dict[bytes, bytes] = {}
    for one in entries:
        inside = re.search(rb"/layers/([^/]+)/(?:[^/]+/)?fs$", one.root)
        if one.source.startswith(b"cowfs:"):
            found[one.source[6:]] = one.target
        elif inside:
            found[inside[1]] = one.target
        elif one.root == b"/fs" and one.dev in by_device:
            found[by_device[one.dev]] = one.target
    return {os.fsdecode(layer): os.fsdecode(target) for layer, target in found.items()}


def open_store(
    args: argparse.Namespace,
    *,
    create: bool = True,
    options: Mapping[str, str] | None = None,
    outside: bool = False,
    ranges: bool = False,
) -> Store:
    """The store that the options or the environment name.

    Where an ordinary user's store may have files of many owners, this process, which has one thread, enters a user namespace with the ids of
    /etc/subuid, as with ``cowfs unshare``.

    Args:
        options: of its driver.
        outside: never: what is mounted is to be seen by others.
        ranges: always, where this user has ranges: it makes such files.
    """
    from cowfs.store import Store

    root = config.root(args.root)
    fsync = config.fsync()
    if not outside and os.geteuid() != 0:
        root = args.root = _enter(root, always=ranges)  # further openings are of the same one
    return Store.open(root, driver=args.driver, create=create, fsync=fsync, **(options or {}))


def _enter(root: str | None, *, always: bool) -> str:
    """Enter the namespace where that is needed; the store's directory, of which another would be the default in there."""
    from cowfs.store.opening import default_root, needs_ids

    root = os.path.abspath(root or default_root())
    if always or needs_ids(root):
        from cowfs.sandbox import subids

        subids.try_enter()
    return root


def look_at_store(args: argparse.Namespace, *, outside: bool = False) -> Look:
    """The store that the options or the environment name, to read its index only; ``outside`` as for :func:`open_store`."""
    from cowfs.store.look import Look

    root = config.root(args.root)
    if not outside and os.geteuid() != 0:
        root = args.root = _enter(root, always=False)
    return Look.open(root, driver=args.driver, fsync=config.fsync())


def check_new(name: str, what: str = "name") -> str:
    """A key or name that the command may make, since a later command can name it.

    Raises:
        InvalidArgument: it would be taken for something else, or does not fit on one line.
    """
    from cowfs.store.names import check_name

    return check_name(name, what)


def known_in_store(args: argparse.Namespace, name: str) -> bool:
    """Whether the store, if there is one, has a snapshot or tag of this name."""
    from cowfs.errors import NotFound

    try:
        with look_at_store(args, outside=True) as store:
            store.resolve(name)
    except NotFound:
        return False
    return True


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


def label_pairs(pairs: list[str]) -> dict[str, str | None]:
    """Labels from ``K=V`` (set) and ``K=`` or ``K-`` (removed)."""
    labels: dict[str, str | None] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals and pair.endswith("-"):
            key, value = pair[:-1], ""
        elif not equals:
            raise InvalidArgument(f"not a label: {pair!r}", remedy="write KEY=VALUE, or KEY- to remove it")
        if not key.isprintable():
            raise InvalidArgument(f"{key!r} cannot be the key of a label", remedy="printable, and without '='")
        labels[key] = value or None
    return labels


def set_labels(pairs: list[str]) -> dict[str, str]:
    """Labels that are only set."""
    return {key: value or "" for key, value in label_pairs(pairs).items()}


@contextmanager
def paged() -> Iterator[Callable[[str], None]]:
    """A function that prints lines: through a pager if standard output is a terminal and a pager is installed."""
    pager = os.environ.get("PAGER") or "less"
    if not sys.stdout.isatty() or pager == "cat":
        yield print
        return
    import shutil

    if shutil.which(pager.split()[0]) is None:
        yield print
        return
    import subprocess

    environment = {"LESS": "FRX", **os.environ}
    with subprocess.Popen(
        pager.split(), stdin=subprocess.PIPE, text=True, errors="surrogateescape", env=environment
    ) as process:
        assert process.stdin is not None
        pipe = process.stdin
        try:
            yield lambda line: print(line, file=pipe)
            pipe.close()
        except BrokenPipeError:
            pass  # the reader quit


def when(nanoseconds: int) -> str:
    """A time for people, local."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))
