"""``docker cp``: files of a container as a tar, and a tar into a container.

Rules (a stranger owns the tree, and may change it during the walk: CVE-2018-15664 and its kind):

1. The requested path is resolved as if the container's root were the root (openat2(2), RESOLVE_IN_ROOT); from
   there on no link is followed, and each step is relative to a descriptor.
2. A tar coming in makes directories, regular files, links and FIFOs, each by name in the descriptor of its parent directory; a
   name that leads out, a device and a hard link out of what was unpacked are refused.
3. ``tarfile`` parses and formats headers. It never opens, makes or extracts a file.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import tarfile
import time
from typing import Any, BinaryIO, cast

from cowfs.errors import InvalidArgument, NotFound
from cowfs.service.errors import ApiError
from cowfs.sys.files import open_beneath, open_in_root

__all__ = ["pack", "path_stat", "unpack"]

CHUNK = 1 << 20

# Go's os.FileMode, which the header of a path's status has: type bits differ from stat(2)'s.
_GO_MODE = {stat.S_IFDIR: 1 << 31, stat.S_IFLNK: 1 << 27, stat.S_IFBLK: 1 << 26, stat.S_IFCHR: 1 << 26 | 1 << 21, stat.S_IFIFO: 1 << 25, stat.S_IFSOCK: 1 << 24}  # fmt: skip


def _split(path: str) -> tuple[bytes, bytes]:
    """Directory and last name of a path in a container; a name of ``.`` or ``..`` belongs to the directory."""
    whole = os.fsencode(path) or b"/"
    directory, _, name = whole.rstrip(b"/").rpartition(b"/")
    if name in (b"", b".", b".."):
        return whole, b""
    return directory or b"/", name


def _find(root: int, path: str) -> tuple[int, bytes]:
    """A descriptor (O_PATH) of the object of a path, links not followed, and its last name; the caller closes it.

    Raises:
        NotFound: there is nothing.
    """
    directory, name = _split(path)
    try:
        above = open_in_root(root, directory, os.O_PATH | os.O_DIRECTORY)
        if not name:
            return above, b"/"
        try:
            return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above), name
        finally:
            os.close(above)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"Could not find the file {path}") from None


def path_stat(root: int, path: str) -> str:
    """The header ``X-Docker-Container-Path-Stat`` of a path: JSON in base64.

    Raises:
        NotFound: there is nothing.
    """
    fd, name = _find(root, path)
    try:
        st = os.fstat(fd)
        target = os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(st.st_mode) else b""
    finally:
        os.close(fd)
    if path.rstrip("/") != path and not stat.S_ISDIR(st.st_mode) and not target:
        raise ApiError(400, f"{path}: not a directory")
    go_mode = stat.S_IMODE(st.st_mode) & 0o777 | _GO_MODE.get(stat.S_IFMT(st.st_mode), 0)
    for bit, go in ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20)):
        go_mode |= go if st.st_mode & bit else 0
    told = {
        "name": os.fsdecode(name),
        "size": st.st_size,
        "mode": go_mode,
        "mtime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(st.st_mtime)),
        "linkTarget": os.fsdecode(target),
    }
    return base64.b64encode(json.dumps(told).encode("utf-8", "surrogateescape")).decode()


def pack(root: int, path: str, out: BinaryIO) -> None:
    """Write the object of a path, with all beneath it, as a tar whose first name is the path's last one.

    Raises:
        NotFound: there is nothing.
    """
    fd, name = _find(root, path)
    try:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:
            _add(tar, fd, os.fsdecode(name).lstrip("/") or ".", {})
    finally:
        os.close(fd)


def _add(tar: tarfile.TarFile, fd: int, name: str, seen: dict[tuple[int, int], str]) -> None:
    st = os.fstat(fd)
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid, info.mtime = stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, int(st.st_mtime)
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFDIR:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        directory = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for inner in sorted(os.listdir(directory)):
                try:
                    below = os.open(inner, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
                except FileNotFoundError:
                    continue  # it vanished during the walk
                try:
                    _add(tar, below, f"{name}/{inner}", seen)
                finally:
                    os.close(below)
        finally:
            os.close(directory)
        return
    if st.st_nlink > 1 and (st.st_dev, st.st_ino) in seen:
        info.type, info.linkname = tarfile.LNKTYPE, seen[st.st_dev, st.st_ino]
        tar.addfile(info)
        return
    seen[st.st_dev, st.st_ino] = name
    if kind == stat.S_IFREG:
        source = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        info.size = st.st_size
        with os.fdopen(source, "rb") as file:
            tar.addfile(info, cast("Any", _Exactly(file, st.st_size)))
    elif kind == stat.S_IFLNK:
        info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(os.readlink(b"", dir_fd=fd))
        tar.addfile(info)
    elif kind == stat.S_IFIFO:
        info.type = tarfile.FIFOTYPE
        tar.addfile(info)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        info.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(st.st_rdev), os.minor(st.st_rdev)
        tar.addfile(info)


class _Exactly:
    """A fixed number of bytes of a file that may shrink meanwhile; missing bytes are zeros."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, count: int) -> bytes:
        count = min(count, self._left)
        data = self._file.read(count).ljust(count, b"\0")
        self._left -= count
        return data


def unpack(root: int, path: str, source: BinaryIO, *, keep_kind: bool) -> None:
    """Unpack a tar into a directory of the container.

    Args:
        path: the directory; links on the way to it are followed inside the container.
        keep_kind: refuse to replace a directory by something else, and the reverse.

    Raises:
        NotFound: no such directory. InvalidArgument: a tar that is damaged, or that leads out.
        OSError: of the tree: ENOSPC at its limit, EROFS.
    """
    try:
        target = open_in_root(root, os.fsencode(path) or b"/", os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        raise NotFound(f"Could not find the file {path}") from None
    except NotADirectoryError:
        raise ApiError(400, "extraction point is not a directory") from None
    try:
        later: list[tuple[bytes, tarfile.TarInfo]] = []
        try:
            with tarfile.open(fileobj=source, mode="r|*", bufsize=CHUNK) as tar:
                for member in tar:
                    name = _safe(member.name)
                    if name:
                        _make(target, name, member, tar, keep_kind)
                        if member.isdir():
                            later.append((name, member))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise InvalidArgument(f"not a tar, or a damaged one: {error}") from None
        for name, member in reversed(later):
            fd = open_beneath(target, name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.utime(fd, (member.mtime, member.mtime))
            finally:
                os.close(fd)
    finally:
        os.close(target)


def _safe(name: str) -> bytes:
    parts = [part for part in os.fsencode(name).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InvalidArgument(f"the archive's entry {name!r} leads out of it")
    return b"/".join(parts)


def _make(target: int, path: bytes, member: tarfile.TarInfo, tar: tarfile.TarFile, keep_kind: bool) -> None:
    directory, _, name = path.rpartition(b"/")
    try:
        parent = open_beneath(target, directory, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:
        parent = _make_parents(target, directory)
    except OSError as error:
        raise InvalidArgument(f"the archive's entry {member.name!r}: {error.strerror}") from None
    try:
        if _clear(parent, name, member, keep_kind):
            _create(target, parent, name, member, tar)
        _own(parent, name, member)
    finally:
        os.close(parent)


def _make_parents(target: int, directory: bytes) -> int:
    at = b""
    for part in directory.split(b"/"):
        above = open_beneath(target, at, os.O_PATH | os.O_DIRECTORY)
        try:
            os.mkdir(part, 0o755, dir_fd=above)
        except FileExistsError:
            pass
        finally:
            os.close(above)
        at = at + b"/" + part if at else part
    return open_beneath(target, directory, os.O_PATH | os.O_DIRECTORY)


def _clear(parent: int, name: bytes, member: tarfile.TarInfo, keep_kind: bool) -> bool:
    """Make room for an entry; False for a directory that exists already."""
    try:
        st = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return True
    is_directory = stat.S_ISDIR(st.st_mode)
    if is_directory and member.isdir():
        return False
    if keep_kind and is_directory != member.isdir():
        what = "a directory with a file" if is_directory else "a file with a directory"
        raise ApiError(400, f"cannot overwrite {what}: {os.fsdecode(name)}")
    if is_directory:
        _remove_tree(parent, name)
    else:
        os.unlink(name, dir_fd=parent)
    return True


def _remove_tree(parent: int, name: bytes) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        for inner in os.listdir(fd):
            inner_name = os.fsencode(inner)
            if stat.S_ISDIR(os.stat(inner_name, dir_fd=fd, follow_symlinks=False).st_mode):
                _remove_tree(fd, inner_name)
            else:
                os.unlink(inner_name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _create(target: int, parent: int, name: bytes, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    if member.isdir():
        os.mkdir(name, 0o700, dir_fd=parent)
    elif member.isfile():
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        source = tar.extractfile(member)
        assert source is not None
        with os.fdopen(fd, "wb") as file:
            while data := source.read(CHUNK):
                file.write(data)
    elif member.issym():
        os.symlink(os.fsencode(member.linkname), name, dir_fd=parent)
    elif member.islnk():
        directory, _, linked = _safe(member.linkname).rpartition(b"/")
        above = open_beneath(target, directory, os.O_PATH | os.O_DIRECTORY)
        try:
            os.link(linked, name, src_dir_fd=above, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(above)
    elif member.isfifo():
        os.mkfifo(name, 0o600, dir_fd=parent)
    else:
        raise InvalidArgument(f"the archive's entry {member.name!r} is a device")


def _own(parent: int, name: bytes, member: tarfile.TarInfo) -> None:
    if member.islnk():
        return
    os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
    if member.issym():
        return
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{fd}", member.mode & 0o7777)
        os.utime(f"/proc/self/fd/{fd}", (member.mtime, member.mtime))
    finally:
        os.close(fd)
