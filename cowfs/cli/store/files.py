"""`cowfs cat`, `cp`, `find` and `du`, and `ls` of a directory: files of snapshots without a mount.

An argument NAME:PATH is a path in a snapshot. Names may hold colons themselves (``debian:12``): the longest part before a colon that
the store knows is the name.
"""

from __future__ import annotations

import os
import stat
import sys
import time

from cowfs._typed import TYPE_CHECKING, Any, NamedTuple
from cowfs.cli.common import Command, is_path
from cowfs.cli.late import Late
from cowfs.cli.output import path_fields, print_items, print_json, shown
from cowfs.cli.store.args import add_json, add_store, open_store
from cowfs.errors import InvalidArgument, NotFound
from cowfs.model import format_size, parse_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from cowfs.cli.progress import Bars
    from cowfs.model import FileInfo
    from cowfs.store import Store

_CHUNK = 1 << 20
_TYPES = {"f": "file", "d": "dir", "l": "symlink", "p": "fifo", "s": "socket", "c": "char", "b": "block"}
_FORMATS = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK,
            "char": stat.S_IFCHR, "block": stat.S_IFBLK}  # fmt: skip


class Place(NamedTuple):
    """A path in a snapshot."""

    name: str
    path: str


def place_in(store: Store, text: str, *, need_path: bool = True) -> Place:
    """Parse NAME:PATH, or (unless a path is needed) NAME alone.

    Raises:
        InvalidArgument: there is no colon.
        NotFound: the store has no such name.
    """
    if not need_path and _known(store, text):
        return Place(text, "/")
    at = len(text)
    while (at := text.rfind(":", 0, at)) > 0:
        if _known(store, text[:at]):
            return Place(text[:at], text[at + 1 :] or "/")
    name = text.partition(":/")[0] if ":/" in text else text.rpartition(":")[0] or text
    if ":" not in text and _known(store, text):
        raise InvalidArgument(f"{text!r} names a snapshot, and no path in it", remedy=f"write {text}:/PATH")
    raise NotFound(f"no snapshot or tag {name!r}", remedy="'cowfs ls' and 'cowfs images' show what there is")


def _known(store: Store, name: str) -> bool:
    return store.index.find(name) is not None or store.index.tag(name) is not None


# -- cat ---------------------------------------------------------------------------------------------------------------


def _configure_cat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="NAME:PATH", help="a file of a snapshot")
    add_store(parser, json=False)


def _cat(args: argparse.Namespace) -> int:
    out = sys.stdout.buffer
    with open_store(args, create=False) as store:
        for text in args.files:
            place = place_in(store, text)
            with store.open_file(place.name, place.path, buffering=0) as file:
                while piece := file.read(_CHUNK):
                    out.write(piece)
    out.flush()
    return 0


# -- cp ----------------------------------------------------------------------------------------------------------------


def _configure_cp(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="NAME:PATH, a path of the host, or - for a tar; /. behind it: what is in it")
    add("target", metavar="TARGET", help="likewise; into a directory that is there, under the name that it has")
    add("-a", "--archive", action="store_true", help="keep owners, set-id bits and all extended attributes")
    add_store(parser)


def _cp(args: argparse.Namespace) -> int:
    inside = [text != "-" and not is_path(text) and ":" in text for text in (args.source, args.target)]
    if not any(inside):
        raise InvalidArgument("neither of them is in a snapshot", remedy="write one as NAME:PATH")
    if "-" in (args.source, args.target) and all(inside):
        raise InvalidArgument("- is a tar, and takes the place of the host's path")
    from cowfs.cli.progress import Bars

    with open_store(args, create=False) as store, Bars(args) as bars:
        done = [0, 0]
        progress = _counted(bars, done)
        if all(inside):
            source, target = place_in(store, args.source), place_in(store, args.target)
            path = _landing(source.path, target.path, lambda path: _is_dir(store, target.name, path))
            store.copy_between(source.name, source.path, target.name, path, owners=True, progress=progress)
        elif inside[0]:
            _copy_out(args, store, progress)
        else:
            _copy_in(args, store, progress)
    if args.json and args.target != "-":
        told = {"source": args.source, "target": args.target, "bytes": done[0], "objects": done[1]}
        print_json(told, args.json)
    return 0


def _counted(bars: Bars, counts: list[int]) -> Callable[[int, int], object]:
    """The function for the progress of a copy; it keeps bytes and objects in ``counts``, too."""

    def progress(done: int, objects: int) -> None:
        counts[:] = done, objects
        bars("copied", done, 0)

    return progress


def _copy_out(args: argparse.Namespace, store: Store, progress: Callable[[int, int], object]) -> None:
    place = place_in(store, args.source)
    if args.target == "-":
        if sys.stdout.isatty():
            raise InvalidArgument("an archive does not go to a terminal", remedy="redirect it, or name a file")
        store.copy_out_tar(place.name, place.path, sys.stdout.buffer, progress=progress)
        sys.stdout.buffer.flush()
        return
    target = _landing(place.path, args.target, os.path.isdir)
    store.copy_out(place.name, place.path, target, owners=args.archive, progress=progress)


def _copy_in(args: argparse.Namespace, store: Store, progress: Callable[[int, int], object]) -> None:
    place = place_in(store, args.target)
    if args.source == "-":
        store.copy_in_tar(place.name, sys.stdin.buffer, place.path, progress=progress)
        return
    if not os.path.lexists(args.source):
        raise NotFound(f"no such file: {args.source}")
    path = _landing(args.source, place.path, lambda path: _is_dir(store, place.name, path))
    store.copy_in(place.name, args.source, path, owners=args.archive, progress=progress)


def _is_dir(store: Store, name: str, path: str) -> bool:
    try:
        return store.stat_file(name, path).type == "dir"
    except (FileNotFoundError, NotADirectoryError):
        return False


def _landing(source: str, target: str, is_dir: Callable[[str], bool]) -> str:
    """The destination of a source, as in cp(1): inside an existing directory, else under the target's own name.

    Raises:
        NotFound: the target's directory does not exist.
    """
    if not is_dir(target):
        if target.endswith("/"):
            raise NotFound(f"no such directory: {target}")
        return target
    name = os.path.basename(source.rstrip("/"))
    return target if name in ("", ".", "..") else f"{target.rstrip('/')}/{name}"


# -- ls of a directory -------------------------------------------------------------------------------------------------


def list_files(args: argparse.Namespace, texts: list[str]) -> int:
    """`cowfs ls NAME:PATH ...`."""
    with open_store(args, create=False) as store:
        for text in texts:
            place = place_in(store, text)
            entries = list(_listed(store, place))
            if args.json:
                print_items((file_as_json(name, entry) for name, entry in entries), args.json)
                continue
            for name, entry in entries:
                print(_long(name, entry) if args.long else shown(name))
    return 0


def _listed(store: Store, place: Place) -> Iterator[tuple[bytes, FileInfo]]:
    """(name as shown, entry) of a directory's entries, or of the one file."""
    top = store.stat_file(place.name, place.path)
    if top.type != "dir":
        yield os.fsencode(place.path), top
        return
    for entry in list(store.walk_files(place.name, place.path + "/.", depth=1))[1:]:
        yield entry.path.rpartition(b"/")[2], entry


def _mode_word(entry: FileInfo) -> str:
    return stat.filemode(_FORMATS[entry.type] | entry.mode)


def _long(name: bytes, entry: FileInfo) -> str:
    size = f"{os.major(entry.rdev)}, {os.minor(entry.rdev)}" if entry.type in ("char", "block") else str(entry.size)
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.mtime // 1_000_000_000))
    arrow = f" -> {shown(entry.target)}" if entry.type == "symlink" else ""
    return f"{_mode_word(entry)} {max(1, entry.nlink):>3} {entry.uid:>5} {entry.gid:>5} {size:>10} {day} {shown(name)}{arrow}"


def file_as_json(path: bytes, entry: FileInfo) -> dict[str, Any]:
    """An object of a tree as programs read it."""
    return {
        **path_fields("path", path),
        "type": entry.type,
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "mtime": entry.mtime,
        "nlink": entry.nlink,
        **(path_fields("target", entry.target) if entry.type == "symlink" else {}),
        **({"rdev": [os.major(entry.rdev), os.minor(entry.rdev)]} if entry.type in ("char", "block") else {}),
    }


# -- find --------------------------------------------------------------------------------------------------------------


def _configure_find(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("place", metavar="NAME[:PATH]", help="a snapshot, or a directory in it")
    add("-name", metavar="GLOB", help="the last name matches")
    add("-iname", metavar="GLOB", help="the same, whatever the case")
    add("-path", metavar="GLOB", help="the whole path matches, from the root with its slash")
    add("-type", metavar="T", help="one or several of f d l p s c b, with commas")
    add("-size", metavar="[+-]SIZE", help="a file of more (+), less (-) or exactly that many bytes: +10M")
    add("-perm", metavar="[-/]MODE", help="permission bits are MODE; all (-) or any (/) of MODE's are set: -4000")
    add("-uid", type=int, metavar="N", help="belongs to the user N")
    add("-gid", type=int, metavar="N", help="belongs to the group N")
    add("-links", type=int, metavar="N", help="has N names")
    add("-mtime", metavar="[+-]DAYS", help="changed more (+) or less (-) than DAYS days ago")
    add("-empty", action="store_true", help="an empty file or directory")
    add("-maxdepth", type=int, metavar="N", help="levels below PATH at most")
    add("-l", "--long", action="store_true", help="as ls -l")
    add("-0", "--print0", dest="nul", action="store_true", help="a NUL behind each path, the bytes as they are")
    add_store(parser, json=False)
    add_json(parser)
    known = parser.parse_known_args

    def parse_known_args(arguments: list[str], namespace: object = None) -> tuple[argparse.Namespace, list[str]]:
        """A value may begin with a dash, as find(1) has it."""
        joined: list[str] = []
        for word in arguments:
            if joined and joined[-1] in ("-size", "-perm", "-mtime"):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return known(joined)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


def _find(args: argparse.Namespace) -> int:
    tests = _tests(args)
    with open_store(args, create=False) as store, Late(args, f"find {args.place}") as late:
        place = place_in(store, args.place, need_path=False)
        found = late.until_shown(_matching(args, store, place, tests))
        if args.json:
            print_items((file_as_json(b"/" + entry.path, entry) for entry in found), args.json)
        elif args.nul:
            for entry in found:
                sys.stdout.buffer.write(b"/" + entry.path + b"\0")
            sys.stdout.buffer.flush()
        else:
            for entry in found:
                path = b"/" + entry.path
                print(_long(path, entry) if args.long else shown(path))
    return 0


def _matching(
    args: argparse.Namespace, store: Store, place: Place, tests: list[Callable[[FileInfo], bool]]
) -> Iterator[FileInfo]:
    filled: set[bytes] = set()
    entries: Iterator[FileInfo] = store.walk_files(
        place.name,
        place.path,
        depth=None if args.maxdepth is None else args.maxdepth + 1 if args.empty else args.maxdepth,
    )
    if args.empty:
        every = list(entries)
        filled = {entry.path.rpartition(b"/")[0] for entry in every if entry.path}
        top = every[0].path
        entries = (entry for entry in every if args.maxdepth is None or _depth(entry.path, top) <= args.maxdepth)
    for entry in entries:
        if args.empty and not (
            (entry.type == "file" and not entry.size) or (entry.type == "dir" and entry.path not in filled)
        ):
            continue
        if all(test(entry) for test in tests):
            yield entry


def _depth(path: bytes, top: bytes) -> int:
    return len([part for part in path[len(top) :].split(b"/") if part])


def _tests(args: argparse.Namespace) -> list[Callable[[FileInfo], bool]]:
    """The tests of the arguments; all must hold."""
    import fnmatch

    tests: list[Callable[[FileInfo], bool]] = []
    if args.name is not None:
        name = os.fsencode(args.name)
        tests.append(lambda entry: fnmatch.fnmatchcase(_last(entry), name))
    if args.iname is not None:
        iname = os.fsencode(args.iname.lower())
        tests.append(lambda entry: fnmatch.fnmatchcase(_last(entry).lower(), iname))
    if args.path is not None:
        path = os.fsencode(args.path)
        tests.append(lambda entry: fnmatch.fnmatchcase(b"/" + entry.path, path))
    if args.type is not None:
        kinds = args.type.split(",")
        if not all(kind in _TYPES for kind in kinds):
            raise InvalidArgument(f"no file type {args.type!r}", remedy=f"of {' '.join(_TYPES)}, with commas")
        wanted = {_TYPES[kind] for kind in kinds}
        tests.append(lambda entry: entry.type in wanted)
    if args.size is not None:
        sign, size = _signed(args.size)
        count = 0 if size == "0" else parse_size(size)
        tests.append(lambda entry: entry.type == "file" and _compare(sign, entry.size, count))
    if args.perm is not None:
        tests.append(_perm(args.perm))
    if args.mtime is not None:
        tests.append(_changed(args.mtime))
    if args.uid is not None:
        tests.append(lambda entry: entry.uid == args.uid)
    if args.gid is not None:
        tests.append(lambda entry: entry.gid == args.gid)
    if args.links is not None:
        tests.append(lambda entry: entry.nlink == args.links)
    return tests


def _changed(text: str) -> Callable[[FileInfo], bool]:
    sign, days = _signed(text)
    try:
        limit = time.time_ns() - int(float(days) * 86_400e9)
    except (ValueError, OverflowError):
        sign = ""
    if not sign:
        raise InvalidArgument(f"not an age: {text!r}", remedy="+7 for more, -7 for less than seven days ago")
    return lambda entry: entry.mtime < limit if sign == "+" else entry.mtime >= limit


def _last(entry: FileInfo) -> bytes:
    return entry.path.rpartition(b"/")[2]


def _signed(text: str) -> tuple[str, str]:
    return (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)


def _compare(sign: str, value: int, bound: int) -> bool:
    return value > bound if sign == "+" else value < bound if sign == "-" else value == bound


def _perm(text: str) -> Callable[[FileInfo], bool]:
    how, digits = (text[0], text[1:]) if text[:1] in ("-", "/") else ("", text)
    try:
        bits = int(digits, 8)
    except ValueError:
        raise InvalidArgument(f"not a mode: {text!r}", remedy="octal digits, as 644, -4000 or /022") from None
    if how == "-":
        return lambda entry: entry.mode & bits == bits
    return lambda entry: entry.mode & bits != 0 if how == "/" else entry.mode == bits


# -- du ----------------------------------------------------------------------------------------------------------------

_UNIT = 4096


def _configure_du(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("place", metavar="NAME[:PATH]", help="a snapshot, or a directory in it")
    add("-d", "--depth", type=int, default=1, metavar="N", help="levels that are shown (default: 1)")
    add("-s", "--summarize", action="store_true", help="the sum alone")
    add("-b", "--bytes", action="store_true", help="plain numbers")
    add_store(parser, json=False)
    add_json(parser)


def _du(args: argparse.Namespace) -> int:
    from cowfs.cli.progress import Bars

    depth = 0 if args.summarize else args.depth
    with open_store(args, create=False) as store:
        place = place_in(store, args.place, need_path=False)
        with Bars(args, f"du {args.place}"):
            sums, top = _sums(store, place, depth)
    rows = sorted(sums.items(), key=lambda item: item[1], reverse=True)
    rows = [row for row in rows if row[0] != top] + [(top, sums[top])]
    if args.json:
        print_items(({**path_fields("path", b"/" + path), "bytes": used, "objects": count} for path, (used, count) in rows), args.json)  # fmt: skip
        return 0
    for path, (used, _) in rows:
        print(f"{used if args.bytes else format_size(used):>10}  {shown(b'/' + path)}")
    return 0


def _sums(store: Store, place: Place, depth: int) -> tuple[dict[bytes, tuple[int, int]], bytes]:
    """Bytes and objects below each directory down to a depth; a file with several names counts at the first one found."""
    sums: dict[bytes, tuple[int, int]] = {}
    seen: set[object] = set()
    top: bytes | None = None
    for entry in store.walk_files(place.name, place.path):
        if top is None:
            top = entry.path
        used = -(-entry.size // _UNIT) * _UNIT
        if entry.nlink > 1 and entry.type != "dir":
            used = 0 if entry.file in seen else used
            seen.add(entry.file)
        below = entry.path[len(top) :].lstrip(b"/").split(b"/")
        levels = below[:-1] if entry.type != "dir" else [name for name in below if name]
        at = top
        for level in range(min(depth, len(levels)) + 1):
            if level:
                at = at + b"/" + levels[level - 1] if at else levels[level - 1]
            had = sums.get(at, (0, 0))
            sums[at] = had[0] + used, had[1] + 1
    assert top is not None
    return sums, top


COMMANDS = {
    "cat": Command(
        _configure_cat,
        _cat,
        "Print files of snapshots, committed or active, mounted or not. Links are followed inside the snapshot.",
        ("cowfs cat base:/etc/os-release", "cowfs cat debian:12:/etc/passwd | wc -l"),
    ),
    "cp": Command(
        _configure_cp,
        _cp,
        "Copy files and trees out of a snapshot, into an active one, or between two; - reads or writes a tar. Existing files are replaced,"
        " directories are merged. Links in a copied tree stay links.",
        (
            "cowfs cp base:/etc/os-release .",
            "cowfs cp ./site work:/srv/",
            "cowfs cp base:/etc/. ./etc-of-base",
            "tar -c site | cowfs cp - work:/srv",
            "cowfs cp base:/usr/share - | tar -t",
        ),
    ),
    "find": Command(
        _configure_find,
        _find,
        "List the paths of a snapshot that pass all tests. Of a committed one only the index is read.",
        (
            "cowfs find base -name '*.conf'",
            "cowfs find base:/usr -type f -size +1M -l",
            "cowfs find base -perm -4000",
            "cowfs find base -type l --jsonl",
        ),
    ),
    "du": Command(
        _configure_du,
        _du,
        "Sum up file data in units of 4 KiB by directory, the largest first; a file with several names counts once.",
        ("cowfs du base", "cowfs du base:/usr --depth 2", "cowfs du base -s -b"),
    ),
}
