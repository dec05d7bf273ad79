"""The upper layer takes over the content of the layer right beneath it, while the view goes on.

Strategy. Every visible object of the lower layer is copied up, as before a change, one object between two requests; its
whiteouts are made again above it, and a directory that shows nothing of the layers beneath becomes opaque. Each step is
an ordinary copy-up, so the tree is the same before and after each, *with and without* the layer beneath. Once none of
it is visible any more, it can be taken away (:func:`cowfs.union.restack.restack`); if that does not happen, nothing is
lost.

No file may come to depend on the layer while this runs: a copy-up that would be a metacopy of one of its files becomes
a full copy (:meth:`Absorption.before_up`). So one pass over the layer, and one over the upper layer for the metacopies
and redirect files made before, are enough; the second is repeated when a directory was renamed under it.

A layer that renamed directories is another matter: paths from the upper layer to lower objects lead through those
renames. So the whole visible content of such a directory is copied, data included.

Redirect files keep the blocks that lower layers hold: only those of the layer that goes are copied.

Threads: :func:`absorb` runs in its caller's; all that touches the view goes through ``call``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial

from cowfs._record import record
from cowfs._typed import TYPE_CHECKING, Any
from cowfs.format import whiteout
from cowfs.model import Usage
from cowfs.sys import files, xattr
from cowfs.union import copyup, hardlinks, merge, quota, stored
from cowfs.union.copyup import Stage
from cowfs.union.filedata import Absorbing, Lower
from cowfs.union.layers import Layer, Source
from cowfs.union.node import DT_REG, PLAIN, Dir, Node
from cowfs.union.restack import aside, depends, own_data

if TYPE_CHECKING:
    from cowfs.union.core import Core

__all__ = ["Absorption", "absorb"]

Call = Callable[[Callable[[], Any]], Any]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASSES = 20
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})  # moved or removed: any other error ends the absorption


def absorb(view: Core, call: Call | None = None) -> Usage:
    """Bring every visible object of the topmost lower layer into the upper one.

    Args:
        call: runs a function in the thread that owns the view and returns its result (default: at once, in this thread).

    Returns:
        Bytes and inodes that the upper layer holds more than before.

    Raises:
        OSError: EROFS; ENOSPC, EIO from the host. Copies made until then stay, harmlessly.
    """
    run: Call = call or (lambda function: function())
    work: Absorption = run(lambda: Absorption(view))
    try:
        for kind, path, names in _walk(work.layer.root.open()):
            if kind == "leave":
                run(partial(work.leave, path))
                continue
            run(partial(work.enter, path))
            for name in names:
                _bring(work, run, path + b"/" + name if path else name)
        for path in run(work.redirected):
            run(partial(work.take_all, path))
        for _ in range(_PASSES):
            moves = work.moves
            for path in _unfinished(view):
                _bring(work, run, path, anywhere=False)
            if work.moves == moves:
                break
        if view.must_sync and view.rows is not None:
            run(view.rows.sync_job)()
        return work.ledger.usage()
    finally:
        run(work.end)


def _bring(work: Absorption, run: Call, path: bytes, *, anywhere: bool = True) -> None:
    step = run(partial(work.begin, path, anywhere))
    while step is not None:
        if isinstance(step, Stage):
            step.run()
            step = run(partial(work.publish, step))
        elif isinstance(step, _Apart):
            step.job(False)
            step = run(step.then)
        else:
            step = run(step)


@record(frozen=True, slots=True)
class _Apart:
    """A step that waits for the disk, and goes on in the view's thread."""

    job: Callable[[bool], None]
    then: Callable[[], Any]


def _walk(root: int) -> Iterator[tuple[str, bytes, list[bytes]]]:
    """The directories of a frozen layer: each with its other names before, and again after, those in it."""
    stack = [("enter", b"")]
    while stack:
        kind, path = stack.pop()
        if kind == "leave":
            yield kind, path, []
            continue
        fd = files.open_beneath(root, path, _DIR)
        try:
            with os.scandir(fd) as found:
                entries = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in found]
        finally:
            os.close(fd)
        yield kind, path, [name for name, is_dir in entries if not is_dir]
        stack.append(("leave", path))
        stack += [("enter", path + b"/" + name if path else name) for name, is_dir in entries if is_dir]


def _unfinished(view: Core) -> Iterator[bytes]:
    """Paths in the upper layer of files whose data, or a part of it, is elsewhere. From any thread."""
    form = view.form
    root = view.stack.layers[-1].root.open()
    pending = [b""]
    while pending:
        path = pending.pop()
        try:
            fd = files.open_beneath(root, path, _DIR)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            continue  # moved or removed meanwhile
        try:
            with os.scandir(fd) as found:
                entries = [
                    (os.fsencode(e.name), e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False))
                    for e in found
                ]
            for name, is_dir, is_file in entries:
                inner = path + b"/" + name if path else name
                if is_dir:
                    pending.append(inner)
                elif is_file:
                    try:
                        stands_on = xattr.try_get(fd, name, form.row) or (
                            form.redirects and xattr.try_get(fd, name, form.metacopy) is not None
                        )
                    except FileNotFoundError:  # renamed or removed meanwhile, as Absorption.moves shows
                        continue
                    if stands_on:
                        yield inner
        finally:
            os.close(fd)


class Absorption:
    """One absorption under way: ``view.moves.leaving`` while it is. Its methods run in the thread that owns the view.

    Attributes:
        layer: the layer to remove.
        ledger: what was copied.
        moves: the number of directories renamed meanwhile.
    """

    def __init__(self, view: Core) -> None:
        view.need_upper()
        self.view = view
        self.layer: Layer = view.stack.layers[-2]
        self.ledger = quota.ledger(view)
        self.moves = 0
        self._renames = hardlinks.scan_redirects(view, self.layer)
        if view.stack.upper not in view.moves.redirects:
            hardlinks.find_moved(view)
        view.moves.absorbing(self)

    def end(self) -> None:
        """End the absorption."""
        if self.view.moves.absorbed(self) and self.view.space is not None:
            self.view.space.later(self.ledger)

    def renamed(self) -> None:
        """Count the rename of a directory."""
        self.moves += 1

    def before_up(self, node: Node) -> None:
        """Copy a file fully before it is copied up, renamed or linked, so that it does not depend on the layer."""
        if node.type == DT_REG and (node.where is not None or node.data is not PLAIN) and self._stands_on(node):
            with aside(self.view, self.ledger):
                own_data(self.view, node)

    def _stands_on(self, node: Node) -> bool:
        file = node.data
        if file.pieced and file.home is not self.layer:
            assert self.view.rows is not None
            if self.view.rows.stands_on(node, self.layer):
                return True
        elif depends(node, {self.layer}):
            return True
        if isinstance(file, Lower) and self.view.in_upper(node) and self._has(file.path):
            return True  # the way to its data leads through the layer's metacopy, which a redirect may have taken elsewhere
        return bool(self._renames) and (node.data is not PLAIN or not self.view.in_upper(node))

    def _has(self, path: bytes) -> bool:
        """Whether the layer has anything at a path of the merged lower tree, whose topmost it is."""
        head, _, name = path.rpartition(b"/")
        try:
            fd = files.open_beneath(self.layer.root.open(), head, _DIR)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        try:
            os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        finally:
            os.close(fd)
        return True

    # -- directories ------------------------------------------------------------------------------

    def _shown(self, path: bytes) -> list[Node]:
        """The nodes that a file of the layer is in the merged tree."""
        found = [self._at(candidate) for candidate in hardlinks.merged_paths(self.view, self.layer, path)]
        return [node for node in found if node is not None]

    def _at(self, path: bytes) -> Node | None:
        here: Node | None = self.view.root
        for name in path.split(b"/") if path else ():
            if not isinstance(here, Dir):
                return None
            here = self.view.child(here, name)
        return here

    def _directory(self, path: bytes) -> tuple[Dir, Source] | None:
        """The merged directory of a directory of the layer, and its source; None if it is hidden."""
        inside = path + b"/" if path else b""  # if a name in it is visible, so is the directory, moved or not
        for candidate in hardlinks.merged_paths(self.view, self.layer, inside + b"-"):
            node = self._at(candidate.rpartition(b"/")[0])
            if isinstance(node, Dir):
                for source in node.sources:
                    if source.layer is self.layer and source.path() == path:
                        return node, source
        return None

    def _stands_alone(self, directory: Dir) -> bool:
        """Whether a directory has no source beneath the layer."""
        return directory.record is None and directory.sources[-1].layer.index >= self.layer.index

    def enter(self, path: bytes) -> None:
        """Bring a directory of the layer up, with the layer's whiteouts."""
        there = self._directory(path)
        if there is None:
            return
        directory, source = there
        view = self.view
        exempt = xattr.try_get(source.open(), b"", view.form.exempt) is not None
        with aside(view, self.ledger):
            up = copyup.up_dir(view, directory, exempt=exempt)
        if self._stands_alone(directory):
            return
        children = directory.children if directory.children is not None else view.load(directory)
        for name in merge.scan(source, view.form)[1]:
            if name in children:
                made = view.child(directory, name)
                if isinstance(made, Dir) and made.lowpath is None and self._stands_alone(made):
                    self._seal(made)  # it was made over a directory that the layer hides
            elif not (up.whiteouts is not None and name in up.whiteouts):
                assert view.stack.workdir is not None
                if not whiteout.exists(up.open(), name):
                    with stored.kept_times(up):
                        view.stack.workdir.put_whiteout(up.open(), name)
                    self.ledger.hid(up, name)
                if up.whiteouts is not None:
                    up.whiteouts.add(name)

    def leave(self, path: bytes) -> None:
        """Finish a directory whose entries in the layer are all above."""
        there = self._directory(path)
        if there is None or not path:
            return
        if self._stands_alone(there[0]):
            self._seal(there[0])
        self.view.drop(there[0])

    def _seal(self, directory: Dir) -> None:
        """Make a directory opaque."""
        with aside(self.view, self.ledger):
            up = copyup.up_dir(self.view, directory)
        xattr.setx(up.open(), b"", self.view.form.opaque, b"y")
        xattr.setx(
            up.open(), b"", self.view.form.impure, b"y"
        )  # a merging directory needs no such mark, and must have none

    def redirected(self) -> list[bytes]:
        """Directories that the layer renamed, or whose path leads through one: their whole visible content is copied."""
        if not self._renames:
            return []
        view = self.view
        through = [now for _, now in self._renames] + [low for low, _ in self._renames]
        shown = [self._directory(now) for _, now in self._renames]
        found = [view.path(there[0]) for there in shown if there is not None]
        for directory in list(view.moves.moved):
            low = directory.lowpath
            if low is not None and any(low == path or low.startswith(path + b"/") for path in through):
                found.append(view.path(directory))
        return found

    def take_all(self, path: bytes) -> None:
        """Copy the whole visible content of a directory, and make it opaque."""
        top = self._at(path)
        if not isinstance(top, Dir) or top is self.view.root:
            return
        pending: list[Dir] = [top]
        order: list[Dir] = []
        while pending:
            directory = pending.pop()
            order.append(directory)
            children = directory.children if directory.children is not None else self.view.load(directory)
            for name in list(children):
                node = self.view.child(directory, name)
                if isinstance(node, Dir):
                    pending.append(node)
                elif node is not None and (node.data is not PLAIN or not self.view.in_upper(node)):
                    with aside(self.view, self.ledger):
                        own_data(self.view, node)
        for directory in reversed(order):
            self._seal(directory)

    # -- files ------------------------------------------------------------------------------------

    def begin(self, path: bytes, anywhere: bool) -> Any:
        """The first step of bringing up the data of a file of the layer, or (not ``anywhere``) of the upper layer.

        Returns:
            None if it is done; a stage to run and hand to :meth:`publish`; or the next step to call.
        """
        step = None
        for node in self._shown(path) if anywhere else [self._at(path)]:
            if node is None or isinstance(node, Dir) or not self._stands_on(node):
                continue
            step = self._bring_pieces(node) if node.data.pieced else self._bring(node)
        return step

    def _bring(self, node: Node) -> Stage | None:
        view = self.view
        with aside(view, self.ledger):
            if node.type != DT_REG or view.size(node) == 0:
                copyup.up_meta(view, node)
                return None
            stage = copyup.writable(view, node, plain=True)
            if stage is None:
                return None
            if not stage.small:
                node.nlookup += 1
                return stage
            stage.run()
            copyup.publish(view, stage)
        self._done(node)
        return None

    def publish(self, stage: Stage) -> None:
        """The second step."""
        node = stage.node
        try:
            with aside(self.view, self.ledger):
                copyup.publish(self.view, stage)
        finally:
            node.nlookup -= 1
            self._done(node)

    def _done(self, node: Node) -> None:
        node.space = None
        self.view.drop(node)

    def _bring_pieces(self, node: Node) -> Callable[[], Any]:
        """Bring up a redirect file: the layer's blocks, or all of them if its base cannot be named any more."""
        assert self.view.rows is not None
        with aside(self.view, self.ledger):
            work = self.view.rows.absorb(node, self.layer, renames=bool(self._renames))
        node.nlookup += 1
        return partial(self._fill, node, work)

    def _fill(self, node: Node, work: Absorbing) -> Any:
        with aside(self.view, self.ledger):
            if work.step():
                return partial(self._fill, node, work)
            job = work.sync_job()
        if job is None:
            node.nlookup -= 1
            return None
        return _Apart(job, partial(self._finish, node, work))

    def _finish(self, node: Node, work: Absorbing) -> Any:
        if not work.finish():
            return partial(self._fill, node, work)
        node.nlookup -= 1
        self._done(node)
        return None


def complete(view: Core) -> bool:
    """Whether no file in use stands on the topmost lower layer. A safety net; only between requests."""
    layer = view.stack.layers[-2]
    for node in view.nodes.values():
        if isinstance(node, Dir) or node.parent is None:
            continue
        if node.where is not None and node.where.layer is layer:
            return False
        if isinstance(node.data, Lower) and node.data.where.layer is layer:
            return False
    return True
