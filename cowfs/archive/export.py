"""A layer directory, or a whole tree, becomes a tar: the same bytes for the same tree, anywhere.

Strategy. Three sources, one writer: a layer directory (:mod:`cowfs.archive.walk`), a merged tree, or a
list of changes against one (:mod:`cowfs.archive.members`). Hashing and compressing run on threads of
their own (:mod:`cowfs.archive.compress`).

Source: OCI image-spec ``layer.md`` ("Whiteouts": they come before their siblings).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from cowfs._typed import BinaryIO
from cowfs.archive import header
from cowfs.archive.compress import Packer
from cowfs.archive.members import MemberWriter, Progress, write_object, write_tree
from cowfs.archive.names import WHITEOUT_PREFIX
from cowfs.archive.options import Exported, Tree
from cowfs.archive.walk import LayerWalk
from cowfs.errors import InvalidArgument
from cowfs.format.whiteout import FORMS
from cowfs.model import Change

__all__ = ["export_changes", "export_layer", "export_tree"]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_END = bytes(2 * header.BLOCK)


def _run(
    out: BinaryIO, compression: str, level: int | None, progress: Progress | None, reserved: bool, override: bool,
    body: Callable[[MemberWriter], None],
) -> Exported:  # fmt: skip
    packer = Packer(out, compression, level)
    writer = MemberWriter(packer, progress, reserved=reserved, override=override)
    try:
        body(writer)
        packer.write(_END)
        packer.close()
    except BaseException:
        packer.abandon()
        raise
    if progress is not None:
        progress(packer.size, writer.entries)
    return Exported(
        diff_id=packer.diff_id,
        size=packer.size,
        digest=packer.blob_digest,
        blob_size=packer.blob_size,
        entries=writer.entries,
    )


def export_layer(
    layer: str | bytes | int,
    out: BinaryIO,
    *,
    form: str = "trusted",
    tree: Tree | None = None,
    compression: str = "none",
    level: int | None = None,
    override: bool = False,
    sparse: bool = False,
    reserved: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """Write an OCI layer tar of a layer directory.

    Args:
        layer: the directory, a path or an open descriptor.
        form: ``trusted`` or ``user``: an overlay layer in that form; ``plain``: no whiteouts in it.
        tree: the merged tree with this layer on top; needed where the layer refers to lower ones.
        compression: ``none``, ``gzip`` or ``zstd``; level: its own scale.
        override: take owner, mode and type from ``user.containers.override_stat`` where it is
            set: only for layers applied with ``owners="xattr"`` and nothing else, since whoever may write a
            file may set its attribute.
        sparse: write files that are half holes or more as PAX sparse members (GNU tar, bsdtar and Go read
            them). The bytes then depend on where this host has holes; without it they never do.
        reserved: refuse names that begin with ``.wh.``; without it this is a plain tar, in which they are names.
        progress: called with (uncompressed bytes, members) now and then.

    Raises:
        InvalidArgument: a name that a layer archive cannot hold.
        Unsupported: the layer refers to lower ones and no ``tree`` was given.
        FailedPrecondition: the layer changed while it was read.
    """
    if form != "plain" and form not in FORMS:
        raise InvalidArgument(f"unknown layer form {form!r}", remedy="use trusted, user or plain")
    root = os.open(".", _DIR, dir_fd=layer) if isinstance(layer, int) else os.open(layer, _DIR)
    try:
        walk = LayerWalk(FORMS.get(form), tree, override, sparse)
        return _run(out, compression, level, progress, reserved, override, lambda writer: walk.run(writer, root))
    finally:
        os.close(root)


def export_tree(
    tree: Tree, out: BinaryIO, *, top: bytes = b"", compression: str = "none", level: int | None = None,
    override: bool = False, progress: Progress | None = None,
) -> Exported:  # fmt: skip
    """Write a plain tar of a whole merged tree (a root filesystem, flattened), or of ``top`` in it; as :func:`export_layer`."""
    return _run(out, compression, level, progress, False, override, lambda writer: write_tree(writer, tree, top))


def export_changes(
    tree: Tree, changes: Iterable[Change], out: BinaryIO, *, compression: str = "none", level: int | None = None,
    override: bool = False, progress: Progress | None = None,
) -> Exported:  # fmt: skip
    """Write an OCI layer tar of a list of changes, the new state of each read from ``tree``.

    Args:
        changes: any order; ``deleted`` ones become whiteouts, the others members. A changed
            directory is written as itself only, an added one too: what is in it has changes of its own. A socket has no
            place in an archive; one that took another object's place becomes a whiteout. The directories above each
            change are members, too: a storage that unpacks layers apart from each other has no other source for their
            owner and mode.
    """

    def body(writer: MemberWriter) -> None:
        above: list[bytes] = []  # the directories around the last change, outermost first, all of them written
        for change in sorted(changes, key=lambda change: _order(change.path, _is_gone(change))):
            above = [each for each in above if change.path.startswith(each + b"/")]
            for each in _parents(change.path)[len(above) :]:
                write_object(writer, tree, each)
                above.append(each)
            if change.type == "dir":
                above.append(change.path)
            if _is_gone(change):
                parent, _, name = change.path.rpartition(b"/")
                writer.mark((parent + b"/" if parent else b"") + WHITEOUT_PREFIX + name)
            else:
                write_object(writer, tree, change.path)

    return _run(out, compression, level, progress, True, override, body)


def _parents(path: bytes) -> list[bytes]:
    """The directories around an object, outermost first, without the root."""
    parts = path.split(b"/")
    return [b"/".join(parts[:count]) for count in range(1, len(parts))]


def _is_gone(change: Change) -> bool:
    """Whether an archive has a whiteout for it."""
    return change.kind == "deleted" or (change.kind == "changed" and change.type == "socket")


def _order(path: bytes, deleted: bool) -> list[tuple[bool, bytes]]:
    """Parents before children, whiteouts before siblings, else by bytes."""
    if not path:
        return []
    *parents, name = path.split(b"/")
    return [(True, part) for part in parents] + [(not deleted, name)]
