"""Container images in and out: OCI layouts, docker-archives, root filesystem tars, directories.

:mod:`digests` (no files), :mod:`files` (a directory or a tar, opened by name), :mod:`layouts`
(documents into descriptions), :mod:`reading` (what is this source?), :mod:`writing`. What a layer's tar says is :mod:`cowfs.archive`'s business.
"""

from cowfs.images.description import Image, Layer
from cowfs.images.digests import chain_ids, check_digest, diff_ids_of, digest_of, make_config
from cowfs.images.reading import ImageSource, open_image
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
