"""Archives and images, in and out of the store.

Strategy. A layer of an image becomes one committed snapshot, named by its chain id; what has that
chain id already is not unpacked again. Layers are unpacked into ``new-*`` directories, several at a
time, each without waiting for the ones beneath; only what an archive leaves to its parent (the
attributes of a directory that it does not list, the data of a hard link into it) waits for that. Rows
are then written in order, so that whatever happens, a chain in the index is complete.

A layer that came from an archive is exported as that archive, byte for byte: its headers are kept beside
the layer (``cowfs-headers``), and the row has the diff id. A row gets it only if nothing in
the layer has changed since: no ctime is later than the one of ``cowfs-applied``.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from cowfs import archive, images, scan
from cowfs.errors import AlreadyExists, InvalidArgument, NotFound
from cowfs.faults import point
from cowfs.images import OutImage, OutLayer
from cowfs.index import Index, Row
from cowfs.model import Change, Kind, Limit, Usage
from cowfs.store.content import IndexedTree
from cowfs.store.layers import KeptDigests, SameData, hold, mark_copied, mark_time, untouched
from cowfs.store.names import check_name, new_id
from cowfs.store.staging import Staged
from cowfs.store.upkeep import UpkeepVerbs
from cowfs.sys import trees, xattr
from cowfs.tree import Pending

__all__ = ["FORMATS", "ImageVerbs"]

HEADERS = "cowfs-headers"
APPLIED = "cowfs-applied"
FORMATS = ("oci", "docker", "tar", "layer")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: not known)."""


class ImageVerbs(UpkeepVerbs):
    """apply, export, import."""

    # -------------------------------------------------------------------- apply

    def apply(
        self,
        key: str,
        stream: BinaryIO,
        *,
        options: archive.ApplyOptions | None = None,
        diff_id: str | None = None,
        progress: Progress | None = None,
    ) -> archive.Applied:
        """Unpack an OCI layer tar into an active snapshot.

        Args:
            key: an active snapshot that nobody has mounted.
            stream: the archive, plain or compressed; a pipe will do.
            options: bounds, and what to do without privilege.
            diff_id: what its digest must be.
            progress: told how much was read.

        Raises:
            NotFound: no such key.
            FailedPrecondition: not active, or mounted.
            InvalidArgument: the archive is damaged or hostile; the message names the entry.
            Corrupt: another digest than asked for.

        After an error the snapshot holds a part of the archive.
        """
        row = self._active(key)
        with hold(self.driver, row, "apply to"):
            row = self._active(key, row.num)
            fresh = untouched(self.driver, row.id)
            _forget(self.driver.directory(row.id))
            above = self.index.by_num(row.parent) if row.parent is not None else None
            applied, digests = self._unpack(
                self.driver.directory(row.id), stream, self._content(above), options, diff_id, _counter(progress, key)
            )
            point("apply.unpacked")
            KeptDigests.save(self.driver, row.id, digests)
            if fresh:
                mark_time(f"{self.driver.directory(row.id)}/{APPLIED}", applied.diff_id)
            else:
                _forget(self.driver.directory(row.id))
            point("apply.synced")
        return applied

    def _unpack(
        self,
        directory: str,
        stream: BinaryIO,
        lower: archive.Tree | None,
        options: archive.ApplyOptions | None,
        diff_id: str | None,
        progress: Callable[[int, int], object] | None,
        blob_digest: str | None = None,
    ) -> tuple[archive.Applied, dict[int, bytes]]:
        """Unpack into ``directory``; the digests of the files by inode."""
        digests: dict[int, bytes] = {}

        def on_inode(inode: int, digest: str) -> None:
            digests[inode] = bytes.fromhex(digest)

        with open(f"{directory}/{HEADERS}", "w+b") as log:
            applied = archive.apply_layer(
                stream,
                f"{directory}/fs",
                form="plain" if self.driver.whole else self.driver.form.name,
                lower=_RootOnly(f"{directory}/fs") if self.driver.whole and lower is not None else lower,
                options=options,
                log=log,
                on_inode=on_inode,
                progress=progress,
                diff_id=diff_id,
                blob_digest=blob_digest,
            )
            log.flush()
            if self.driver.fsync:
                os.fsync(log.fileno())
        return applied, digests

    def _content(self, row: Row | None) -> IndexedTree | None:
        if row is None or row.root is None:
            return None
        return IndexedTree(self.index, row.root, SameData(self.driver, self.index))

    def _archive_of(self, row: Row, scanned: scan.Scanned) -> tuple[str | None, str | None]:
        """(diff id, chain id) of a layer that is exactly what one archive made it."""
        path = f"{self.driver.directory(row.id)}/{APPLIED}"
        try:
            with open(path, encoding="ascii") as file:
                diff_id = file.read().strip()
                mark = os.fstat(file.fileno()).st_ctime_ns
        except FileNotFoundError:
            return None, None
        if scanned.latest >= mark:
            _forget(self.driver.directory(row.id))
            return None, None
        return diff_id, self._chain_id(row.parent, diff_id)

    def _chain_id(self, parent: int | None, diff_id: str) -> str | None:
        """Of a layer over a snapshot; None where that has none itself (OCI image-spec, "Layer ChainID")."""
        if parent is None:
            return diff_id
        above = self.index.by_num(parent).chain_id
        return None if above is None else images.digest_of(f"{above} {diff_id}".encode())

    # ------------------------------------------------------------------- import

    def import_image(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        name: str | None = None,
        *,
        tag: str | None = None,
        platform: str | None = None,
        options: archive.ApplyOptions | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> str:
        """Bring in an image or a tree: a chain of snapshots named by chain id, and a tag.

        Args:
            source: an OCI layout (directory or tar), a docker-archive, a root filesystem's tar, or a plain
                directory; a path or a stream.
            name: the tag it gets here; default: those that the source has.
            tag, platform: which image of the source, where it has several.
            options: bounds for its archives.
            labels: for the snapshots that are new.
            progress: told how far it is.

        Returns:
            The name of its top snapshot.

        Raises:
            NotFound: no such source, or no such image in it.
            InvalidArgument: it cannot be read, is hostile, or the tag cannot be one.
            Corrupt: a digest does not match.
            AlreadyExists: a snapshot has that name.
        """
        if name is not None:
            check_name(name, "tag")
            self._free(name)
        with images.open_image(source, spool_dir=self.root) as opened:
            image = opened.pick(tag, platform=platform)
            top = self._import_layers(image, options, labels or {}, progress)
            config = image.config.decode("utf-8", "strict")
            if any(layer.diff_id is None for layer in image.layers):
                config = images.make_config(self._diff_ids(top), image.config).decode()
            for each in [name] if name is not None else image.tags:
                if _usable_tag(each, strict=name is not None):
                    self.tag(each, top.name, config=config)
        return top.name

    def _import_layers(
        self, image: images.Image, options: archive.ApplyOptions | None, labels: Mapping[str, str], progress: Progress | None
    ) -> Row:
        if not image.layers:
            raise InvalidArgument("the image has no layers")
        top, start = self._already(image)
        missing = image.layers[start:]
        if not missing:
            assert top is not None
            return top
        if self.driver.whole or len(missing) == 1:
            for layer in missing:
                with _Import(self, layer, options, progress) as job:
                    job.unpack(top)
                    top = job.commit(top, labels)
            assert top is not None
            return top
        return self._import_together(missing, top, options, labels, progress)

    def _import_together(
        self,
        missing: Sequence[images.Layer],
        top: Row | None,
        options: archive.ApplyOptions | None,
        labels: Mapping[str, str],
        progress: Progress | None,
    ) -> Row:
        """Unpack several layers at once; write their rows in order."""
        jobs = [_Import(self, layer, options, progress) for layer in missing]
        below: list[Future[Row | None]] = [Future() for _ in range(len(jobs) + 1)]
        below[0].set_result(top)
        with ThreadPoolExecutor(max_workers=min(len(jobs), os.cpu_count() or 1)) as pool:
            try:
                unpacked = [pool.submit(job.unpack_over, future) for job, future in zip(jobs, below, strict=False)]
                for at, job in enumerate(jobs):
                    unpacked[at].result()
                    top = job.commit(top, labels)
                    below[at + 1].set_result(top)
            except BaseException as error:
                for future in below:
                    if not future.done():
                        future.set_exception(error)
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                for job in jobs:
                    job.close()
        assert top is not None
        return top

    def _already(self, image: images.Image) -> tuple[Row | None, int]:
        """The highest layer of an image that is there, and how many are."""
        if any(layer.diff_id is None for layer in image.layers):
            return None, 0
        chain = image.chain
        for count in range(len(chain), 0, -1):
            row = self.index.by_chain(chain[count - 1])
            if row is not None and not self.driver.check(row.id):
                return row, count
        return None, 0

    # ------------------------------------------------------------------- export

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
        if format in ("tar", "layer"):
            write = self._write_tar if format == "tar" else self._write_layer
            packed = compression or "none"
            if isinstance(target, (str, os.PathLike)):
                return _into_file(os.fspath(target), lambda out: write(row, out, packed, progress))
            return write(row, target, packed, progress)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"{name!r} is not committed, an image is made of committed ones", remedy="commit it first")
        image = self._image(name, row)
        where = target if not isinstance(target, os.PathLike) else os.fspath(target)
        if format == "oci":
            images.write_oci(
                where, [image], directory=directory, compression=compression or "gzip", spool_dir=self.root
            )
        else:
            images.write_docker(where, [image], spool_dir=self.root)
        return row.name

    def _image(self, name: str, row: Row) -> OutImage:
        chain = [self.index.by_num(num) for num, _ in reversed(self.index.chain(row.num))]
        diff_ids = self._diff_ids(row)
        config = self._config(chain, diff_ids)

        def writer(each: Row) -> Callable[[BinaryIO, str], str]:
            return lambda out, compression: self._write_layer(each, out, compression, None)

        outs = [OutLayer(diff_id=diff_id, write=writer(each)) for each, diff_id in zip(chain, diff_ids, strict=True)]
        tags = [name] if self.index.tag(name) is not None else [tag.name for tag in self.index.tags("t.target = ?", (row.num,))]
        return OutImage(config=config, layers=outs, tags=tags)

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
                with self.index.write() as connection:
                    connection.execute(
                        "UPDATE snapshots SET diff_id = ?, chain_id = ? WHERE num = ? AND diff_id IS NULL",
                        (diff_id, chain_id, num),
                    )
            found.append(diff_id)
        return found

    def _write_tar(self, row: Row, out: BinaryIO, compression: str, progress: Progress | None) -> str:
        pending = Pending(self.index)
        tree = IndexedTree(pending, self._tree(row, pending), SameData(self.driver, self.index))
        return archive.export_tree(tree, out, compression=compression, progress=_counter(progress, row.name)).diff_id

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
        """A layer tar of what changed from ``before`` (default: the parent), the same bytes for the same snapshots."""
        pending = Pending(self.index)
        if before is None and after.parent is not None:
            before = self.index.by_num(after.parent)
        tree = IndexedTree(pending, self._tree(after, pending), SameData(self.driver, self.index))
        changes: Iterator[Change] = self.diff(before.name if before is not None else after.name, after.name)
        if before is None:
            changes = self.diff(after.name)
        return archive.export_changes(
            tree, changes, out, compression=compression, progress=_counter(progress, after.name)
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


class _Import:
    """One layer of an image on its way in.

    Threads: :meth:`unpack_over` in a worker, everything else in the thread that imports.
    """

    def __init__(
        self, store: ImageVerbs, layer: images.Layer, options: archive.ApplyOptions | None, progress: Progress | None
    ) -> None:
        self._store = store
        self._layer = layer
        self._options = options
        self._progress = progress
        self._staged: Staged | None = None
        self._base = Limit()
        self._applied: archive.Applied
        self._digests: dict[int, bytes] = {}
        self._copied = Usage()

    def __enter__(self) -> _Import:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete what was not committed."""
        layer, self._staged = self._staged, None
        if layer is not None:
            layer.close(keep=False)

    def unpack(self, parent: Row | None) -> None:
        """Unpack over a parent that is there."""
        done: Future[Row | None] = Future()
        done.set_result(parent)
        self.unpack_over(done)

    def unpack_over(self, below: Future[Row | None]) -> None:
        """Unpack; the parent is waited for only when the archive needs it."""
        store, driver = self._store, self._store.driver
        self._staged = layer = Staged(driver, new_id())
        point("create.made")
        parent = below.result() if below.done() else None
        chain = [id for _, id in store.index.chain(parent.num)] if parent is not None else []
        self._copied = driver.create(layer.staged, chain, Limit())
        if driver.whole and chain:
            mark_copied(driver, layer.staged, chain[0], only_root=False)
        point("create.filled")
        with self._layer.open() as stream:
            self._applied, self._digests = store._unpack(
                driver.directory(layer.staged),
                stream,
                _Awaited(store, below) if parent is not None or not driver.whole else None,
                self._options,
                self._layer.diff_id,
                _counter(self._progress, (self._layer.digest or self._layer.diff_id or "layer")[:19], self._layer.size or 0),
                self._layer.digest,
            )
        point("apply.unpacked")

    def commit(self, parent: Row | None, labels: Mapping[str, str]) -> Row:
        """Read it into records and write its row; if somebody else was faster, take theirs."""
        store, driver, index, layer = self._store, self._store.driver, self._store.index, self._staged
        assert layer is not None
        diff_id = self._applied.diff_id
        chain_id = store._chain_id(parent.num if parent is not None else None, diff_id)
        assert chain_id is not None
        there = index.by_chain(chain_id)
        if there is not None:
            self.close()
            return there
        if not driver.whole:
            _inherit_root(driver.tree(parent.id) if parent is not None else None, driver.tree(layer.staged))
        driver.freeze(layer.staged)
        num = index.reserve()
        digests = self._digests
        scanned = store._scan_at(
            layer.staged, num, parent, lambda path, st: digests.get(st.st_ino) or None, self._copied
        )
        if driver.fsync:
            trees.sync_tree(driver.tree(layer.staged))
        point("create.synced")
        now = time.time_ns()
        try:
            with index.write() as connection:
                if parent is not None:
                    store._parent(parent.name, parent.num)
                Index.add_records(connection, scanned.pending.new)
                connection.execute(
                    "INSERT INTO snapshots (num, id, name, kind, parent, depth, labels, created, updated, base_bytes,"
                    " base_inodes, bytes, inodes, root_content, root_storage, diff_id, chain_id)"
                    " VALUES (?, ?, ?, 'committed', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        num,
                        layer.id,
                        chain_id,
                        None if parent is None else parent.num,
                        0 if parent is None else parent.depth + 1,
                        json.dumps(dict(labels), sort_keys=True),
                        now,
                        now,
                        self._copied.bytes,
                        self._copied.inodes,
                        scanned.usage.bytes,
                        scanned.usage.inodes,
                        *scanned.root,
                        diff_id,
                        chain_id,
                    ),
                )
                point("create.recorded")
                layer.publish()
                point("create.renamed")
        except sqlite3.IntegrityError:
            self.close()
            other = index.find(chain_id)
            if other is None or other.chain_id != chain_id:
                raise AlreadyExists(f"another snapshot is called {chain_id}") from None
            return other
        point("create.committed")
        self._staged = None
        layer.close(keep=True)
        return index.get(chain_id)


class _Awaited:
    """The tree beneath a layer, waited for when it is first asked something.

    Threads: belongs to the worker that unpacks the layer.
    """

    def __init__(self, store: ImageVerbs, below: Future[Row | None]) -> None:
        self._store = store
        self._below = below
        self._tree: IndexedTree | None = None
        self._lock = threading.Lock()

    def _get(self) -> IndexedTree | None:
        with self._lock:
            if self._tree is None:
                self._tree = self._store._content(self._below.result())
            return self._tree

    def stat(self, path: bytes) -> archive.LowerStat | None:
        if not path:
            return _NO_ROOT
        tree = self._get()
        return tree.stat(path) if tree is not None else None

    def names(self, path: bytes) -> list[bytes]:
        tree = self._get()
        return tree.names(path) if tree is not None else []

    def readlink(self, path: bytes) -> bytes:
        return self._must().readlink(path)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        return self._must().xattrs(path) if path else {}

    def read(self, path: bytes) -> Iterator[bytes]:
        return self._must().read(path)

    def _must(self) -> IndexedTree:
        tree = self._get()
        if tree is None:
            raise NotFound("there is no layer beneath")
        return tree


class _RootOnly:
    """Beneath a whole layer there is nothing but what was copied: only its root may be empty and count."""

    def __init__(self, tree: str) -> None:
        fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            own = archive.DirTree(fd)
            self._root = own.stat(b"")
            self._xattrs = xattr.read_all(fd, b"")
        finally:
            os.close(fd)

    def stat(self, path: bytes) -> archive.LowerStat | None:
        return None if path else self._root

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        return {} if path else self._xattrs

    def names(self, path: bytes) -> list[bytes]:
        return []

    def readlink(self, path: bytes) -> bytes:
        raise FileNotFoundError(2, os.strerror(2), path)

    def read(self, path: bytes) -> Iterator[bytes]:
        raise FileNotFoundError(2, os.strerror(2), path)


# -------------------------------------------------------------------- helpers


def _counter(progress: Progress | None, what: str, total: int = 0) -> Callable[[int, int], object] | None:
    if progress is None:
        return None
    tell = progress
    return lambda done, _entries: tell(what, done, total)


def _forget(directory: str) -> None:
    """The layer is no longer what one archive made it."""
    for name in (APPLIED, HEADERS):
        try:
            os.unlink(f"{directory}/{name}")
        except FileNotFoundError:
            pass


_NO_ROOT = archive.LowerStat(mode=0o040755, uid=0, gid=0, size=0, mtime=123_456_789)
"""What :class:`_Awaited` says of the root, so that unpacking does not wait for the layer beneath: a root with
this time had no entry in the archive."""


def _inherit_root(below: str | None, tree: str) -> None:
    """Give a root without an entry in the archive the attributes of the parent's."""
    dst = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(dst).st_mtime_ns != _NO_ROOT.mtime:
            return
        if below is None:
            os.utime(dst, ns=(0, 0))
            return
        src = os.open(below, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            trees.copy_attributes(src, dst, os.fstat(src))
        finally:
            os.close(src)
    finally:
        os.close(dst)


def _usable_tag(name: str, *, strict: bool) -> bool:
    try:
        check_name(name, "tag")
    except InvalidArgument:
        if strict:
            raise
        return False
    return True


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

