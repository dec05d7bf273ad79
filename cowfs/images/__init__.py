"""Container images in and out: OCI layouts, docker-archives, root filesystem tars, directories.

:mod:`digests` (no files), :mod:`files` (a directory or a tar, opened by name), :mod:`reading`,
:mod:`writing`. What a layer's tar says is :mod:`cowfs.archive`'s business.
"""

from cowfs.images.digests import chain_ids, check_digest, diff_ids_of, digest_of, make_config
from cowfs.images.reading import Image, ImageSource, Layer, open_image
from cowfs.images.writing import OutImage, OutLayer, write_docker, write_oci

__all__ = [
    "Image",
    "ImageSource",
    "Layer",
    "OutImage",
    "OutLayer",
    "chain_ids",
    "check_digest",
    "diff_ids_of",
    "digest_of",
    "make_config",
    "open_image",
    "write_docker",
    "write_oci",
]
