"""The checked and locked parts of one mount: its layers, its writable directory, its limit and records.

Rules:

1. Only the server process holds a :class:`Stack`, and its locks end with it.
2. No change on disk comes before the last check, and all changes are undone if the mount then fails.
3. Layers are bottom first everywhere but in :attr:`Stack.lowers`, which is topmost first as the kernel's ``lowerdir=``.
4. One holder an upper: an exclusive flock(2) on the upper directory itself, and on the work directory; shared ones on
the layers, which keep writers away.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence

from cowfs._record import replace
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound
from cowfs.model import Limit
from cowfs.mounting import kept_limit, notice
from cowfs.mounting.holders import lock, refuse_kernel_mount, share
from cowfs.mounting.notice import Notice
from cowfs.mounting.request import MountSpec, check_directory
from cowfs.mounting.upper_state import layers_of, limit_of, read_record, record_places, write_record
from cowfs.mounting.volatile import check_volatile
from cowfs.sys import files, locks

__all__ = ["Stack"]

_EPHEMERAL = "ephemeral-"


class Stack:
    """The checked and locked parts of one mount. Owned by the server process.

    Attributes:
        spec: the request.
        lowers: read-only directories, topmost first.
        upper, work: the writable pair, or None.
        limit: the present one (given, else recorded).
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
        self._notice: Notice | None = None
        self._alongside = False  # read-only, beside a writer of the upper
        self._made: list[str] = []  # directories made by this mount

    @classmethod
    def open(cls, spec: MountSpec) -> Stack:
        """Check, make missing directories, lock.

        Raises:
            CowfsError: the fault and its remedy; the disk is unchanged.
        """
        stack = cls(spec)
        try:
            stack._open()
        except BaseException:
            stack.undo()
            raise
        return stack

    def undo(self) -> None:
        """Give up before the mount: remove the directories that :meth:`open` made, and close everything."""
        while self._made:
            _remove_tree(self._made.pop())
        self.close()

    def _open(self) -> None:
        spec = self.spec
        wanted = Limit(bytes=spec.size, inodes=spec.inodes)
        self._check_layers()
        if spec.record:
            self._hold_layers()
        if wanted and (spec.readonly or (spec.upper is None and spec.scratch is None)):
            raise InvalidArgument("a limit needs something writable", remedy="leave out --read-only, or the limit")
        if spec.upper is None and spec.scratch is None:
            self.limit = None
            self._check_mountpoint()
            return
        if spec.io == "passthrough" and wanted:
            raise InvalidArgument(
                "no limit can hold with io=passthrough, since writes do not pass the server",
                remedy="leave out one of the two",
            )
        upper, work, place = self._places()
        self._check_own(upper, work)
        self._check_upper(upper, work)
        self._check_mountpoint(upper, work)
        recorded = self._check_record(place, upper)
        self.upper, self.work, self._place = self._make(upper, work, place)
        if spec.readonly and not spec.record:
            fd, self._alongside = share(self.upper, mounts_only=spec.checked)
            self._locks.append(fd)
        else:
            self._lock(self.upper)
            refuse_kernel_mount(self.upper)
        if not spec.readonly:
            self._lock(self.work)
            check_volatile(self.work, volatile=spec.volatile, upper=self.upper)
        self.limit = Limit(
            bytes=spec.size if spec.size is not None else recorded.bytes,
            inodes=spec.inodes if spec.inodes is not None else recorded.inodes,
        )
        if self._is_engines():
            self.limit = kept_limit.read(self.work, wanted)
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
            status = check_directory(layer, "the layer")
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                again = "" if seen[identity] == layer else f" (as {seen[identity]})"
                raise InvalidArgument(f"the layer is listed twice: {layer}{again}")
            seen[identity] = layer

    def _hold_layers(self) -> None:
        """Take shared locks on the layers: a writer of one, as an upper, holds it alone.

        Not for engines (``record=False``), which read a container's upper while it is mounted. A file system without
        flock for directories is accepted.
        """
        for layer in self.spec.layers:
            try:
                fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise InvalidArgument(f"the layer cannot be used: {layer}: {error.strerror}") from None
            self._locks.append(fd)
            try:
                mine = locks.lock(fd, shared=True)
            except OSError:
                continue
            if not mine:
                holder = locks.holder(fd)
                raise FailedPrecondition(
                    f"the layer {layer} is being written by {f'process {holder}' if holder else 'another mount'}",
                    remedy="unmount that one first (cowfs mounts lists them)",
                )

    def _places(self) -> tuple[str, str, str | None]:
        """Find the paths of upper, work and the record's directory, without making any."""
        spec = self.spec
        if spec.upper is not None:
            upper = os.path.realpath(spec.upper)
            place = record_places(upper)[0]
            work = os.path.realpath(spec.work) if spec.work else os.path.join(place, "work")
            return upper, work, place if spec.record else None
        assert spec.scratch is not None
        scratch = os.path.realpath(spec.scratch)
        if spec.ephemeral:
            directory = os.path.join(scratch, f"{_EPHEMERAL}{os.getpid()}-{os.urandom(4).hex()}")
            return os.path.join(directory, "upper"), os.path.join(directory, "work"), None
        return os.path.join(scratch, "upper"), os.path.join(scratch, "work"), scratch if spec.record else None

    def _check_own(self, upper: str, work: str) -> None:
        """Check that directories that cowfs keeps unasked beside layers or an upper are its own.

        A stack from a stranger may come with symbolic links under these names, which would direct cowfs's writes
        anywhere; and in a directory like /tmp another user may have made them, who could then replace their content.

        Raises:
            InvalidArgument: one of them is a symbolic link, or another user's, or others may write in it.
        """
        spec = self.spec
        if spec.checked or spec.readonly:
            return
        kept = [] if spec.work else [work]
        if spec.upper is None:
            assert spec.scratch is not None
            kept += [spec.scratch, upper]
        elif not spec.work:
            kept.append(os.path.dirname(work))
        for path in kept:
            try:
                status = os.lstat(path)
            except OSError:
                continue  # it will be made
            if stat.S_ISLNK(status.st_mode):
                raise InvalidArgument(
                    f"{path} is a symbolic link", remedy="remove it, or give --upper DIR and --work DIR"
                )
            if status.st_uid not in (os.geteuid(), 0) and path != upper:
                raise InvalidArgument(
                    f"{path} belongs to user {status.st_uid}",
                    remedy="mount as that user, or give --upper DIR and --work DIR",
                )
            if status.st_mode & 0o022 and path != upper:
                raise InvalidArgument(
                    f"others may write in {path}", remedy=f"chmod go-w {path}, if you trust what is in it"
                )

    def _check_upper(self, upper: str, work: str) -> None:
        below = () if self.spec.checked else self.spec.layers  # each costs a dozen system calls
        layers: dict[tuple[int, int] | None, str] = {_identity(os.stat(layer)): layer for layer in below}
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
                check_directory(
                    upper,
                    "the upper directory",
                    mode=os.R_OK | os.W_OK | os.X_OK if not self.spec.readonly else os.R_OK | os.X_OK,
                )
            )
            for layer in below:
                if any(_identity_at(path) == identity for path in _upwards(os.path.realpath(layer))):
                    raise InvalidArgument(f"the layer lies inside the upper directory: {layer}")
        if upper == work or upper.startswith(f"{work}/") or work.startswith(f"{upper}/"):
            raise InvalidArgument(f"upper and work directory must not contain each other: {upper}, {work}")
        if not self.spec.readonly and os.path.lexists(work):
            check_directory(work, "the work directory", mode=os.R_OK | os.W_OK | os.X_OK)
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
        # A mount over one of its own layers is allowed, as with fuse-overlayfs: the layers stay open by descriptor.
        for tree in writable if not self.spec.record else (*below, *writable):
            if identity is not None and any(_identity_at(path) == identity for path in _upwards(tree)):
                raise InvalidArgument(f"the mount point {mountpoint} would hide {tree}", remedy="mount it elsewhere")

    def _check_record(self, place: str | None, upper: str) -> Limit:
        record = read_record(place) if place else None
        if record is None:
            return Limit()
        assert place is not None
        before, now = layers_of(place, record), self.spec.layers
        if [os.path.realpath(layer) for layer in before] != [os.path.realpath(layer) for layer in now]:
            raise FailedPrecondition(
                f"{upper} was written over other layers: {', '.join(before)}",
                remedy="mount those, or give another --upper, or --ephemeral, "
                f"or drop what was written: rm -r {place if self.spec.upper is None else f'{upper} {place}'}",
            )
        return limit_of(record)

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
                files.make_directory(part)
                self._made.append(part)
        except OSError as error:
            raise InvalidArgument(f"cannot make {error.filename}: {error.strerror}") from None

    def _make_ephemeral(self, base: str) -> None:
        scratch = os.path.dirname(base)
        self._make_directories(scratch)
        fd = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            locks.lock(fd, wait=True)  # no sweep comes between the mkdir and the lock
            _sweep(scratch)
            files.make_directory(base)
            self._ephemeral = base
            self._lock(base)
        finally:
            os.close(fd)

    def _make_upper(self, upper: str) -> None:
        """Make an upper whose root has the attributes of the topmost layer's root, since users of the mount see them."""
        self._make_directories(upper)
        model = os.stat(self.spec.layers[-1])
        if (model.st_uid, model.st_gid) != (os.geteuid(), os.getegid()) and os.geteuid() == 0:
            os.chown(upper, model.st_uid, model.st_gid)
        os.chmod(upper, stat.S_IMODE(model.st_mode))
        os.utime(upper, ns=(model.st_atime_ns, model.st_mtime_ns))

    def announce(self, told: Notice) -> None:
        """Leave the server's notice beside the upper layer, if there is a place for it: a store's layer, or the record's."""
        self._notice = told
        directory = self._notice_place()
        if directory is not None:
            notice.leave(directory, told, alone=not self.spec.readonly)

    def _notice_place(self) -> str | None:
        if self.upper is None or self._alongside:
            return None
        root, layers, below = self.upper.rpartition("/layers/")
        if layers and os.path.exists(f"{root}/index.db"):
            return f"{root}/layers/{below.partition('/')[0]}"
        return self._place

    def announce_at(self, upper: str) -> str | None:
        """Leave the notice beside a layer of the store that is about to become the upper, and return its path."""
        return None if self._notice is None else notice.leave(os.path.dirname(upper), self._notice, alone=True)

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

    def share(self) -> None:
        """Turn the exclusive locks into shared ones, since this mount writes no more."""
        self.spec = replace(self.spec, readonly=True)
        for fd in self._locks:
            locks.lock(fd, shared=True, wait=True)

    def switched(self, upper: str, work: str, locks: Sequence[int]) -> None:
        """Replace the writable pair, and unlock the former one."""
        former = self._notice_place()
        if former is not None:
            notice.drop(former)
        for fd in self._locks:
            os.close(fd)
        self._locks = list(locks)
        self.upper, self.work = upper, work

    def _lock(self, directory: str) -> None:
        self._locks.append(lock(directory, shared=self.spec.readonly))

    # -- while mounted -------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Record the layers of the finished mount; its directories stay."""
        self._made.clear()
        self.record_limit(self.limit)

    def _is_engines(self) -> bool:
        """Whether an engine's options, which are for all its containers alike, are all that this mount was asked."""
        spec = self.spec
        return not (spec.record or spec.readonly or spec.ephemeral or spec.factory or spec.checked)

    def keep_limit(self, limit: Limit | None) -> None:
        """The limit was set while mounted: keep it for the mounts to come.

        Raises:
            OSError: there is no room to write it down; it holds for this mount.
        """
        self.record_limit(limit)
        if self._is_engines() and self.work is not None:
            kept_limit.write(self.work, Limit(bytes=self.spec.size, inodes=self.spec.inodes), limit or Limit())

    def record_limit(self, limit: Limit | None) -> None:
        """Keep the limit (and the layers) beside the upper, atomically."""
        self.limit = limit
        if self._place and self.upper and not self.spec.readonly:
            layers = [os.path.realpath(layer) for layer in self.spec.layers]
            had = read_record(self._place)
            if had is not None and layers == [os.path.realpath(layer) for layer in layers_of(self._place, had)]:
                same = os.path.realpath(os.path.join(self._place, str(had["upper"]))) == self.upper
                if same and limit_of(had) == (limit or Limit()):
                    return  # unchanged, and perhaps there is no room to write
            write_record(self._place, layers, self.upper, limit or Limit())

    def close(self) -> None:
        """Remove the notice, drop an ephemeral upper, then release the locks. Idempotent."""
        place = self._notice_place() if self._notice is not None else None
        if place is not None and self._notice is not None:
            notice.remove(place, self._notice)
            self._notice = None
        if self._ephemeral:
            _remove_tree(self._ephemeral)
            self._ephemeral = None
        while self._locks:
            os.close(self._locks.pop())


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


def _sweep(scratch: str) -> None:
    """Remove the ephemeral uppers of killed servers: those whose lock is free."""
    for name in os.listdir(scratch):
        if not name.startswith(_EPHEMERAL):
            continue
        path = os.path.join(scratch, name)
        try:
            fd = locks.open_locked(path)
        except OSError:
            continue
        if fd is None:
            continue
        try:
            _remove_tree(path)
        except OSError:
            pass
        finally:
            os.close(fd)


def _remove_tree(path: str) -> None:
    """rm -r relative to descriptors; directories without permissions get them first (this user owns them)."""
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
