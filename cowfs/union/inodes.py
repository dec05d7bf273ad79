"""Inode numbers: stable across copy-up and remount, distinct across file systems.

Strategy: a file keeps the inode number that its first layer gave it. Numbers of the first host
file system are shown as they are; those of the n-th get n in their top byte. A file that was
copied up carries ``origin``, the kernel's record of the lower file handle, from which the
number is read back after a remount.

``origin`` is the kernel's ``struct ovl_fb`` (fs/overlayfs/overlayfs.h): version 0, magic 0xfb,
length, flags, handle type, 16 bytes of uuid, then the handle of name_to_handle_at(2). How a file
system lays out its handle is in the kernel's include/linux/exportfs.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from cowfs._typed import NamedTuple
from cowfs.sys import files
from cowfs.union.layers import Layer

_HEAD = struct.Struct("<BBBBB16s")
_MAGIC, _FOREIGN = 0xFB, 0x01  # foreign: big endian
_SHIFT = 56
_PLAIN = (1 << _SHIFT) - 1
#: ids that no host file system gave, for the rare case of two files claiming one number
SYNTHETIC = 1 << 63


def handle_of(value: bytes) -> tuple[int, bytes] | None:
    """(type, bytes) of the file handle in an ``origin``; ``None`` where there is none that this host can read."""
    if len(value) < _HEAD.size:
        return None
    _, magic, length, flags, kind, _ = _HEAD.unpack_from(value)
    if magic != _MAGIC or length != len(value) or flags & _FOREIGN:
        return None
    return kind, value[_HEAD.size :]


Beneath = tuple[int, bytes, bytes | None, int | None]
"""A file of a lower layer: directory descriptor, name, its own origin, the number that an index shows for it."""


class _System(NamedTuple):
    """One file system that layers are on.

    Attributes:
        uuid: as overlayfs stores it in an origin; zeros where it has none.
        name: "ext4", "tmpfs"...
        dev: of the layers on it.
        fd: an open directory on it, for open_by_handle_at(2).
    """

    uuid: bytes
    name: str
    dev: int
    fd: int


class Inodes:
    """Maps (device, inode) to the number shown. Owner: the view's thread.

    A number is for showing only: the real device and inode identify a file, always.
    """

    __slots__ = ("_can_decode", "_claims", "_index", "_systems")

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._index: dict[int, int] = {}
        self._systems: list[_System] = []
        self._can_decode = True
        #: number -> (device, inode) of the upper file with several names that has it, whether it is in use or not
        self._claims: dict[int, tuple[int, int]] = {}
        try:
            for layer in layers:
                if layer.dev not in self._index:
                    self.index(layer.dev)
                    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=layer.root.fd)
                    self._systems.append(_System(files.fs_uuid(fd), files.fs_name(fd), layer.dev, fd))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the descriptors. Idempotent."""
        for system in self._systems:
            os.close(system.fd)
        self._systems.clear()

    def uuid_of(self, dev: int) -> bytes:
        """The uuid of a layer's file system; zeros when it has none or is not a layer's."""
        return next((system.uuid for system in self._systems if system.dev == dev), bytes(16))

    def index(self, dev: int) -> int:
        """The place of a device, given on first sight."""
        found = self._index.get(dev)
        if found is None:
            found = self._index[dev] = len(self._index)
        return found

    def shown(self, dev: int, ino: int) -> int:
        """The number shown for a host's inode."""
        index = self.index(dev)
        return ino if index == 0 else (index << _SHIFT) ^ ino

    def claim(self, number: int, dev: int, ino: int) -> bool:
        """Whether an upper file with several names may show a number, since another one may have it by a copied origin."""
        return self._claims.setdefault(number, (dev, ino)) == (dev, ino)

    def forget_claims(self) -> None:
        """Handle a new upper layer: files copied into it may show the numbers of their sources."""
        self._claims.clear()

    def from_origin(self, value: bytes, beneath: Iterable[Beneath] = ()) -> int | None:
        """The number shown for the file that an ``origin`` names; ``None`` unless that file is certain.

        It is when every layer's file system with the uuid in it finds one and the same inode by the handle, which holds
        the inode's generation: a reused number does not count.

        Args:
            value: the xattr.
            beneath: files of lower layers that it may name; looked at where this process may not open by handle.
        """
        if len(value) < _HEAD.size:
            return None
        _, magic, length, flags, kind, uuid = _HEAD.unpack_from(value)
        if magic != _MAGIC or length != len(value) or flags & _FOREIGN:
            return None
        handle = value[_HEAD.size :]
        if not self._can_decode:
            return self._by_path(value, kind, handle, beneath)
        found: tuple[int, int] | None = None
        for system in self._systems:
            if system.uuid != uuid:
                continue
            # A FUSE server gives its handles again after a remount; one system that finds nothing makes the others doubtful.
            try:
                place = None if system.name == "fuse" else self._decode(system, kind, handle)
            except PermissionError:
                self._can_decode = False
                return self._by_path(value, kind, handle, beneath)
            if place is None or found not in (None, place) or place[0] not in self._index:
                return None
            found = place
        return None if found is None else self.shown(*found)

    @staticmethod
    def _decode(system: _System, kind: int, handle: bytes) -> tuple[int, int] | None:
        """(device, inode) of the file with a handle, or None. Raises PermissionError: this process may not look."""
        try:
            fd = files.open_handle(system.fd, kind, handle)
        except PermissionError:
            raise
        except OSError:
            return None
        st = os.fstat(fd)
        os.close(fd)
        return st.st_dev, st.st_ino

    def _by_path(self, value: bytes, kind: int, handle: bytes, beneath: Iterable[Beneath]) -> int | None:
        """The number of the lower file that an origin names, or that was copied from the same one."""
        for dirfd, name, origin, number in beneath:
            try:
                if origin == value or files.file_handle(dirfd, name) == (kind, handle):
                    st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
                    return self.shown(st.st_dev, st.st_ino) if number is None else number
            except OSError:
                continue
        return None


def make_origin(dirfd: int, name: bytes, uuid: bytes) -> bytes:
    """The ``origin`` of a lower file: empty (as the kernel writes it) if there are no handles, or no lasting ones."""
    try:
        if files.fs_name(dirfd) == "fuse":
            return b""
        kind, handle = files.file_handle(dirfd, name)
    except OSError:
        return b""
    if kind > 0xFF:
        return b""
    return _HEAD.pack(0, _MAGIC, _HEAD.size + len(handle), 0, kind, uuid) + handle
