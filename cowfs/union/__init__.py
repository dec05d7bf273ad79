"""The merged view of a stack of layers; it speaks no FUSE. Start at :mod:`cowfs.union.view`."""

from cowfs.union.attr import ATTR, Attr, decode_dev, encode_dev, unpack as attr_of
from cowfs.union.copyup import Stage
from cowfs.union.node import Dir, Node
from cowfs.union.options import Options
from cowfs.union.view import View

__all__ = ["ATTR", "Attr", "Dir", "Node", "Options", "Stage", "View", "attr_of", "decode_dev", "encode_dev"]
