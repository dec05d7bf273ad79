"""The limit engines ``loop`` and ``loop-xfs``: the upper of a kernel mount is a file system of the limit's size, in a sparse file.

Strategy. Beside a layer's tree ``fs`` lies ``upper.img``, once it was mounted so: an ext4 or XFS (:mod:`cowfs.store.limit_image`) with the directories ``fs`` and ``work``. As long as the image
is there, *it* holds the layer's tree, and ``fs`` beside it is the former state. The kernel mounts it through a loop device that
goes with the last mount, and nothing is mounted anywhere but the overlay: a kill or a reboot leaves the image in the
state of any such file system after one. Every verb that wants the tree as a directory *settles* it first: the content of the image,
which is the change, is copied into a new directory, which takes the place of ``fs`` in one step; then the image is
deleted.

Exactness. The file system is a little larger than the limit, and the surplus withheld from all users, so that a fresh upper
has exactly the limit available, to the block, and ``statvfs`` shows it. An upper takes the room that its file system needs
for it: data in blocks of 4 KiB, directories, extended attributes that do not fit into the inode. Changing the limit is
one number while the file system is large enough; it is grown otherwise.

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
from cowfs.driver.interface import Driver
from cowfs.driver.plan import MountPlan
from cowfs.errors import FailedPrecondition, Unsupported
from cowfs.model import Limit, Usage
from cowfs.store.limit_engine import LimitEngine
from cowfs.store.limit_image import BLOCK, KINDS, ImageKind, Own, kind_of, path_at
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
_NOTE = "user.cowfs.loop"
_WORKING = 16  # blocks, and inodes, that overlayfs needs at a mount, to probe its upper, and gives back
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        if device is None or not loop.is_mounted(device):
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
    kind = kind_of(image)
    for _ in range(50):
        device = loop.device_of(image)
        try:
            if device is None:
                device, fd = loop.attach(image)
                held.callback(os.close, fd)
            quiet = readonly and not loop.is_mounted(device)
            root = loop.hidden_mount(kind.name, device, kind.options, readonly=quiet)
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


def why_not(driver: Driver, kind: ImageKind = KINDS["loop"]) -> str:
    """The reason why this engine cannot hold limits for a store, on this host and by this user; "" if it can."""
    if driver.capabilities.whole:
        return f"layers of {driver.name} are whole trees"
    if not driver.form.redirects or not host.has_cap(host.CAP_SYS_ADMIN):
        return f"only root mounts an {kind.name} image"
    return kind.why_not()


def best(driver: Driver, limit: Limit) -> ImageKind:
    """The kind of image for a limit where none was asked for: ext4, which is smaller and can count inodes."""
    kinds = [kind for kind in KINDS.values() if not why_not(driver, kind) and not kind.why_not_limit(limit)]
    return kinds[0] if kinds else KINDS["loop"]


def used(driver: Driver, id: str) -> Usage | None:
    """The use of a layer whose tree is in an image, as ext4 counts it; None without an image."""
    if not has_image(driver, id):
        return None
    with _opened(image_of(driver, id), readonly=True) as (_, root):
        own, spare = _own(root), kind_of(image_of(driver, id)).withheld(root)
        told = os.fstatvfs(root)
        inodes = told.f_files - told.f_ffree - own.inodes - spare.inodes
        bytes = (told.f_blocks - told.f_bfree - own.blocks) * BLOCK - spare.bytes
        return Usage(bytes=max(0, bytes), inodes=max(0, inodes))


@contextmanager
def limited(driver: Driver, id: str, plan: MountPlan, kind: ImageKind | None = None) -> Iterator[MountPlan]:
    """A plan whose upper can take no more than the limit, for as long as the block or a mount made in it lasts.

    Args:
        kind: of the image; None: the one that is there, else the best one.

    Raises:
        Unsupported: this engine cannot hold the limit.
    """
    image = image_of(driver, id)
    with ExitStack() as held:
        if os.path.exists(image) and (kind is None or kind is kind_of(image)):
            try:
                ready = held.enter_context(_ready(image, plan))
            except FailedPrecondition:  # a size or a number of inodes that this image cannot have
                held.enter_context(settled(driver, id))
        elif os.path.exists(image):
            held.enter_context(settled(driver, id))
        if not os.path.exists(image):
            _make(image, driver.tree(id), kind or best(driver, plan.limit), plan.limit, durable=driver.fsync)
            ready = held.enter_context(_ready(image, plan))
        yield ready


@contextmanager
def _ready(image: str, plan: MountPlan) -> Iterator[MountPlan]:
    with _opened(image) as (device, root):
        _set(image, device, root, plan.limit, more=_WORKING)
        yield replace(
            plan,
            upper=f"{path_at(root, 'fs')}",
            work=f"{path_at(root, 'work')}",
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

    def __init__(self, driver: Driver, id: str, base: Usage) -> None:
        self._image = image_of(driver, id)
        self.name = kind_of(self._image).engine
        self._base = base

    def change(self, limit: Limit) -> None:
        with _opened(self._image) as (device, root):
            _set(self._image, device, root, limit.over(self._base))


def _make(image: str, tree: str, kind: ImageKind, limit: Limit, *, durable: bool) -> None:
    """Make an image with the content of a tree."""
    why = kind.why_not_limit(limit)
    if why:
        raise Unsupported(why, remedy="give a size alone; or mount it with FUSE")
    new = f"{image}.new"
    with suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, kind.size(limit))
        kind.format(new, limit)
        with _opened(new) as (_, root):
            for name, mode in (("fs", 0o755), ("work", 0o700), ("spare", 0o700)):
                os.mkdir(name, mode, dir_fd=root)
            told = os.fstatvfs(root)
            more = kind.mounted
            _note(root, Own(told.f_blocks - told.f_bfree + more.blocks, told.f_files - told.f_ffree + more.inodes))
            trees.copy_tree(tree, path_at(root, "fs"))
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


def _note(root: int, own: Own) -> None:
    os.setxattr(path_at(root, "."), _NOTE, b"%d %d" % own)


def _own(root: int) -> Own:
    blocks, inodes = os.getxattr(path_at(root, "."), _NOTE).split()
    return Own(int(blocks), int(inodes))


def _set(image: str, device: str, root: int, limit: Limit, *, more: int = 0) -> None:
    """Make a limit hold in a file system that is mounted.

    Args:
        more: additional blocks and inodes that may be used for now.
    """
    if limit.bytes is None:
        raise FailedPrecondition(
            "a mount with an image for its upper has a limit on bytes", remedy="unmount it first, or give a size"
        )
    own = _own(root)
    now = kind_of(image).hold(image, device, root, own, limit, more=more)
    if now != own:
        _note(root, now)
