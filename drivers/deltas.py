"""The common part of backends with delta layers in the overlay format: probing a host, and making an empty layer."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowfs.driver.interface import Driver
from cowfs.driver.roots import copy_root
from cowfs.format.whiteout import Form
from cowfs.sys import files, locks, xattr

__all__ = ["create", "why_not"]


def why_not(root: str, form: Form) -> tuple[str, str]:
    """(the file system's name, the reason why it cannot hold layers of this form; "" if it can)."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="new-probe-", dir=root) as place:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            locks.lock(fd, wait=True)  # so that no sweep of another process removes it
            name = files.fs_name(fd)
            try:
                xattr.setx(fd, b"", form.opaque, b"y")
            except OSError as error:
                return name, f"{name} takes no {form.name}.* xattrs: {error.strerror}"
            try:
                os.mknod("whiteout", 0o020000, 0, dir_fd=fd)
            except OSError as error:
                return name, f"no whiteouts can be made on {name}: {error.strerror}"
        finally:
            os.close(fd)
    return name, ""


def create(driver: Driver, id: str, parents: Sequence[str]) -> None:
    """Empty directories, the root's attributes from the parent."""
    directory, tree = driver.directory(id), driver.tree(id)
    os.mkdir(tree, 0o755)
    os.mkdir(driver.work(id), 0o700)
    os.chmod(tree, 0o755)
    if parents:
        copy_root(driver, parents[0], id)
    if driver.fsync:
        for path in (tree, directory):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
