"""The request for a mount, before any check: plain data, and the search for layers in a directory.

A :class:`MountSpec` is made by the command, by the library or by a store, and sent to the server process, where
:class:`cowfs.mounting.resources.Stack` checks it and opens its layers.
"""

from __future__ import annotations

import errno
import os
import re
import stat

from cowfs._record import record
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound

__all__ = ["INDEXED", "IdMap", "MountSpec", "check_directory", "find_layers", "refuse_layer"]


_OF_A_ROOT = frozenset(
    [
        "bin",
        "boot",
        "dev",
        "etc",
        "home",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "media",
        "mnt",
        "opt",
        "proc",
        "root",
        "run",
        "sbin",
        "srv",
        "sys",
        "tmp",
        "usr",
        "var",
    ]
)
"""Directories of a root file system (Filesystem Hierarchy Standard 3.0, section 3)."""

_MARKS = tuple(f"{prefix}.overlay.{mark}" for prefix in ("trusted", "user") for mark in ("opaque", "origin", "impure"))

INDEXED = "cowfs.mounting.index_view:view"
"""``MountSpec.factory`` of a store's snapshots (:func:`cowfs.mounting.index_view.view`)."""

IdMap = tuple[tuple[int, int, int], ...]


@record(frozen=True, slots=True, kw_only=True)
class MountSpec:
    """One wanted mount. All paths absolute.

    Attributes:
        layers: bottom first.
        mountpoint: an existing directory.
        upper: the writable directory; with ``readonly`` the topmost layer; None: see ``scratch``.
        work: the work directory; None: beside the upper.
        scratch: directory that gets ``upper`` and ``work`` where ``upper`` is None; None: read-only.
        ephemeral: an upper of its own below ``scratch``, removed at unmount.
        memory: that upper is in memory, by the kernel where it can (:mod:`cowfs.mounting.kernel`).
        record: keep layers and limit beside the upper, and check them.
        size, inodes: the limit; None: the recorded one, or none.
        uid_map, gid_map: ranges (id in the layers, id shown at the mount, count).
        override_xattr: xattr that holds owner and mode (``user.containers.override_stat``), or "".
        form: of the layers' xattrs (:data:`cowfs.format.whiteout.FORMS`); ``auto``: the best one for this user.
        row: bytes a block: a written file of a lower layer gets a redirect file (docs/row.md); 0: it is copied up.
        volatile: sync nothing, and mark the work directory so; ``fsync=False``: the same without the mark.
        drop_synced: what redirect files hold is not kept in the host's page cache once it is synced.
        patience: seconds that a write waits for room on the host before it fails.
        options: mount(8) words (``nodev``, ``noexec``...).
        subtype: the type shown is ``fuse.SUBTYPE``.
        log: file for diagnostics; "": one in the run directory, or standard error in the foreground.
        factory: the maker of the view: :data:`INDEXED`, from a store's index; "": the merged view of the layers.
        label: the label of the mount in `cowfs mounts` (a snapshot's key, say).
        owner: a process with whose end, however it ends, the mount ends as well; 0: none.
        checked: layers, upper and work come from a store, which vouches for them: the checks whose cost grows with
            the number of layers are left out.
    """

    layers: tuple[str, ...]
    mountpoint: str
    upper: str | None = None
    work: str | None = None
    scratch: str | None = None
    ephemeral: bool = False
    memory: bool = False
    record: bool = True
    readonly: bool = False
    volatile: bool = False
    fsync: bool = True
    size: int | None = None
    inodes: int | None = None
    uid_map: IdMap = ()
    gid_map: IdMap = ()
    squash_uid: int | None = None
    squash_gid: int | None = None
    override_xattr: str = ""
    noxattrs: bool = False
    dotwh: bool = False
    form: str = "auto"
    row: int = 0
    allow_other: bool | None = None
    io: str = "cached"
    frontend: str = "kernel"
    drop_synced: bool = False
    patience: float = 0.0
    options: tuple[str, ...] = ()
    source: str = "cowfs"
    subtype: str = "cowfs"
    foreground: bool = False
    trace: bool = False
    log: str = ""
    max_nodes: int | None = None
    factory: str = ""
    label: str = ""
    owner: int = 0
    checked: bool = False

    def to_json(self) -> dict[str, object]:
        from dataclasses import asdict

        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, object]) -> MountSpec:
        """Inverse of :meth:`to_json`; lists become tuples."""
        from dataclasses import fields

        def frozen(value: object) -> object:
            return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value

        names = {field.name for field in fields(cls)}
        return cls(**{key: frozen(value) for key, value in data.items() if key in names})  # type: ignore[arg-type]


def _numbers_as_numbers(name: str) -> list[tuple[int, int, str]]:
    """Sort key: ``2`` before ``10``, digits before letters.

    >>> sorted(["b", "²", "10", "2"], key=_numbers_as_numbers)
    ['2', '10', 'b', '²']
    """
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def find_layers(directory: str) -> tuple[str, ...]:
    """The layers in a stack directory: its sub-directories that are not hidden, bottom first.

    Raises:
        NotFound: no such directory, or no layer in it.
        InvalidArgument: a file, a directory that looks like a root file system itself, or one that is a layer.
    """
    check_directory(directory, "the stack of layers")
    names = [e.name for e in os.scandir(directory) if not e.name.startswith(".") and e.is_dir()]
    like = sorted(_OF_A_ROOT.intersection(names))
    if len(like) > 1 or (like and len(like) == len(names)):
        raise InvalidArgument(
            f"{directory} looks like a root file system ({', '.join(like)}), not like a directory of layers",
            remedy=f"to use it as one layer: --layer {directory}; layers of such names are given one by one",
        )
    refuse_layer(directory)
    if not names:
        raise NotFound(
            f"no layers in {directory}", remedy="each sub-directory that is not hidden is a layer, bottom first"
        )
    return tuple(os.path.join(directory, name) for name in sorted(names, key=_numbers_as_numbers))


def refuse_layer(directory: str) -> None:
    """Refuse to keep cowfs's files in a directory that is a layer itself: they would show in every mount of that layer.

    The signs are the mark that an overlay leaves on a layer's root, the store around the layer, and the record of the
    stack above it.

    Raises:
        InvalidArgument: the directory is a layer.
    """
    path = os.path.realpath(directory)
    above, name = os.path.split(path)
    why = ""
    if name == "fs" and os.path.exists(f"{above}/../../index.db"):
        why = "is a layer of a store"
    elif _is_recorded(path, above):
        why = f"is a layer of the stack {above}"
    else:
        try:
            marks = [mark for mark in os.listxattr(path) if mark.startswith(_MARKS)]
        except OSError:
            marks = []
        if marks:
            why = f"is a layer: it has the overlay's {marks[0]}"
    if why:
        raise InvalidArgument(
            f"{directory} {why}, not a directory of layers", remedy=f"to use it as one layer: --layer {directory}"
        )


def _is_recorded(path: str, above: str) -> bool:
    from cowfs.errors import Corrupt
    from cowfs.mounting.upper_state import HIDDEN, layers_of, read_record

    place = os.path.join(above, HIDDEN)
    try:
        record = read_record(place)
    except Corrupt:
        return False
    return record is not None and path in map(os.path.realpath, layers_of(place, record))


def check_directory(path: str, what: str, *, mode: int = os.R_OK | os.X_OK) -> os.stat_result:
    """The status of a directory that must exist and be usable; ``mode`` as in access(2).

    Raises:
        NotFound, InvalidArgument, FailedPrecondition: it does not, or is not; the message begins with ``what``.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFound(f"{what} does not exist: {path}") from None
        if error.errno == errno.ENOTCONN:
            raise FailedPrecondition(
                f"{what} is a mount whose server is gone: {path}", remedy=f"cowfs umount {path}"
            ) from None
        raise InvalidArgument(f"{what} cannot be used: {path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise InvalidArgument(f"{what} is not a directory: {path}")
    if not os.access(path, mode, effective_ids=True):
        verb = "writable" if mode & os.W_OK else "readable"
        raise InvalidArgument(f"{what} is not {verb} for this user: {path}")
    return status
