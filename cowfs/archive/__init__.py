"""Layer archives in and out: OCI layer tars as a library, with no tar program and no ``tarfile``.

Reading order: :mod:`header` (the codec, no I/O), :mod:`reader` (members of a stream), :mod:`names`
(what a name means), :mod:`extract` with :mod:`dirs` and :mod:`attributes` (members become files),
:mod:`headerlog` (byte for byte reproduction), :mod:`export` with :mod:`walk` and :mod:`members` (a layer
or a tree becomes a tar), :mod:`compress` and :mod:`decode` (threads, digests, gzip and zstd).
"""

from cowfs._lazy import exports
from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.archive.apply import apply_layer as apply_layer
    from cowfs.archive.export import (
        export_changes as export_changes,
        export_layer as export_layer,
        export_tree as export_tree,
    )
    from cowfs.archive.headerlog import member_names as member_names, read_trailer as read_trailer, rebuild as rebuild
    from cowfs.archive.options import (
        FORM as FORM,
        Applied as Applied,
        ApplyOptions as ApplyOptions,
        Budget as Budget,
        Exported as Exported,
        LowerStat as LowerStat,
        Tree as Tree,
    )
    from cowfs.union.tree import DirTree as DirTree

_EXPORTS = {
    "Applied": "cowfs.archive.options",
    "ApplyOptions": "cowfs.archive.options",
    "Budget": "cowfs.archive.options",
    "DirTree": "cowfs.union.tree",
    "Exported": "cowfs.archive.options",
    "FORM": "cowfs.archive.options",
    "LowerStat": "cowfs.archive.options",
    "Tree": "cowfs.archive.options",
    "apply_layer": "cowfs.archive.apply",
    "export_changes": "cowfs.archive.export",
    "export_layer": "cowfs.archive.export",
    "export_tree": "cowfs.archive.export",
    "member_names": "cowfs.archive.headerlog",
    "read_trailer": "cowfs.archive.headerlog",
    "rebuild": "cowfs.archive.headerlog",
}

__all__ = sorted(_EXPORTS)

__getattr__ = exports(__name__, _EXPORTS)
