"""The records that cross module borders. Each one is frozen, plain data without I/O.

Sizes are bytes, counts are inodes, times are integer nanoseconds since 1970 (negative before).
Paths inside a tree are ``bytes`` without a leading slash, because file names are bytes.
"""

from __future__ import annotations

import enum
import stat
from collections.abc import Mapping

from cowfs._record import field, record
from cowfs.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from typing import TypeGuard

__all__ = [
    "SMALLEST_LIMIT",
    "TYPE_NAMES",
    "Change",
    "Event",
    "FileInfo",
    "Info",
    "Kind",
    "Limit",
    "Mount",
    "Statistics",
    "Timed",
    "Usage",
    "format_size",
    "parse_count",
    "parse_size",
]


#: the word for a file type, by S_IFMT of a mode
TYPE_NAMES: Mapping[int, str] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


class Kind(enum.StrEnum):
    """The three states of a snapshot (containerd's words)."""

    ACTIVE = "active"
    VIEW = "view"
    COMMITTED = "committed"


@record(frozen=True, slots=True, kw_only=True)
class Usage:
    """The space that one layer takes itself; its parents are not counted.

    Attributes:
        bytes: file data in 4 KiB units, plus what directories, xattrs, long links and the rest take (docs/mounts.md, Limits).
        inodes: files, directories and the rest; whiteouts are free.
    """

    bytes: int = 0
    inodes: int = 0


@record(frozen=True, slots=True, kw_only=True)
class Limit:
    """An upper bound on :class:`Usage`; false when it bounds nothing.

    Attributes:
        bytes: of file data and the rest, as :attr:`Usage.bytes`; None: unlimited.
        inodes: None: unlimited.
    """

    bytes: int | None = None
    inodes: int | None = None

    def __bool__(self) -> bool:
        return self.bytes is not None or self.inodes is not None

    def over(self, base: Usage) -> Limit:
        """The limit on a whole tree of which ``base`` does not count (or, negative, something elsewhere does).

        With a base at least 1 of each: a mount's options cannot say 0.
        """
        if base == Usage():
            return self
        return Limit(
            bytes=None if self.bytes is None else max(1, self.bytes + base.bytes),
            inodes=None if self.inodes is None else max(1, self.inodes + base.inodes),
        )


@record(frozen=True, slots=True, kw_only=True)
class Info:
    """One snapshot as the index knows it. ``json.dumps(info.as_dict())`` works.

    Attributes:
        name: its key (active, view) or name (committed).
        kind: its state; a string, too.
        parent: the name of the snapshot beneath; None without one.
        labels: text by key; keys that begin with ``cowfs.`` are the store's.
        created, updated: nanoseconds since 1970.
        id: of its layer in the store.
        limit: on what it may hold itself.
        usage: of a committed one; None of others, whose count is :meth:`cowfs.Store.usage`.
        diff_id: digest of the layer's archive, None while it is not known.

    Tags are :meth:`cowfs.Store.tags`, the place of a mount :meth:`cowfs.Store.mount_of`.
    """

    name: str
    kind: Kind
    parent: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    created: int = 0
    updated: int = 0
    id: str = ""
    limit: Limit = Limit()
    usage: Usage | None = None
    diff_id: str | None = None

    def as_dict(self) -> dict[str, object]:
        """The fields as plain data: strings, numbers, None and dictionaries of them.

        >>> Info(name="a", kind=Kind.ACTIVE).as_dict()["limit"]
        {'bytes': None, 'inodes': None}
        """
        usage = None if self.usage is None else {"bytes": self.usage.bytes, "inodes": self.usage.inodes}
        return {
            "name": self.name,
            "kind": self.kind.value,
            "parent": self.parent,
            "labels": dict(self.labels),
            "created": self.created,
            "updated": self.updated,
            "id": self.id,
            "limit": {"bytes": self.limit.bytes, "inodes": self.limit.inodes},
            "usage": usage,
            "diff_id": self.diff_id,
        }


@record(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mount as data, not an action: mount(8)'s three words.

    Attributes:
        type: ``overlay``, ``bind`` or ``fuse.cowfs-overlayfs``.
        source: the directory of a bind, else a label.
        options: one word or ``key=value`` each; paths in them are escaped (:mod:`cowfs.format.mount_options`).
    """

    type: str
    source: str
    options: tuple[str, ...] = ()


@record(frozen=True, slots=True, kw_only=True)
class Change:
    """One path that an upper layer adds, changes or deletes.

    Attributes:
        path: relative, ``b""`` is the root.
        kind: ``added``, ``changed`` or ``deleted``.
        type: ``file``, ``dir``, ``symlink``, ``fifo``, ``socket``, ``char`` or ``block``
            (of the present object; of the former one, when deleted).
        size: bytes, of regular files; 0 otherwise.
        what: for ``changed``: any of ``content mode owner mtime xattrs type links``; ``links`` means that the names of
            the same file differ between the two trees.
    """

    path: bytes
    kind: str
    type: str
    size: int = 0
    what: frozenset[str] = frozenset()


@record(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One object in a snapshot's tree.

    Attributes:
        path: relative, ``b""`` is the root.
        type: as in :class:`Change`.
        mode: permission bits, set-id and sticky bits with them.
        uid, gid: the owner's ids in the layer.
        size: bytes, of regular files; 0 otherwise.
        mtime: nanoseconds since 1970.
        rdev: of devices, as :func:`os.makedev` gives it.
        nlink: names of the file within the tree.
        target: of a symbolic link.
        file: equal for all names of one file with several links; distinct files differ.
    """

    path: bytes
    type: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    rdev: int = 0
    nlink: int = 1
    target: bytes = b""
    file: object = None


@record(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to the store, its mounts or its containers.

    Attributes:
        seq: grows by one from event to event; 0 for one that is not in the log (``log lost``).
        time: nanoseconds since 1970.
        type: ``image``, ``container``, ``snapshot``, ``mount``, ``limit``, ``store`` or ``log``.
        action: a verb: ``tag``, ``commit``, ``mount``, ``reached``...
        actor: what it happened to: a key, name, tag or id.
        attributes: more about it.
    """

    seq: int
    time: int
    type: str
    action: str
    actor: str
    attributes: Mapping[str, str] = field(default_factory=dict)


@record(frozen=True, slots=True)
class Timed:
    """The timed requests of one kind.

    Attributes:
        count: how many. seconds: of all of them together. longest: seconds of the longest.
    """

    count: int
    seconds: float
    longest: float


@record(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The figures that a mount's server has counted since it began.

    Attributes:
        usage: None while a big upper layer without a limit is being counted. limit: bytes and inodes, None for none.
        requests: of the kernel, by opcode name. nodes: files and directories in memory.
        timed: by opcode name; requests during the last ``timed_seconds`` in which somebody asked for statistics. A time
            is that of the server's loop; work in other threads (copies of big files, fsync) is not included.
        hits, misses: among the timed requests about names: those answered from memory, and those that needed a layer or
            the index.
        copied_files, copied_bytes: files whose data was copied up. copied_attributes: files that were copied up without data.
        redirected_files, redirected_blocks: redirect files made, and blocks written to them.
        directories_read: directories whose names were read from layers or index.
    """

    usage: Usage | None
    limit: Limit
    requests: Mapping[str, int] = field(default_factory=dict)
    nodes: int = 0
    timed_seconds: float = 0.0
    timed: Mapping[str, Timed] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    copied_files: int = 0
    copied_bytes: int = 0
    copied_attributes: int = 0
    redirected_files: int = 0
    redirected_blocks: int = 0
    directories_read: int = 0


_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_SIZE = r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([kmgtp]?)(?:i?b|(?<=[kmgtp])i)?\s*"
_COUNT = r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([kmg]?)\s*"
SMALLEST_LIMIT = 4096
"""Bytes: one unit of what a limit counts. Less than that allows nothing."""


def parse_size(text: str | int, *, least: int = 1) -> int:
    """Bytes from ``"2G"``, ``"512MiB"``, ``"4096"`` or an int; units are powers of 1024.

    Args:
        least: the smallest size that makes sense here, bytes.

    Raises:
        InvalidArgument: not a size, a part of a byte, or below ``least``.

    >>> parse_size("2G"), parse_size("1.5k"), parse_size("2Gi"), parse_size(7)
    (2147483648, 1536, 2147483648, 7)
    """
    match = _matched(_SIZE, text)
    value = _amount(match, 1 << _UNITS[match[2].lower()]) if match else text if _is_count(text) else 0
    if value <= 0 or value >= 1 << 63:
        raise InvalidArgument(f"not a size: {text!r}", remedy="write bytes or 512M, 2G, 1.5T")
    if value < least:
        raise InvalidArgument(
            f"{text!r} is a size of {value} bytes, less than the unit of {least} that is counted",
            remedy=f"write a unit, as in {value}M or {value}G" if value < 1024 else "write bytes or 512M, 2G, 1.5T",
        )
    return int(value)


def parse_count(text: str | int) -> int:
    """A number of inodes from ``"100k"``, ``"2M"`` or an int; units are powers of 1000.

    Raises:
        InvalidArgument: not a count, a part of one, or not above zero.

    >>> parse_count("100k")
    100000
    """
    match = _matched(_COUNT, text)
    scale = 1000 ** ("kmg".find(match[2].lower()) + 1 if match[2] else 0) if match else 1
    value = _amount(match, scale) if match else text if _is_count(text) else 0
    if value <= 0 or value >= 1 << 63:
        raise InvalidArgument(f"not a count: {text!r}", remedy="write a whole number or 100k, 2M")
    return int(value)


def _matched(pattern: str, text: str | int) -> re.Match[str] | None:
    if not isinstance(text, str):
        return None
    import re

    return re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _amount(match: re.Match[str], scale: int) -> int:
    """Number times unit, exactly; 0 for a fraction without a unit."""
    whole, _, fraction = match[1].partition(".")
    if scale == 1 and fraction.strip("0"):
        return 0
    return int(whole + fraction) * scale // int(10 ** len(fraction))


def format_size(count: int) -> str:
    """Bytes for people: three digits and a unit of 1024.

    >>> format_size(0), format_size(1536), format_size(2 << 30)
    ('0 B', '1.5 KiB', '2 GiB')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    text = f"{value:.1f}".removesuffix(".0") if abs(value) < 100 else f"{value:.0f}"
    return f"{text} {unit}"
