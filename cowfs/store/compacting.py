"""Compaction of the redirect files of an active snapshot (driver ``row``), mounted or not.

Only what can still be written is compacted: the records of a committed snapshot say which blocks it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cowfs.errors import CowfsError, Unsupported
from cowfs.index.database import Row
from cowfs.model import Info
from cowfs.store import layers
from cowfs.store.engines import EngineVerbs
from cowfs.store.reserve import names_full

__all__ = ["Compacted", "CompactionVerbs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What a compaction did.

    Attributes:
        files: redirect files that are plain files now.
        skipped: redirect files that were left: too little of them was written, or the limit was reached.
        bytes: what was copied from the parents.
    """

    files: int
    skipped: int
    bytes: int


OnProgress = Callable[[str, int, int], None]
"""Called with the path in work, bytes copied so far, bytes that this file still lacks."""


class CompactionVerbs(EngineVerbs):
    """compact, and commit with it."""

    def commit(
        self,
        key: str,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        replace_labels: bool = False,
        digests: bool = False,
        mounted: bool = False,
        compact: bool = False,
        kernel_image: bool = False,
    ) -> Info:
        """Make an active snapshot immutable under a name.

        The layer is recorded first, which takes as long as there are files in it; then one step of the index makes it committed, and
        a kill before that leaves it active.

        Args:
            key: an active snapshot.
            name: the name that it gets; its key is free afterwards.
            labels: added to those that it has.
            replace_labels: put ``labels`` in place of those that it has.
            digests: also record the digest of each file, which reads all data.
            mounted: commit it although it is mounted; the mount becomes read-only.
            compact: :meth:`compact` what has mostly been written before.
            kernel_image: also make the image that mounts by the kernel of what stands on it begin with, which the first of
                them makes otherwise.

        Returns:
            The committed snapshot.

        Raises:
            NotFound: no such key.
            AlreadyExists: the name is taken.
            FailedPrecondition: not active, or in use.
            InvalidArgument: a bad name or label.
            Unsupported: of ``kernel_image``: the kernel mounts no images of these layers; nothing was committed.
        """
        if kernel_image:
            from cowfs.store import kernel_image as images

            why = images.why_not(self.driver)
            if why:
                raise Unsupported(f"no image for kernel mounts: {why}", remedy="leave it out")
        if compact and self.driver.capabilities.row:
            self.compact(key)
        info = super().commit(key, name, labels=labels, replace_labels=replace_labels, digests=digests, mounted=mounted)
        if kernel_image:
            images.build(self.driver, self.index, self.index.get(name))
        return info

    @names_full
    def compact(self, key: str, *, share: float | None = None, on_progress: OnProgress | None = None) -> Compacted:
        """Turn redirect files, most of which was written, into plain files. Reading and writing go on meanwhile.

        Args:
            key: an active snapshot, mounted or not.
            share: leave files alone of which less than this part is their own; default: 0.75; 0 takes all.
            on_progress: told after each step.

        Raises:
            NotFound: no such key.
            FailedPrecondition: not active, or in use by another verb.
            Unsupported: the driver makes no redirect files.
            CowfsError: an I/O error; what was compacted until then is.
        """
        from cowfs.row.compact import SHARE

        share = SHARE if share is None else share
        row = self._active(key)
        if not self.driver.capabilities.row:
            raise Unsupported(
                f"the driver {self.driver.name} has nothing to compact", remedy="it is for the driver row"
            )
        server = self._server_of(row, made_by="store")
        if server is not None:
            return self._compact_mounted(server, share, on_progress)
        with layers.hold(self.driver, row, "compact"):
            return self._compact_layer(row, share, on_progress)

    def _compact_mounted(self, server: dict[str, Any], share: float, on_progress: OnProgress | None) -> Compacted:
        from cowfs.mounting import protocol

        def say(told: dict[str, Any]) -> None:
            if on_progress is not None:
                on_progress(told["path"], told["done"], told["todo"])

        while True:  # once, but for a server of an older cowfs, which tells how far it is by its answer
            news = protocol.stream(server["socket"], "compact", timeout=600.0, share=share)
            while True:
                try:
                    say(next(news))
                except StopIteration as end:
                    told: dict[str, Any] = end.value
                    break
            say(told)
            if told["finished"]:
                return Compacted(files=told["files"], skipped=told["skipped"], bytes=told["done"])

    def _compact_layer(self, row: Row, share: float, on_progress: OnProgress | None) -> Compacted:
        from cowfs.row.compact import compact_layer

        below = [self.driver.tree(id) for _, id in self.index.chain(row.parent)]
        if not below:  # nothing to stand on, so nothing was redirected
            return Compacted(files=0, skipped=0, bytes=0)
        files = skipped = done = 0
        steps = compact_layer(
            below,
            self.driver.tree(row.id),
            self.driver.work(row.id),
            form=self.driver.form.name,
            share=share,
            durable=self.driver.fsync,
        )
        try:
            for told in steps:
                files, skipped, done = told.files, told.skipped, told.done
                if on_progress is not None:
                    on_progress(told.path.decode(errors="surrogateescape"), told.done, told.todo)
        except OSError as error:
            raise CowfsError(f"compaction of {row.name!r} stopped: {error.strerror}") from None
        return Compacted(files=files, skipped=skipped, bytes=done)
