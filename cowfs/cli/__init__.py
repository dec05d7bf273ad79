"""The command `cowfs`: the only place that prints, and the only one that reads the user's environment.

Strategy: one table of verbs. Only the requested verb is imported and gets a parser (so `cowfs mount` starts
fast); `--help` needs the table alone, `completion` and the tests walk all of it. Errors become one line on standard
error and the exit status of their class here, at one of the two edges where errors are translated (the other is the
FUSE session).

A verb's module has a dict ``COMMANDS``: verb -> :class:`cowfs.cli.common.Command`. None imports this one: who prints the whole table is given it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence

from cowfs.cli.common import fill_streams, guarded, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cowfs.cli.common import Command, Commands

__all__ = ["LOOKING", "VERBS", "Verb", "command", "fill_streams", "main", "parser_of", "say"]


class Verb:
    """A line of the table: what is known of a verb without importing it."""

    __slots__ = ("group", "load", "summary")

    def __init__(self, load: Callable[[], Commands], summary: str, group: str) -> None:
        self.load = load
        self.summary = summary
        self.group = group


# Each group of verbs is imported by a function of its own, so that readers and tools see who imports whom.


def _mount() -> Commands:
    from cowfs.cli import mount

    return mount.COMMANDS


def _show() -> Commands:
    from cowfs.cli import show

    return show.COMMANDS


def _store_io() -> Commands:
    from cowfs.cli.store import io

    return io.COMMANDS


def _registry() -> Commands:
    from cowfs.cli import registry

    return registry.COMMANDS


def _store_run() -> Commands:
    from cowfs.cli.store import run

    return run.COMMANDS


def _store_files() -> Commands:
    from cowfs.cli.store import files

    return files.COMMANDS


def _store_look() -> Commands:
    from cowfs.cli.store import look

    return look.COMMANDS


def _store_snapshots() -> Commands:
    from cowfs.cli.store import snapshots

    return snapshots.COMMANDS


def _store_live() -> Commands:
    from cowfs.cli.store import live

    return live.COMMANDS


def _store_compact() -> Commands:
    from cowfs.cli.store import compact

    return compact.COMMANDS


def _store_house() -> Commands:
    from cowfs.cli.store import house

    return house.COMMANDS


def _store_keep() -> Commands:
    from cowfs.cli.store import keep

    return keep.COMMANDS


def _store_send() -> Commands:
    from cowfs.cli.store import send

    return send.COMMANDS


def _service() -> Commands:
    from cowfs.cli import serve

    return serve.COMMANDS


def _podman() -> Commands:
    from cowfs.cli import podman

    return podman.COMMANDS


def _stats() -> Commands:
    from cowfs.cli import stats

    return stats.COMMANDS


def _top() -> Commands:
    from cowfs.cli import top

    return top.COMMANDS


def _bench() -> Commands:
    from cowfs.cli import bench

    return bench.COMMANDS


def _completion() -> Commands:
    from cowfs.cli import completion

    return completion.commands({name: verb.summary for name, verb in VERBS.items()}, parser_of)


_MOUNTS, _SNAPSHOTS, _FILES, _STORE, _SERVICE, _ABOUT = "Mounts", "Snapshots", "Files", "Store", "Service", "About"

VERBS: dict[str, Verb] = {
    "mount": Verb(_mount, "mount a stack of layers as one tree", _MOUNTS),
    "umount": Verb(_mount, "unmount, also when the server is gone", _MOUNTS),
    "mounts": Verb(_show, "what is mounted: layers, upper, use and limit, process", _MOUNTS),
    "diff": Verb(_show, "what an upper layer adds, changes and deletes", _MOUNTS),
    "usage": Verb(_show, "bytes and inodes that an upper layer holds", _MOUNTS),
    "logs": Verb(_store_house, "what the server of a mount wrote", _MOUNTS),
    "limit": Verb(_mount, "show or change the limit of a mount or a snapshot, mounted or not", _MOUNTS),
    "import": Verb(_store_io, "bring an image or a tree into the store", _SNAPSHOTS),
    "pull": Verb(_registry, "bring an image from a registry into the store", _SNAPSHOTS),
    "push": Verb(_registry, "send an image to a registry", _SNAPSHOTS),
    "run": Verb(_store_run, "run a command in a fresh snapshot", _SNAPSHOTS),
    "sh": Verb(_store_run, "run a shell in a snapshot that is there, mounted or not", _SNAPSHOTS),
    "unshare": Verb(_store_run, "start a command with all ids of an ordinary user", _STORE),
    "prepare": Verb(_store_snapshots, "make a writable snapshot", _SNAPSHOTS),
    "view": Verb(_store_snapshots, "make a read-only snapshot", _SNAPSHOTS),
    "commit": Verb(_store_snapshots, "make a snapshot immutable under a name", _SNAPSHOTS),
    "snapshot": Verb(_store_live, "commit what a key holds now, also while it is written", _SNAPSHOTS),
    "rollback": Verb(_store_live, "put a key back to an ancestor, also while it is mounted", _SNAPSHOTS),
    "squash": Verb(_store_live, "merge a snapshot into its only child", _SNAPSHOTS),
    "fork": Verb(_store_live, "prepare many snapshots of one parent", _SNAPSHOTS),
    "compact": Verb(_store_compact, "make plain files of files that were mostly rewritten", _SNAPSHOTS),
    "rm": Verb(_store_snapshots, "remove snapshots and tags", _SNAPSHOTS),
    "ls": Verb(_store_look, "list snapshots", _SNAPSHOTS),
    "tree": Verb(_store_look, "which snapshot is based on which", _SNAPSHOTS),
    "log": Verb(_store_look, "a snapshot and its ancestors", _SNAPSHOTS),
    "stat": Verb(_store_look, "all about one snapshot", _SNAPSHOTS),
    "label": Verb(_store_snapshots, "set and remove labels", _SNAPSHOTS),
    "tag": Verb(_store_snapshots, "give a snapshot a tag", _SNAPSHOTS),
    "rename": Verb(_store_house, "give a key, name or tag another one", _SNAPSHOTS),
    "copy": Verb(_store_house, "copy snapshots to another store", _SNAPSHOTS),
    "send": Verb(_store_send, "write snapshots to a pipe, for another store", _SNAPSHOTS),
    "receive": Verb(_store_send, "bring in what send wrote", _SNAPSHOTS),
    "images": Verb(_store_look, "list tags with layers and size", _SNAPSHOTS),
    "apply": Verb(_store_io, "unpack a layer archive into a snapshot", _SNAPSHOTS),
    "export": Verb(_store_io, "write a snapshot out as image, tree or layer", _SNAPSHOTS),
    "cat": Verb(_store_files, "print files of snapshots, without a mount", _FILES),
    "cp": Verb(_store_files, "copy files and trees in, out and between snapshots", _FILES),
    "find": Verb(_store_files, "list paths of a snapshot by tests", _FILES),
    "du": Verb(_store_files, "which directories of a snapshot hold how much", _FILES),
    "init": Verb(_store_keep, "make a store", _STORE),
    "info": Verb(_store_keep, "driver, mounts and host, and why they were chosen", _STORE),
    "df": Verb(_store_keep, "what the store holds", _STORE),
    "check": Verb(_store_keep, "verify the store, and repair it", _STORE),
    "gc": Verb(_store_keep, "delete what nothing records", _STORE),
    "migrate": Verb(_store_keep, "move the store to another driver", _STORE),
    "prune": Verb(_store_house, "remove snapshots that nothing needs", _STORE),
    "doctor": Verb(_store_house, "what this host and user can do, and how to get the rest", _STORE),
    "serve": Verb(_service, "serve the store to Docker's clients", _SERVICE),
    "podman": Verb(_podman, "let podman and buildah mount fast, by the mount service", _SERVICE),
    "tls": Verb(_service, "certificates to try the TLS door with", _SERVICE),
    "stats": Verb(_stats, "what mounts and containers use, and what their servers do", _SERVICE),
    "top": Verb(_top, "what mounts and containers do now, the busiest first", _SERVICE),
    "events": Verb(_service, "what happens to the store, mounts and containers", _SERVICE),
    "bench": Verb(_bench, "measure against other file systems, on your own disk", _ABOUT),
    "completion": Verb(_completion, "completion for bash, zsh or fish", _ABOUT),
}


#: verbs that only look, and end soon: they leave no garbage worth collecting
LOOKING = frozenset(("ls", "tree", "log", "stat", "images", "df", "info", "usage", "mounts"))

#: verbs that look, too, but may go through big trees, and leave garbage
_WALKING = frozenset(("diff", "cat", "find", "du", "doctor"))

#: options that may stand before the verb, and whether a value follows
_BEFORE = {
    **dict.fromkeys(("--root", "--driver", "--format", "--progress"), True),
    **dict.fromkeys(("--json", "--jsonl", "-q", "--quiet", "-v", "--verbose", "-D", "--debug"), False),
}


def command_of(name: str) -> Command:
    """Import a verb."""
    return VERBS[name].load()[name]


def parser_of(name: str) -> argparse.ArgumentParser:
    """A verb's parser: one line for a bad argument, examples below its help."""
    from cowfs.cli import common

    return common.parser(name, command_of(name))


def overview() -> str:
    """The text of `cowfs --help`."""
    lines = [
        "usage: cowfs VERB [arguments]     (cowfs VERB --help tells more, with examples)",
        "",
        "Copy-on-write root file systems: stacks of layers, mounted with a size limit that holds.",
    ]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<12} {verb.summary}" for name, verb in VERBS.items() if verb.group == group]
    lines += [
        "",
        "examples:",
        "  cowfs mount layers/ /mnt/rootfs --size 2G",
        "  cowfs diff /mnt/rootfs",
        "  cowfs umount /mnt/rootfs",
        "",
    ]
    return "\n".join(lines)


def verb_first(arguments: Sequence[str]) -> list[str]:
    """Move the options of a store that stand before the verb behind it.

    >>> verb_first(["--root", "store", "--json", "ls", "-l"])
    ['ls', '--root', 'store', '--json', '-l']
    """
    end = 0
    while end < len(arguments) and (option := arguments[end].partition("="))[0] in _BEFORE:
        end += 2 if _BEFORE[option[0]] and not option[1] else 1
    return (
        [*arguments[end : end + 1], *arguments[:end], *arguments[end + 1 :]]
        if end < len(arguments)
        else list(arguments)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command. Returns the exit status."""
    fill_streams()
    arguments = verb_first(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "help"):
        if name == "help" and len(arguments) > 1 and arguments[1] in VERBS:
            return guarded(lambda: _run(arguments[1], ["--help"]))
        return guarded(lambda: say(overview(), 0 if arguments else 2))
    if name in ("--version", "-V"):
        from cowfs import __version__

        return guarded(lambda: say(f"cowfs {__version__}\n"))
    if name not in VERBS:
        import difflib

        near = difflib.get_close_matches(name, VERBS, 1)
        sys.stderr.write(f"cowfs: no verb {name!r} ({f'did you mean {near[0]}?' if near else 'see: cowfs --help'})\n")
        return 2
    return guarded(lambda: _run(name, arguments[1:]))


def command() -> int:
    """The command as it is installed: :func:`main`, and an end without the taking apart of modules after a verb that only looked."""
    code = main()
    if (LOOKING | _WALKING).issuperset(verb_first(sys.argv[1:])[:1]):
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End this process at once: to take modules apart costs a looking verb an eighth of its time.

    Nothing is lost: what was asked for at exit is done, streams are flushed. Where another thread lives, or a stream fails, this returns.
    """
    threading = sys.modules.get("threading")
    if threading is not None and threading.active_count() > 1:
        return
    import os
    from atexit import _run_exitfuncs  # the function by which multiprocessing's children end

    _run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(code)


def parsed(name: str, arguments: list[str]) -> argparse.Namespace:
    """The values of an argument list, by argparse; it ends the process after --help and after a bad argument."""
    parser = parser_of(name)
    options, rest = parser.parse_known_args(arguments)
    if rest and name in ("run", "sh"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # arguments on both sides of an option, or ones that are not known
        options = parser.parse_intermixed_args(arguments)
    return options


def _run(name: str, arguments: list[str]) -> int:
    from cowfs.cli import common

    gc.disable()  # imports leave nothing to collect
    try:
        options = common.parse_quickly(command_of(name), arguments) or parsed(name, arguments)
    finally:
        if name not in LOOKING:
            gc.enable()
    common.begin(options)
    code: int = options.run(options)
    return code
