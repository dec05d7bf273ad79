"""Names ``.wh.NAME`` in an upper layer, as an unpacked archive left them."""

from __future__ import annotations

import os

from cowfs._typed import TYPE_CHECKING
from cowfs.format import whiteout
from cowfs.sys import xattr
from cowfs.union.layers import Source
from cowfs.union.node import DT_DIR

if TYPE_CHECKING:
    from cowfs.union.core import Core

__all__ = ["own_whiteouts"]


def own_whiteouts(view: Core, up: Source, names: dict[bytes, int], deleted: set[bytes]) -> None:
    """Turn the ``.wh.`` names of an upper directory, as an unpacked archive left them, into the layer form's own.

    A name that the same layer also has becomes opaque if it is a directory; other objects hide the lower ones by themselves.
    """
    work, fd = view.stack.workdir, up.open()
    assert work is not None
    space = view.space
    for name in list(deleted):
        mark = whiteout.WH_PREFIX + name
        if not whiteout.exists(fd, mark):
            continue
        if space is not None:
            space.unhid((mark,))
        if name not in names:
            work.put_whiteout(fd, name)
            if space is not None:
                space.hid(up, name)
        else:
            deleted.discard(name)
            if names[name] == DT_DIR:
                xattr.setx(fd, name, view.form.opaque, b"y")
        os.unlink(mark, dir_fd=fd)
    if whiteout.exists(fd, whiteout.WH_OPAQUE):
        xattr.setx(fd, b"", view.form.opaque, b"y")
        os.unlink(whiteout.WH_OPAQUE, dir_fd=fd)
        if space is not None:
            space.unhid((whiteout.WH_OPAQUE,))
