"""EROFS images: a tree's metadata (and maps of its data) in a file that the kernel mounts.

Reading order: :mod:`layout` (the structures on disk), :mod:`tree` (the records that an image is made of), :mod:`writer`,
:mod:`reader` (for checks and tests). Source of the format: Linux, ``fs/erofs/erofs_fs.h`` and
``Documentation/filesystems/erofs.rst``.
"""

from cowfs._lazy import exports
from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.erofs.reader import Image as Image
    from cowfs.erofs.tree import Chunk as Chunk, Device as Device, Inode as Inode, Map as Map, Source as Source
    from cowfs.erofs.writer import Written as Written, write_image as write_image

_EXPORTS = {
    "Chunk": "cowfs.erofs.tree",
    "Device": "cowfs.erofs.tree",
    "Image": "cowfs.erofs.reader",
    "Inode": "cowfs.erofs.tree",
    "Map": "cowfs.erofs.tree",
    "Source": "cowfs.erofs.tree",
    "Written": "cowfs.erofs.writer",
    "write_image": "cowfs.erofs.writer",
}

__all__ = sorted(_EXPORTS)

__getattr__ = exports(__name__, _EXPORTS)
