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

from cowfs.sys import files
from cowfs.union.layers import Layer

_HEAD = struct.Struct("<BBBBB16s")
_MAGIC, _FOREIGN = 0xFB, 0x01  # foreign: big endian
_SHIFT = 56
_PLAIN = (1 << _SHIFT) - 1
#: ids that no host file system gave, for the rare case of two files claiming one number
SYNTHETIC = 1 << 63

_INO32, _INO64, _BTRFS = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<Q")
_TMPFS = struct.Struct("<4xQ")


def _ino_of_handle(fs: str, kind: int, handle: bytes) -> int | None:
    """The inode number inside a file handle, for the layouts that are known."""
    if fs == "tmpfs" and kind == 1 and len(handle) == 12:
        return int(_TMPFS.unpack(handle)[0])
    if kind in (1, 2) and len(handle) >= 8:
        return int(_INO32.unpack_from(handle)[0])
    if kind in (0x81, 0x82, 0x4D, 0x4E, 0x4F) and len(handle) >= 12:
        return int(_INO64.unpack_from(handle)[0])
    return None


def ino_of_origin(value: bytes, fs: str) -> int | None:
    """The inode number in an ``origin`` of the named file system; ``None`` where it has none."""
    if len(value) < _HEAD.size:
        return None
    _, magic, length, flags, kind, _ = _HEAD.unpack_from(value)
    if magic != _MAGIC or length != len(value) or flags & _FOREIGN:
        return None
    return _ino_of_handle(fs, kind, value[_HEAD.size :])


class Inodes:
    """Maps (device, inode) to the number shown. Owner: the view's thread."""

    __slots__ = ("_index", "_systems")

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._index: dict[int, int] = {}
        self._systems: list[tuple[bytes, str, int]] = []  # uuid, name, index
        for layer in layers:
            if layer.dev not in self._index:
                self.index(layer.dev)
                fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=layer.root.fd)
                try:
                    self._systems.append((files.fs_uuid(fd), files.fs_name(fd), self._index[layer.dev]))
                finally:
                    os.close(fd)

    def uuid_of(self, dev: int) -> bytes:
        """The uuid of a layer's file system; zeros when it has none or is not a layer's."""
        index = self._index.get(dev)
        return next((uuid for uuid, _, known in self._systems if known == index), bytes(16))

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

    def from_origin(self, value: bytes) -> int | None:
        """The number shown for the file that an ``origin`` names; ``None`` when it names none."""
        if len(value) < _HEAD.size:
            return None
        _, magic, length, flags, kind, uuid = _HEAD.unpack_from(value)
        if magic != _MAGIC or length != len(value) or flags & _FOREIGN:
            return None
        handle = value[_HEAD.size :]
        for known, name, index in self._systems:
            if known == uuid:
                ino = _ino_of_handle(name, kind, handle)
                if ino is not None:
                    return ino if index == 0 else (index << _SHIFT) ^ ino
        return None


def make_origin(dirfd: int, name: bytes, uuid: bytes) -> bytes:
    """The ``origin`` of a lower file: empty (as the kernel writes it) where handles are unknown."""
    try:
        kind, handle = files.file_handle(dirfd, name)
    except OSError:
        return b""
    if kind > 0xFF:
        return b""
    return _HEAD.pack(0, _MAGIC, _HEAD.size + len(handle), 0, kind, uuid) + handle
