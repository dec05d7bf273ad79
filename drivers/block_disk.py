"""The image of a layer as a disk of its own: a child of it, whose file system has the layer's tree for its root directory.

Strategy: the child is a delta like any other, so making it costs what changes: the names in the tree's root are moved up, the directories of a
layer go, the file system is checked, gets an identity of its own and, where that is wanted, another size. Then the chain is mounted
once more, and the file in it is handed out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowfs.errors import InvalidArgument
from cowfs.sys import mounts, trees

from . import block_device, block_image
from .block_image import BLOCK
from .block_pool import DISK

__all__ = ["handed_out"]

_TREE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATIENCE = 20.0  # seconds that a device has to go after its last mount


@contextmanager
def handed_out(directory: str, request: block_device.DiskRequest, size: int) -> Iterator[tuple[int, int]]:
    """A descriptor of a disk, and its size in bytes.

    Args:
        directory: of a layer that was just made as a child.
        request: its image, writable.
        size: bytes that the file system is to have; 0: as many as it has.

    Raises:
        InvalidArgument: it cannot be made so large, or so small.
        OSError: as of the programs for the file system.
    """
    at = f"{directory}/{block_device.SERVED}"
    block_device.attach(directory, request)
    try:
        _move_up(f"{directory}/mnt")
    finally:
        block_device.detach(directory)
    _wait(directory)
    device, fd = block_device.device(directory, request)
    try:
        blocks = _own(request, device, size)
    finally:
        os.close(fd)
    _wait(directory)
    handle = block_device.serve(directory, request)
    try:
        fd = os.open(f"{at}/{DISK}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd, blocks * BLOCK
        finally:
            os.close(fd)
    finally:
        handle.unmount()


def _move_up(root: str) -> None:
    """Make the tree in a layer's file system its root directory."""
    inside = f"{root}/.cowfs-{os.urandom(8).hex()}"
    trees.remove_tree(f"{root}/work")
    os.rename(f"{root}/fs", inside)
    fd, top = os.open(inside, _TREE), os.open(root, _TREE)
    try:
        there = os.fstat(fd)
        for name in os.listdir(fd):
            if name == "lost+found":
                with suppress(FileNotFoundError):
                    os.rmdir(name, dir_fd=top)
            os.rename(name, name, src_dir_fd=fd, dst_dir_fd=top)
        os.rmdir(inside)
        trees.copy_attributes(fd, top, there)
    finally:
        os.close(fd)
        os.close(top)


def _own(request: block_device.DiskRequest, device: str, size: int) -> int:
    """Give a file system that nobody has mounted a size and an identity of its own; its blocks then."""
    kind = request.kind
    blocks = block_device.size_of(device, kind)
    if kind.name == "ext4":
        block_image.run("e2fsck", "-fp", device, package=kind.package, fine=(0, 1))
        if size:
            wanted = size // BLOCK
            if not kind.least // BLOCK <= wanted <= block_image.DEVICE // BLOCK:
                raise InvalidArgument(f"no ext4 of {size} bytes", remedy=f"at least {kind.least}")
            try:
                block_image.grow_at_rest(kind, device, wanted)
            except OSError as error:
                if wanted >= blocks:
                    raise
                raise InvalidArgument(
                    f"a file system of {blocks * BLOCK} bytes cannot be made as small as {size}: {error.strerror}",
                    remedy="leave out the size, or give a larger one",
                ) from None
            blocks = block_device.size_of(device, kind)
        block_image.run("tune2fs", "-f", "-U", "random", device, package=kind.package)
    else:
        if size and size // BLOCK != blocks:
            raise InvalidArgument("an XFS keeps its size", remedy="leave out the size: it grows where it is mounted")
        block_image.run("xfs_admin", "-U", "generate", device, package=kind.package)
    return blocks


def _wait(directory: str) -> None:
    """Until a layer's device is gone: it goes a moment after its last user."""
    end = time.monotonic() + _PATIENCE
    served = block_device.Served.of(directory)
    while served is not None and time.monotonic() < end:
        time.sleep(0.01)
        served = block_device.Served.of(directory)
    while block_device.is_mounted(f"{directory}/mnt") and block_device.take_away(f"{directory}/mnt", mounts.MNT_DETACH):
        pass
