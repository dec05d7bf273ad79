"""The limit engine ``loop``: the upper of a kernel mount is an ext4 file system of the limit's size, in a sparse file.

Strategy. Beside a layer's tree ``fs`` lies ``upper.img``, once it was mounted so: an ext4 with the directories ``fs`` and ``work``. As long as the image
is there, *it* holds the layer's tree, and ``fs`` beside it is the former state. The kernel mounts it through a loop device that
goes with the last mount, and nothing is mounted anywhere but the overlay: a kill or a reboot leaves the image in the
state of any ext4 after one. Every verb that wants the tree as a directory *settles* it first: the content of the image,
which is the change, is copied into a new directory, which takes the place of ``fs`` in one step; then the image is
deleted.

Exactness. The file system is a little larger than the limit. The surplus is withheld from all users
(``reserved_clusters``), so that a fresh upper has exactly the limit available, to the block, and ``statvfs`` shows it.
An upper takes the room that ext4 needs for it: data in blocks of 4 KiB, directories, extended attributes that do not
fit into the inode. Changing the limit is one number while the file system is large enough; it is grown otherwise. Empty
files take the surplus of inodes.

Crash safety, step by step. An image is made under another name and renamed. To settle: copy into ``fs.new``; exchange
it with ``fs``; delete the image; delete what was ``fs``. Killed before the exchange, the image still counts, and
``fs.new`` is deleted by the next attempt; after it, the next attempt copies the same once more.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from cowfs._record import replace
from cowfs._typed import NamedTuple
from cowfs.driver.interface import Driver
from cowfs.driver.plan import MountPlan
from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.model import Limit, Usage
from cowfs.store.limit_engine import LimitEngine
from cowfs.sys import files, host, locks, loop, trees
from cowfs.sys.atomic import fsync_directory
from cowfs.sys.faults import point

__all__ = [
    "LoopEngine",
    "has_image",
    "is_mounted",
    "limited",
    "opened_image",
    "settled",
    "used",
    "why_not",
]

IMAGE = "upper.img"
_BLOCK = 4096
_NOTE = "user.cowfs.loop"
_MOST_SPARE = 20_000
_WORKING = 16  # blocks, and inodes, that overlayfs needs at a mount, to probe its upper, and gives back
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MIB = 1 << 20


class _Own(NamedTuple):
    """The blocks and inodes that an empty upper takes of its file system."""

    blocks: int
    inodes: int


def image_of(driver: Driver, id: str) -> str:
    """The path of a layer's image, if it has one."""
    return f"{driver.directory(id)}/{IMAGE}"


def has_image(driver: Driver, id: str) -> bool:
    """Whether a layer's tree is in an image."""
    return os.path.exists(image_of(driver, id))


def is_mounted(driver: Driver, id: str) -> bool:
    """Whether a layer's image is mounted, in whatever mount namespace; waits for a running unmount."""
    for _ in range(100):
        device = loop.device_of(image_of(driver, id))
        if device is None or not loop.ext4_mounted(device):
            return False
        time.sleep(0.01)
    return True


@contextmanager
def _opened(image: str, *, readonly: bool = False) -> Iterator[tuple[str, int]]:
    """(the loop device, a descriptor of the root) of an image, mounted already or not.

    Args:
        readonly: write nothing to an unmounted image.
    """
    with ExitStack() as held:
        yield _mounted(image, held, readonly)


def _mounted(image: str, held: ExitStack, readonly: bool) -> tuple[str, int]:
    for _ in range(50):
        device = loop.device_of(image)
        try:
            if device is None:
                device, fd = loop.attach(image)
                held.callback(os.close, fd)
            root = loop.ext4_mount(device, readonly=readonly and not loop.ext4_mounted(device))
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EBUSY, errno.ENODEV):
                raise
            time.sleep(0.02)  # the device of the last mount went just now
            continue
        held.callback(os.close, root)
        return device, root
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), image)


@contextmanager
def opened_image(driver: Driver, id: str) -> Iterator[int]:
    """A descriptor of the tree in a layer's image, mounted or not."""
    with _opened(image_of(driver, id), readonly=True) as (_, root):
        fd = os.open("fs", _DIR, dir_fd=root)
        try:
            yield fd
        finally:
            os.close(fd)


@contextmanager
def settled(driver: Driver, id: str) -> Iterator[None]:
    """Bring a layer's tree out of its unmounted image; the caller holds the layer's lock until the block ends.

    May be repeated; does nothing without an image.

    Raises:
        OSError: ENOSPC: the host has no room for both; the image stays.
    """
    image = image_of(driver, id)
    old, new = driver.tree(id), f"{driver.directory(id)}/fs.new"
    trees.remove_tree(new)  # of an attempt that was killed
    if not os.path.exists(image):
        yield
        return
    with opened_image(driver, id) as tree:
        os.mkdir(new, 0o700)
        try:
            trees.copy_tree(b"/proc/self/fd/%d/." % tree, new)
            if driver.fsync:
                trees.sync_tree(new)
        except BaseException:
            trees.remove_tree(new)
            raise
    point("settle.copied")
    fd = os.open(new, _DIR)
    try:
        locks.lock(fd)  # it must be locked from the moment when it becomes the layer's tree
        files.rename2(files.AT_FDCWD, os.fsencode(new), files.AT_FDCWD, os.fsencode(old), files.RENAME_EXCHANGE)
        point("settle.exchanged")
        if driver.fsync:
            fsync_directory(driver.directory(id))  # the image goes once its content is surely the tree
        os.unlink(image)
        point("settle.unlinked")
        trees.remove_tree(new)
        yield
    finally:
        os.close(fd)


def why_not(driver: Driver) -> str:
    """The reason why this engine cannot hold limits for a store, on this host and by this user; "" if it can."""
    if driver.capabilities.whole:
        return f"layers of {driver.name} are whole trees"
    if not driver.form.redirects or not host.has_cap(host.CAP_SYS_ADMIN):
        return "only root mounts an ext4 image"
    if _mkfs() is None:
        return "mkfs.ext4 is not installed (apt-get install e2fsprogs)"
    return loop.why_not_ext4()


def used(driver: Driver, id: str) -> Usage | None:
    """The use of a layer whose tree is in an image, as ext4 counts it; None without an image."""
    if not has_image(driver, id):
        return None
    with _opened(image_of(driver, id), readonly=True) as (_, root):
        own = _own(root)
        told = os.fstatvfs(root)
        spare = len(os.listdir(_at(root, "spare")))
        inodes = told.f_files - told.f_ffree - own.inodes - spare
        return Usage(bytes=max(0, told.f_blocks - told.f_bfree - own.blocks) * _BLOCK, inodes=max(0, inodes))


@contextmanager
def limited(driver: Driver, id: str, plan: MountPlan) -> Iterator[MountPlan]:
    """A plan whose upper can take no more than the limit, for as long as the block or a mount made in it lasts.

    Raises:
        Unsupported: this engine cannot hold the limit.
    """
    image = image_of(driver, id)
    with ExitStack() as held:
        if os.path.exists(image):
            try:
                ready = held.enter_context(_ready(image, plan))
            except FailedPrecondition:  # a size or a number of inodes that this image cannot have
                held.enter_context(settled(driver, id))
        if not os.path.exists(image):
            _make(image, driver.tree(id), plan.limit, durable=driver.fsync)
            ready = held.enter_context(_ready(image, plan))
        yield ready


@contextmanager
def _ready(image: str, plan: MountPlan) -> Iterator[MountPlan]:
    with _opened(image) as (device, root):
        _set(image, device, root, plan.limit, more=_WORKING)
        yield replace(
            plan,
            upper=f"{_at(root, 'fs')}",
            work=f"{_at(root, 'work')}",
            lowers=plan.lowers or (plan.empty,),
            limit=Limit(),
            why_not_kernel="the kernel's overlayfs cannot read redirect files" if plan.row and plan.lowers else "",
            why_not_image="",
        )
        _set(image, device, root, plan.limit)


class LoopEngine(LimitEngine):
    """The image of one layer, mounted.

    Args:
        base: the use of the layer that does not count as its own, as in :meth:`cowfs.driver.Driver.create`.
    """

    name = "loop"

    def __init__(self, driver: Driver, id: str, base: Usage) -> None:
        self._image = image_of(driver, id)
        self._base = base

    def change(self, limit: Limit) -> None:
        with _opened(self._image) as (device, root):
            _set(self._image, device, root, limit.over(self._base))


def _at(root: int, name: str) -> str:
    return f"/proc/self/fd/{root}/{name}"


def _mkfs() -> str | None:
    from cowfs.sys import programs

    return programs.find("mkfs.ext4")


def _journal(size: int) -> int:
    """Bytes of the journal of a file system for so much data."""
    return 4 * _MIB if size < 128 * _MIB else 16 * _MIB if size < 1024 * _MIB else 64 * _MIB


def _image_size(limit: Limit) -> int:
    """Bytes of an image whose file system has room for a limit, and for a little more."""
    if limit.bytes is None:
        raise Unsupported(
            "a limit on inodes alone is not held by an image", remedy="give a size, too; or mount it with FUSE"
        )
    room = limit.bytes + _journal(limit.bytes) + 2 * _MIB
    inodes = limit.inodes + 300 if limit.inodes is not None else 0
    size = room + inodes * 256 if limit.inodes is not None else room * 16 // 15
    return (size + size // 256) & -_BLOCK


def _make(image: str, tree: str, limit: Limit, *, durable: bool) -> None:
    """Make an image with the content of a tree."""
    import subprocess

    mkfs = _mkfs()
    assert mkfs is not None
    size, new = _image_size(limit), f"{image}.new"
    assert limit.bytes is not None
    with suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        inodes = ["-N", str(limit.inodes + 64)] if limit.inodes is not None else ["-i", str(_BLOCK)]
        journal = f"size={_journal(limit.bytes) // _MIB}"
        words = ["-q", "-F", "-b", str(_BLOCK), "-I", "256", "-m", "0", "-J", journal, *inodes]
        lazy = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
        done = subprocess.run([mkfs, *words, "-E", lazy, new], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unsupported(f"mkfs.ext4 cannot make a file system of {size} bytes: {done.stderr.strip()}")
        with _opened(new) as (_, root):
            for name, mode in (("fs", 0o755), ("work", 0o700), ("spare", 0o700)):
                os.mkdir(name, mode, dir_fd=root)
            told = os.fstatvfs(root)
            # Each upper also has the directory that overlayfs makes in "work".
            own = _Own(told.f_blocks - told.f_bfree + 1, told.f_files - told.f_ffree + 1)
            os.setxattr(_at(root, "."), _NOTE, b"%d %d" % own)
            trees.copy_tree(tree, _at(root, "fs"))
            if durable:
                _sync(root)
        if durable:
            os.fsync(fd)
        os.rename(new, image)
        if durable:
            fsync_directory(os.path.dirname(image))
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(new)
        raise
    finally:
        os.close(fd)


def _sync(root: int) -> None:
    fd = os.open(".", _DIR, dir_fd=root)
    try:
        files.syncfs(fd)
    finally:
        os.close(fd)


def _own(root: int) -> _Own:
    blocks, inodes = os.getxattr(_at(root, "."), _NOTE).split()
    return _Own(int(blocks), int(inodes))


def _set(image: str, device: str, root: int, limit: Limit, *, more: int = 0) -> None:
    """Make a limit hold in a file system that is mounted.

    Args:
        more: additional blocks and inodes that may be used for now.
    """
    if limit.bytes is None:
        raise FailedPrecondition(
            "a mount with an image for its upper has a limit on bytes", remedy="unmount it first, or give a size"
        )
    own, wanted = _own(root), -(-limit.bytes // _BLOCK)
    _set_inodes(root, own, limit, more)
    room = os.fstatvfs(root).f_blocks - own.blocks
    if room < wanted:
        _grow(image, device, root, (wanted - room) * _BLOCK)
        _set_inodes(root, own, limit, more)  # a larger file system has more
        room = os.fstatvfs(root).f_blocks - own.blocks
    loop.ext4_reserve(device, max(0, room - wanted - more))


def _grow(image: str, device: str, root: int, missing: int) -> None:
    size = os.stat(image).st_size
    try:
        loop.grow(image, device, root, (size + missing + missing // 12 + 2 * _MIB) & -_BLOCK)
    except PermissionError:  # ext4 asks for CAP_SYS_RESOURCE
        raise FailedPrecondition(
            "this process may not make a mounted ext4 larger (CAP_SYS_RESOURCE)",
            remedy="unmount it, set the limit, and mount it again",
        ) from None


def _set_inodes(root: int, own: _Own, limit: Limit, more: int) -> None:
    """Take the inodes beyond the limit, with empty files."""
    have = sorted(os.listdir(_at(root, "spare")), key=int)
    total = os.fstatvfs(root).f_files - own.inodes
    wanted = 0 if limit.inodes is None else total - limit.inodes
    if not 0 <= wanted <= _MOST_SPARE:
        raise FailedPrecondition(
            f"the file system has {total} inodes, and cannot be given a limit of {limit.inodes} while it is mounted",
            remedy="unmount it first",
        )
    wanted = max(0, wanted - more)
    for name in have[wanted:]:
        os.unlink(_at(root, f"spare/{name}"))
    for number in range(len(have), wanted):
        try:
            os.close(os.open(_at(root, f"spare/{number}"), os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            break  # the use is beyond the new limit
