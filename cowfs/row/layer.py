"""A row layer as a whole, without a view: sealing it, checking it, finding its redirect files.

Every redirect file has its map and every map its file. A file without its map has lost data: that is damage. A map
without its file is garbage, left by a process that was killed between two steps.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from cowfs.format.redirect import ROOT_MARK, Ref, is_marked
from cowfs.format.whiteout import Form
from cowfs.row import map as row_map
from cowfs.sys import files, xattr
from cowfs.union.layers import MAP_DIR

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_maps(root_fd: int) -> int:
    """Open the directory of a layer's maps. It lies beside the layer's root, so it must have the same owner.

    In a directory where other users may write, like /tmp, any user could have made it; beside the root of a mounted
    image it would be another directory.

    Raises:
        OSError: ENOENT; EIO for a symbolic link or anything else that is no directory; EPERM for one that is another user's,
            that others may write in, or that is on another file system.
    """
    try:
        fd = os.open(MAP_DIR, _DIR, dir_fd=root_fd)
    except NotADirectoryError:  # O_NOFOLLOW and O_DIRECTORY: a symbolic link, too
        raise OSError(errno.EIO, "not a directory", MAP_DIR) from None
    try:
        st, root, beside = os.fstat(fd), os.fstat(root_fd), os.stat(b"..", dir_fd=root_fd)
        if st.st_dev != root.st_dev or beside.st_dev != root.st_dev:
            raise OSError(errno.EPERM, "the map directory is not the layer's: it is on another file system", MAP_DIR)
        if st.st_uid not in (os.geteuid(), 0, root.st_uid, beside.st_uid):
            raise OSError(errno.EPERM, f"the map directory is not the layer's: it belongs to user {st.st_uid}", MAP_DIR)
        if st.st_mode & 0o022:
            raise OSError(errno.EPERM, "the map directory is not the layer's alone: others may write in it", MAP_DIR)
    except BaseException:
        os.close(fd)
        raise
    return fd


def mark(layer: str | bytes, form: Form) -> None:
    """Make a fresh layer one that may hold redirect files.

    Raises:
        OSError: its file system takes no such xattr.
    """
    root = os.open(layer, _DIR)
    try:
        os.mkdir(MAP_DIR, 0o700, dir_fd=root)
        xattr.setx(root, b"", form.row, ROOT_MARK)
    finally:
        os.close(root)


def seal(layer: str | bytes, *, form: Form, durable: bool = True) -> None:
    """Make the maps of a layer valid for good, after its last write. May be repeated.

    Args:
        layer: its tree's directory.
        durable: bring what is not on the disk there first.

    Raises:
        OSError: EIO for a damaged map.
    """
    root = os.open(layer, _DIR)
    try:
        if not is_marked(root, form):
            return
        maps = open_maps(root)
        try:
            if row_map.seal(maps, (lambda: files.syncfs(root)) if durable else None) and durable:
                os.fsync(maps)
        finally:
            os.close(maps)
    finally:
        os.close(root)


def redirects(layer: str | bytes, form: Form) -> Iterator[tuple[bytes, Ref | OSError]]:
    """(path, reference) of every redirect file of a layer; the error where the reference is damaged."""
    root = os.open(layer, _DIR)
    try:
        if is_marked(root, form):
            yield from _walk(root, b"", form)
    finally:
        os.close(root)


def _walk(fd: int, prefix: bytes, form: Form) -> Iterator[tuple[bytes, Ref | OSError]]:
    pending: list[bytes] = [prefix]
    while pending:
        path = pending.pop()
        here = files.open_beneath(fd, path, _DIR)
        try:
            with os.scandir(here) as found:
                entries = [
                    (os.fsencode(entry.name), entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False))
                    for entry in found
                ]
            for name, is_dir, is_file in entries:
                inner = path + b"/" + name if path else name
                if is_dir:
                    pending.append(inner)
                elif is_file:
                    value = xattr.try_get(here, name, form.row)
                    if value is None:
                        continue
                    try:
                        yield inner, Ref.unpack(value, name)
                    except OSError as error:
                        yield inner, error
        finally:
            os.close(here)


def inspect(layer: str | bytes, form: Form) -> tuple[list[str], list[bytes]]:
    """Check a row layer.

    Returns:
        (damage, one line each; names of maps that belong to no file). Walks the whole layer.
    """
    damage: list[str] = []
    root = os.open(layer, _DIR)
    try:
        if not is_marked(root, form):
            return [], []
        try:
            maps = open_maps(root)
        except FileNotFoundError:
            return [f"the map directory is missing: {os.fsdecode(layer)}/{MAP_DIR.decode()}"], []
        try:
            spare = {os.fsencode(name) for name in os.listdir(maps)}
            for path, ref in _walk(root, b"", form):
                if isinstance(ref, OSError):
                    damage.append(f"{os.fsdecode(path)}: {ref.strerror}")
                    continue
                if not ref.has_map:
                    continue
                spare.discard(ref.map_name)
                try:
                    row_map.read(maps, ref)
                except FileNotFoundError:
                    damage.append(f"{os.fsdecode(path)}: its map {ref.map_name.decode()} is missing")
                except OSError as error:
                    damage.append(f"{os.fsdecode(path)}: {error.strerror}")
        finally:
            os.close(maps)
    finally:
        os.close(root)
    return damage, sorted(spare)


def collect(layer: str | bytes, form: Form) -> int:
    """Remove the maps without a file in an unmounted layer. Returns their number."""
    _, spare = inspect(layer, form)
    if spare:
        root = os.open(layer, _DIR)
        try:
            for name in spare:
                os.unlink(MAP_DIR + b"/" + name, dir_fd=root)
        finally:
            os.close(root)
    return len(spare)
