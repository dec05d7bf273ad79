"""What one mount is made of: its layers, its writable directory and the lock, limit and records that go with it.

Rules:

1. A :class:`MountSpec` is a wish: plain data, made by the command or the library, sent to the server process.
   A :class:`Stack` is that wish checked and locked; only the server process holds one, and its locks end with it.
2. Nothing is changed on disk before everything that can be checked was checked.
3. Layers are bottom first everywhere but in :attr:`Stack.lowers`, which is topmost first as the kernel's ``lowerdir=``.
4. One holder an upper: an exclusive flock(2) on the upper directory itself, and on the work directory. The kernel's
   overlayfs takes no such lock, so its mounts are found in mountinfo.
5. The record beside a kept upper (``state.json``) names the layers relative to itself, so that a stack can be moved.

The volatile marker is the kernel's (Documentation/filesystems/overlayfs.rst, "Volatile mount"):
``work/work/incompat/volatile/dirty``. The kernel leaves that file empty; we write the host's boot id in it, which tells
whether the host can have lost anything since.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from cowfs.errors import Corrupt, FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.model import Limit

__all__ = ["MountSpec", "Stack", "find_layers", "lookup_record"]

HIDDEN = ".cowfs"
RECORD = "state.json"
_EPHEMERAL = "ephemeral-"
_LOCK_TRIES, _LOCK_PAUSE = 40, 0.025  # one second: a server that was just unmounted from outside is still closing

IdMap = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSpec:
    """One wanted mount. All paths absolute.

    Attributes:
        layers: bottom first.
        mountpoint: an existing directory.
        upper: the writable directory; with ``readonly`` the topmost layer; None: see ``scratch``.
        work: the work directory; None: beside the upper.
        scratch: directory that gets ``upper`` and ``work`` where ``upper`` is None; None: read-only.
        ephemeral: an upper of its own below ``scratch``, removed at unmount.
        record: keep layers and limit beside the upper, and check them.
        size, inodes: the limit; None: the recorded one, or none.
        uid_map, gid_map: ranges (id in the layers, id shown at the mount, count).
        override_xattr: xattr that holds owner and mode (``user.containers.override_stat``), or "".
        row: bytes a block: a written file of a lower layer gets a redirect file (docs/row.md); 0: it is copied up.
        volatile: sync nothing, and mark the work directory so; ``fsync=False``: the same without the mark.
        options: mount(8) words (``nodev``, ``noexec``...).
        subtype: the type shown is ``fuse.SUBTYPE``.
        log: file for diagnostics; "": one in the run directory, or standard error in the foreground.
        factory: "module:function" called with the stack and the view's options to make the view; "": the merged view.
        label: what `cowfs mounts` shows beside the mount (a snapshot's key, say).
        checked: layers, upper and work come from a store, which vouches for them: the checks whose cost grows with
            the number of layers are left out.
    """

    layers: tuple[str, ...]
    mountpoint: str
    upper: str | None = None
    work: str | None = None
    scratch: str | None = None
    ephemeral: bool = False
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
    row: int = 0
    allow_other: bool | None = None
    io: str = "cached"
    frontend: str = "kernel"
    options: tuple[str, ...] = ()
    source: str = "cowfs"
    subtype: str = "cowfs"
    foreground: bool = False
    trace: bool = False
    log: str = ""
    max_nodes: int | None = None
    factory: str = ""
    label: str = ""
    checked: bool = False

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, object]) -> MountSpec:
        """Inverse of :meth:`to_json`; lists become tuples."""

        def frozen(value: object) -> object:
            return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value

        names = {field.name for field in fields(cls)}
        return cls(**{key: frozen(value) for key, value in data.items() if key in names})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------
# Finding layers


def _numbers_as_numbers(name: str) -> list[tuple[int, int, str]]:
    """Sort key: ``2`` before ``10``, digits before letters."""
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def find_layers(directory: str) -> tuple[str, ...]:
    """The layers in a stack directory: its sub-directories that are not hidden, bottom first.

    Raises:
        NotFound: no such directory, or nothing in it.
        InvalidArgument: a file, or a directory that looks like a root file system itself.
    """
    _check_directory(directory, "the stack of layers")
    names = [e.name for e in os.scandir(directory) if not e.name.startswith(".") and e.is_dir()]
    if "etc" in names and "usr" in names:
        raise InvalidArgument(
            f"{directory} looks like a root file system, not like a directory of layers",
            remedy=f"to use it as one layer: --layer {directory}",
        )
    if not names:
        raise NotFound(
            f"no layers in {directory}", remedy="each sub-directory that is not hidden is a layer, bottom first"
        )
    return tuple(os.path.join(directory, name) for name in sorted(names, key=_numbers_as_numbers))


def _check_directory(path: str, what: str, *, mode: int = os.R_OK | os.X_OK) -> os.stat_result:
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


# ---------------------------------------------------------------------------------------------------------------
# The record beside a kept upper


def _record_places(upper: str) -> tuple[str, ...]:
    parent, name = os.path.split(upper.rstrip("/"))
    return (os.path.join(parent, f".{name}{HIDDEN}"), parent)


def lookup_record(upper: str) -> tuple[tuple[str, ...], Limit] | None:
    """Layers (bottom first) and limit recorded beside an upper directory, or None when there is no record.

    Raises:
        Corrupt: a record that cannot be read.
    """
    upper = os.path.realpath(upper)
    for place in _record_places(upper):
        found = _read_record(place)
        if found and os.path.realpath(os.path.join(place, str(found.get("upper")))) == upper:
            return _layers_of(place, found), _limit_of(found)
    return None


def _read_record(place: str) -> dict[str, object] | None:
    import json

    path = os.path.join(place, RECORD)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            data = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Corrupt(
            f"{path} cannot be read: {error}", remedy="remove it if you know the layers of this upper"
        ) from None
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list) or not isinstance(data.get("upper"), str):
        raise Corrupt(f"{path} is not a record of cowfs", remedy="remove it if you know the layers of this upper")
    return data


def _layers_of(place: str, record: dict[str, object]) -> tuple[str, ...]:
    layers = record["layers"]
    assert isinstance(layers, list)
    return tuple(os.path.normpath(os.path.join(place, str(layer))) for layer in layers)


def _limit_of(record: dict[str, object]) -> Limit:
    def number(name: str) -> int | None:
        value = record.get(name)
        return value if isinstance(value, int) else None

    return Limit(bytes=number("size"), inodes=number("inodes"))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_record(place: str, layers: Sequence[str], upper: str, limit: Limit) -> None:
    import json

    data = {
        "version": 1,
        "upper": os.path.relpath(upper, place),
        "layers": [os.path.relpath(layer, place) for layer in layers],
        "size": limit.bytes,
        "inodes": limit.inodes,
    }
    path = os.path.join(place, RECORD)
    with open(f"{path}.new", "w", encoding="utf-8", errors="surrogateescape", opener=_private) as file:
        json.dump(data, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


# ---------------------------------------------------------------------------------------------------------------
# The stack


class Stack:
    """The checked and locked parts of one mount. Owned by the server process.

    Attributes:
        spec: the wish.
        lowers: read-only directories, topmost first.
        upper, work: the writable pair, or None.
        limit: what holds now (given, else recorded).
    """

    def __init__(self, spec: MountSpec) -> None:
        self.spec = spec
        self.lowers: tuple[str, ...] = tuple(reversed(spec.layers))
        self.upper: str | None = None
        self.work: str | None = None
        self.limit: Limit | None = None
        self._place: str | None = None  # directory of the record
        self._locks: list[int] = []
        self._ephemeral: str | None = None
        self._made: list[str] = []  # directories that were not there before

    @classmethod
    def open(cls, spec: MountSpec) -> Stack:
        """Check, make what is to be made, lock.

        Raises:
            CowfsError: what is wrong and how to mend it; nothing was changed.
        """
        stack = cls(spec)
        try:
            stack._open()
        except BaseException:
            stack.undo()
            raise
        return stack

    def undo(self) -> None:
        """Give up before anything was mounted: what :meth:`open` made is removed, and all is closed."""
        while self._made:
            _remove_tree(self._made.pop())
        self.close()

    def _open(self) -> None:
        spec = self.spec
        wanted = Limit(bytes=spec.size, inodes=spec.inodes)
        self._check_layers()
        if spec.record:
            self._hold_layers()
        if spec.upper is None and spec.scratch is None:
            if wanted:
                raise InvalidArgument("a limit needs something writable", remedy="leave out --read-only, or the limit")
            self.limit = None
            self._check_mountpoint()
            return
        if spec.io == "passthrough" and wanted:
            raise InvalidArgument(
                "no limit can hold with io=passthrough, since writes do not pass the server",
                remedy="leave out one of the two",
            )
        upper, work, place = self._places()
        self._check_upper(upper, work)
        self._check_mountpoint(upper, work)
        recorded = self._check_record(place, upper)
        self.upper, self.work, self._place = self._make(upper, work, place)
        self._lock(self.upper)
        _refuse_kernel_mount(self.upper)
        if not spec.readonly:
            self._lock(self.work)
            check_volatile(self.work, volatile=spec.volatile, upper=self.upper)
        self.limit = Limit(
            bytes=spec.size if spec.size is not None else recorded.bytes,
            inodes=spec.inodes if spec.inodes is not None else recorded.inodes,
        )
        if not self.limit:
            self.limit = None
        elif spec.io == "passthrough":
            raise InvalidArgument(
                f"{upper} has a recorded limit, which io=passthrough cannot hold",
                remedy="mount without --io passthrough, or remove the limit first: cowfs limit MNT --size none",
            )

    # -- checks ------------------------------------------------------------------------------------------------

    def _check_layers(self) -> None:
        if not self.spec.layers:
            raise InvalidArgument("no layers", remedy="name at least one directory")
        if self.spec.checked:
            return
        seen: dict[tuple[int, int], str] = {}
        for layer in self.spec.layers:
            status = _check_directory(layer, "the layer")
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                again = "" if seen[identity] == layer else f" (as {seen[identity]})"
                raise InvalidArgument(f"the layer is listed twice: {layer}{again}")
            seen[identity] = layer

    def _hold_layers(self) -> None:
        """Shared locks on the layers: who writes in one, as an upper, holds it alone.

        Not for engines (``record=False``), which read a container's upper while it is mounted. A file system that
        has no flock for directories is taken at its word.
        """
        import fcntl

        for layer in self.spec.layers:
            try:
                fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise InvalidArgument(f"the layer cannot be used: {layer}: {error.strerror}") from None
            self._locks.append(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _lock_holder(fd)
                raise FailedPrecondition(
                    f"the layer {layer} is being written by {f'process {holder}' if holder else 'another mount'}",
                    remedy="unmount that one first (cowfs mounts lists them)",
                ) from None
            except OSError:
                pass

    def _places(self) -> tuple[str, str, str | None]:
        """Paths of upper, work and the record's directory; nothing is made yet."""
        spec = self.spec
        if spec.upper is not None:
            upper = os.path.realpath(spec.upper)
            place = _record_places(upper)[0]
            work = os.path.realpath(spec.work) if spec.work else os.path.join(place, "work")
            return upper, work, place if spec.record else None
        assert spec.scratch is not None
        scratch = os.path.realpath(spec.scratch)
        if spec.ephemeral:
            directory = os.path.join(scratch, f"{_EPHEMERAL}{os.getpid()}-{os.urandom(4).hex()}")
            return os.path.join(directory, "upper"), os.path.join(directory, "work"), None
        return os.path.join(scratch, "upper"), os.path.join(scratch, "work"), scratch if spec.record else None

    def _check_upper(self, upper: str, work: str) -> None:
        layers: dict[tuple[int, int] | None, str] = {_identity(os.stat(layer)): layer for layer in self.spec.layers}
        for path in _upwards(upper):
            inside = layers.get(_identity_at(path))
            if inside is not None:
                how = "is also a layer" if path == upper else f"lies inside the layer {inside}"
                raise InvalidArgument(
                    f"the upper directory {how}: {upper}", remedy="choose a directory outside the layers"
                )
        for path in _upwards(work):
            if _identity_at(path) in layers:
                raise InvalidArgument(f"the work directory lies inside a layer: {work}")
        if os.path.lexists(upper):
            identity = _identity(
                _check_directory(
                    upper,
                    "the upper directory",
                    mode=os.R_OK | os.W_OK | os.X_OK if not self.spec.readonly else os.R_OK | os.X_OK,
                )
            )
            for layer in self.spec.layers:
                if any(_identity_at(path) == identity for path in _upwards(os.path.realpath(layer))):
                    raise InvalidArgument(f"the layer lies inside the upper directory: {layer}")
        if upper == work or upper.startswith(f"{work}/") or work.startswith(f"{upper}/"):
            raise InvalidArgument(f"upper and work directory must not contain each other: {upper}, {work}")
        if not self.spec.readonly and os.path.lexists(work):
            _check_directory(work, "the work directory", mode=os.R_OK | os.W_OK | os.X_OK)
        if not self.spec.readonly:
            self._check_same_filesystem(upper, work)

    def _check_same_filesystem(self, upper: str, work: str) -> None:
        here, there = next(filter(os.path.isdir, _upwards(upper))), next(filter(os.path.isdir, _upwards(work)))
        if os.stat(here).st_dev != os.stat(there).st_dev:
            raise InvalidArgument(
                f"upper and work directory are on different file systems: {upper}, {work}",
                remedy="use a directory below that file system's top as --upper, or give --work DIR",
            )
        for path in (here, there):
            if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
                raise InvalidArgument(
                    f"cannot write in {path}", remedy="give --upper DIR or --ephemeral, or mount with --read-only"
                )

    def _check_mountpoint(self, *writable: str) -> None:
        mountpoint = self.spec.mountpoint
        below = () if self.spec.checked else self.spec.layers
        trees = {_identity_at(tree): tree for tree in (*below, *writable)}
        for path in _upwards(mountpoint):
            tree = trees.get(_identity_at(path))
            if tree is not None and path != mountpoint:
                raise InvalidArgument(f"the mount point {mountpoint} lies inside {tree}", remedy="mount it elsewhere")
        identity = _identity_at(mountpoint)
        # Over one of its own layers is what fuse-overlayfs is used for, too: the layers stay open by descriptor.
        for tree in writable if not self.spec.record else (*below, *writable):
            if identity is not None and any(_identity_at(path) == identity for path in _upwards(tree)):
                raise InvalidArgument(f"the mount point {mountpoint} would hide {tree}", remedy="mount it elsewhere")

    def _check_record(self, place: str | None, upper: str) -> Limit:
        record = _read_record(place) if place else None
        if record is None:
            return Limit()
        assert place is not None
        before, now = _layers_of(place, record), self.spec.layers
        if [os.path.realpath(layer) for layer in before] != [os.path.realpath(layer) for layer in now]:
            raise FailedPrecondition(
                f"{upper} was written over other layers: {', '.join(before)}",
                remedy="mount those, or give another --upper, or --ephemeral, "
                f"or drop what was written: rm -r {place if self.spec.upper is None else f'{upper} {place}'}",
            )
        return _limit_of(record)

    # -- making ------------------------------------------------------------------------------------------------

    def _make(self, upper: str, work: str, place: str | None) -> tuple[str, str, str | None]:
        if self.spec.ephemeral:
            self._make_ephemeral(os.path.dirname(upper))
        for directory in (place, os.path.dirname(work), os.path.dirname(upper)):
            if directory and not self.spec.readonly:
                self._make_directories(directory)
        if not os.path.isdir(upper):
            if self.spec.readonly:
                raise NotFound(f"the upper directory does not exist: {upper}")
            self._make_upper(upper)
        if not self.spec.readonly:
            self._make_directories(work)
        return upper, work, place

    def _make_directories(self, path: str) -> None:
        missing = [part for part in _upwards(path) if not os.path.isdir(part)]
        try:
            for part in reversed(missing):
                os.mkdir(part, 0o700)
                self._made.append(part)
        except OSError as error:
            raise InvalidArgument(f"cannot make {error.filename}: {error.strerror}") from None

    def _make_ephemeral(self, base: str) -> None:
        import fcntl

        scratch = os.path.dirname(base)
        self._make_directories(scratch)
        fd = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # nobody sweeps between our mkdir and our lock
            _sweep(scratch)
            os.mkdir(base, 0o700)
            self._ephemeral = base
            self._lock(base)
        finally:
            os.close(fd)

    def _make_upper(self, upper: str) -> None:
        """An upper whose root looks as the topmost layer's root does: it is what users of the mount see."""
        self._make_directories(upper)
        model = os.stat(self.spec.layers[-1])
        if (model.st_uid, model.st_gid) != (os.geteuid(), os.getegid()) and os.geteuid() == 0:
            os.chown(upper, model.st_uid, model.st_gid)
        os.chmod(upper, stat.S_IMODE(model.st_mode))
        os.utime(upper, ns=(model.st_atime_ns, model.st_mtime_ns))

    def lock_more(self, *directories: str) -> list[int]:
        """Lock directories that are about to become the writable pair; the locks are the caller's until
        :meth:`switched`.

        Raises:
            FailedPrecondition: one is in use.
        """
        before = len(self._locks)
        try:
            for directory in directories:
                self._lock(directory)
        except BaseException:
            for fd in self._locks[before:]:
                os.close(fd)
            del self._locks[before:]
            raise
        taken = self._locks[before:]
        del self._locks[before:]
        return taken

    def switched(self, upper: str, work: str, locks: Sequence[int]) -> None:
        """The writable pair is another one from now on; the former one is let go."""
        for fd in self._locks:
            os.close(fd)
        self._locks = list(locks)
        self.upper, self.work = upper, work

    def _lock(self, directory: str) -> None:
        import fcntl

        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        kind = fcntl.LOCK_SH if self.spec.readonly else fcntl.LOCK_EX
        for attempt in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_TRIES - 1:
                    pid = _lock_holder(fd)
                    os.close(fd)
                    raise FailedPrecondition(
                        f"{directory} is in use by {f'process {pid}' if pid else 'another process'}",
                        remedy="unmount that one first (cowfs mounts lists them), or use another --upper, or --ephemeral",
                    ) from None
                import time

                time.sleep(_LOCK_PAUSE)
        self._locks.append(fd)

    # -- while mounted -------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """The mount is there: record what it is made of; what was made stays."""
        self._made.clear()
        self.record_limit(self.limit)

    def record_limit(self, limit: Limit | None) -> None:
        """Keep the limit (and the layers) beside the upper, atomically."""
        self.limit = limit
        if self._place and self.upper and not self.spec.readonly:
            layers = [os.path.realpath(layer) for layer in self.spec.layers]
            _write_record(self._place, layers, self.upper, limit or Limit())

    def close(self) -> None:
        """Drop an ephemeral upper, then the locks. Idempotent."""
        if self._ephemeral:
            _remove_tree(self._ephemeral)
            self._ephemeral = None
        while self._locks:
            os.close(self._locks.pop())


# ---------------------------------------------------------------------------------------------------------------
# Helpers


def _identity(status: os.stat_result) -> tuple[int, int]:
    return (status.st_dev, status.st_ino)


def _identity_at(path: str) -> tuple[int, int] | None:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


def _upwards(path: str) -> Iterable[str]:
    """The path, its parent, and so on up to the root."""
    while True:
        yield path
        parent = os.path.dirname(path)
        if parent == path:
            return
        path = parent


def _lock_holder(fd: int) -> int | None:
    """The process that holds a flock on this inode, from /proc/locks (proc(5)), or None where that does not tell.

    The device is not compared: btrfs shows another one there than stat(2) does.
    """
    inode = str(os.fstat(fd).st_ino)
    try:
        with open("/proc/locks", encoding="ascii") as file:
            for line in file:
                fields_ = line.split()
                if fields_[1] == "FLOCK" and fields_[5].rpartition(":")[2] == inode and int(fields_[4]) > 0:
                    return int(fields_[4])
    except (OSError, IndexError, ValueError):
        pass
    return None


def _refuse_kernel_mount(upper: str) -> None:
    """The kernel lets any number of mounts share an upper, and each then corrupts the other's view."""
    from cowfs.sys.mounts import mountinfo

    identity = _identity(os.stat(upper))
    for entry in mountinfo():
        if entry.fstype != "overlay":
            continue
        for option in entry.super_options.split(b","):
            path = option.removeprefix(b"upperdir=")
            if path != option and (os.fsdecode(path) == upper or _identity_at(os.fsdecode(path)) == identity):
                raise FailedPrecondition(
                    f"{upper} is in use by the kernel's overlay mount at {os.fsdecode(entry.target)}",
                    remedy=f"umount {os.fsdecode(entry.target)}",
                )


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def check_volatile(work: str, *, volatile: bool, upper: str) -> None:
    """Honour what an earlier volatile mount left in the work directory.

    A marker of this boot's is harmless: what was written is in the host's cache. A durable mount syncs it and drops the
    marker. Any other marker means that the host may have lost writes.

    Raises:
        FailedPrecondition: the upper was used by a volatile mount that a crash of the host may have damaged.
        Unsupported: the work directory asks for a feature we do not know.
    """
    incompat = os.path.join(work, "work", "incompat")
    try:
        names = os.listdir(incompat)
    except OSError:
        return
    for name in names:
        if name != "volatile":
            raise Unsupported(f"{incompat}/{name}: a feature that cowfs does not know")
    marker = os.path.join(incompat, "volatile")
    if "volatile" in names:
        try:
            with open(os.path.join(marker, "dirty"), encoding="ascii", errors="replace") as file:
                boot = file.read().strip()
        except OSError:
            boot = ""
        if not boot or boot != _boot_id():
            raise FailedPrecondition(
                f"{upper} belongs to a volatile mount and may be incomplete",
                remedy=f"start with an empty upper, or, if the host has not crashed since: rm -r {marker}",
            )
        if not volatile:
            from cowfs.sys.files import syncfs

            fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
            try:
                syncfs(fd)
            finally:
                os.close(fd)
            _remove_tree(incompat)


def mark_volatile(work: str) -> None:
    """Write the marker that :func:`check_volatile` and the kernel honour."""
    directory = os.path.join(work, "work", "incompat", "volatile")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with open(os.path.join(directory, "dirty"), "w", encoding="ascii", opener=_private) as file:
        file.write(_boot_id() + "\n")


def _sweep(scratch: str) -> None:
    """Remove the ephemeral uppers of servers that were killed: those whose lock can be had."""
    import fcntl

    for name in os.listdir(scratch):
        if not name.startswith(_EPHEMERAL):
            continue
        path = os.path.join(scratch, name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_tree(path)
        except OSError:
            pass
        finally:
            os.close(fd)


def _remove_tree(path: str) -> None:
    """rm -r relative to descriptors; directories without permissions are opened up first (they are ours)."""
    import shutil

    def open_up(function: object, name: str, info: object) -> None:
        parent = os.path.dirname(name)
        os.chmod(parent, 0o700)
        if os.path.isdir(name) and not os.path.islink(name):
            os.chmod(name, 0o700)
            shutil.rmtree(name, ignore_errors=True)
        else:
            os.unlink(name)

    try:
        shutil.rmtree(path, onerror=open_up)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
