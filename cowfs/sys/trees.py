"""Copying and removing whole trees that belong to cowfs.

Rules: every step is relative to a directory descriptor and follows no link; depth costs memory,
not stack; only the last ``KEEP_OPEN`` descriptors of a path stay open. A copy keeps all that a
user can see (type, mode, owner, times, xattrs, links, holes) or fails: nothing is left out
without a word.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.sys import files, xattr
from cowfs.sys.threads import Thread

__all__ = [
    "copy_attributes",
    "copy_tree",
    "empty_tree",
    "remove_entry",
    "remove_tree",
    "sync_tree",
    "syncing",
    "walk_all",
]

KEEP_OPEN = 128
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str | bytes) -> None:
    """Delete a directory and all in it; entries that are gone, or go meanwhile, are no error.

    Raises:
        OSError: something could not be deleted.
    """
    try:
        top = _open_own(None, path)
    except FileNotFoundError:
        return
    try:
        _empty(top)
    finally:
        os.close(top)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass


def remove_entry(dirfd: int, name: bytes) -> None:
    """Delete an entry of an open directory, of any type, with all that is in it.

    Raises:
        OSError: something could not be deleted.
    """
    try:
        os.unlink(name, dir_fd=dirfd)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # some hosts answer EPERM for directories
        if not stat.S_ISDIR(os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_mode):
            raise
    top = _open_own(dirfd, name)
    try:
        _empty(top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=dirfd)


def empty_tree(path: str | bytes) -> None:
    """Delete all that is in a directory, and keep it."""
    top = _open_own(None, path)
    try:
        _empty(top)
    finally:
        os.close(top)


def _empty(top: int) -> None:
    """Delete what is in a directory: files at once, then each sub-directory, deepest first."""
    stack: list[tuple[int, list[bytes], bytes]] = [(os.dup(top), _unlink_files(top), b"")]
    try:
        while True:
            fd, below, name = stack[-1]
            if below:
                child = below.pop()
                try:
                    deeper = _open_own(fd, child)
                except FileNotFoundError:
                    continue
                stack.append((deeper, _unlink_files(deeper), child))
                if len(stack) > KEEP_OPEN and stack[-KEEP_OPEN][0] >= 0:
                    old = stack[-KEEP_OPEN]
                    os.close(old[0])
                    stack[-KEEP_OPEN] = (-1, *old[1:])
                continue
            if len(stack) == 1:
                return
            above = stack[-2]
            if above[0] < 0:
                above = stack[-2] = (os.open("..", _DIR, dir_fd=fd), *above[1:])
            os.close(fd)
            stack.pop()
            try:
                os.rmdir(name, dir_fd=above[0])
            except FileNotFoundError:
                pass
    finally:
        for fd, _, _ in stack:
            if fd >= 0:
                os.close(fd)


def _open_own(dirfd: int | None, name: str | bytes) -> int:
    try:
        return os.open(name, _DIR, dir_fd=dirfd)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=dirfd)
        return os.open(name, _DIR, dir_fd=dirfd)


def _unlink_files(fd: int) -> list[bytes]:
    below = []
    with os.scandir(fd) as listing:
        found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in listing]
    if found and not os.access(b"/proc/self/fd/%d" % fd, os.W_OK | os.X_OK, effective_ids=True):
        os.fchmod(fd, 0o700)
    for name, is_dir in found:
        if is_dir:
            below.append(name)
            continue
        try:
            os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            pass
    return below


def copy_attributes(src: int, dst: int, st: os.stat_result) -> None:
    """Owner, mode, xattrs and times from one open object to another of the same type (not a link)."""
    if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()) or os.geteuid() == 0:
        os.chown(dst, st.st_uid, st.st_gid)
    for attribute, value in xattr.read_all(src, b"").items():
        xattr.setx(dst, b"", attribute, value)
    os.chmod(dst, stat.S_IMODE(st.st_mode))
    os.utime(dst, ns=(st.st_atime_ns, st.st_mtime_ns))


def copy_tree(source: str | bytes, target: str | bytes) -> None:
    """Copy the content of a directory into another, empty one, with the directory's attributes.

    Args:
        source: a directory; links in it are copied, not followed.
        target: an existing, empty directory.

    Raises:
        OSError: an object could not be copied in full.
    """
    links: dict[int, int] = {}  # an inode with several names -> O_PATH descriptor of its copy
    stack: list[tuple[int, int, list[bytes], bytes]] = []
    try:
        src = os.open(source, _DIR)
        stack.append((src, -1, [], b""))  # an open descriptor is on the stack at once, so that it is closed in any case
        dst = os.open(target, _DIR)
        stack[0] = (src, dst, [], b"")
        stack[0][2].extend(_copy_files(src, dst, links))
        while True:
            src, dst, below = stack[-1][:3]
            if below:
                child = below.pop()
                deeper = os.open(child, _DIR, dir_fd=src)
                stack.append((deeper, -1, [], child))
                os.mkdir(child, 0o700, dir_fd=dst)
                copy = os.open(child, _DIR, dir_fd=dst)
                stack[-1] = (deeper, copy, [], child)
                stack[-1][2].extend(_copy_files(deeper, copy, links))
                if len(stack) > KEEP_OPEN and stack[-KEEP_OPEN][0] >= 0:
                    old = stack[-KEEP_OPEN]
                    os.close(old[0])
                    os.close(old[1])
                    stack[-KEEP_OPEN] = (-1, -1, *old[2:])
                continue
            copy_attributes(src, dst, os.fstat(src))
            if len(stack) == 1:
                return
            above = stack[-2]
            if above[0] < 0:
                stack[-2] = (os.open("..", _DIR, dir_fd=src), os.open("..", _DIR, dir_fd=dst), *above[2:])
            os.close(src)
            os.close(dst)
            stack.pop()
    finally:
        for src, dst, _, _ in stack:
            for fd in (src, dst):
                if fd >= 0:
                    os.close(fd)
        for fd in links.values():
            os.close(fd)


def _copy_files(src: int, dst: int, links: dict[int, int]) -> list[bytes]:
    below = []
    with os.scandir(src) as listing:
        found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in listing]
    for name, is_dir in found:
        if is_dir:
            below.append(name)
            continue
        st = os.stat(name, dir_fd=src, follow_symlinks=False)
        if st.st_nlink > 1 and st.st_ino in links:
            os.link(files_path(links[st.st_ino]), name, dst_dir_fd=dst, follow_symlinks=True)
            continue
        _copy_file(src, dst, name, st)
        if st.st_nlink > 1:
            links[st.st_ino] = os.open(name, files.O_PATH_ANY, dir_fd=dst)
    return below


def files_path(fd: int) -> bytes:
    """The path under /proc by which a descriptor's object can be linked."""
    return b"/proc/self/fd/%d" % fd


def _copy_file(src: int, dst: int, name: bytes, st: os.stat_result) -> None:
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFREG:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=src)
        try:
            copy = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dst)
            try:
                files.copy_data(source, copy, st.st_size)
                copy_attributes(source, copy, st)
            finally:
                os.close(copy)
        finally:
            os.close(source)
        return
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=src), name, dir_fd=dst)
    else:
        os.mknod(name, kind | 0o600, st.st_rdev, dir_fd=dst)
    if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()) or os.geteuid() == 0:
        os.chown(name, st.st_uid, st.st_gid, dir_fd=dst, follow_symlinks=False)
    for attribute, value in xattr.read_all(src, name).items():
        xattr.setx(dst, name, attribute, value)
    if kind != stat.S_IFLNK:
        os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=dst)
    os.utime(name, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=dst, follow_symlinks=False)


def walk_all(path: str | bytes) -> Iterator[os.stat_result]:
    """The stat of everything below a directory, in no order; no link is followed, depth costs memory only."""
    stack: list[tuple[int, list[bytes]]] = []
    try:
        fd = os.open(path, _DIR)
        stack.append((fd, []))
        yield from _stats(fd, stack[-1][1])
        while stack:
            fd, below = stack[-1]
            if below:
                child = os.open(below.pop(), _DIR, dir_fd=fd)
                stack.append((child, []))
                if len(stack) > KEEP_OPEN and stack[-KEEP_OPEN][0] >= 0:
                    os.close(stack[-KEEP_OPEN][0])
                    stack[-KEEP_OPEN] = (-1, stack[-KEEP_OPEN][1])
                yield from _stats(child, stack[-1][1])
                continue
            if len(stack) > 1 and stack[-2][0] < 0:
                stack[-2] = (os.open("..", _DIR, dir_fd=fd), stack[-2][1])
            os.close(fd)
            stack.pop()
    finally:
        for fd, _ in stack:
            if fd >= 0:
                os.close(fd)


def _stats(fd: int, below: list[bytes]) -> Iterator[os.stat_result]:
    """Stat each name of a directory; names of sub-directories go to ``below``."""
    for name in os.listdir(fd):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            below.append(os.fsencode(name))
        yield st


def sync_tree(path: str | bytes) -> None:
    """Bring everything below a path to the disk (syncfs(2): the whole file system)."""
    fd = os.open(path, _DIR)
    try:
        files.syncfs(fd)
    finally:
        os.close(fd)


@contextmanager
def syncing(path: str | bytes) -> Iterator[None]:
    """All that is below a path when the block begins is on the disk when it ends; the disk works while the block runs.

    Raises:
        OSError: of syncfs(2), behind the block.
    """
    failed: list[OSError] = []

    def run() -> None:
        try:
            sync_tree(path)
        except OSError as error:
            failed.append(error)

    thread = Thread(run, "cowfs-sync")
    started = thread.start()
    try:
        yield
    finally:
        if started:
            thread.join()
    if not started:
        run()
    if failed:
        raise failed[0]
