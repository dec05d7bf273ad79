"""Snapshots out: images, whole trees, layers, and the changes between any two."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from cowfs import archive, images
from cowfs.errors import InvalidArgument, NotFound
from cowfs.index import compare
from cowfs.index.database import Row
from cowfs.index.directory import Pending
from cowfs.model import Change, Kind
from cowfs.store import layers
from cowfs.store.applying import HEADERS, ArchiveVerbs, Progress, counter

__all__ = ["FORMATS", "ExportVerbs"]

FORMATS = ("oci", "docker", "tar", "layer")


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
                return _into_file(os.fspath(target), lambda out: write(row, out, packed, progress))
            return write(row, target, packed, progress)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(
                f"{name!r} is not committed, an image is made of committed ones", remedy="commit it first"
            )
        image = self._image(name, row)
        where = target if not isinstance(target, os.PathLike) else os.fspath(target)
        if format == "oci":
            images.write_oci(
                where, [image], directory=directory, compression=compression or "gzip", spool_dir=self.index.spool
            )
        else:
            images.write_docker(where, [image], spool_dir=self.index.spool)
        return row.name

    def _image(self, name: str, row: Row) -> images.OutImage:
        chain = [self.index.by_num(num) for num, _ in reversed(self.index.chain(row.num))]
        diff_ids = self._diff_ids(row)
        config = self._config(chain, diff_ids)

        def writer(each: Row) -> Callable[[BinaryIO, str], str]:
            return lambda out, compression: self._write_layer(each, out, compression, None)

        outs = [
            images.OutLayer(diff_id=diff_id, write=writer(each)) for each, diff_id in zip(chain, diff_ids, strict=True)
        ]
        tags = (
            [name]
            if self.index.tag(name) is not None
            else [tag.name for tag in self.index.tags("t.target = ?", (row.num,))]
        )
        return images.OutImage(config=config, layers=outs, tags=tags)

    def _config(self, chain: list[Row], diff_ids: list[str]) -> bytes:
        """The configuration of the nearest tagged ancestor, with the layers above it added."""
        for row in reversed(chain):
            for tag in self.index.tags("t.target = ?", (row.num,)):
                if tag.config:
                    config = tag.config.encode()
                    if row is chain[-1] and images.diff_ids_of(config) == diff_ids:
                        return config
                    return images.make_config(diff_ids, config)
        return images.make_config(diff_ids)

    def _diff_ids(self, row: Row) -> list[str]:
        """Diff ids of a chain, bottom first; those not known yet are found by a dry export and kept."""
        found = []
        for num, _ in reversed(self.index.chain(row.num)):
            each = self.index.by_num(num)
            diff_id = each.diff_id
            if diff_id is None:
                with open(os.devnull, "wb") as nowhere:
                    diff_id = self._write_layer(each, nowhere, "none", None)
                chain_id = self._chain_id(each.parent, diff_id)
                if self.index.spool is not None:  # a store that can only be read finds it anew each time
                    with self.index.write() as connection:
                        connection.execute(
                            "UPDATE snapshots SET diff_id = ?, chain_id = ? WHERE num = ? AND diff_id IS NULL",
                            (diff_id, chain_id, num),
                        )
            found.append(diff_id)
        return found

    def _write_tar(self, row: Row, out: BinaryIO, compression: str, progress: Progress | None) -> str:
        pending = Pending(self.index)
        tree = self._content(self._tree(row, pending), pending)
        return archive.export_tree(tree, out, compression=compression, progress=counter(progress, row.name)).diff_id

    def _write_layer(self, row: Row, out: BinaryIO, compression: str, progress: Progress | None) -> str:
        directory = self.driver.directory(row.id)
        if row.kind is Kind.COMMITTED and row.diff_id is not None and os.path.exists(f"{directory}/{HEADERS}"):
            fd = os.open(f"{directory}/fs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with open(f"{directory}/{HEADERS}", "rb") as log:
                    if archive.read_trailer(log).get("complete"):
                        archive.rebuild(log, fd, out, compression=compression)
                        return row.diff_id
            finally:
                os.close(fd)
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

        Returns:
            Its diff id.
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


def _into_file(path: str, fill: Callable[[BinaryIO], str]) -> str:
    """Write a file that appears whole or not at all."""
    temporary = f"{path}.new-{os.getpid()}"
    try:
        with open(temporary, "xb") as out:
            result = fill(out)
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
    return result
