"""The file systems in the images of the block backend: what tells ext4 and XFS apart.

Sources: mkfs.ext4(8), mkfs.xfs(8), ext4(5), xfs(5), and of the ioctls :mod:`cowfs.sys.blockfs`.
"""

from __future__ import annotations

import errno
import os
import re

from cowfs._record import record
from cowfs.errors import FailedPrecondition
from cowfs.sys import blockfs, loop, mounts, programs

__all__ = ["BLOCK", "KINDS", "Kind", "make", "run"]

BLOCK = 4096
DEVICE = 8 << 40
"""Bytes of the device that an image is to those who mount it: the file system in it is smaller, and grows without touching the device."""


@record(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of file system.

    Attributes:
        name: as mount(8) knows it.
        mkfs: the program that makes it, and its words before the file's name; ``{size}`` is in bytes.
        size_last: whether mkfs is told the size in blocks after the file's name.
        package: Debian's, with the program.
        options: of every mount.
        readonly: more of them where nothing is written: the image is at rest, so no log is to be replayed.
        least: bytes of the smallest one.
        limits: whether it can withhold blocks from everybody.
    """

    name: str
    mkfs: tuple[str, ...]
    size_last: bool
    package: str
    options: str
    readonly: str
    least: int
    limits: bool


KINDS = {
    "ext4": Kind(
        name="ext4",
        mkfs=(
            "mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-I", "256", "-m", "0", "-E",
            "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
        ),
        size_last=True,
        package="e2fsprogs",
        options="noinit_itable",
        readonly="noload",
        least=16 << 20,
        limits=True,
    ),
    "xfs": Kind(
        name="xfs",
        mkfs=("mkfs.xfs", "-q", "-f", "-K", "-b", f"size={BLOCK}", "-d", "size={size}"),
        size_last=False,
        package="xfsprogs",
        options="nouuid",
        readonly="norecovery",
        least=300 << 20,
        limits=False,
    ),
}  # fmt: skip


def run(*command: str, package: str, fine: tuple[int, ...] = (0,)) -> None:
    """Run a program to its end.

    Args:
        fine: exit codes of a success.

    Raises:
        Unsupported: it is not installed.
        OSError: EIO with the first line of its complaint.
    """
    done = programs.run(*command, package=package)
    if done.returncode not in fine:
        lines = (done.stderr or done.stdout).strip().splitlines()
        told = [line for line in lines if not re.match(rf"{command[0]} [0-9.]+ \\(", line)] or [
            f"exit code {done.returncode}"
        ]
        raise OSError(errno.EIO, f"{command[0]}: {told[0].removeprefix(f'{command[0]}: ')}")


def make(kind: Kind, disk: str, size: int) -> None:
    """An empty file system of so many bytes in a new, sparse file.

    Raises:
        Unsupported: the program that makes one is not installed.
        OSError: what it or the host said.
    """
    fd = os.open(disk, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, DEVICE)
    finally:
        os.close(fd)
    words = [word.format(size=size) for word in kind.mkfs]
    run(*words, disk, *([str(size // BLOCK)] if kind.size_last else []), package=kind.package)


def mount(kind: Kind, device: str, place: str, *, readonly: bool, discard: bool) -> None:
    """Mount a device. Raises OSError as mount(2)."""
    words = [kind.options]
    if readonly:
        words.append(kind.readonly)
    elif discard:
        words.append("discard")
    flags = mounts.MS_NOATIME | (mounts.MS_RDONLY if readonly else 0)
    mounts.mount(device, place, kind.name, flags, ",".join(words))


def grow(kind: Kind, root: int, blocks: int) -> None:
    """Make a mounted file system larger.

    Raises:
        FailedPrecondition: this process may not.
        OSError: as of the ioctls.
    """
    try:
        (blockfs.grow_ext4 if kind.name == "ext4" else blockfs.grow_xfs)(root, blocks)
    except PermissionError:
        raise FailedPrecondition(
            f"this process may not make a mounted {kind.name} larger (ext4 asks for CAP_SYS_RESOURCE)",
            remedy="unmount it: it grows before the next mount",
        ) from None


def grow_at_rest(kind: Kind, device: str, blocks: int) -> None:
    """Make an ext4 that nobody has mounted larger.

    Raises:
        Unsupported, OSError: as of :func:`run`.
    """
    run("resize2fs", "-f", device, f"{blocks * (BLOCK // 1024)}K", package=kind.package)


def withhold(device: str, blocks: int) -> None:
    """Of the free blocks of a mounted ext4, keep so many from everybody."""
    loop.ext4_reserve(device, blocks)
