"""The files of a layer: its users, valid digests, equal data.

Strategy: every answer is relative to the layer's tree, by the fewest system calls, and never from the path alone: a
digest kept beside a layer is valid while inode and ctime (which cannot be set) are those of its file.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from cowfs.driver.interface import HELD, Driver
from cowfs.errors import Corrupt, FailedPrecondition
from cowfs.index.database import Index, Row
from cowfs.index.directory import Entry
from cowfs.mounting.holders import take
from cowfs.mounting.notice import drop as drop_notices
from cowfs.store import limit_loop
from cowfs.store.digest_table import ByInode
from cowfs.sys import files, locks, trees, xattr
from cowfs.sys.mounts import MountInfo, mountinfo
from cowfs.sys.regular import open_regular, read_small

__all__ = [
    "PLAIN",
    "UNKNOWN",
    "KeptDigests",
    "LayerFile",
    "SameData",
    "Unchanged",
    "file_digest",
    "hold",
    "is_locked",
    "kernel_mount_of",
    "kernel_mounts_of",
    "known_digest",
    "mark_copied",
    "mark_time",
    "marked_time",
    "not_plain",
    "opened_tree",
    "settle_times",
    "unmark",
    "untouched",
]

KEPT = "cowfs-digests"
_RECORD = struct.Struct("<QQ32s")  # inode, ctime in ns, digest
COPIED = "cowfs-copied"
"""A file made right after a driver copied the parent: what has an older ctime was not touched since."""
PLAIN = "cowfs-plain"
"""A file beside the tree of a layer that holds no metacopies, and that only an engine writes in."""
SEAL = ".seal"
"""Ends the name of the file beside a mark that says which file the mark is: its device, inode and ctime."""
_CHUNK = 1 << 20
UNKNOWN = bytes(32)
"""In place of a digest: the file has none."""


def known_digest(value: bytes | None) -> bytes | None:
    """A digest from its stored form; None for none."""
    return None if value == UNKNOWN else value


@contextmanager
def hold(
    driver: Driver, index: Index, row: Row, verb: str, *, missing_ok: bool = False, at_rest: bool = True
) -> Iterator[None]:
    """Be the only user of a layer's tree, after the end of a server whose mount is gone.

    Args:
        at_rest: whether the content in a limit engine's image is brought into the tree first.

    Raises:
        FailedPrecondition: a mount or another verb uses it, or made another of it; the message names it.
        NotFound: another process removed the snapshot meanwhile.
        Corrupt: the tree is gone.
    """
    tree = driver.tree(row.id)
    with ExitStack() as opened:
        try:
            fd = opened.enter_context(driver.open_tree(row.id))
        except FileNotFoundError:
            if missing_ok:
                yield
                return
            if index.get(row.name).id != row.id:
                raise FailedPrecondition(f"{row.name!r} was replaced meanwhile", remedy="try again") from None
            raise Corrupt(f"the layer of {row.name!r} is gone: {tree}", remedy="run 'cowfs check'") from None
        holder = take(fd, [driver.directory(row.id)])
        if holder is not None:
            how = f"cowfs umount {holder.notice.mountpoint}" if holder.notice else "wait for it, or end it"
            raise FailedPrecondition(
                f"{row.name!r} is in use by {holder}: cannot {verb} it",
                remedy=f"{how}, or use 'cowfs snapshot'" if verb == "commit" else how,
            )
        drop_notices(driver.directory(row.id))
        where = kernel_mount_of(tree)
        if where is not None:
            raise FailedPrecondition(
                f"{row.name!r} is mounted by the kernel at {where}: cannot {verb} it", remedy=f"umount {where}"
            )
        if limit_loop.has_image(driver, row.id) and limit_loop.is_mounted(driver, row.id):
            raise FailedPrecondition(
                f"{row.name!r} is mounted by the kernel in another mount namespace: cannot {verb} it",
                remedy="unmount it there",
            )
        if at_rest:
            opened.enter_context(limit_loop.settled(driver, row.id))
        yield


@contextmanager
def opened_tree(driver: Driver, id: str) -> Iterator[int]:
    """A descriptor of a layer's tree, wherever it is, also while the kernel has it mounted."""
    if limit_loop.has_image(driver, id):
        with limit_loop.opened_image(driver, id) as fd:
            yield fd
        return
    with driver.open_tree(id) as fd:
        yield fd


def is_locked(driver: Driver, row: Row) -> bool:
    """Whether a mount's server or another verb has a layer's tree in use right now."""
    try:
        fd = locks.open_locked(driver.tree(row.id))
    except FileNotFoundError:
        return False
    if fd is None:
        return True
    os.close(fd)
    return False


def kernel_mount_of(tree: str) -> str | None:
    """The mount point of this tree in the kernel, as an overlay's upper or by a bind; None if there is none."""
    found = next(kernel_mounts_of(tree), None)
    return None if found is None else os.fsdecode(found.target)


def kernel_mounts_of(tree: str) -> Iterator[MountInfo]:
    """The kernel's mounts of a tree in this mount namespace, as an overlay's upper or by a bind."""
    try:
        wanted = os.stat(tree)
    except OSError:
        return
    device = f"{os.major(wanted.st_dev)}:{os.minor(wanted.st_dev)}"
    raw = os.fsencode(tree)
    own = b"cowfs:" + os.path.basename(os.path.dirname(raw))  # a view has no upper: its source names the store
    for entry in mountinfo(having=(b" overlay ", b"/fs ")):
        if entry.fstype == "overlay":
            if b"upperdir=" + raw in entry.super_options.split(b",") or entry.source == own:
                yield entry
        elif entry.root.endswith(b"/fs") and (
            (entry.dev == device and raw.endswith(entry.root)) or _is_bind_of(entry, wanted, raw)
        ):
            yield entry


def _is_bind_of(entry: MountInfo, wanted: os.stat_result, raw: bytes) -> bool:
    """Whether a bind mount shows a directory, if neither its device nor its path tells.

    The root of a mount is a path from the root of its file system, which may be mounted elsewhere or (btrfs) by one of its
    subvolumes; and stat(2) shows the number of a subvolume, mountinfo that of the file system.
    """
    place, last = raw.rpartition(b"/layers/")[1:]
    if not place or not entry.root.endswith(place + last):
        return False
    try:
        shown = os.stat(entry.target)
    except OSError:
        return True  # hidden from this process; no other store has a layer of this id
    return (shown.st_dev, shown.st_ino) == (wanted.st_dev, wanted.st_ino)


def not_plain(driver: Driver, id: str) -> None:
    """Drop the mark for engines' mounts, since the next mount may write data that they cannot read."""
    try:
        os.unlink(f"{driver.directory(id)}/{PLAIN}")
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EROFS:
            raise


def mark_copied(driver: Driver, id: str, parent: str, *, only_root: bool) -> None:
    """Mark a whole layer as unchanged since its copy; for a view, which copies nothing, only its root."""
    if only_root:
        with driver.open_tree(parent) as src, driver.open_tree(id) as dst:
            trees.copy_attributes(src, dst, os.fstat(src))
    frozen = None
    if driver.capabilities.snapshots and not only_root:  # its times are the parent's, all from before its commit
        with suppress(FileNotFoundError):
            frozen = os.stat(f"{driver.directory(parent)}/{HELD}").st_ctime_ns
    mark_time(driver, f"{driver.directory(id)}/{COPIED}", after=frozen)


def settle_times(driver: Driver) -> None:
    """Wait until later changes get other times than earlier ones, if times are coarse."""
    time.sleep(driver.capabilities.time_step / 1e9)


def mark_time(driver: Driver, path: str, text: str = "", *, after: int | None = None) -> None:
    """Write a small file with a ctime later than that of all earlier changes, and its seal (:func:`marked_time`).

    File systems stamp with a clock of some milliseconds: this waits for its next tick. Where a layer's times are coarser,
    it does not: a mark is read without its fraction of a step, so all of its second counts as changed (or
    :func:`settle_times` waited for it).

    Args:
        after: later than this (ns) is enough.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        first = os.fstat(file.fileno()).st_ctime_ns
        coarse = driver.capabilities.time_step > 0
        while not coarse and (after is None or first <= after) and os.fstat(file.fileno()).st_ctime_ns == first:
            time.sleep(0.001)
            os.utime(file.fileno())
    with open(path + SEAL, "w", encoding="utf-8") as file:
        file.write(_seal_of(path))


def marked_time(driver: Driver, path: str) -> int | None:
    """The ctime of a mark, ns: files of the layer with an earlier one were last changed before it; None without a mark,
    or for a copy of one.

    A copied store has copies of its marks, with ctimes of the time of copying: they tell nothing about the files beside them.
    """
    try:
        sealed = read_small(path + SEAL).decode("ascii", "replace")
        made = os.stat(path).st_ctime_ns
        step = driver.capabilities.time_step or 1
        return made - made % step if sealed == _seal_of(path) else None
    except FileNotFoundError:
        return None


def unmark(path: str) -> None:
    """Remove a mark that may not be there."""
    for name in (path, path + SEAL):
        with suppress(FileNotFoundError):
            os.unlink(name)


def _seal_of(path: str) -> str:
    st = os.stat(path)
    return f"{st.st_dev} {st.st_ino} {st.st_ctime_ns}"


def untouched(driver: Driver, id: str) -> bool:
    """Whether a layer is as its driver made it: empty, or unchanged since its copy."""
    tree = driver.tree(id)
    if not os.listdir(tree):
        return True
    cut = marked_time(driver, f"{driver.directory(id)}/{COPIED}")
    if cut is None:
        return False
    return os.stat(tree).st_ctime_ns < cut and all(st.st_ctime_ns < cut for st in trees.walk_all(tree))


class LayerFile:
    """The bytes of a regular file of a layer, open until the end of the ``with`` block. Owner of ``fd``."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def size(self) -> int:
        """The size, bytes."""
        return os.fstat(self._fd).st_size

    def pread(self, count: int, offset: int) -> bytes:
        """Up to ``count`` bytes at ``offset``; none at the end."""
        return os.pread(self._fd, count, offset)

    def data_ranges(self) -> list[tuple[int, int]]:
        """The parts that are no holes, as (start, end)."""
        return files.data_ranges(self._fd, self.size)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def __enter__(self) -> LayerFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_shown(trees: Sequence[str], path: bytes, form: str) -> LayerFile:
    """A file in the merged tree of these layers (topmost first). Raises OSError."""
    return _Redirected(list(trees), path, form)


class _Redirected(LayerFile):
    """A redirect file, read through the layers beneath it."""

    def __init__(self, trees: list[str], path: bytes, form: str) -> None:
        from cowfs.row.view import View
        from cowfs.union import Dir, Node, Options

        self._view = View(trees, options=Options(form=form, readonly=True))
        node: Node = self._view.root
        for name in path.split(b"/"):
            assert isinstance(node, Dir)
            node = self._view.lookup(node, name)
        self._node = node

    @property
    def size(self) -> int:
        return self._view.size(self._node)

    def pread(self, count: int, offset: int) -> bytes:
        buffer = bytearray(count)
        return bytes(buffer[: self._view.pread(self._node, offset, memoryview(buffer))])

    def data_ranges(self) -> list[tuple[int, int]]:
        from cowfs.union import content

        return list(content.data_ranges(self._view, self._node))

    def close(self) -> None:
        self._view.close()


def file_digest(file: LayerFile) -> bytes:
    """SHA-256 of an open file's data."""
    import hashlib

    digest = hashlib.sha256()
    at = 0
    while data := file.pread(_CHUNK, at):
        digest.update(data)
        at += len(data)
    return digest.digest()


class KeptDigests:
    """File digests kept beside a layer since an archive was applied to it.

    File ``cowfs-digests`` in the layer's directory: records of :data:`_RECORD`, by inode, so that
    each name of a hard link has its digest.
    """

    def __init__(self, known: ByInode, tree: str, *, row: bytes = b"", compute: bool = False) -> None:
        self._known = known
        self._tree = tree
        self._row = row  # the xattr of redirect files, which have no bytes of their own to digest
        self._compute = compute

    def __call__(self, path: bytes, st: os.stat_result) -> bytes | None:
        found = self._known.get(st.st_ino)
        if found is not None and int.from_bytes(found[:8], "little") == st.st_ctime_ns:
            return found[8:]
        if not self._compute:
            return None
        root = os.open(self._tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = files.open_beneath(root, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        finally:
            os.close(root)
        with LayerFile(fd) as file:
            return None if self._row and xattr.try_get(fd, b"", self._row) is not None else file_digest(file)

    @classmethod
    def load(cls, driver: Driver, id: str, *, compute: bool = False) -> KeptDigests | None:
        """The digests of a layer; None if there are none."""
        known = ByInode(_RECORD.size - 8)
        try:
            with open(open_regular(f"{driver.directory(id)}/{KEPT}"), "rb") as file:
                while len(record := file.read(_RECORD.size)) == _RECORD.size:
                    known[int.from_bytes(record[:8], "little")] = record[8:]
        except FileNotFoundError:
            if not compute:
                return None
        return cls(known, driver.tree(id), row=driver.form.row if driver.capabilities.row else b"", compute=compute)

    @staticmethod
    def save(driver: Driver, id: str, digests: ByInode) -> None:
        """Keep digests, given by inode, after an apply; earlier digests of other inodes stay.

        The ctimes are read now, by a walk of the layer.
        """
        with open(f"{driver.directory(id)}/{KEPT}", "ab") as file:
            for st in trees.walk_all(driver.tree(id)):
                digest = known_digest(digests.get(st.st_ino)) if stat.S_ISREG(st.st_mode) else None
                if digest:
                    file.write(_RECORD.pack(st.st_ino, st.st_ctime_ns, digest))
            file.flush()
            if driver.fsync:
                os.fsync(file.fileno())


class SameData:
    """Compares the bytes of two files in their layers (:data:`cowfs.index.compare.SameData`)."""

    def __init__(self, driver: Driver, index: Index) -> None:
        self._driver = driver
        self._index = index
        self._ids: dict[int, str] = {}

    def open(self, num: int, path: bytes) -> LayerFile:
        """Open a file of a layer for reading.

        Raises:
            Corrupt: the file is missing.
        """
        id = self._ids.get(num)
        if id is None:
            id = self._ids[num] = self._index.by_num(num).id
        try:
            with opened_tree(self._driver, id) as root:
                fd = files.open_beneath(root, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            form = self._driver.form
            if self._driver.capabilities.row and xattr.try_get(fd, b"", form.row) is not None:
                os.close(fd)
                return _Redirected([self._driver.tree(id) for _, id in self._index.chain(num)], path, form.name)
            return LayerFile(fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise Corrupt(
                    f"the index knows {os.fsdecode(path)!r} in layer {id}, where it is not", remedy="run 'cowfs check'"
                ) from None
            raise

    def __call__(self, a_path: bytes, a: Entry, b_path: bytes, b: Entry) -> bool:
        with self.open(a.layer, a_path) as one, self.open(b.layer, b_path) as other:
            return _equal(one, other)


class Unchanged:
    """Whether a file of a whole layer still has its parent's bytes, all attributes being equal.

    A file with a ctime before the mark that was made after copying (:data:`COPIED`) has not been changed since, because
    a ctime cannot be set. Other files are compared; all files, unless marks are trusted.
    """

    def __init__(self, driver: Driver, index: Index, id: str, fd: int, *, believe: bool = True) -> None:
        self._data = SameData(driver, index)
        self._fd = fd
        self._cut = (marked_time(driver, f"{driver.directory(id)}/{COPIED}") or 0) if believe else 0

    def __call__(self, path: bytes, st: os.stat_result, before: Entry) -> bool:
        if st.st_ctime_ns < self._cut:
            return True
        mine = files.open_beneath(self._fd, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with LayerFile(mine) as one, self._data.open(before.layer, before.path or path) as other:
            return _equal(one, other)


def _equal(one: LayerFile, other: LayerFile) -> bool:
    at = 0
    while True:
        a, b = one.pread(_CHUNK, at), other.pread(_CHUNK, at)
        if a != b:
            return False
        if not a:
            return True
        at += len(a)
