"""Container images in and out: OCI layouts, docker-archives, root filesystem tars, directories.

:mod:`digests` (no files), :mod:`files` (a directory or a tar, opened by name), :mod:`layouts`
(documents into descriptions), :mod:`platforms` (the choice among several), :mod:`reading` (the kind of a source),
:mod:`writing`. The content of a layer's tar is :mod:`cowfs.archive`'s business.
"""

from cowfs._lazy import exports
from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.images.description import Image as Image, Layer as Layer
    from cowfs.images.digests import (
        chain_ids as chain_ids,
        check_digest as check_digest,
        diff_ids_of as diff_ids_of,
        digest_of as digest_of,
        make_config as make_config,
    )
    from cowfs.images.reading import Form as Form, ImageSource as ImageSource, open_image as open_image
    from cowfs.images.writing import (
        OutImage as OutImage,
        OutLayer as OutLayer,
        write_docker as write_docker,
        write_oci as write_oci,
    )

_EXPORTS = {
    "Form": "cowfs.images.reading",
    "Image": "cowfs.images.description",
    "ImageSource": "cowfs.images.reading",
    "Layer": "cowfs.images.description",
    "OutImage": "cowfs.images.writing",
    "OutLayer": "cowfs.images.writing",
    "chain_ids": "cowfs.images.digests",
    "check_digest": "cowfs.images.digests",
    "diff_ids_of": "cowfs.images.digests",
    "digest_of": "cowfs.images.digests",
    "make_config": "cowfs.images.digests",
    "open_image": "cowfs.images.reading",
    "write_docker": "cowfs.images.writing",
    "write_oci": "cowfs.images.writing",
}

__all__ = sorted(_EXPORTS)

__getattr__ = exports(__name__, _EXPORTS)
