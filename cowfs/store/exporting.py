"""Snapshots out: images, whole trees, layers, and the changes between any two."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cowfs import archive, images
from cowfs._typed import TYPE_CHECKING, BinaryIO
from cowfs.errors import Corrupt, InvalidArgument, NotFound
from cowfs.index import compare
from cowfs.index.database import Index, Row
from cowfs.index.directory import Pending
from cowfs.model import Change, Kind
from cowfs.store import layers
from cowfs.store.applying import Progress, counter
from cowfs.store.archived import HEADERS
from cowfs.store.reserve import FULL
from cowfs.sys.atomic import replacing
from cowfs.sys.regular import open_regular

if TYPE_CHECKING:
    from cowfs.store.archived import Archived
    from cowfs.store.context import Context
    from cowfs.store.naming import Naming
    from cowfs.store.reading import Reading
    from cowfs.store.scanning import Scanning

__all__ = ["FORMATS", "NO_LAYER", "Exporting"]

FORMATS = ("oci", "docker", "tar", "layer")

NO_LAYER = images.digest_of(b"")
"""The diff id of an archive of no bytes: what an image without layers is kept as."""


class Exporting:
    """Exports of snapshots. A layer that came from an archive is written as that archive."""

    def __init__(
        self, context: Context, reading: Reading, scanning: Scanning, archived: Archived, naming: Naming
    ) -> None:
        self.context = context
        self._reading = reading
        self._scanning = scanning
        self._archived = archived
        self._naming = naming

    def export(
        self,
        name: str,
        target: str | os.PathLike[str] | BinaryIO,
        *,
        format: str = "oci",
        compression: str | None = None,
        directory: bool = False,
        progress: Progress | None = None,
    ) -> str:
        """As :meth:`cowfs.Store.export`."""
        row = self._reading.resolve(name)
        with unless_removed(self.context.index, row):
            return self._export(name, row, target, format, compression, directory, progress)

    def _export(
        self,
        name: str,
        row: Row,
        target: str | os.PathLike[str] | BinaryIO,
        format: str,
        compression: str | None,
        directory: bool,
        progress: Progress | None,
    ) -> str:
        if format not in FORMATS:
            raise InvalidArgument(f"no format {format!r}", remedy=f"one of {', '.join(FORMATS)}")
        if isinstance(target, (str, os.PathLike)):
            _check_target(os.path.abspath(target), directory=directory)
            if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
                with open(target, "wb") as pipe:  # a device or a pipe is written to, not replaced
                    return self._export(name, row, pipe, format, compression, directory, progress)
        if format in ("tar", "layer"):
            write = self._write_tar if format == "tar" else self.write_layer
            packed = compression or "none"
            if isinstance(target, (str, os.PathLike)):
                with replacing(os.fspath(target), mode=0o644, durable=False) as out:
                    return write(row, out, packed, progress)
            return write(row, target, packed, progress)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(
                f"{name!r} is not committed, an image is made of committed ones", remedy="commit it first"
            )
        found = self._images(name, row)
        where = target if not isinstance(target, os.PathLike) else os.fspath(target)
        spool = self._spool(row)
        if format == "oci":
            images.write_oci(where, found, directory=directory, compression=compression or "gzip", spool_dir=spool)
        else:
            images.write_docker(where, found, spool_dir=spool)
        return row.name

    def _spool(self, row: Row) -> str | None:
        """The directory for a layer that waits for its digest: in the store; None (the host's temporary one) if that
        has no room."""
        host = os.statvfs(self.context.root)
        used = [self.context.index.by_num(num).usage for num, _ in self.context.index.chain(row.num)]
        most = max((usage.bytes for usage in used if usage is not None), default=0)
        return self.context.index.spool if most <= host.f_bavail * host.f_frsize else None

    def image(self, name: str) -> images.OutImage:
        """As :meth:`cowfs.Store.image`."""
        row = self._reading.resolve(name)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(
                f"{name!r} is not committed, an image is made of committed ones", remedy="commit it first"
            )
        return self._images(name, row)[0]

    def _images(self, name: str, row: Row) -> list[images.OutImage]:
        """The image of a tag; for a snapshot's own name its images, one for each configuration."""
        chain = [self.context.index.by_num(num) for num, _ in reversed(self.context.index.chain(row.num))]
        diff_ids = self.diff_ids(row)
        if self.context.index.tag(name) is not None:
            return [self._image(chain, diff_ids, self._naming.config(name), [name])]
        tags: dict[str, list[str]] = {}
        for tag in self.context.index.tags_of(row.num):
            tags.setdefault(self._naming.config(tag.name), []).append(tag.name)
        if not tags:
            tags[self._naming.config(name)] = []
        return [self._image(chain, diff_ids, config, names) for config, names in tags.items()]

    def _image(self, chain: list[Row], diff_ids: list[str], config: str, tags: list[str]) -> images.OutImage:
        base = config.encode() if config else None
        listed = images.diff_ids_of(base) if base is not None else None
        if listed != diff_ids and listed is not None and NO_LAYER not in listed:
            # an image without layers is kept as an empty snapshot, which is no layer of derived images
            pairs = [pair for pair in zip(chain, diff_ids, strict=True) if pair[1] != NO_LAYER]
            chain, diff_ids = [each for each, _ in pairs], [diff_id for _, diff_id in pairs]
        document = base if base is not None and listed == diff_ids else None

        def writer(each: Row) -> Callable[[BinaryIO, str], str]:
            return lambda out, compression: self.write_layer(each, out, compression, None)

        outs = [
            images.OutLayer(diff_id=diff_id, write=writer(each)) for each, diff_id in zip(chain, diff_ids, strict=True)
        ]
        if document is None:
            document = images.make_config(diff_ids, base, kept=self._layers_of(chain, config))
        return images.OutImage(config=document, layers=outs, tags=tags)

    def _layers_of(self, chain: list[Row], config: str) -> int:
        """The number of layers of a chain, from the bottom, that are those of a configuration's image."""
        for count, row in enumerate(chain):
            if self.context.index.config_of(row.num) == config:
                return count  # the first that was made from it
        for count, row in enumerate(chain):
            if any(tag.config == config for tag in self.context.index.tags_of(row.num)):
                return count + 1
        return len(chain)

    def diff_ids(self, row: Row) -> list[str]:
        """Diff ids of a chain, bottom first; unknown ones are found by a dry export and kept."""
        found = []
        for num, _ in reversed(self.context.index.chain(row.num)):
            each = self.context.index.by_num(num)
            diff_id = each.diff_id
            if diff_id is None or not (
                self._archived.is_archived(each) or self.context.index.diff_form(num) == archive.FORM
            ):
                with open(os.devnull, "wb") as nowhere:
                    diff_id = self.write_layer(each, nowhere, "none", None)
                chain_id = self._archived.chain_id(each.parent, diff_id)
                try:
                    with self.context.index.write() as change:
                        change.set_archive(num, diff_id, chain_id, form=archive.FORM)
                except OSError as error:
                    if error.errno not in {errno.EROFS, *FULL}:
                        raise  # a read-only store finds it anew each time
            found.append(diff_id)
        return found

    def _write_tar(self, row: Row, out: BinaryIO, compression: str, progress: Progress | None) -> str:
        pending = Pending(self.context.index)
        tree = self._scanning.content(self._scanning.tree(row, pending), pending)
        return archive.export_tree(tree, out, compression=compression, progress=counter(progress, row.name)).diff_id

    def write_layer(self, row: Row, out: BinaryIO, compression: str, progress: Progress | None) -> str:
        """Write a layer's changes as an OCI layer tar: the very archive that it came from, if it still matches.

        Returns:
            Its diff id.
        """
        directory = self.context.driver.directory(row.id)
        if row.diff_id is not None and self._archived.is_archived(row):
            with (
                self.context.driver.open_tree(row.id) as fd,
                open(open_regular(f"{directory}/{HEADERS}"), "rb") as log,
            ):
                archive.rebuild(log, fd, out, compression=compression)
            return row.diff_id
        return self._export_changes(row, None, out, compression, progress)

    def _export_changes(
        self, after: Row, before: Row | None, out: BinaryIO, compression: str, progress: Progress | None
    ) -> str:
        """A layer tar of the changes since ``before`` (default: the parent), the same bytes for the same snapshots.

        A file with several names is in it under all of them, so that no link leads out of the archive: a tool that
        unpacks each layer separately (as overlay storage does) has no other place to link to.
        """
        pending = Pending(self.context.index)
        if before is None and after.parent is not None:
            before = self.context.index.by_num(after.parent)
        tree = self._scanning.content(self._scanning.tree(after, pending), pending)
        old = self._scanning.tree(before, pending) if before is not None else None
        same = layers.SameData(self.context.driver, self.context.index)
        linked = compare.changes_with_links(pending, old, self._scanning.tree(after, pending), same)
        changes: Iterator[Change] = (change for change, _ in linked)
        if before is None:
            changes = itertools.chain(_root_of(tree), changes)
        return archive.export_changes(
            tree, changes, out, compression=compression, progress=counter(progress, after.name)
        ).diff_id

    def export_diff(
        self, a: str, b: str, target: BinaryIO, *, compression: str = "none", progress: Progress | None = None
    ) -> str:
        """As :meth:`cowfs.Store.export_diff`."""
        before, after = self._reading.resolve(a), self._reading.resolve(b)
        with unless_removed(self.context.index, before), unless_removed(self.context.index, after):
            return self._export_changes(after, before, target, compression, progress)


@contextmanager
def unless_removed(index: Index, row: Row) -> Iterator[None]:
    """Tell a failure to read a snapshot that another process removed, or squashed, meanwhile for what it is.

    Raises:
        NotFound: it is gone.
    """
    try:
        yield
    except (OSError, Corrupt, LookupError) as error:
        now = index.find_id(row.id)
        if now is not None and now.num == row.num:
            raise
        raise NotFound(f"{row.name!r} was removed meanwhile by another process", remedy="try again") from error


def _root_of(tree: archive.Tree) -> Iterator[Change]:
    """The root of a layer without a parent, if it differs from an empty layer's: no comparison names it."""
    st = tree.stat(b"")
    if st is not None and ((st.mode, st.uid, st.gid) != (0o40755, 0, 0) or tree.xattrs(b"")):
        yield Change(path=b"", kind="changed", type="dir")


def _check_target(path: str, *, directory: bool) -> None:
    """Check early that a file can be made there.

    Raises:
        NotFound, InvalidArgument: it cannot.
    """
    if not os.path.isdir(os.path.dirname(path)):
        raise NotFound(f"no such directory: {os.path.dirname(path)}", remedy="make it, or choose another place")
    if os.path.isdir(path) and not directory:
        raise InvalidArgument(f"{path} is a directory", remedy=f"name a file, as in {os.path.join(path, 'image.tar')}")
