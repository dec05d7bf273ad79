"""Mounts that the kernel serves: their handle, and the mount over an upper in memory, which needs no store.

Strategy of a mount in memory: the kernel's overlayfs over the layers, and over a tmpfs of the limit's size, which is
mounted nowhere else. So the written data goes with the mount, whoever unmounts it. If the kernel or this user cannot do
that, cowfs's own server puts the upper on an existing tmpfs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType

from cowfs._record import record
from cowfs._typed import Any, NoReturn
from cowfs.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from cowfs.mounting.request import MountSpec
from cowfs.sys import files, host, mounts as sys_mounts

__all__ = [
    "SOURCE",
    "KernelMount",
    "add_flags",
    "folder_in_memory",
    "mount_in_memory",
    "why_not",
    "why_not_in_memory",
    "words_of",
]

SOURCE = "cowfs:memory"
"""The source that such a mount shows, by which it is known as one of ours."""

_SHARED = "/dev/shm"
_WORDS = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
}  # mount(8)'s words that a mount of the kernel gets by its flags
_OWN_INODES = 5
"""Of the tmpfs itself: its root, the upper, the work directory, what overlayfs makes in that, and the marks that it sets."""

_LEAST_INODES = 8
_ASKED = ("uid_map", "gid_map", "row", "io", "frontend", "foreground", "trace", "log", "max_nodes", "options", "owner")
_BY_CALLER = frozenset({"readonly", "allow_other"})  # other users may enter a mount of the kernel in any case


@record(frozen=True, slots=True)
class KernelMount:
    """A mount that the kernel serves. It has no server, and no control socket.

    Attributes:
        mountpoint: absolute path.
    """

    mountpoint: str

    def __enter__(self) -> KernelMount:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unmount()

    def unmount(self, *, lazy: bool = False, force: bool = False) -> None:
        """Unmount.

        Raises:
            FailedPrecondition: in use.
        """
        flags = (sys_mounts.MNT_DETACH if lazy else 0) | (sys_mounts.MNT_FORCE if force else 0)
        try:
            sys_mounts.umount(self.mountpoint, flags)
        except OSError as error:
            raise FailedPrecondition(f"cannot unmount {self.mountpoint}: {error.strerror}") from None

    def nobody(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse a method that needs a server.

        Raises:
            FailedPrecondition: always.
        """
        raise FailedPrecondition(
            f"{self.mountpoint} is mounted by the kernel, which cannot do this",
            remedy="mount it by cowfs's own server",
        )

    usage = limit = diff = snapshot = rollback = counters = status = nobody


def why_not(more: Mapping[str, Any]) -> str:
    """The reason why the kernel cannot mount as requested; "" if it can.

    Args:
        more: fields of a :class:`~cowfs.mounting.request.MountSpec`; ``options`` may be one text.
    """
    plain = MountSpec(layers=(), mountpoint="")
    for name, value in more.items():
        if name == "options":
            others = sorted(set(words_of(value)) - _WORDS.keys())
            if others:
                return f"the option {others[0]} is not one of the kernel's"
        elif name not in _BY_CALLER and value != getattr(plain, name):
            return f"{name} is done by cowfs's own server"
    return ""


def words_of(options: str | Iterable[str]) -> tuple[str, ...]:
    """mount(8)'s words without the default ones."""
    words = options.split(",") if isinstance(options, str) else options
    return tuple(word for word in words if word not in ("", "rw", "defaults"))


def add_flags(mountpoint: str, options: str | Iterable[str]) -> None:
    """Set the flags of mount(8)'s words on a mount of the kernel.

    Raises:
        OSError: as mount(2).
    """
    flags = 0
    for word in words_of(options):
        flags |= _WORDS[word]
    if flags:
        sys_mounts.remount_bind(mountpoint, flags)


def why_not_in_memory(spec: MountSpec) -> str:
    """The reason why the kernel cannot serve a mount in memory as requested; "" if it can."""
    if not (host.init_userns() and host.has_cap(host.CAP_SYS_ADMIN)):
        return "only root mounts with the kernel's overlayfs"
    if spec.inodes is not None and spec.inodes < _LEAST_INODES:
        return f"overlayfs wants {_LEAST_INODES} inodes to begin with"
    return why_not({name: getattr(spec, name) for name in _ASKED})


def mount_in_memory(spec: MountSpec) -> KernelMount:
    """Mount layers under an upper in memory that goes with the mount.

    Raises:
        NotFound: a layer or the mount point is missing.
        Unsupported: the kernel refuses these layers.
    """
    for path in (*spec.layers, spec.mountpoint):
        if not os.path.isdir(path):
            raise NotFound(f"no such directory: {path}")
    inodes = None if spec.inodes is None else spec.inodes + _OWN_INODES
    top = sys_mounts.tmpfs_mount(spec.size, inodes)
    try:
        lowest = os.stat(spec.layers[-1])
        for name, mode in (("fs", lowest.st_mode & 0o7777), ("work", 0o700)):
            os.mkdir(f"/proc/self/fd/{top}/{name}", 0o700)
            os.chmod(f"/proc/self/fd/{top}/{name}", mode)
        os.chown(f"/proc/self/fd/{top}/fs", lowest.st_uid, lowest.st_gid)
        sys_mounts.overlay_mount(
            spec.mountpoint,
            spec.layers[::-1],
            f"/proc/self/fd/{top}/fs",
            f"/proc/self/fd/{top}/work",
            ("index=off", "redirect_dir=on", "metacopy=on"),
            source=SOURCE,
        )
    except OSError as error:
        raise Unsupported(
            f"the kernel cannot mount these layers under an upper in memory: {error.strerror}",
            remedy="leave out --memory",
        ) from None
    finally:
        os.close(top)
    add_flags(spec.mountpoint, spec.options)
    return KernelMount(spec.mountpoint)


def folder_in_memory() -> str:
    """The directory for a server's upper in memory.

    Raises:
        InvalidArgument: there is no such place.
    """
    try:
        fd = os.open(_SHARED, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        fd = -1
    try:
        if fd < 0 or files.fs_name(fd) != "tmpfs":
            raise InvalidArgument(f"{_SHARED} is no file system in memory", remedy="leave out --memory")
    finally:
        if fd >= 0:
            os.close(fd)
    return f"{_SHARED}/cowfs-ephemeral-{os.geteuid()}"
