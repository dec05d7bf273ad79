"""The description of an image, the same for every kind of source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cowfs._typed import BinaryIO
from cowfs.images.digests import chain_ids, check_digest

__all__ = ["LAYER_TAR", "Image", "Layer"]

LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of an image.

    Attributes:
        diff_id: digest of the uncompressed tar; None if the source has none (a root filesystem).
        digest: of the stream that :meth:`open` gives; None if the source has none. size: bytes of that stream, None
            where unknown. media_type: as the manifest has it.
        opener: opens the stream; use :meth:`open`.
        whole: a tree of its own, in which names that begin with ``.wh.`` are ordinary.
    """

    diff_id: str | None
    digest: str | None
    size: int | None
    media_type: str
    opener: Callable[[], BinaryIO] = field(repr=False)
    whole: bool = False

    def open(self) -> BinaryIO:
        """The layer's stream, compressed as it is stored. The caller closes it.

        A root filesystem that came through a pipe can be opened once only (FailedPrecondition).
        """
        return self.opener()


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image of a source.

    Attributes:
        config: the configuration document as it is stored. config_digest: of it, the image's id.
        layers: bottom first. tags: names the source gives it, maybe none.
        platform: ``os/architecture``, or ``os/architecture/variant``.
    """

    config: bytes = field(repr=False)
    config_digest: str
    layers: tuple[Layer, ...]
    tags: tuple[str, ...]
    platform: str

    @property
    def chain(self) -> list[str]:
        """The chain id of each layer, bottom first; raises InvalidArgument where a diff id is not known yet."""
        return chain_ids([check_digest(layer.diff_id, "diff id") for layer in self.layers])
