"""Layer archives in and out: OCI layer tars as a library, with no tar program and no ``tarfile``.

Reading order: :mod:`header` (the codec, no I/O), :mod:`reader` (members of a stream), :mod:`names`
(what a name means), :mod:`extract` with :mod:`dirs` and :mod:`attributes` (members become files),
:mod:`headerlog` (byte for byte reproduction), :mod:`export` with :mod:`walk` and :mod:`members` (a layer
or a tree becomes a tar), :mod:`compress` and :mod:`decode` (threads, digests, gzip and zstd).
"""

from cowfs.archive.apply import apply_layer
from cowfs.archive.export import export_changes, export_layer, export_tree
from cowfs.archive.headerlog import read_trailer, rebuild
from cowfs.archive.options import Applied, ApplyOptions, Exported, LowerStat, Tree
from cowfs.archive.trees import DirTree

__all__ = [
    "Applied",
    "ApplyOptions",
    "DirTree",
    "Exported",
    "LowerStat",
    "Tree",
    "apply_layer",
    "export_changes",
    "export_layer",
    "export_tree",
    "read_trailer",
    "rebuild",
]
