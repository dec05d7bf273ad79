"""Compaction: a mostly rewritten redirect file becomes a plain file again.

Strategy, a file whose blocks lie scattered: write it anew (:mod:`cowfs.row.rewrite`). Any other, and one that cannot be
written anew: fill the parts that still show the base (each piece is an ordinary write to the own blocks, so a crash
leaves a valid redirect file); bring all of it to the disk; then remove the reference, which is one step; then the map.
Reading and writing go on meanwhile: the view's thread does one small piece at a time, between requests.

Holes stay holes. Filled blocks count against the limit; if they do not fit, the file stays a redirect file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from cowfs._typed import TYPE_CHECKING, TypeVar
from cowfs.row import layer as row_layer, rewrite
from cowfs.row.file import RowFile
from cowfs.row.rewrite import Twin
from cowfs.union.node import Dir, Node

if TYPE_CHECKING:
    from cowfs.union.core import Core

#: compact a file if at least this share of it is its own
SHARE = 0.75
#: bytes that the view's thread fills in one go
STEP = 1 << 20

T = TypeVar("T")
Call = Callable[[Callable[[], T]], T]


@dataclass(slots=True)
class Progress:
    """The progress of a compaction.

    Attributes:
        files: redirect files that became plain ones.
        skipped: redirect files left as they are: their own share was too small, or the limit was reached.
        done: bytes copied so far.
        todo: bytes still to copy for the present file.
        path: the present file.
    """

    files: int = 0
    skipped: int = 0
    done: int = 0
    todo: int = 0
    path: bytes = b""


def compact(view: Core, *, share: float = SHARE, call: Call[object] | None = None) -> Iterator[Progress]:
    """Compact the redirect files of a view's upper layer.

    Args:
        share: skip files with a smaller share of own blocks; 0 takes all.
        call: runs a function in the thread that owns the view and returns its result (default: at once, in this thread).
            Everything else runs in the caller's thread.

    Yields:
        The same record, after each step.

    Raises:
        OSError: EROFS; EIO for a damaged file.
    """
    run: Callable[[Callable[[], object]], object] = call or (lambda function: function())
    told = Progress()
    upper = view.need_upper()
    for path, ref in list(row_layer.redirects(upper.path, view.form)):
        if isinstance(ref, OSError):
            raise ref
        told.path = path
        work = _File(view, path, share)
        lacking = run(work.begin)
        if lacking is None:
            told.skipped += 1
            yield told
            continue
        try:
            told.todo = lacking  # type: ignore[assignment]
            if (yield from _anew(work, run, told)):
                told.files += 1
                yield told
                continue
            told.todo = run(work.missing)  # type: ignore[assignment]
            try:
                while told.todo:
                    told.done += run(work.fill)  # type: ignore[operator]
                    told.todo = run(work.missing)  # type: ignore[assignment]
                    yield told
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                told.skipped += 1
                yield told
                continue
            sync = run(work.sync)
            if sync is not None:
                sync(False)  # type: ignore[operator]
            if run(work.finish):
                told.files += 1
            else:
                told.skipped += 1
            yield told
        finally:
            told.todo = 0
            run(work.end)


def _anew(
    work: _File, run: Callable[[Callable[[], object]], object], told: Progress
) -> Generator[Progress, None, bool]:
    """Write a scattered file anew. Returns whether that was done; otherwise the file is unchanged."""
    fd: int = run(work.own)  # type: ignore[assignment]
    try:
        if fd < 0 or not rewrite.scattered(fd):
            return False
    finally:
        if fd >= 0:
            os.close(fd)
    twin: Twin | None = run(work.twin)  # type: ignore[assignment]
    if twin is None:
        return False
    try:
        for _ in range(rewrite.ROUNDS):
            while (piece := run(twin.next)) is not None:
                told.done += piece.copy()  # type: ignore[attr-defined]
                told.todo = piece.left  # type: ignore[attr-defined]
                yield told
            twin.sync()
            if run(twin.finish):
                return True
            if twin.dead:
                break
    except OSError:
        return False  # a fault of the file itself occurs again at once
    finally:
        run(twin.end)
    return False


class _File:
    """One file being compacted. Its methods run in the thread that owns the view."""

    def __init__(self, view: Core, path: bytes, share: float) -> None:
        self._view = view
        self._path = path
        self._share = share
        self._node: Node | None = None

    def begin(self) -> int | None:
        """The bytes that it lacks; ``None`` if it is not to be compacted (any more)."""
        node = self._find()
        file = node.data if node is not None else None
        if node is None or not isinstance(file, RowFile) or not file.writable:
            return None
        missing = file.missing()
        if file.base_end and (file.base_end - missing) / file.base_end < self._share:
            return None
        node.nlookup += 1
        self._node = node
        return missing

    def _find(self) -> Node | None:
        here: Node = self._view.root
        for name in self._path.split(b"/"):
            if not isinstance(here, Dir):
                return None
            found = self._view.child(here, name)
            if found is None:
                return None
            here = found
        return here

    def _file(self) -> RowFile | None:
        """The redirect file, while it is still that of the upper layer (a snapshot may have come between)."""
        file = self._node.data if self._node is not None else None
        return file if isinstance(file, RowFile) and file.writable else None

    def own(self) -> int:
        """A new descriptor of the file itself, or -1."""
        file = self._file()
        return os.dup(file.own_fd()) if file is not None else -1

    def twin(self) -> Twin | None:
        """Begin to write it anew; ``None`` if impossible."""
        file = self._file()
        try:
            return Twin(file) if file is not None and file.ref is not None else None
        except OSError:
            return None

    def missing(self) -> int:
        """Bytes that still show the base."""
        file = self._file()
        return file.missing() if file is not None else 0

    def fill(self) -> int:
        """Do one step. Returns the number of bytes copied."""
        file = self._file()
        return file.fill(STEP) if file is not None else 0

    def sync(self) -> Callable[[bool], None] | None:
        """The job that brings the file to the disk; for any thread."""
        file = self._file()
        return file.sync_job() if file is not None else None

    def finish(self) -> bool:
        """Remove the reference. Returns whether the file is a plain one now."""
        file = self._file()
        if file is None or file.missing():
            return False
        file.rows.make_plain(file)
        return True

    def end(self) -> None:
        """Release the file."""
        if self._node is not None:
            self._view.forget(self._node.id, 1)
            self._node = None


def compact_layer(
    lowers: list[str], layer: str, work: str, *, form: str = "auto", share: float = SHARE, durable: bool = True
) -> Iterator[Progress]:
    """:func:`compact` for an unmounted layer.

    Args:
        lowers: the layers beneath, topmost first.
        layer, work: the layer's tree and its work directory.
        durable: whether everything must be on the disk at each step.

    Raises:
        OSError: as :func:`compact`.
    """
    from cowfs.row.view import View
    from cowfs.union.options import Options

    view = View(lowers, layer, work, options=Options(form=form, volatile=not durable))
    try:
        if view.rows is not None:
            yield from compact(view, share=share)
    finally:
        view.close()


__all__ = ["SHARE", "STEP", "Progress", "compact", "compact_layer"]
