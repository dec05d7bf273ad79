"""The btrfs backend: a layer is a subvolume, a snapshot of its parent's subvolume made in constant time, whatever its size.

Strategy: the layer's directory has one subvolume, ``vol``, with the tree (``fs``) and the work directory of its mounts
(``work``) in it: a server renames between the two, which the kernel does within one subvolume only. Each layer is an entire
tree: the kernel mounts it by a bind, and it is read, backed up and repaired with nothing but a shell. A parent is made
read-only when the first child is made of it. Subvolumes are made and deleted by ioctl(2) (:mod:`cowfs.sys.btrfs`); the
kernel wants CAP_SYS_ADMIN for deleting one.

Limits: in kernel mounts by btrfs's quotas, simple ones (Linux 6.7) where the file system has none yet: a subvolume is
charged for its own writes, metadata included, and not for its parent's. Where the kernel or the file system has classic
ones, the bound is on what a subvolume holds alone, which a snapshot of it makes less. The file system begins to count
when the first limit is asked for. A quota counts no inodes: with a limit on them, as in a FUSE mount, cowfs's server
holds all limits.

Order: ``vol`` is made in the staged directory and deleted in the one that is being removed, so a process that is killed
leaves a directory that the store's sweep deletes, with or without a subvolume.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from cowfs._typed import Any
from cowfs.driver.interface import Capabilities, Changes, Driver, Probe
from cowfs.errors import Unsupported
from cowfs.model import Limit, Usage
from cowfs.sys import btrfs, files, host, locks, trees

LEAST = 256 << 10
"""Bytes of the least limit of a kernel mount: with less, the reserve for the metadata of one file does not fit."""

_VOLUME, _SENT = b"vol", b"sent"
_MOST = 100_000  # changed paths that are kept in memory
_SIMPLE = "/sys/fs/btrfs/features/simple_quota"


class BtrfsDriver(Driver):
    """Subvolumes and snapshots of one btrfs."""

    name = "btrfs"
    whole = True

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Usable on btrfs, as root of the host: a subvolume is made and deleted to see."""
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            name = files.fs_name(fd)
        finally:
            os.close(fd)
        if name != "btrfs":
            return Probe(usable=False, reasons=(f"{root} is on {name}, not on btrfs",))
        if not host.has_cap(host.CAP_SYS_ADMIN):
            return Probe(usable=False, reasons=("only root may delete subvolumes",))
        try:
            _try_subvolumes(root)
        except OSError as error:
            return Probe(usable=False, reasons=(f"no subvolume can be made and deleted: {error.strerror}",))
        return Probe(
            usable=True,
            rank=18,
            reasons=("snapshots of subvolumes, mounted by the kernel or by FUSE",),
        )

    @cached_property
    def capabilities(self) -> Capabilities:
        """Whole layers that share all extents with their parents."""
        return Capabilities(
            whole=True,
            live=False,
            own_limit=host.has_cap(host.CAP_SYS_ADMIN),
            reflink=True,
            snapshots=True,
            kernel_mount=host.has_cap(host.CAP_SYS_ADMIN),
            unprivileged=False,
        )

    def tree(self, id: str) -> str:
        """In the layer's subvolume."""
        return f"{self.directory(id)}/vol/fs"

    def work(self, id: str) -> str:
        """In the layer's subvolume, too."""
        return f"{self.directory(id)}/vol/work"

    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """A snapshot of the nearest parent's subvolume, or an empty one."""
        with _opened(self.directory(id)) as directory:
            if not parents:
                btrfs.create(directory, _VOLUME)
                os.mkdir(self.tree(id), 0o755)
                os.chmod(self.tree(id), 0o755)
                os.mkdir(self.work(id), 0o700)
                if self.fsync:
                    files.syncfs(directory)
                return Usage()
            with _opened(f"{self.directory(parents[0])}/vol") as parent:
                if not btrfs.readonly(parent):
                    btrfs.set_readonly(parent)
                btrfs.snapshot(parent, directory, _VOLUME)  # on the disk when it returns
            trees.empty_tree(self.work(id))
        return self.held(parents[0])

    def snapshot(self, id: str, target: str, ask: Callable[..., dict[str, Any]] | None) -> None:
        """A snapshot of its subvolume; a server takes it itself, while it answers no request."""
        with _opened(self.directory(target)) as directory:
            if ask is not None:
                ask("subvolume", source=f"{self.directory(id)}/vol", directory=self.directory(target), name="vol")
            else:
                with _opened(f"{self.directory(id)}/vol") as volume:
                    btrfs.snapshot(volume, directory, _VOLUME)
            trees.empty_tree(self.work(target))
            with _opened(f"{self.directory(target)}/vol") as volume:
                btrfs.set_readonly(volume)

    def freeze(self, id: str) -> None:
        """Empty the work directory, which only a writer fills."""
        if os.listdir(self.work(id)):
            trees.empty_tree(self.work(id))

    def remove(self, id: str) -> None:
        """Delete the subvolume, in constant time, and the directory around it."""
        try:
            with _opened(self.directory(id)) as directory:
                for name in (_SENT, _VOLUME):
                    _destroy(directory, self.directory(id), name)
        except FileNotFoundError:
            return
        super().remove(id)

    @contextmanager
    def changes(self, id: str, parent: str) -> Iterator[Changes | None]:
        """Read the send stream between the parent and a temporary snapshot of the layer."""
        with (
            _opened(self.directory(id)) as directory,
            _opened(f"{self.directory(id)}/vol") as volume,
            _opened(f"{self.directory(parent)}/vol") as before,
        ):
            try:
                paths = self._sent(id, directory, volume, before)
            except (OSError, ValueError):  # no room, no subvolume, paths too long: the store then reads the whole layer
                paths = None

            def names(inode: int) -> list[bytes]:
                found = btrfs.paths_of(volume, inode)
                return [path.removeprefix(b"fs/") for path in found if path.startswith(b"fs/")]

            yield None if paths is None else Changes(paths=paths, names=names)

    def _sent(self, id: str, directory: int, volume: int, before: int) -> dict[bytes, bool] | None:
        _destroy(directory, self.directory(id), _SENT)  # of a process that was killed
        if btrfs.has_inner(volume) or btrfs.has_inner(before):  # the stream has nothing of their content
            return None
        if not btrfs.readonly(before):
            btrfs.set_readonly(before)
        btrfs.snapshot(volume, directory, _SENT, readonly=True)
        try:
            with _opened(f"{self.directory(id)}/sent") as sent:
                return changed_paths(btrfs.send(sent, btrfs.subvolume_id(before)))
        finally:
            _destroy(directory, self.directory(id), _SENT)

    def _why_not_kernel(self, limit: Limit) -> str:
        if limit.inodes is not None:
            return "btrfs's quotas count no inodes"
        if limit.bytes is not None and limit.bytes < LEAST:
            return f"btrfs's quotas count metadata, and hold no limit below {LEAST >> 10} KiB"
        return super()._why_not_kernel(limit)

    def limit(self, id: str, limit: Limit) -> None:
        """A bound of the subvolume's quota group; quotas begin with the first one."""
        with _opened(f"{self.directory(id)}/vol") as volume:
            kind = btrfs.quota_kind(volume)
            if kind is None:
                if limit.bytes is None:
                    return
                try:
                    kind = btrfs.enable_quota(volume)
                except OSError as error:
                    raise Unsupported(f"quotas of this btrfs cannot be enabled: {error.strerror}") from None
            btrfs.limit(volume, btrfs.subvolume_id(volume), limit.bytes, exclusive=kind == "classic")

    def explain(self) -> dict[str, str]:
        """The kind of quota that holds limits."""
        with _opened(self.root) as fd:
            kind = btrfs.quota_kind(fd)
        if kind is None:
            kind = "simple" if os.path.exists(_SIMPLE) else "classic"
            kind = f"{kind} ones, from the first limit on"
        return {"limits": f"kernel mounts by btrfs's quotas ({kind}), others by cowfs's server"}

    def check(self, id: str) -> list[str]:
        """The tree is there, in a subvolume of its own."""
        found = super().check(id)
        if not found:
            with _opened(f"{self.directory(id)}/vol") as volume:
                if not btrfs.is_subvolume(volume):
                    found.append(f"layer {id} is no subvolume: {self.directory(id)}/vol")
        return found


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor of a directory, never through a link."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _destroy(directory: int, path: str, name: bytes) -> None:
    """Delete a subvolume of a layer's directory, if there is one; subvolumes that users made in it go with it."""
    try:
        btrfs.destroy(directory, name)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EINVAL):  # EINVAL: a plain directory, of a store that was copied
            raise
        path = f"{path}/{os.fsdecode(name)}"
        with _opened(path) as volume:
            if btrfs.is_subvolume(volume) and btrfs.readonly(volume):
                btrfs.set_readonly(volume, False)
        trees.remove_tree(path)


def _try_subvolumes(root: str) -> None:
    """Make a subvolume and a snapshot, and delete both. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix="new-probe-", dir=root) as place, _opened(place) as fd:
        locks.lock(fd, wait=True)  # so that no sweep of another process removes it
        btrfs.create(fd, b"one")
        try:
            with _opened(f"{place}/one") as one:
                btrfs.snapshot(one, fd, b"two")
            btrfs.destroy(fd, b"two")
        finally:
            btrfs.destroy(fd, b"one")


class _Place:
    """A name in the layer: the known changes of its object, and the names below it.

    Attributes:
        touched: whether the object changed.
        whole: whether the object is new here, and so all below it.
    """

    __slots__ = ("below", "touched", "whole")

    def __init__(self) -> None:
        self.below: dict[bytes, _Place] = {}
        self.touched = self.whole = False


def changed_paths(stream: Iterable[btrfs.Command]) -> dict[bytes, bool] | None:
    """The paths that a send stream touches, below ``fs``, by their final names: path -> whether the object is new there.

    The paths of a command are those after the commands before it. So the notes move with each rename.

    Returns:
        None where there are too many.
    """
    root = _Place()
    count = 0

    def find(path: bytes) -> _Place:
        place = root
        for name in path.split(b"/"):
            place = place.below.setdefault(name, _Place())
        return place

    for command in stream:
        for attribute in ("path", "path_to", "path_link"):
            path = command.values.get(attribute)
            if path is None or command.name in ("snapshot", "subvol"):
                continue
            count += 1
            if count > _MOST:
                return None
            if attribute == "path_to" and command.name == "rename":
                _move(find, command.path(), path)
            elif path:
                place = find(path)
                place.touched = True
                place.whole |= command.name in _MAKES and attribute == "path"
    return _collected(root.below.get(b"fs"))


_MAKES = frozenset({"mkdir", "mkfile", "mknod", "mkfifo", "mksock", "symlink", "link"})


def _move(find: Callable[[bytes], _Place], old: bytes, new: bytes) -> None:
    """Note a rename: the notes of the old place move to the new one, and the old name is gone."""
    source = find(old)
    target = find(new)
    target.below, source.below = source.below, {}
    source.touched = target.touched = target.whole = True
    source.whole = False


def _collected(top: _Place | None) -> dict[bytes, bool]:
    found: dict[bytes, bool] = {}
    todo = [(b"", top)] if top is not None else []
    while todo:
        path, place = todo.pop()
        if place.touched:
            found[path] = place.whole
        todo += [(b"/".join((path, name)) if path else name, below) for name, below in place.below.items()]
    return found
