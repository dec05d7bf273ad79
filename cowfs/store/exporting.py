"""Snapshots out: images, whole trees, layers, and the changes between any two."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from cowfs import archive, images
from cowfs.errors import Corrupt, InvalidArgument, NotFound
from cowfs.index import compare
from cowfs.index.database import Row
from cowfs.index.directory import Pending
from cowfs.model import Change, Kind
from cowfs.store import layers
from cowfs.store.applying import HEADERS, ArchiveVerbs, Progress, counter
from cowfs.store.checking import Problem, Report
from cowfs.store.layers import unmark
from cowfs.store.reserve import FULL
from cowfs.sys.atomic import replacing
from cowfs.sys.regular import open_regular

__all__ = ["FORMATS", "NO_LAYER", "ExportVerbs"]

FORMATS = ("oci", "docker", "tar", "layer")
NO_LAYER = images.digest_of(b"")
"""The diff id of an archive of no bytes: what an image without layers is kept as."""


class ExportVerbs(ArchiveVerbs):
    """export."""

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
        """Write a snapshot out.

        Args:
            name: a snapshot or a tag. Active ones only as ``tar`` and ``layer``.
            target: a path, or a stream.
            format: ``oci`` (a layout in a tar), ``docker`` (a docker-archive), ``tar`` (the whole tree) or
                ``layer`` (what it changed against its parent, as an OCI layer tar).
            compression: ``none``, ``gzip`` or ``zstd``; default: gzip for ``oci``, else none.
            directory: of ``oci``: make a layout directory.
            progress: told how much was written.

        Returns:
            The digest of the uncompressed tar (``tar``, ``layer``) or the name of the top snapshot.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: no such format, or something that it cannot express.
            FailedPrecondition: an active snapshot as an image.
        """
        row = self.resolve(name)
        if format not in FORMATS:
            raise InvalidArgument(f"no format {format!r}", remedy=f"one of {', '.join(FORMATS)}")
        if isinstance(target, (str, os.PathLike)):
            _check_target(os.path.abspath(target), directory=directory)
            if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
                with open(target, "wb") as pipe:  # a device or a pipe is written to, not replaced
                    return self.export(name, pipe, format=format, compression=compression, progress=progress)
        if format in ("tar", "layer"):
            write = self._write_tar if format == "tar" else self._write_layer
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
        """Where a layer waits for its digest: in the store; None (the host's temporary directory) where it has no room."""
        host = os.statvfs(self.root)
        used = [self.index.by_num(num).usage for num, _ in self.index.chain(row.num)]
        most = max((usage.bytes for usage in used if usage is not None), default=0)
        return self.index.spool if most <= host.f_bavail * host.f_frsize else None

    def image(self, name: str) -> images.OutImage:
        """A committed snapshot or a tag as an image: its configuration, and layers that can be written.

        Digests of layers that no archive made are found by a dry export once, and kept.

        Args:
            name: a name or a tag.

        Raises:
            NotFound: no such snapshot or tag.
            InvalidArgument: it is not committed.
        """
        row = self.resolve(name)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(
                f"{name!r} is not committed, an image is made of committed ones", remedy="commit it first"
            )
        return self._images(name, row)[0]

    def _images(self, name: str, row: Row) -> list[images.OutImage]:
        """The image that a tag names; of a snapshot's own name each image that it is, one for each configuration."""
        chain = [self.index.by_num(num) for num, _ in reversed(self.index.chain(row.num))]
        diff_ids = self._diff_ids(row)
        if self.index.tag(name) is not None:
            return [self._image(chain, diff_ids, self.config(name), [name])]
        tags: dict[str, list[str]] = {}
        for tag in self.index.tags_of(row.num):
            tags.setdefault(self.config(tag.name), []).append(tag.name)
        if not tags:
            tags[self.config(name)] = []
        return [self._image(chain, diff_ids, config, names) for config, names in tags.items()]

    def _image(self, chain: list[Row], diff_ids: list[str], config: str, tags: list[str]) -> images.OutImage:
        base = config.encode() if config else None
        listed = images.diff_ids_of(base) if base is not None else None
        if listed != diff_ids and listed is not None and NO_LAYER not in listed:
            # an image without layers is kept as a snapshot of nothing, which is no layer of what is made of it
            pairs = [pair for pair in zip(chain, diff_ids, strict=True) if pair[1] != NO_LAYER]
            chain, diff_ids = [each for each, _ in pairs], [diff_id for _, diff_id in pairs]
        document = base if base is not None and listed == diff_ids else None

        def writer(each: Row) -> Callable[[BinaryIO, str], str]:
            return lambda out, compression: self._write_layer(each, out, compression, None)

        outs = [
            images.OutLayer(diff_id=diff_id, write=writer(each)) for each, diff_id in zip(chain, diff_ids, strict=True)
        ]
        if document is None:
            document = images.make_config(diff_ids, base, kept=self._layers_of(chain, config))
        return images.OutImage(config=document, layers=outs, tags=tags)

    def _layers_of(self, chain: list[Row], config: str) -> int:
        """How many layers of a chain, bottom first, are those of the image that a configuration belongs to."""
        for count, row in enumerate(chain):
            if self.index.config_of(row.num) == config:
                return count  # the first that was made from it
        for count, row in enumerate(chain):
            if any(tag.config == config for tag in self.index.tags_of(row.num)):
                return count + 1
        return len(chain)

    def _diff_ids(self, row: Row) -> list[str]:
        """Diff ids of a chain, bottom first; those not known yet are found by a dry export and kept."""
        found = []
        for num, _ in reversed(self.index.chain(row.num)):
            each = self.index.by_num(num)
            diff_id = each.diff_id
            if diff_id is None or not (self._is_archived(each) or self.index.diff_form(num) == archive.FORM):
                with open(os.devnull, "wb") as nowhere:
                    diff_id = self._write_layer(each, nowhere, "none", None)
                chain_id = self._chain_id(each.parent, diff_id)
                try:
                    with self.index.write() as change:
                        change.set_archive(num, diff_id, chain_id, form=archive.FORM)
                except OSError as error:
                    if error.errno not in {errno.EROFS, *FULL}:
                        raise  # a store that can only be read finds it anew each time
            found.append(diff_id)
        return found

    def _is_archived(self, row: Row) -> bool:
        """Whether a layer leaves as the archive that it came from."""
        if row.kind is not Kind.COMMITTED or row.diff_id is None:
            return False
        try:
            with open(open_regular(f"{self.driver.directory(row.id)}/{HEADERS}"), "rb") as log:
                return bool(archive.read_trailer(log).get("complete"))
        except FileNotFoundError:
            return False

    def _check_content(self, report: Report, row: Row, repair: bool) -> None:
        """As :meth:`UpkeepVerbs._check_content`; and a layer that leaves as its archive is that archive."""
        super()._check_content(report, row, repair)
        if not self._is_archived(row):
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                self._write_layer(row, nowhere, "none", None)
            left = self._not_deleted(row)
        except Corrupt as error:
            why = error.message
        else:
            if not left:
                return
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            why = f"{os.fsdecode(left[0])!r}{more} should be deleted; import the image again"
        done = ""
        if repair:
            with self.index.write() as change:
                change.forget_archive(row.num)
            unmark(f"{self.driver.directory(row.id)}/{HEADERS}")
            done = "its diff id is forgotten"
        what = f"layer {row.id} is not the archive {row.diff_id}: {why}"
        report.problems.append(Problem(kind="archive", name=row.name, what=what, repaired=done))

    def _not_deleted(self, row: Row) -> list[bytes]:
        """Paths of a snapshot that the archive of its layer deletes. Raises Corrupt."""
        from cowfs.store import damage

        assert row.root is not None
        with open(open_regular(f"{self.driver.directory(row.id)}/{HEADERS}"), "rb") as log:
            return sorted(damage.not_deleted(self.index, row.root, lambda: archive.member_names(log)))

    def _write_tar(self, row: Row, out: BinaryIO, compression: str, progress: Progress | None) -> str:
        pending = Pending(self.index)
        tree = self._content(self._tree(row, pending), pending)
        return archive.export_tree(tree, out, compression=compression, progress=counter(progress, row.name)).diff_id

    def _write_layer(self, row: Row, out: BinaryIO, compression: str, progress: Progress | None) -> str:
        directory = self.driver.directory(row.id)
        if row.diff_id is not None and self._is_archived(row):
            with (
                self.driver.open_tree(row.id) as fd,
                open(open_regular(f"{directory}/{HEADERS}"), "rb") as log,
            ):
                archive.rebuild(log, fd, out, compression=compression)
            return row.diff_id
        return self._export_changes(row, None, out, compression, progress)

    def _export_changes(
        self, after: Row, before: Row | None, out: BinaryIO, compression: str, progress: Progress | None
    ) -> str:
        """A layer tar of what changed from ``before`` (default: the parent), the same bytes for the same snapshots.

        A file with several names is in it under all of them, so that no link leads out of the archive: whatever unpacks
        layers apart from each other (overlay storage does) has no other place to link to.
        """
        pending = Pending(self.index)
        if before is None and after.parent is not None:
            before = self.index.by_num(after.parent)
        tree = self._content(self._tree(after, pending), pending)
        old = self._tree(before, pending) if before is not None else None
        same = layers.SameData(self.driver, self.index)
        linked = compare.changes_with_links(pending, old, self._tree(after, pending), same)
        changes: Iterator[Change] = (change for change, _ in linked)
        if before is None:
            changes = itertools.chain(_root_of(tree), changes)
        return archive.export_changes(
            tree, changes, out, compression=compression, progress=counter(progress, after.name)
        ).diff_id

    def export_diff(
        self, a: str, b: str, target: BinaryIO, *, compression: str = "none", progress: Progress | None = None
    ) -> str:
        """Write what changed from one snapshot to another, related or not, as an OCI layer tar.

        Applied to a snapshot that equals ``a``, it gives one that equals ``b``.

        Args:
            a, b: keys, names or tags.
            target: where the tar goes, a binary stream.
            compression: "none", "gzip" or "zstd".
            progress: told (bytes, entries) so far.

        Returns:
            Its diff id.

        Raises:
            NotFound: no such snapshot.
            OSError: the target cannot be written.
        """
        return self._export_changes(self.resolve(b), self.resolve(a), target, compression, progress)


def _root_of(tree: archive.Tree) -> Iterator[Change]:
    """The root of a layer without a parent, if it is not what an empty layer's is: no comparison names it."""
    st = tree.stat(b"")
    if st is not None and ((st.mode, st.uid, st.gid) != (0o40755, 0, 0) or tree.xattrs(b"")):
        yield Change(path=b"", kind="changed", type="dir")


def _check_target(path: str, *, directory: bool) -> None:
    """Say in time that a file cannot be made there.

    Raises:
        NotFound, InvalidArgument: why not.
    """
    if not os.path.isdir(os.path.dirname(path)):
        raise NotFound(f"no such directory: {os.path.dirname(path)}", remedy="make it, or choose another place")
    if os.path.isdir(path) and not directory:
        raise InvalidArgument(f"{path} is a directory", remedy=f"name a file, as in {os.path.join(path, 'image.tar')}")
