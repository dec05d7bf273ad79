"""Builders of layers in the kernel overlayfs's own format.

A ``Layer`` writes to a plain directory; ``form`` chooses the xattr prefix (``trusted``, or
``user`` as the kernel's ``userxattr`` option reads). Methods take paths relative to the layer,
make missing parents (0755) and return the layer, so that a layer reads as one expression.
Format: Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories",
"redirect_dir", "metadata only copy up".
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

EPOCH = 1_500_000_000_000_000_000
"""Default mtime of what a builder makes, ns."""

ACL_EA_VERSION = 2
ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 1, 2, 4, 8, 16, 32
NO_ID = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as the kernel's xattr holds it: (tag, permissions, id) each, id -1 where it has none."""
    return struct.pack("<I", ACL_EA_VERSION) + b"".join(
        struct.pack("<HHI", tag, permissions, id_ & NO_ID) for tag, permissions, id_ in entries
    )


def acl_entries(raw: bytes) -> list[tuple[int, int, int]]:
    """The reverse of ``acl``."""
    assert struct.unpack_from("<I", raw)[0] == ACL_EA_VERSION
    return [
        (tag, permissions, id_ if id_ != NO_ID else -1) for tag, permissions, id_ in struct.iter_unpack("<HHI", raw[4:])
    ]


class Layer:
    """One directory being filled as a layer."""

    def __init__(self, path: str | os.PathLike[str], form: str = "trusted") -> None:
        self.path = Path(path)
        self.form = form
        self.path.mkdir(parents=True, exist_ok=True)

    def __fspath__(self) -> str:
        return str(self.path)

    def at(self, name: str) -> str:
        return os.path.join(self.path, name)

    def attr(self, name: str) -> str:
        """Full name of an overlay xattr in this layer's form."""
        return f"{self.form}.overlay.{name}"

    def _new(self, name: str) -> str:
        full = self.at(name)
        os.makedirs(os.path.dirname(full), mode=0o755, exist_ok=True)
        return full

    def _finish(
        self, full: str, mode: int | None, uid: int, gid: int, mtime: int | None, xattrs: Mapping[str, bytes] | None
    ) -> Layer:
        if uid or gid:
            os.chown(full, uid, gid, follow_symlinks=False)
        if mode is not None:
            os.chmod(full, mode)
        for key, value in (xattrs or {}).items():
            os.setxattr(full, key, value, follow_symlinks=False)
        if mtime is not None:
            os.utime(full, ns=(mtime, mtime), follow_symlinks=False)
        return self

    def file(
        self,
        name: str,
        data: bytes = b"",
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        mtime: int | None = EPOCH,
        xattrs: Mapping[str, bytes] | None = None,
    ) -> Layer:
        full = self._new(name)
        with open(full, "xb") as file:
            file.write(data)
        return self._finish(full, mode, uid, gid, mtime, xattrs)

    def sparse(self, name: str, size: int, pieces: Mapping[int, bytes], mode: int = 0o644) -> Layer:
        """A file of ``size`` bytes with only ``pieces`` (offset -> data) stored."""
        full = self._new(name)
        with open(full, "xb") as file:
            file.truncate(size)
            for offset, data in pieces.items():
                os.pwrite(file.fileno(), data, offset)
        return self._finish(full, mode, 0, 0, EPOCH, None)

    def dir(
        self,
        name: str,
        mode: int = 0o755,
        uid: int = 0,
        gid: int = 0,
        mtime: int | None = None,
        xattrs: Mapping[str, bytes] | None = None,
        opaque: bool = False,
    ) -> Layer:
        full = self._new(name)
        os.makedirs(full, exist_ok=True)
        if opaque:
            os.setxattr(full, self.attr("opaque"), b"y")
        return self._finish(full, mode, uid, gid, mtime, xattrs)

    def symlink(self, name: str, target: str, uid: int = 0, gid: int = 0) -> Layer:
        full = self._new(name)
        os.symlink(target, full)
        return self._finish(full, None, uid, gid, EPOCH, None)

    def link(self, old: str, new: str) -> Layer:
        """``new`` becomes another name of ``old``."""
        os.link(self.at(old), self._new(new), follow_symlinks=False)
        return self

    def fifo(self, name: str, mode: int = 0o644) -> Layer:
        full = self._new(name)
        os.mkfifo(full)
        return self._finish(full, mode, 0, 0, EPOCH, None)

    def socket(self, name: str, mode: int = 0o755) -> Layer:
        full = self._new(name)
        os.mknod(full, stat.S_IFSOCK | mode)
        return self._finish(full, mode, 0, 0, EPOCH, None)

    def char(self, name: str, major: int, minor: int, mode: int = 0o644) -> Layer:
        full = self._new(name)
        os.mknod(full, stat.S_IFCHR | mode, os.makedev(major, minor))
        return self._finish(full, mode, 0, 0, EPOCH, None)

    def block(self, name: str, major: int, minor: int, mode: int = 0o644) -> Layer:
        full = self._new(name)
        os.mknod(full, stat.S_IFBLK | mode, os.makedev(major, minor))
        return self._finish(full, mode, 0, 0, EPOCH, None)

    def whiteout(self, name: str) -> Layer:
        """Hide ``name`` of the layers below (character device 0/0)."""
        os.mknod(self._new(name), stat.S_IFCHR, 0)
        return self

    def xattr_whiteout(self, name: str) -> Layer:
        """The other encoding: an empty file with ``overlay.whiteout``, its directory ``opaque=x``."""
        full = self._new(name)
        with open(full, "xb"):
            pass
        os.setxattr(full, self.attr("whiteout"), b"y")
        os.setxattr(os.path.dirname(full), self.attr("opaque"), b"x")
        return self

    def redirect(self, name: str, target: str) -> Layer:
        """Directory ``name`` merges with ``target`` below: a sibling's name, or '/path/from/root'."""
        full = self._new(name)
        os.makedirs(full, exist_ok=True)
        os.setxattr(full, self.attr("redirect"), os.fsencode(target))
        return self

    def metacopy(
        self, name: str, size: int, mode: int = 0o644, uid: int = 0, gid: int = 0, redirect: str | None = None
    ) -> Layer:
        """Attributes only; the data of ``size`` bytes is that of the layer below."""
        full = self._new(name)
        with open(full, "xb") as file:
            file.truncate(size)
        os.setxattr(full, self.attr("metacopy"), b"")
        if redirect is not None:
            os.setxattr(full, self.attr("redirect"), os.fsencode(redirect))
        return self._finish(full, mode, uid, gid, EPOCH, None)
