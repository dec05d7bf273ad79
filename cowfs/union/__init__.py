"""The merged view of a stack of layers; it speaks no FUSE. Start at :mod:`cowfs.union.view`."""

from cowfs._lazy import exports
from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.union.attr import (
        ATTR as ATTR,
        Attr as Attr,
        decode_dev as decode_dev,
        encode_dev as encode_dev,
        unpack as attr_of,  # noqa: F401
    )
    from cowfs.union.copyup import Stage as Stage
    from cowfs.union.node import Dir as Dir, Node as Node
    from cowfs.union.options import Options as Options
    from cowfs.union.view import View as View

_EXPORTS = {
    "ATTR": "cowfs.union.attr",
    "Attr": "cowfs.union.attr",
    "Dir": "cowfs.union.node",
    "Node": "cowfs.union.node",
    "Options": "cowfs.union.options",
    "Stage": "cowfs.union.copyup",
    "View": "cowfs.union.view",
    "attr_of": "cowfs.union.attr:unpack",
    "decode_dev": "cowfs.union.attr",
    "encode_dev": "cowfs.union.attr",
}

__all__ = sorted(_EXPORTS)

__getattr__ = exports(__name__, _EXPORTS)
