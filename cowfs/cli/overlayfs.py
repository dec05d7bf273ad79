"""`cowfs-overlayfs`: the command line of fuse-overlayfs, for container engines and for mount(8).

Strategy: two tables define the options; an unknown one is reported on standard error and ignored, as by fuse-overlayfs.
Everything beyond the parsing is the mount that `cowfs mount` makes, with two differences: nothing is recorded beside
the upper, since the engine keeps its own records, and no upperdir means read-only.

Forms seen in practice, all understood: ``PROGRAM -o OPTIONS TARGET`` (podman, buildah), ``PROGRAM SOURCE TARGET -o
OPTIONS`` (mount helpers, containerd), ``-oOPTIONS``, several ``-o``, ``a,,b,``, paths with ``\\:`` ``\\,`` ``\\\\``, and
``context="a,b"`` in quotes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.cli.common import complain, fill_streams, guarded, say
from cowfs.errors import InvalidArgument, Unsupported
from cowfs.format.mount_options import split_layers, split_options, unescape

if TYPE_CHECKING:
    from cowfs.mounting.request import IdMap, MountSpec

PROGRAM = "cowfs-overlayfs"

HELP = f"""\
usage: {PROGRAM} [-f] [-d] -o OPTIONS TARGET
       {PROGRAM} SOURCE TARGET -o OPTIONS

Mounts layers as one tree, with the command line of fuse-overlayfs. Returns when the mount answers.

  -o lowerdir=A:B:...        read-only layers, topmost first; needed (\\: for a colon in a path)
  -o upperdir=DIR            writable layer; without it the mount is read-only
  -o workdir=DIR             on the same file system as upperdir; needed with it
  -o size=SIZE, inodes=N     limit on what upperdir holds: 2G, 100k
  -o ro                      read-only, upperdir included
  -o volatile                never sync, and mark workdir so; fsync=0: without the mark
  -o uidmapping=A:B:N[:...]  ids A.. of the layers show as B..; gidmapping likewise
  -o squash_to_root, squash_to_uid=N, squash_to_gid=N
  -o xattr_permissions=1|2   owner and mode are kept in an xattr: security.fuseoverlayfs.override_stat,
                             or user.containers.override_stat
  -o noxattrs=1              no extended attributes
  -o form=aufs               the layers are a store's in the archive form: names .wh.NAME hide NAME
  -o dotwh=0                 names .wh.NAME are ordinary; by default they hide NAME, as containers/storage expects of a
                             mount program, and none can be made
  -o row=4096                redirect on write: of a big file only the blocks written go to upperdir (docs/row.md)
  -o allow_other, nodev, nosuid, noexec, noatime, ...
  -f                         stay in the foreground
  -d, --debug                as -f, with a line for each request
  -V, --version; -h, --help
  --limit-hook               instead of a mount, be the hook of an OCI runtime: set the limit that a container's annotations
                             cowfs.size and cowfs.inodes ask for (cowfs podman install)

example:
  {PROGRAM} -o lowerdir=python:base,upperdir=up,workdir=work,size=2G /mnt/rootfs
"""

OVERRIDE_XATTR = {0: "", 1: "security.fuseoverlayfs.override_stat", 2: "user.containers.override_stat"}


# -- parsing -----------------------------------------------------------------------------------------------------------


def parse_mapping(text: str) -> IdMap:
    """Triples of numbers, however many colons stand between or before them.

    >>> parse_mapping(":0:1000:1:1:110000:65536")
    ((0, 1000, 1), (1, 110000, 65536))
    """
    numbers = [part for part in text.split(":") if part]
    if not numbers or len(numbers) % 3 or not all(_is_number(part) for part in numbers):
        raise InvalidArgument(f"not a mapping of ids: {text!r}", remedy="write IN:OUT:COUNT[:IN:OUT:COUNT...]")
    values = [int(part) for part in numbers]
    return tuple((values[i], values[i + 1], values[i + 2]) for i in range(0, len(values), 3))


def _switch(name: str, text: str) -> bool:
    if text not in ("", "0", "1"):
        raise InvalidArgument(f"{name} is 0 or 1, not {text!r}")
    return text != "0"


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= 20


def _number(name: str, text: str) -> int:
    if not _is_number(text) or int(text) >= 1 << 32:
        raise InvalidArgument(f"{name} needs a number, not {text!r}")
    return int(text)


def _permissions(text: str) -> str:
    number = _number("xattr_permissions", text)
    if number not in OVERRIDE_XATTR:
        raise InvalidArgument(f"xattr_permissions is 0, 1 or 2, not {text!r}")
    return OVERRIDE_XATTR[number]


def _size(text: str) -> int:
    from cowfs.model import parse_size

    return parse_size(text)


def _count(text: str) -> int:
    from cowfs.model import parse_count

    return parse_count(text)


def _form(text: str) -> str:
    from cowfs.format.whiteout import FORMS

    if text not in ("auto", *FORMS):
        raise InvalidArgument(f"form={text}: no form of layers", remedy=", ".join(FORMS))
    return text


def _block(text: str) -> int:
    from cowfs.format.redirect import check_block
    from cowfs.model import parse_size

    size = parse_size(text)
    try:
        check_block(size)
    except ValueError as error:
        raise InvalidArgument(f"row={text}: {error}") from None
    return size


# Option -> fields of the request. "lowers" and "squash_to_root" are resolved afterwards.
_MEANING: dict[str, Callable[[str], dict[str, Any]]] = {
    "lowerdir": lambda text: {"lowers": split_layers(text)},
    "upperdir": lambda text: {"upper": unescape(text)},
    "workdir": lambda text: {"work": unescape(text)},
    "size": lambda text: {"size": _size(text)},
    "inodes": lambda text: {"inodes": _count(text)},
    "ro": lambda text: {"readonly": True},
    "rw": lambda text: {},
    "volatile": lambda text: {"volatile": _switch("volatile", text)},
    "fsync": lambda text: {"fsync": _switch("fsync", text)},
    "uidmapping": lambda text: {"uid_map": parse_mapping(text)},
    "gidmapping": lambda text: {"gid_map": parse_mapping(text)},
    "squash_to_root": lambda text: {"squash_to_root": True},
    "squash_to_uid": lambda text: {"squash_uid": _number("squash_to_uid", text)},
    "squash_to_gid": lambda text: {"squash_gid": _number("squash_to_gid", text)},
    "xattr_permissions": lambda text: {"override_xattr": _permissions(text)},
    "noxattrs": lambda text: {"noxattrs": _switch("noxattrs", text)},
    "dotwh": lambda text: {"dotwh": _switch("dotwh", text)},
    "form": lambda text: {"form": _form(text)},
    "row": lambda text: {"row": _block(text)},
    "allow_other": lambda text: {"allow_other": True},
    "io": lambda text: {"io": text},
    "debug": lambda text: {"foreground": True, "trace": True},
    "remount": lambda text: {"remount": True},
}

# Accepted without effect: the mount always behaves so, or the word is for another program.
_IGNORED = frozenset(
    [
        "allow_root",
        "async",
        "auto",
        "auto_unmount",
        "big_writes",
        "clone_fd",
        "comment",
        "context",
        "default_permissions",
        "defaults",
        "defcontext",
        "entry_timeout",
        "attr_timeout",
        "fast_ino",
        "fast_ino_check",
        "fscontext",
        "fsname",
        "group",
        "index",
        "ino32_t",
        "max_idle_threads",
        "max_read",
        "max_threads",
        "max_write",
        "metacopy",
        "nfs_export",
        "noacl",
        "noauto",
        "nofail",
        "nonempty",
        "nouser",
        "noxattr",
        "owner",
        "plugins",
        "private",
        "redirect_dir",
        "rootcontext",
        "rprivate",
        "rshared",
        "rslave",
        "shared",
        "slave",
        "splice_move",
        "splice_read",
        "splice_write",
        "static_nlink",
        "subtype",
        "sync_read",
        "threaded",
        "timeout",
        "unbindable",
        "user",
        "users",
        "userxattr",
        "uuid",
        "verity",
        "writeback",
        "xino",
        "_netdev",
    ]
)


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """The request of a command line: fields of a :class:`~cowfs.mounting.request.MountSpec`, before paths are made absolute.

    Raises:
        InvalidArgument: a bad value, or a missing option.
    """
    from cowfs.sys.mounts import OPTION_FLAGS

    found: dict[str, Any] = {"words": [], "arguments": []}
    texts = []
    rest = iter(argv)
    for argument in rest:
        if argument == "-o":
            text = next(rest, None)
            if text is None:
                raise InvalidArgument("-o needs options behind it")
            texts.append(text)
        elif argument.startswith("-o"):
            texts.append(argument[2:])
        elif argument in ("-d", "--debug"):
            texts.append("debug")
        elif argument == "-f":
            found["foreground"] = True
        elif argument == "--":
            found["arguments"] += rest
        elif argument.startswith("-") and len(argument) > 1:
            if argument not in ("-s", "-n", "-v", "-w"):
                _warn(argument)
        else:
            found["arguments"].append(argument)
    for option in (option for text in texts for option in split_options(text)):
        name, _, value = option.partition("=")
        if name in _MEANING:
            found.update(_MEANING[name](value))
        elif option in OPTION_FLAGS:
            found["words"].append(option)
        elif name not in _IGNORED and not name.startswith(("x-", "X-")):
            _warn(option)
    return found


def _warn(what: str) -> None:
    sys.stderr.write(f"{PROGRAM}: ignored: {what}\n")


def spec_of(argv: Sequence[str]) -> MountSpec:
    """The mount request of a command line.

    Raises:
        InvalidArgument, Unsupported: the request is malformed, or cannot be served.
    """
    from cowfs.mounting import mountpoint
    from cowfs.mounting.request import MountSpec

    found = {"dotwh": True, **parse(argv)}
    arguments = found.pop("arguments")
    if not 1 <= len(arguments) <= 2:
        raise InvalidArgument(
            "a mount point is needed" if not arguments else f"too many arguments: {' '.join(arguments)}",
            remedy=f"{PROGRAM} -o OPTIONS TARGET",
        )
    lowers = found.pop("lowers", [])
    if not lowers:
        raise InvalidArgument("no lowerdir", remedy="-o lowerdir=A:B, topmost first")
    for lower in lowers:
        if lower.startswith("//"):
            raise Unsupported(f"layers from plugins are not supported: {lower}")
    if found.pop("squash_to_root", False):
        found.setdefault("squash_uid", 0)
        found.setdefault("squash_gid", 0)
    upper, work = found.pop("upper", None), found.pop("work", None)
    readonly = found.pop("readonly", False)
    if upper and not work and not readonly:
        raise InvalidArgument("an upperdir needs a workdir", remedy="on the same file system: -o workdir=DIR")
    layers = tuple(os.path.abspath(lower) for lower in reversed(lowers))
    upper = os.path.abspath(upper) if upper else None
    for directory in [upper] if upper else layers:
        _have_there(directory, readonly=not upper or readonly)
    if not found.get("override_xattr"):
        found["override_xattr"] = _detected_override([upper, *layers] if upper else layers)
    return MountSpec(
        layers=layers,
        mountpoint=mountpoint.resolve(arguments[-1]),
        upper=upper,
        work=os.path.abspath(work) if upper and work else None,
        readonly=readonly or not upper,
        record=False,
        options=tuple(found.pop("words")),
        source=arguments[0] if len(arguments) == 2 and arguments[0] else PROGRAM,
        subtype=PROGRAM,
        **found,
    )


def _have_there(directory: str, *, readonly: bool) -> None:
    """A layer of a store whose driver makes it a directory when it is wanted, as the driver's record of the mount says, is made one."""
    root, between, inside = directory.rpartition("/layers/")
    id = inside.partition("/")[0]
    if not between or os.path.isdir(directory) or not os.path.isdir(f"{root}/layers/{id}"):
        return
    from cowfs.store import Store

    with Store.open(root) as store:
        store.driver.mounts(id, [], readonly=readonly, mount_type="kernel")


def _detected_override(directories: Sequence[str]) -> str:
    """The xattr with the owner of a layer's root, if the layer was written with one (podman's force_mask)."""
    for directory in directories:
        for name in (OVERRIDE_XATTR[2], OVERRIDE_XATTR[1]):
            try:
                os.getxattr(directory, name)
            except OSError:
                continue
            return name
    return ""


def remount(found: dict[str, Any]) -> int:
    """`mount -o remount,ro MNT`: set other flags on an existing mount; its server goes on. Returns the exit status.

    As in mount(2), flags that are not given are cleared; mount(8) adds those that the mount has.
    """
    from cowfs.mounting import mountpoint
    from cowfs.sys import mounts

    target = mountpoint.resolve(found["arguments"][-1]) if found["arguments"] else ""
    mounted = mountpoint.find(target) if target else None
    if mounted is None or mounted.fstype != f"fuse.{PROGRAM}":
        raise InvalidArgument(
            f"nothing of {PROGRAM} is mounted at {target!r}", remedy="mount it first, without remount"
        )
    flags = mounts.MS_RDONLY if found.get("readonly") else 0
    for word in found["words"]:
        flag, on = mounts.OPTION_FLAGS[word]
        flags = flags | flag if on else flags & ~flag
    mounts.mount("", target, "", flags | mounts.MS_REMOUNT)
    return 0


def run(argv: Sequence[str], serve: Callable[[MountSpec], int]) -> int:
    """Mount. Returns the exit status."""
    if any("remount" in split_options(argument.removeprefix("-o")) for argument in argv):
        return remount(parse(argv))
    return serve(spec_of(argv))


def handed_over(argv: Sequence[str], answers: int) -> int | None:
    """The command in a child of the mount service, which becomes the mount's server and tells the exit status on ``answers``.

    Returns:
        the exit status of what mounts nothing; None: that is to be done where the user is (in the foreground).
    """
    from cowfs.mounting import protocol, server

    def told(message: dict[str, Any]) -> bytes:
        if "error" not in message:
            return b"0\n"
        error = protocol.error_from(message["error"])
        return b"%d\n" % complain(PROGRAM, str(error), error.exit_code)

    def serve(spec: MountSpec) -> int:
        if spec.foreground:
            return _DECLINED
        return server.serve(spec, server.Report(answers, told))

    status = main(argv, serve)
    return None if status == _DECLINED else status


_DECLINED = -1


def _serve(spec: MountSpec) -> int:
    from cowfs.cli.mount import serve

    return serve(spec)


def main(argv: Sequence[str] | None = None, serve: Callable[[MountSpec], int] = _serve) -> int:
    """The command, once it is clear that it is done here. Returns the exit status."""
    fill_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        return guarded(lambda: say(HELP), PROGRAM)
    if any(argument in ("-V", "--version") for argument in arguments):
        from cowfs import __version__

        return guarded(lambda: say(f"{PROGRAM}: version {__version__}\n"), PROGRAM)
    if arguments == ["--limit-hook"]:
        from cowfs.cli import oci_hook

        return guarded(oci_hook.run, PROGRAM)
    return guarded(lambda: run(arguments, serve), PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
