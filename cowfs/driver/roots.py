"""The root directory of a delta layer: as its parent's, unless somebody changes it."""

from __future__ import annotations

import os

from cowfs.driver.interface import Driver
from cowfs.sys import trees, xattr

__all__ = ["copy_root"]


def copy_root(driver: Driver, source: str, target: str) -> None:
    """Give the root of a layer the attributes of another one's, without the marks that the other has as a layer.

    Args:
        source, target: ids of layers.
    """
    src = os.open(driver.tree(source), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        dst = os.open(driver.tree(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            trees.copy_attributes(src, dst, os.fstat(src))
            for own in (driver.form.origin, driver.form.impure, driver.form.opaque, driver.form.row):
                if xattr.try_get(dst, b"", own) is not None:
                    xattr.remove(dst, b"", own)
        finally:
            os.close(dst)
    finally:
        os.close(src)
