"""EROFS images: a tree's metadata (and maps of its data) in a file that the kernel mounts.

Reading order: :mod:`layout` (the structures on disk), :mod:`tree` (the records that an image is made of), :mod:`writer`,
:mod:`reader` (for checks and tests). Source of the format: Linux, ``fs/erofs/erofs_fs.h`` and
``Documentation/filesystems/erofs.rst``.
"""
