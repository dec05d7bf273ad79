"""Mounting: mount(2), umount2(2), the mount API by descriptors, and /proc/PID/mountinfo."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Sequence

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING
from cowfs.sys._libc import check, libc, syscall

if TYPE_CHECKING:
    from _typeshed import StrOrBytesPath

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_REMOUNT = 1, 2, 4, 8, 16, 32
MS_DIRSYNC, MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME = 128, 256, 1024, 2048
MS_BIND, MS_MOVE, MS_REC, MS_SILENT = 4096, 8192, 16384, 32768
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25
MNT_FORCE, MNT_DETACH, MNT_EXPIRE, UMOUNT_NOFOLLOW = 1, 2, 4, 8

# mount(8)'s words for the flags: word -> (flag, whether the word sets or clears it)
OPTION_FLAGS: dict[str, tuple[int, bool]] = {
    "ro": (MS_RDONLY, True),
    "rw": (MS_RDONLY, False),
    "nosuid": (MS_NOSUID, True),
    "suid": (MS_NOSUID, False),
    "nodev": (MS_NODEV, True),
    "dev": (MS_NODEV, False),
    "noexec": (MS_NOEXEC, True),
    "exec": (MS_NOEXEC, False),
    "sync": (MS_SYNCHRONOUS, True),
    "async": (MS_SYNCHRONOUS, False),
    "dirsync": (MS_DIRSYNC, True),
    "noatime": (MS_NOATIME, True),
    "atime": (MS_NOATIME, False),
    "nodiratime": (MS_NODIRATIME, True),
    "diratime": (MS_NODIRATIME, False),
    "relatime": (MS_RELATIME, True),
    "norelatime": (MS_RELATIME, False),
    "strictatime": (MS_STRICTATIME, True),
    "nosymfollow": (MS_NOSYMFOLLOW, True),
}

# linux/mount.h
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_SET_FD, _FSCONFIG_CMD_CREATE = 0, 1, 5, 6
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
_OPEN_TREE_CLONE, _AT_RECURSIVE, _AT_EMPTY_PATH = 1, 0x8000, 0x1000
_MOUNT_ATTR_RDONLY = 1
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
_MOUNT_ATTR = struct.Struct("<QQQQ")  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd


def mount(source: str, target: StrOrBytesPath, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    check(
        libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            os.fsencode(fstype),
            ctypes.c_ulong(flags),
            os.fsencode(data) if data else None,
        ),
        target,
    )


def umount(target: StrOrBytesPath, flags: int = 0) -> None:
    """umount2(2)."""
    check(libc.umount2(os.fsencode(target), flags), target)


def overlay_mount(
    target: StrOrBytesPath,
    lowers: Sequence[StrOrBytesPath | int],
    upper: StrOrBytesPath | None = None,
    work: StrOrBytesPath | None = None,
    options: Iterable[str] = (),
    *,
    readonly: bool = False,
    data: Sequence[StrOrBytesPath] = (),
    source: str = "overlay",
) -> None:
    """Mount the kernel's overlayfs by descriptors, so that any number of layers fits.

    Args:
        target: the mount point.
        lowers: topmost first; a descriptor stands for a directory that has no path (Linux 6.13).
        upper, work: the writable layer.
        options: of overlayfs.
        readonly: mount it read-only.
        data: layers that only metacopies of ``lowers`` reach into (``datadir+``, Linux 6.8).
        source: shown as the mount's source.

    Source: Documentation/filesystems/overlayfs.rst (``lowerdir+``, Linux 6.8).

    Raises:
        OSError: what the kernel said; EINVAL stands for most bad combinations.
    """
    fd = syscall(_FSOPEN, b"overlay", 1)
    try:

        def config(command: int, key: bytes | None, value: bytes | None) -> None:
            syscall(_FSCONFIG, fd, command, key, value, 0)

        config(_FSCONFIG_SET_STRING, b"source", os.fsencode(source))
        for lower in lowers:
            if isinstance(lower, int):
                syscall(_FSCONFIG, fd, _FSCONFIG_SET_FD, b"lowerdir+", None, lower)
            else:
                config(_FSCONFIG_SET_STRING, b"lowerdir+", os.fsencode(lower))
        for place in data:
            config(_FSCONFIG_SET_STRING, b"datadir+", os.fsencode(place))
        if upper is not None and work is not None:
            config(_FSCONFIG_SET_STRING, b"upperdir", os.fsencode(upper))
            config(_FSCONFIG_SET_STRING, b"workdir", os.fsencode(work))
        for option in options:
            key, equals, value = os.fsencode(option).partition(b"=")
            if equals:
                config(_FSCONFIG_SET_STRING, key, value)
            else:
                config(_FSCONFIG_SET_FLAG, key, None)
        config(_FSCONFIG_CMD_CREATE, None, None)
        tree = syscall(_FSMOUNT, fd, 1, _MOUNT_ATTR_RDONLY if readonly else 0)
    finally:
        os.close(fd)
    try:
        syscall(_MOVE_MOUNT, tree, b"", -100, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def image_mount(image: str | bytes, devices: Sequence[str | bytes] = ()) -> int:
    """Mount an EROFS image from its file, read-only, attached nowhere, and return a descriptor of its root.

    The mount lasts as long as the descriptor and the mounts made of it. Devices are read past the host's page
    cache where the kernel can do that (``directio``, Linux 6.12): requests to several files then wait for the disk
    together, and no page is kept twice.

    Args:
        image: the file, on a host file system whose files can be read page by page (not tmpfs, not overlayfs).
        devices: files of the image's devices, the first one first.

    Raises:
        OSError: ENOTBLK: the host file system cannot do that; ENODEV: the kernel has no EROFS; EINVAL: the file is no
            EROFS image.
    """
    if devices:
        try:
            return _image_mount(image, devices, (b"ro", b"directio"))
        except OSError as error:
            if error.errno != errno.EINVAL:  # the kernel lacks the option
                raise
    return _image_mount(image, devices, (b"ro",))


def _image_mount(image: str | bytes, devices: Sequence[str | bytes], flags: Sequence[bytes]) -> int:
    words = [(b"source", os.fsencode(image)), *[(b"device", os.fsencode(device)) for device in devices]]
    return detached_mount(b"erofs", [*words, *[(flag, None) for flag in flags]], readonly=True)


def detached_mount(
    fstype: bytes, words: Iterable[tuple[bytes, bytes | None]], *, readonly: bool = False, attributes: int = 0
) -> int:
    """Mount a file system without a place: a descriptor of its root, with which it goes, or with what was mounted upon it.

    Args:
        words: its options in order, with their values; None for one that has none.
        readonly: the mount is.
        attributes: of the mount, ATTR_NOSUID and its like.

    Raises:
        OSError: as mount(2).
    """
    fd = syscall(_FSOPEN, fstype, 1)
    try:
        for key, value in words:
            syscall(_FSCONFIG, fd, _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING, key, value, 0)
        syscall(_FSCONFIG, fd, _FSCONFIG_CMD_CREATE, None, None, 0)
        return syscall(_FSMOUNT, fd, 1, attributes | (_MOUNT_ATTR_RDONLY if readonly else 0))
    finally:
        os.close(fd)


def detached_bind(source: str | int, attributes: int = 0, *, recursive: bool = True) -> int:
    """A copy of the mount that a file or directory is on, with it as the root and without a place: a descriptor of that.

    Args:
        source: a path, or a descriptor of what it leads to.
        attributes: that it and all mounts beneath get, ATTR_RDONLY and its like (mount_setattr(2), Linux 5.12).
        recursive: with the mounts beneath it.

    Raises:
        OSError: as open_tree(2) and mount_setattr(2).
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    where, path = (source, b"") if isinstance(source, int) else (-100, os.fsencode(source))
    fd = syscall(_OPEN_TREE, where, path, flags | (0 if path else _AT_EMPTY_PATH))
    try:
        if attributes:
            set_attributes(fd, attributes, recursive=recursive)
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_attributes(fd: int, attributes: int, *, recursive: bool = False) -> None:
    """Give a mount, by a descriptor of its root, more attributes.

    Raises:
        OSError: ENOSYS before Linux 5.12.
    """
    given = _MOUNT_ATTR.pack(attributes, 0, 0, 0)
    syscall(_MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0), given, len(given))


def attach(fd: int, target: int) -> None:
    """Give a mount without a place one: upon what another descriptor is of. Neither is closed.

    Raises:
        OSError: ENOTDIR, a directory upon what is none, or the reverse.
    """
    syscall(_MOVE_MOUNT, fd, b"", target, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


def tmpfs_mount(size: int | None, inodes: int | None) -> int:
    """Mount a new tmpfs, attached nowhere, and return a descriptor of its root; it lasts as long as the descriptor and
    the mounts made of it.

    Args:
        size: bytes; None: the kernel's default, half of the memory.
        inodes: likewise; None: no bound.

    Raises:
        OSError: as mount(2).
    """
    words: list[tuple[bytes, bytes | None]] = [(b"mode", b"0755"), (b"nr_inodes", b"%d" % (inodes or 0))]
    if size is not None:
        words.append((b"size", b"%d" % size))
    return detached_mount(b"tmpfs", words)


def make_private() -> None:
    """Hide every mount made from now on from other mount namespaces (mount --make-rprivate /).

    In a chroot "/" is no mount point, so there the mounts that can be seen are made private one by one.
    """
    try:
        mount("", "/", "", MS_REC | MS_PRIVATE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        for one in mountinfo():
            mount("", one.target, "", MS_PRIVATE)


def remount_bind(target: str, flags: int) -> None:
    """Add some of the flags MS_RDONLY, MS_NOSUID, MS_NODEV and MS_NOEXEC to one mount, which keeps those that it has.

    Raises:
        OSError: as mount(2).
    """
    now = os.statvfs(target).f_flag
    kept = now & (
        MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME
    )  # the same numbers (statvfs(3))
    mount("none", target, "", MS_REMOUNT | MS_BIND | kept | flags | (MS_RELATIME if now & os.ST_RELATIME else 0))


@record(frozen=True, slots=True)
class MountInfo:
    """One line of /proc/PID/mountinfo (proc(5)), octal escapes undone."""

    mount_id: int
    parent_id: int
    dev: str
    root: bytes
    target: bytes
    options: tuple[str, ...]
    fstype: str
    source: bytes
    super_options: bytes


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    for code in (b"040", b"011", b"012", b"043", b"134"):
        text = text.replace(b"\\" + code, bytes([int(code, 8)]))
    return text


def mountinfo(pid: int | str = "self", *, having: tuple[bytes, ...] = ()) -> list[MountInfo]:
    """All mounts of a process's mount namespace, in the kernel's order.

    Args:
        having: leave out the mounts whose line holds none of these, which are then not taken apart.
    """
    found = []
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        for line in file:
            if having and not any(part in line for part in having):
                continue
            fields = line.rstrip(b"\n").split(b" ")
            dash = fields.index(b"-", 6)
            found.append(
                MountInfo(
                    int(fields[0]),
                    int(fields[1]),
                    fields[2].decode(),
                    _unescape(fields[3]),
                    _unescape(fields[4]),
                    tuple(fields[5].decode().split(",")),
                    fields[dash + 1].decode(),
                    _unescape(fields[dash + 2]),
                    _unescape(fields[dash + 3]) if len(fields) > dash + 3 else b"",
                )
            )
    return found
