"""The exact changes of an upper layer against the tree beneath it.

Strategy: two read-only views, one of the lowers, one of upper and lowers together, are gone down side by side. The
views know every encoding of "deleted", "moved" and "only its attributes", so this module needs none. The cost is that
of the upper: while a directory merely merges with the same one beneath it, only the names that the upper holds are
looked at. Below a directory that the upper made opaque or moved, all names of both sides are.

Rules (those of :func:`cowfs.index.compare.compare`, which answers the same question from the index):

1. One change a path, in path order, a directory before what is in it.
2. A deleted directory is one change. An added one is a change for itself and for everything in it. A directory that
   became something else, or the reverse, is one change of type; what was in it is not listed as deleted.
3. A file counts as changed in content only when its bytes differ: those of equal size are compared, unless both views
   say that the data is the same inode (a chmod that copied no data).
4. A rename is a deletion and an addition, since a layer has no other record of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence

from cowfs._typed import TYPE_CHECKING, Any
from cowfs.errors import CowfsError, InvalidArgument, NotFound
from cowfs.index.compare import different_attributes
from cowfs.model import TYPE_NAMES, Change

if TYPE_CHECKING:
    from cowfs.row.view import View
    from cowfs.union import Options
    from cowfs.union.node import Dir, Node

__all__ = ["changes", "view_options"]

_CHUNK = 1 << 20


def view_options(details: Mapping[str, Any]) -> Options:
    """The options that decide about the content of a tree, from the mapping of a mount's details or request."""
    from cowfs.union import Options

    def ranges(name: str) -> tuple[tuple[int, int, int], ...]:
        return tuple((int(a), int(b), int(c)) for a, b, c in details.get(name) or ())

    return Options(
        readonly=True,
        uid_map=ranges("uid_map"),
        gid_map=ranges("gid_map"),
        override_xattr=str(details.get("override_xattr") or "").encode() or None,
        noxattrs=bool(details.get("noxattrs")),
        dotwh=bool(details.get("dotwh")),
    )


def changes(upper: str, layers: Sequence[str], *, options: Options | None = None) -> Iterator[Change]:
    """The changes of ``upper``: additions, changes and deletions.

    Args:
        upper: the writable layer's directory; may be mounted meanwhile, then changes made during the walk may be missed.
        layers: the directories beneath it, bottom first.
        options: as the tree is mounted with (id ranges, override xattr); default: plain.

    Raises:
        NotFound, InvalidArgument: a directory that is missing or unfit (at once, not at the first change).
        CowfsError: an I/O error during the walk.
    """
    from cowfs.row.view import View
    from cowfs.union import Options

    if isinstance(layers, str | bytes | os.PathLike):
        raise InvalidArgument(f"layers are a sequence of directories, not one path: {layers!r}", remedy="[path]")
    options = options or Options(readonly=True)
    below = list(reversed(layers))
    for path in (upper, *below):
        if not os.path.isdir(path):
            raise (
                NotFound(f"no such directory: {path}")
                if not os.path.exists(path)
                else InvalidArgument(f"not a directory: {path}")
            )
    try:
        lower = View(below, options=options)
        try:
            merged = View([upper, *below], options=options)
        except BaseException:
            lower.close()
            raise
    except OSError as error:
        raise CowfsError(f"cannot read the layers: {error.filename or upper}: {error.strerror}") from None
    return _Walk(lower, merged, dotwh=options.dotwh).run()


class _Walk:
    """One comparison. Owner of both views; closes them at its end."""

    def __init__(self, lower: View, merged: View, *, dotwh: bool) -> None:
        self.lower = lower
        self.merged = merged
        self.upper_layer = merged.layers[-1]
        self.dotwh = dotwh

    def run(self) -> Iterator[Change]:
        try:
            yield from self._run()
        except OSError as error:
            name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
            raise CowfsError(f"diff stopped: {f'{name}: ' if name else ''}{error.strerror}") from None
        finally:
            self.lower.close()
            self.merged.close()

    def _run(self) -> Iterator[Change]:
        from cowfs.union.node import Dir

        what = self._differences(self.lower.root, self.merged.root)
        if what:
            yield Change(path=b"", kind="changed", type="dir", what=what)
        stack = [self._below(b"", self.lower.root, self.merged.root, True)]
        while stack:
            step = next(stack[-1], None)
            if step is None:
                stack.pop()
                continue
            path, before, after, plain = step
            if after is None:
                if before is not None:
                    yield self._change(self.lower, path, "deleted", before)
                continue
            if before is None:
                yield self._change(self.merged, path, "added", after)
            else:
                what = self._differences(before, after)
                if what:
                    yield self._change(self.merged, path, "changed", after, what)
            if isinstance(after, Dir):
                stack.append(self._below(path, before if isinstance(before, Dir) else None, after, plain))

    def _below(
        self, path: bytes, before: Dir | None, after: Dir, plain: bool
    ) -> Iterator[tuple[bytes, Node | None, Node | None, bool]]:
        """Names to look at in a directory: (path, node beneath, node now, whether both have the same lower directory)."""
        plain = plain and before is not None and self._merges(after)
        names = self._upper_names(after) if plain else set(self._names(self.merged, after))
        if not plain and before is not None:
            names |= set(self._names(self.lower, before))
        base = path + b"/" if path else b""
        for name in sorted(names):
            old = self.lower.child(before, name) if before is not None else None
            new = self.merged.child(after, name)
            yield base + name, old, new, plain

    def _merges(self, after: Dir) -> bool:
        """Whether the upper has this directory and merges it with the same one beneath."""
        source = after.sources[0]
        if source.layer is not self.upper_layer:
            return False
        from cowfs.sys import xattr

        form, fd = self.merged.form, source.open()
        if xattr.try_get(fd, b"", form.opaque) == b"y" or xattr.try_get(fd, b"", form.redirect) is not None:
            return False
        return not (self.dotwh and b".wh..wh..opq" in self._raw_names(after))

    def _raw_names(self, after: Dir) -> list[bytes]:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=after.sources[0].open())
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)

    def _upper_names(self, after: Dir) -> set[bytes]:
        names = self._raw_names(after)
        if self.dotwh:
            names = [name.removeprefix(b".wh.") for name in names]
        return set(names)

    @staticmethod
    def _names(view: View, directory: Dir) -> Iterator[bytes]:
        return iter(list(view.load(directory) if directory.children is None else directory.children))

    # -- one path --------------------------------------------------------------------------------------------------

    @staticmethod
    def _change(view: View, path: bytes, kind: str, node: Node, what: frozenset[str] = frozenset()) -> Change:
        from cowfs.union.attr import unpack

        attr = unpack(view.attr(node))
        type_ = TYPE_NAMES[stat.S_IFMT(attr.mode)]
        return Change(path=path, kind=kind, type=type_, size=attr.size if type_ == "file" else 0, what=what)

    def _differences(self, before: Node, after: Node) -> frozenset[str]:
        from cowfs.union.attr import unpack

        a, b = unpack(self.lower.attr(before)), unpack(self.merged.attr(after))
        what = different_attributes(a, b)
        if _xattrs(self.lower, before) != _xattrs(self.merged, after):
            what.add("xattrs")
        if "type" not in what:
            if stat.S_ISREG(a.mode):
                differs = a.size != b.size or not self._same_bytes(before, after, a.size)
            elif stat.S_ISLNK(a.mode):
                differs = self.lower.readlink(before) != self.merged.readlink(after)
            else:
                differs = a.rdev != b.rdev
            if differs:
                what.add("content")
        return frozenset(what)

    def _same_bytes(self, before: Node, after: Node, size: int) -> bool:
        if not size or _data_identity(self.lower, before) == _data_identity(self.merged, after):
            return True
        one, two = memoryview(bytearray(_CHUNK)), memoryview(bytearray(_CHUNK))
        offset = 0
        while offset < size:
            count = self.lower.pread(before, offset, one)
            if count <= 0 or self.merged.pread(after, offset, two) != count or one[:count] != two[:count]:
                return False
            offset += count
        return True


def _xattrs(view: View, node: Node) -> dict[bytes, bytes]:
    try:
        return {name: view.getxattr(node, name) for name in view.listxattr(node)}
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENODATA, errno.EPERM, errno.EACCES):
            return {}
        raise


def _data_identity(view: View, node: Node) -> object:
    """The inode that holds a file's data; unique where there is no single one."""
    try:
        status = os.fstat(view.data_fd(node, False))
    except OSError:
        return object()
    return (status.st_dev, status.st_ino)
