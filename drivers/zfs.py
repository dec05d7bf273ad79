"""The zfs backend: a layer is a dataset, a clone of its parent's dataset made in constant time, whatever its size.

Strategy: the store's directory is on a dataset; layer ID is the dataset ``cowfs-ID`` below that one, with the tree
(``fs``) and the work directory of its mounts (``work``) in it. A parent has one snapshot, ``@cowfs``, made for its
first child; its children are clones of that. Everything goes through the programs ``zfs`` and, for probing, ``zpool``:
OpenZFS and zfs-fuse both have them, and only their common options are used (zfs-fuse 0.7 has no ``zfs diff``, no
property ``written``, no ``list -p``).

Mounts: a dataset is mounted at ``vol`` in the layer's directory when its tree is wanted, and stays: up to :data:`_IDLE`
trees that nobody uses are left mounted. A tree that was planned for a mount (:meth:`ZfsDriver.plan`) stays until its
layer is removed. A mount goes with its directory when that is renamed; the property ``mountpoint`` is set anew before
the next mount. zfs-fuse mounts in the namespace of its daemon.

Order: the layer's directory is there before its dataset and goes after it, and the dataset is named after the final id from the
start. So a process that is killed leaves a directory, with or without a dataset, that the store's sweep deletes. The program
that it was waiting for holds the layer's lock until it has ended, so a sweep comes after it.

Locks of a layer, files in its directory: ``zfs-turn``, held exclusively while its dataset is mounted, unmounted, made
or destroyed; ``zfs-use``, shared, while the tree is read.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

from cowfs.driver.interface import Capabilities, Driver, Probe
from cowfs.driver.plan import MountPlan
from cowfs.errors import Unsupported
from cowfs.model import Limit, Usage
from cowfs.sys import atomic, files, host, locks, mounts, programs, trees
from cowfs.sys.regular import read_small

_VOLUME = "vol"
_TURN, _USE, _KEEP, _QUOTA, _MADE, _PLACE = (
    "zfs-turn", "zfs-use", "zfs-keep", "zfs-quota", "zfs-snapshot", "zfs-place",
)  # fmt: skip
LEAST = 1 << 20
"""Bytes of the least limit of a kernel mount: an empty dataset has 100 KiB of metadata, and each change of it more."""

_SNAPSHOT = "@cowfs"
_IDLE = 32
_PATIENCE = 0.3  # seconds that a dataset may stay busy after its last file was closed
_TYPES = ("zfs", "fuse.zfs")
_SECOND = 10**9


class ZfsDriver(Driver):
    """Datasets and clones of one pool."""

    name = "zfs"
    whole = True

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Usable on a dataset, as root of the host, where the program ``zfs`` can talk to it."""
        found = _dataset_at(root)
        if found is None:
            return Probe(usable=False, reasons=(f"{root} is on no zfs dataset",))
        if not host.has_cap(host.CAP_SYS_ADMIN):
            return Probe(usable=False, reasons=("only root may mount datasets",))
        done = _zfs("get", "-H", "-o", "value", "readonly", found)
        if done.returncode:
            return Probe(usable=False, reasons=(f"zfs cannot be asked about {found}: {_said(done)}",))
        has = "with" if _has_xattrs(root) else "without"
        diff = "has" if "diff" in _zfs("help").stdout + _zfs("-?").stderr else "lacks"
        return Probe(
            usable=True,
            rank=17,
            reasons=(f"clones of datasets below {found}, {has} xattrs; zfs {diff} diff, changes are found by cowfs",),
        )

    @cached_property
    def capabilities(self) -> Capabilities:
        """Whole layers that share all blocks with their parents; the abilities of the pool's files are probed."""
        return Capabilities(
            whole=True,
            live=False,
            own_limit=True,
            reflink=True,
            kernel_mount=host.has_cap(host.CAP_SYS_ADMIN),
            unprivileged=False,
            xattrs=_has_xattrs(self.root),
            time_step=_SECOND if _whole_seconds(self.root) else 0,
        )

    @cached_property
    def _dataset(self) -> str:
        """The dataset that the store is on."""
        found = _dataset_at(self.root)
        if found is None:
            raise Unsupported(
                f"{self.root} is on no zfs dataset", remedy="mount its dataset first: zfs mount, or start zfs-fuse"
            )
        return found

    # -- places

    def _place(self, id: str) -> str:
        """Where the layer's dataset is mounted."""
        return f"{self.directory(id)}/{_VOLUME}"

    def _name(self, id: str) -> str:
        return f"{self._dataset}/cowfs-{_bare(id)}"

    def tree(self, id: str) -> str:
        """In the layer's dataset, where that is mounted."""
        return f"{self._place(id)}/fs"

    def work(self, id: str) -> str:
        """In the layer's dataset, too."""
        return f"{self._place(id)}/work"

    @contextmanager
    def open_tree(self, id: str) -> Iterator[int]:
        """Mount the dataset, if it is not mounted."""
        with self._used(id), super().open_tree(id) as fd:
            yield fd

    def plan(
        self,
        id: str,
        parents: Sequence[str],
        *,
        readonly: bool = False,
        limit: Limit = Limit(),  # noqa: B008 - frozen
    ) -> MountPlan:
        """Mount the trees of a plan, which stay mounted."""
        for one in (id, *parents[:1]) if readonly else (id,):
            if os.path.isdir(self.directory(one)):  # "cowfs info" asks about layers that do not exist
                with self._used(one):
                    _touch(f"{self.directory(one)}/{_KEEP}")
        return super().plan(id, parents, readonly=readonly, limit=limit)

    def _why_not_kernel(self, limit: Limit) -> str:
        if limit.inodes is not None:
            return "zfs's quotas count no inodes"
        if limit.bytes is not None and limit.bytes < LEAST:
            return f"zfs's quotas count metadata, and hold no limit below {LEAST >> 20} MiB"
        return super()._why_not_kernel(limit)

    # -- verbs

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """A clone of the nearest parent's dataset, or an empty one."""
        options = ["-o", f"mountpoint={self._place(id)}", "-o", "canmount=noauto"]
        self._unmount_idle()
        if parents:
            self._snapshot(parents[0])
        atomic.write_file(f"{self.directory(id)}/{_PLACE}", os.fsencode(self._place(id)), durable=False)
        with self._turn(id) as turn:
            if parents:
                _must(_zfs("clone", *options, self._name(parents[0]) + _SNAPSHOT, self._name(id), hold=turn))
            else:
                _must(_zfs("create", *options, self._name(id), hold=turn))
            self._mount(id, turn)
        if parents:
            return self.held(parents[0])
        os.mkdir(self.tree(id), 0o755)
        os.chmod(self.tree(id), 0o755)
        os.mkdir(self.work(id), 0o700)
        if self.fsync:
            _sync(self.tree(id))
        return Usage()

    def _snapshot(self, id: str) -> None:
        """Make the snapshot of a frozen layer, if it has none."""
        with self._used(id), self._turn(id) as turn:
            mark = f"{self.directory(id)}/{_MADE}"
            if os.path.exists(mark):
                return
            trees.empty_tree(self.work(id))
            _sync(self.tree(id))  # bring writes through maps to the disk
            done = _zfs("snapshot", self._name(id) + _SNAPSHOT, hold=turn)
            if "already exists" not in done.stderr:
                _must(done)
            _touch(mark)

    def limit(self, id: str, limit: Limit) -> None:
        """Set the quota, which counts what the layer does not share with its parent."""
        mark = f"{self.directory(id)}/{_QUOTA}"
        if limit.bytes is None and not os.path.exists(mark):
            return
        with self._turn(id) as turn:
            _touch(mark)
            quota = "none" if limit.bytes is None else str(limit.bytes)
            _must(_zfs("set", f"quota={quota}", self._name(id), hold=turn))
            if limit.bytes is None:
                os.unlink(mark)

    def explain(self) -> dict[str, str]:
        """The holder of limits, and the abilities that the pool lacks."""
        can = self.capabilities
        lacks = [] if can.xattrs else ["xattrs"]
        lacks += ["fractions of seconds"] if can.time_step else []
        told = {"dataset": self._dataset, "limits": "kernel mounts by quotas of zfs, others by cowfs's server"}
        return {**told, "files without": ", ".join(lacks)} if lacks else told

    def freeze(self, id: str) -> None:
        """Empty the work directory, which only a writer fills. The tree is not mounted by its plan any more."""
        with self.open_tree(id):
            if os.listdir(self.work(id)):
                trees.empty_tree(self.work(id))
        with suppress(FileNotFoundError):
            os.unlink(f"{self.directory(id)}/{_KEEP}")

    def remove(self, id: str) -> None:
        """Destroy the dataset, and the directory that stands for it.

        zfs destroys no dataset with an open file. Such a layer keeps its directory, and the next sweep of the store removes it.
        """
        if not os.path.isdir(self.directory(id)):
            return
        with self._turn(id) as turn:
            if not _detach(self._place(id)) or not self._destroy(id, turn):
                return
        super().remove(id)

    def _destroy(self, id: str, turn: int) -> bool:
        """Destroy the dataset. Returns whether it is gone."""
        end = time.monotonic() + _PATIENCE
        while True:
            done = _zfs("destroy", "-r", self._name(id), hold=turn)
            if not done.returncode or "does not exist" in done.stderr:
                return True
            if "busy" not in done.stderr and "dependent clones" not in done.stderr:
                _must(done)
            if time.monotonic() > end:
                return False
            time.sleep(0.02)

    def strays(self) -> list[str]:
        """Datasets whose directories are gone: of a program that went on while its layer was removed, or of a copy of the store."""
        done = _zfs("list", "-H", "-o", "name,mountpoint", "-r", self._dataset)
        _must(done)
        found, start = [], f"{self._dataset}/cowfs-"
        for line in done.stdout.splitlines():
            name, _, place = line.partition("\t")
            id = name.removeprefix(start)
            ours = name.startswith(start) and "/" not in id and place.startswith(f"{self.root}/")
            if ours and not any(os.path.isdir(self.directory(prefix + id)) for prefix in ("", "new-", "rm-")):
                found.append(id)
        return found

    def check(self, id: str) -> list[str]:
        """Check that the dataset exists, with the tree in it."""
        if not os.path.isdir(self.directory(id)):
            return [f"layer {id} is gone: {self.directory(id)}"]
        done = _zfs("list", "-H", "-o", "name", self._name(id))
        if done.returncode:
            return [f"layer {id} has no dataset: {_said(done)}"]
        try:
            with self.open_tree(id):
                return []
        except FileNotFoundError:
            return [f"layer {id} has no tree: {self.tree(id)}"]

    # -- mounting datasets

    @contextmanager
    def _turn(self, id: str) -> Iterator[int]:
        """Hold the lock for mounting, unmounting, making and destroying this layer's dataset; yields its descriptor."""
        fd = os.open(f"{self.directory(id)}/{_TURN}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            locks.lock(fd, wait=True)
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _used(self, id: str) -> Iterator[None]:
        """Hold the dataset mounted for the block.

        Raises:
            FileNotFoundError: the layer is gone.
            Unsupported: it cannot be mounted here.
        """
        fd = os.open(f"{self.directory(id)}/{_USE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            locks.lock(fd, shared=True, wait=True)
            if not os.path.ismount(self._place(id)):
                self._unmount_idle()
                with self._turn(id) as turn:
                    self._mount(id, turn)
            yield
        finally:
            os.close(fd)

    def _mount(self, id: str, turn: int) -> None:
        """Mount the dataset; the caller holds its lock."""
        place, name = self._place(id), self._name(id)
        if os.path.ismount(place):
            return
        mark = f"{self.directory(id)}/{_PLACE}"
        if not os.path.exists(mark) or read_small(mark) != os.fsencode(
            place
        ):  # the layer has another name now, or the store
            _must(_zfs("set", f"mountpoint={place}", name, hold=turn))
            atomic.write_file(mark, os.fsencode(place), durable=False)
        end = time.monotonic() + _PATIENCE
        while True:
            os.makedirs(place, mode=0o700, exist_ok=True)
            done = _zfs("mount", name, hold=turn)
            if os.path.ismount(place):
                return
            if "does not exist" in done.stderr:
                raise FileNotFoundError(errno.ENOENT, f"no dataset {name}", place)
            if not done.returncode or "already mounted" in done.stderr:
                raise Unsupported(
                    f"{name} is mounted, but not at {place} in this mount namespace",
                    remedy="zfs-fuse mounts where its daemon runs: run cowfs there",
                )
            if "busy" not in done.stderr or time.monotonic() > end:
                _must(done)
            time.sleep(0.01)

    def _unmount_idle(self) -> None:
        """Unmount unused trees, unless they are few."""
        start, end = os.fsencode(f"{self.root}/layers/"), b"/" + os.fsencode(_VOLUME)
        found = [one.target for one in mounts.mountinfo() if one.target.startswith(start) and one.target.endswith(end)]
        if len(found) <= _IDLE:
            return
        for place in found:
            directory = os.fsdecode(os.path.dirname(place))
            if os.path.exists(f"{directory}/{_KEEP}"):
                continue
            with suppress(FileNotFoundError), self._turn(os.path.basename(directory)):
                use = locks.open_locked(f"{directory}/{_USE}", flags=os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
                if use is not None:
                    with suppress(OSError):  # a file is open
                        mounts.umount(place)
                    os.close(use)


# -- the programs


def _zfs(*arguments: str, hold: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``zfs``.

    Args:
        hold: a descriptor that the program keeps open until it ends, even if this process is killed.

    Raises:
        Unsupported: it is not installed.
    """
    return programs.run("zfs", *arguments, package="zfsutils-linux (or zfs-fuse)", hold=hold)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The first line of a program's error output."""
    lines = done.stderr.strip().splitlines()
    return lines[0] if lines else f"exit code {done.returncode}"


def _must(done: subprocess.CompletedProcess[str]) -> None:
    """Raise an OSError with the message of ``zfs``, if it failed."""
    if done.returncode:
        said = _said(done)
        code = errno.EIO
        if "out of space" in said or "quota" in said:
            code = errno.ENOSPC
        raise OSError(code, f"zfs {done.args[1]}: {said}")


def _dataset_at(path: str) -> str | None:
    """The dataset of a path, by mountinfo; None on another file system."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for entry in mounts.mountinfo():
        if entry.dev == wanted and entry.fstype in _TYPES:
            return os.fsdecode(entry.source)
    return None


def _bare(id: str) -> str:
    """The final id of a layer."""
    return id.removeprefix("new-").removeprefix("rm-")


def _touch(path: str) -> None:
    """Make an empty file, if there is none."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _has_xattrs(path: str) -> bool:
    """Whether files there can have extended attributes."""
    try:
        os.getxattr(path, "user.cowfs")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


def _whole_seconds(root: str) -> bool:
    """Whether times there are kept without fractions, as zfs-fuse does. A wrong yes costs time, nothing else."""
    there = [root, *(entry.path for entry in os.scandir(root))]
    return all(os.lstat(path).st_ctime_ns % _SECOND == 0 for path in there[:8])


def _detach(place: str) -> bool:
    """Unmount a dataset. Returns whether it is unmounted. Not lazily: zfs-fuse hangs when the last file is closed then."""
    try:
        while os.path.ismount(place):
            mounts.umount(place)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _sync(path: str) -> None:
    """Bring a dataset to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        files.syncfs(fd)
    finally:
        os.close(fd)
