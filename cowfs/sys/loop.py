"""Loop devices over image files (loop(4), linux/loop.h), and the size of the ext4 file systems in them.

A device made here is removed by the kernel with its last user (LO_FLAGS_AUTOCLEAR): no unmount leaves one behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Sequence

from cowfs.sys import mounts
from cowfs.sys.files import fs_name

__all__ = [
    "attach",
    "device_at",
    "device_of",
    "ext4_reserve",
    "grow",
    "hidden_mount",
    "image_mount",
    "is_direct",
    "is_mounted",
    "is_readonly",
    "name_of",
    "why_not",
]

_CTL_GET_FREE, _CONFIGURE, _GET_STATUS64, _SET_CAPACITY = 0x4C82, 0x4C0A, 0x4C05, 0x4C07
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_INFO = struct.Struct("=5Q4I64s64s32s2Q")  # struct loop_info64
_HEAD = struct.Struct("=2I")  # of struct loop_config: descriptor, block size
assert (_INFO.size, _HEAD.size) == (232, 8)


def why_not() -> str:
    """The reason why this process cannot make loop devices; "" if it can."""
    if not os.path.exists("/dev/loop-control"):
        return "there are no loop devices here (/dev/loop-control)"
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        return "loop devices are root's"
    return ""


def attach(image: str, *, readonly: bool = False, name: str = "") -> tuple[str, int]:
    """A loop device over a file, read and written without the page cache where the file's host can do that.

    Args:
        readonly: the device is only read; the file may then be named by a link, such as one in /proc.
        name: what :func:`name_of` tells of it, at most 63 bytes; "" for the file's path.

    Returns:
        (its path, a descriptor of it). The device stays until the descriptor is closed and its file system unmounted.

    Raises:
        OSError: no device, or what the kernel said.
    """
    backing = os.open(image, os.O_CLOEXEC | (os.O_RDONLY if readonly else os.O_RDWR | os.O_NOFOLLOW))
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            while True:
                path = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
                device = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if readonly else os.O_RDWR))
                try:
                    _configure(device, backing, name or image, _READ_ONLY if readonly else 0)
                    return path, device
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:  # another process was given the same device, and was faster
                        raise
        finally:
            os.close(control)
    finally:
        os.close(backing)


def _configure(device: int, backing: int, called: str, more: int) -> None:
    name = os.fsencode(called)[-63:]
    for flags in (_AUTOCLEAR | _DIRECT_IO | more, _AUTOCLEAR | more):
        info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
        try:
            fcntl.ioctl(device, _CONFIGURE, _HEAD.pack(backing, 0) + info + bytes(64))
            return
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & _DIRECT_IO:
                raise


def name_of(device: str) -> str | None:
    """The name that a loop device was given at :func:`attach`; None where it has no file (any more)."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        name: bytes = _INFO.unpack(fcntl.ioctl(fd, _GET_STATUS64, bytes(_INFO.size)))[9]
    except OSError:
        return None
    finally:
        os.close(fd)
    return os.fsdecode(name.rstrip(b"\0"))


def device_at(place: str) -> str:
    """The device that a mounted file system is on."""
    there = os.stat(place).st_dev
    return "/dev/" + os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(there)}:{os.minor(there)}"))


def is_readonly(device: str) -> bool:
    """Whether nobody can write to a loop device."""
    return _told(device, "ro") == "1"


def is_direct(device: str) -> bool:
    """Whether a loop device's file is read and written without the page cache; its host may not do that."""
    return _told(device, "loop/dio") == "1"


def _told(device: str, attribute: str) -> str:
    with open(f"/sys/block/{os.path.basename(device)}/{attribute}", encoding="utf-8") as file:
        return file.read().strip()


def device_of(image: str) -> str | None:
    """The loop device over a file, in whatever mount namespace it is used; None where there is none."""
    try:
        wanted = os.stat(image)
    except FileNotFoundError:
        return None
    for name in os.listdir("/sys/block"):
        if not re.fullmatch("loop[0-9]+", name) or not os.path.exists(f"/sys/block/{name}/loop"):
            continue
        try:
            fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            device, inode = _INFO.unpack(fcntl.ioctl(fd, _GET_STATUS64, bytes(_INFO.size)))[:2]
        except OSError:
            continue
        finally:
            os.close(fd)
        if inode == wanted.st_ino and _new_encoding(wanted.st_dev) == device:
            return f"/dev/{name}"
    return None


def _new_encoding(dev: int) -> int:
    """A device number as the kernel's ``huge_encode_dev`` gives it, which lo_device has."""
    major, minor = os.major(dev), os.minor(dev)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def is_mounted(device: str) -> bool:
    """Whether the ext4 or XFS of a device is mounted, in whatever mount namespace."""
    return any(os.path.exists(f"/sys/fs/{name}/{os.path.basename(device)}") for name in ("ext4", "xfs"))


def hidden_mount(name: str, device: str, options: Sequence[bytes], *, readonly: bool = False) -> int:
    """Mount the file system of a device, attached nowhere, and return a descriptor of its root. A device that is mounted
    already gives the same file system.

    Args:
        name: of the file system.
        options: words without a value.

    Raises:
        OSError: as mount(2); EBUSY: mounted already, and with another ``readonly``.
    """
    words: list[tuple[bytes, bytes | None]] = [(b"source", os.fsencode(device)), *((word, None) for word in options)]
    return mounts.detached_mount(os.fsencode(name), [*words, (b"ro", None)] if readonly else words)


def ext4_reserve(device: str, blocks: int) -> None:
    """Withhold free blocks from every user, root included; used blocks stay used.

    Source: the kernel's Documentation/ABI/testing/sysfs-fs-ext4, ``reserved_clusters``. It lasts until the unmount.

    Raises:
        OSError: EINVAL: more than the file system has; EROFS where /sys cannot be written.
    """
    with open(f"/sys/fs/ext4/{os.path.basename(device)}/reserved_clusters", "w", encoding="utf-8") as file:
        file.write(f"{blocks}\n")


def grow(image: str, device: str, size: int) -> None:
    """Make an image and its device larger; the file system in it stays as large as it is.

    Args:
        size: bytes; a multiple of 4,096.

    Raises:
        OSError: as of ftruncate(2) and the loop driver.
    """
    os.truncate(image, size)
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _SET_CAPACITY, 0)
    finally:
        os.close(fd)


def image_mount(image: str, devices: Sequence[str]) -> int:
    """Mount an EROFS image from its file, or through a loop device where the kernel or the file's host cannot do that.

    An image with devices is mounted from files only: read from block devices, a block that follows one of another
    device at the next address is taken from that one (Linux 6.18, iomap joins requests by their sectors), and our
    blocks have their addresses in all devices.

    Args:
        image, devices: as for :func:`cowfs.sys.mounts.image_mount`.

    Raises:
        OSError: as of that, and of :func:`attach`.
    """
    try:
        return mounts.image_mount(image, devices)
    except OSError as error:
        # The kernel wants a block device.
        if devices or error.errno not in (errno.ENOTBLK, errno.EOPNOTSUPP) or why_not():
            raise
    path, fd = attach(image, readonly=True)
    try:
        return mounts.image_mount(path)
    finally:
        os.close(fd)


def why_no_images(place: str, *, devices: bool = False) -> str:
    """The reason why the kernel mounts no EROFS images from files below ``place``; "" if it does.

    Args:
        devices: images with devices (:func:`image_mount`).
    """
    with open("/proc/filesystems", encoding="utf-8") as file:
        known = {line.split()[-1] for line in file}
    if "erofs" not in known:
        return "this kernel has no EROFS (modprobe erofs)"
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        host = fs_name(fd)
    finally:
        os.close(fd)
    if host == "fuse" or (devices and host in ("tmpfs", "overlay")):
        return f"images cannot be mounted from files of {host}"
    if host in ("tmpfs", "overlay"):  # nor there, but a loop device works
        why = why_not()
        return f"images cannot be mounted from files of {host}, and {why}" if why else ""
    return ""
