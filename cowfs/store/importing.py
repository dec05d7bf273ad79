"""Images into the store.

Strategy. A layer of an image becomes one committed snapshot, named by its chain id; an existing one is not unpacked
again. Layers are unpacked into ``new-*`` directories, several at a time, each without waiting for the ones beneath;
only parts that an archive leaves to its parent (the attributes of a directory that it does not list, the data of a hard
link into it) wait for it. Rows are then written in order, so that a chain in the index is always complete.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from cowfs import archive, images
from cowfs._typed import TYPE_CHECKING, BinaryIO, NamedTuple
from cowfs.errors import AlreadyExists, CowfsError, InvalidArgument, NotFound
from cowfs.index.database import Row
from cowfs.index.transaction import Committed, NameTaken
from cowfs.model import Kind, Limit, Usage
from cowfs.store.applying import Applying, Progress, counter
from cowfs.store.archived import Archived, present
from cowfs.store.digest_table import ByInode
from cowfs.store.layers import known_digest, mark_copied
from cowfs.store.names import check_name, new_id
from cowfs.store.reserve import FULL, names_full
from cowfs.store.staging import Staged
from cowfs.sys import files, trees
from cowfs.sys.faults import point

if TYPE_CHECKING:
    from concurrent.futures import Future

    from cowfs.images.dockerhost import DockerHost
    from cowfs.store.content import IndexedTree
    from cowfs.store.context import Context
    from cowfs.store.exporting import Exporting
    from cowfs.store.lookup import Lookup
    from cowfs.store.naming import Naming
    from cowfs.store.scanning import Scanning

__all__ = ["Importing"]


class Importing:
    """Images, brought in layer by layer."""

    def __init__(
        self,
        context: Context,
        lookup: Lookup,
        scanning: Scanning,
        archived: Archived,
        naming: Naming,
        applying: Applying,
        exporting: Exporting,
    ) -> None:
        self.context = context
        self._lookup = lookup
        self._naming = naming
        self._exporting = exporting
        self._parts = _Parts(context, lookup, scanning, archived, applying)

    @names_full
    def import_image(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        name: str | None = None,
        *,
        tag: str | None = None,
        platform: str | None = None,
        form: images.Form | None = None,
        options: archive.ApplyOptions | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        told: Callable[[str], object] | None = None,
    ) -> str:
        """As :meth:`cowfs.Store.import_image`."""
        if name is not None:
            check_name(name, "tag")
            self._lookup.must_be_free(name, for_tag=True)
        options = options or archive.ApplyOptions()
        tell = told or _warn
        with images.open_image(source, form=form, spool_dir=self.context.root, max_bytes=options.max_bytes) as opened:
            image = opened.pick(tag, platform=platform)
            tags = [name] if name is not None else [each for each in image.tags if _usable_tag(each, tell)]
            top, config = self._bring_in(image, tags, options, labels or {}, progress)
        for each in tags:
            had = self.context.index.tag(each)
            self._naming.tag(each, top.name, config=config)
            if name is None and had is not None and (had.target, had.config) != (top.name, config):
                tell(f"the tag {each!r} was another image's ({had.target}) and names {top.name} now")
        return top.name

    def import_opened(
        self,
        image: images.Image,
        tags: Sequence[str] = (),
        *,
        options: archive.ApplyOptions | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> tuple[str, str]:
        """As :meth:`cowfs.Store.import_opened`."""
        for each in tags:
            check_name(each, "tag")
        top, config = self._bring_in(image, tags, options or archive.ApplyOptions(), labels or {}, progress)
        for each in tags:
            self._naming.tag(each, top.name, config=config)
        return top.name, config

    @names_full
    def import_docker_host(
        self,
        root: str | os.PathLike[str],
        driver: str,
        *,
        options: archive.ApplyOptions | None = None,
        labels: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        told: Callable[[str], object] | None = None,
    ) -> tuple[list[str], int]:
        """As :meth:`cowfs.Store.import_docker_host`."""
        from cowfs.images.dockerhost import DockerHost

        count = 0

        def tell(line: str) -> None:
            nonlocal count
            count += 1
            (told or _warn)(line)

        there = DockerHost(os.fspath(root), driver, tell)
        tops: dict[str, None] = {}
        for image in there.images():
            what = f"image {', '.join(image.tags) or image.config_digest[7:19]}"
            tags = [each for each in image.tags if _usable_tag(each, tell)]
            more = {"options": options, "labels": labels, "progress": progress}
            try:
                try:
                    tops[self.import_opened(image, tags, **more)[0]] = None  # type: ignore[arg-type]
                except (CowfsError, OSError):
                    mended = _mended(there, image, what, tell)
                    if mended is None:
                        raise
                    tops[self.import_opened(mended, tags, **more)[0]] = None  # type: ignore[arg-type]
            except (CowfsError, OSError) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                tell(f"{what} is left out: {error}")
        return list(tops), count

    def _bring_in(
        self,
        image: images.Image,
        tags: Sequence[str],
        options: archive.ApplyOptions,
        labels: Mapping[str, str],
        progress: Progress | None,
    ) -> tuple[Row, str]:
        """The layers as snapshots: the top one, and the configuration that belongs to it."""
        for each in tags:
            self._lookup.must_be_free(each, for_tag=True)
        top = self._import_layers(image, options, labels, progress)
        config = image.config.decode()
        if any(layer.diff_id is None for layer in image.layers):
            config = images.make_config(self._exporting.diff_ids(top), image.config).decode() if top.diff_id else ""
        return top, config

    def _import_layers(
        self,
        image: images.Image,
        options: archive.ApplyOptions,
        labels: Mapping[str, str],
        progress: Progress | None,
    ) -> Row:
        top, start = self._already(image, options.owners)
        budget = archive.Budget(options.max_bytes)
        jobs = [_Import(self._parts, layer, options, budget, progress) for layer in image.layers[start:]]
        if self.context.driver.capabilities.whole or len(jobs) == 1:
            for job in jobs:
                with job:
                    job.unpack(top)
                    top = job.commit(top, labels)
        elif jobs:
            top = self._import_together(jobs, top, labels)
        assert top is not None
        return top

    def _import_together(self, jobs: Sequence[_Import], top: Row | None, labels: Mapping[str, str]) -> Row:
        """Unpack several layers at once; write their rows in order."""
        from concurrent.futures import Future, ThreadPoolExecutor

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

    def _already(self, image: images.Image, owners: str) -> tuple[Row | None, int]:
        """The highest existing layer of an image, and the number of existing ones, each on the very layers of the image."""
        if any(layer.diff_id is None for layer in image.layers):
            return None, 0
        top: Row | None = None
        for count, (layer, chain_id) in enumerate(zip(image.layers, image.chain, strict=True)):
            row = present(self.context, top, chain_id, layer.diff_id, owners)
            if row is None:
                return top, count
            top = row
        return top, len(image.layers)


class _Parts(NamedTuple):
    """The services that bring in a layer."""

    context: Context
    lookup: Lookup
    scanning: Scanning
    archived: Archived
    applying: Applying


class _Import:
    """One layer of an image on its way in.

    Threads: :meth:`unpack_over` in a worker, everything else in the thread that imports.
    """

    def __init__(
        self,
        parts: _Parts,
        layer: images.Layer,
        options: archive.ApplyOptions,
        budget: archive.Budget,
        progress: Progress | None,
    ) -> None:
        self._parts = parts
        self._budget = budget
        self._layer = layer
        self._options = replace(options, whiteouts=False) if layer.whole else options
        self._progress = progress
        self._staged: Staged | None = None
        self._base = Limit()
        self._applied: archive.Applied
        self._digests: ByInode
        self._copied = Usage()

    def __enter__(self) -> _Import:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete uncommitted layers."""
        layer, self._staged = self._staged, None
        if layer is not None:
            layer.close(keep=False)

    def unpack(self, parent: Row | None) -> None:
        """Unpack over an existing parent."""
        from concurrent.futures import Future

        done: Future[Row | None] = Future()
        done.set_result(parent)
        self.unpack_over(done)

    def unpack_over(self, below: Future[Row | None]) -> None:
        """Unpack; the parent is waited for only when the archive needs it."""
        parts, driver = self._parts, self._parts.context.driver
        self._staged = layer = Staged(driver, parts.context.index, new_id())
        point("create.made")
        parent = below.result() if below.done() else None
        chain = [id for _, id in parts.context.index.chain(parent.num)] if parent is not None else []
        self._copied = driver.create(layer.staged, chain, Limit())
        if driver.capabilities.whole and chain:
            mark_copied(driver, layer.staged, chain[0], only_root=False)
        point("create.filled")
        with self._layer.open() as stream:
            self._applied, self._digests = parts.applying.unpack(
                layer.staged,
                stream,
                _Awaited(parts.scanning, below, self._options.owners)
                if parent is not None or not driver.capabilities.whole
                else None,
                self._options,
                self._layer.diff_id,
                counter(
                    self._progress, (self._layer.digest or self._layer.diff_id or "layer")[:19], self._layer.size or 0
                ),
                self._layer.digest,
                self._budget,
            )
        point("apply.unpacked")

    def commit(self, parent: Row | None, labels: Mapping[str, str]) -> Row:
        """Read it into records and write its row; if another process was faster, use that row."""
        parts, layer = self._parts, self._staged
        driver, index = parts.context.driver, parts.context.index
        assert layer is not None
        diff_id: str | None = self._applied.diff_id
        chain_id = parts.archived.chain_id(parent.num if parent is not None else None, self._applied.diff_id)
        assert chain_id is not None
        name = chain_id
        if self._applied.reserved:  # as a layer the same bytes would mean another tree
            name, diff_id, chain_id = images.digest_of(f"tree {diff_id}".encode()), None, None
        taken = index.find(name) is not None
        there = self._there_already(parent, name, chain_id, diff_id)
        if there is not None:
            self.close()
            return there
        if taken:
            name = f"{name}.{layer.id}"  # the snapshot of its name is not this layer any more
        if not driver.capabilities.whole and parent is not None and not self._applied.root:
            _inherit_root(driver.tree(parent.id), driver.tree(layer.staged))
        driver.freeze(layer.staged)
        num = index.reserve()
        digests = self._digests
        scanned = parts.scanning.scan_at(
            layer.staged, num, parent, lambda path, st: known_digest(digests.get(st.st_ino)), self._copied
        )
        if scanned.held is not None:
            driver.note(layer.staged, scanned.held, scanned.sums or ())
        if driver.fsync:
            with driver.open_tree(layer.staged) as fd:
                files.syncfs(fd)
        point("create.synced")
        try:
            with index.write() as change:
                if parent is not None:
                    parts.lookup.parent(parent.name, parent.num)
                change.add_snapshot(
                    num=num,
                    id=layer.id,
                    name=name,
                    kind=Kind.COMMITTED,
                    parent=None if parent is None else (parent.num, parent.depth),
                    labels=labels,
                    base=self._copied,
                    committed=Committed(
                        usage=scanned.usage,
                        root=scanned.root,
                        records=scanned.pending.new,
                        diff_id=diff_id,
                        chain_id=chain_id,
                    ),
                )
                point("create.recorded")
                layer.publish()
                point("create.renamed")
        except NameTaken:
            self.close()
            other = self._there_already(parent, name, chain_id, diff_id)
            if other is None:
                raise AlreadyExists(f"another snapshot is called {name}") from None
            return other
        point("create.committed")
        self._staged = None
        layer.close(keep=True)
        return index.get(name)

    def _there_already(self, parent: Row | None, name: str, chain_id: str | None, diff_id: str | None) -> Row | None:
        if chain_id is not None:
            return present(self._parts.context, parent, chain_id, diff_id, self._options.owners)
        row = self._parts.context.index.find(name)
        return row if row is not None and row.kind is Kind.COMMITTED and row.parent is None else None


class _Awaited:
    """The tree beneath a layer, which waits for that layer on first use.

    Threads: belongs to the worker that unpacks the layer.
    """

    def __init__(self, scanning: Scanning, below: Future[Row | None], owners: str) -> None:
        # The root is root's, or this user's if that cannot give it away and no attribute records its owner.
        ours = os.geteuid() and owners != "xattr"
        self._uid, self._gid = (os.geteuid(), os.getegid()) if ours else (0, 0)
        self._scanning = scanning
        self._below = below
        self._tree: IndexedTree | None = None
        self._lock = threading.Lock()

    def _get(self) -> IndexedTree | None:
        with self._lock:
            if self._tree is None:
                self._tree = self._scanning.content_of(self._below.result())
            return self._tree

    def stat(self, path: bytes) -> archive.LowerStat | None:
        if not path:
            return archive.LowerStat(mode=0o040755, uid=self._uid, gid=self._gid, size=0, mtime=0)
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

    def data(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        return self._must().data(path)

    def _must(self) -> IndexedTree:
        tree = self._get()
        if tree is None:
            raise NotFound("there is no layer beneath")
        return tree


def _inherit_root(below: str, tree: str) -> None:
    """Give a root without an entry in the archive the attributes of the parent's: unpacking did not wait for that."""
    dst = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        src = os.open(below, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            trees.copy_attributes(src, dst, os.fstat(src))
        finally:
            os.close(src)
    finally:
        os.close(dst)


def _mended(there: DockerHost, image: images.Image, what: str, tell: Callable[[str], object]) -> images.Image | None:
    """The image with damaged layers read from their directories, each fault reported; None if there is no damage."""
    layers = []
    for number, layer in enumerate(image.layers, 1):
        faults = there.faults(layer)
        for fault in faults:
            tell(f"{what}, layer {number}: {fault}")
        if faults:
            tell(f"{what}, layer {number}: comes as its directory is, under another digest")
        layers.append(there.as_it_is(layer) if faults else layer)
    return replace(image, layers=tuple(layers)) if layers != list(image.layers) else None


def _usable_tag(name: str, tell: Callable[[str], object]) -> bool:
    try:
        check_name(name, "tag")
    except InvalidArgument as error:
        tell(f"a name of the source is left out: {error.message}")
        return False
    return True


def _warn(line: str) -> None:
    import warnings

    warnings.warn(line, stacklevel=5)
