"""What a backend is, and the words it is described with.

A store keeps *snapshots*; each owns one *layer*, a directory that one driver fills and reads.
The store decides which layers there are, what they are called, which is whose parent, and in
which order things reach the disk. The driver knows only how a layer *holds* a tree. It is given
ids and never sees a key, a name, a tag or the index, so a driver is a few small functions.

Words. An **id** names a layer's directory and survives the commit. **parents** are ids, nearest
first. The layer being written is *active*; :meth:`Driver.freeze` makes it *frozen*, which is for
good. A **plan** says which directories a mount is made of (:class:`~cowfs.driver.plan.MountPlan`),
a **mount** the same in mount(8)'s words: data, a driver never mounts. A **delta** layer holds what changed against its parents, a **whole** layer the
entire tree.

On disk. Layer ``ID`` is ``ROOT/layers/ID``. While it is being made it is ``ROOT/new-ID``, while
it is being deleted ``ROOT/rm-ID``; the store has the driver move it (:meth:`Driver.publish`), and hands the driver the
id with the prefix. So nothing in a layer's directory may name the directory's own path. The tree that users
see, or its changes, is where :meth:`Driver.tree` says (``fs``), and :meth:`Driver.work` beside it, on the same file system,
belongs to whoever mounts; everything else in there belongs to the driver and to the store's files called ``cowfs-*``.

A driver may keep a layer in another form (an image, say) and make it a directory when it is wanted: between the ends of
:meth:`Driver.open_tree`, and from a :meth:`Driver.plan` until the layer is removed. At other times there need be nothing at
:meth:`Driver.tree`, and the store looks for nothing there.

Invariants, which :class:`cowfs.testing.DriverSuite` checks for any driver:

1. ``create`` either returns with a complete layer or leaves what ``remove`` can delete.
2. The root directory of a fresh layer looks as its parent's: mode, owner, times, xattrs.
3. Nothing written through the mounts of one layer changes any other layer.
4. ``freeze`` may be repeated, and a crash in it leaves the layer writable or frozen.
5. ``usage`` counts the layer itself: for a whole layer the difference to what ``create`` copied.
6. ``remove`` and ``close`` may be repeated.
7. A limit given to ``create`` holds in every mount that ``plan`` and ``mounts`` describe.

8. ``capabilities`` are true.

A driver that keeps whole layers in plain directories is no more than this::

    import os

    from cowfs.driver import Driver, copy_tree
    from cowfs.model import Usage

    class CopyDriver(Driver):
        name = "copy"
        whole = True

        def create(self, id, parents, limit):
            os.mkdir(self.tree(id), 0o755)
            os.mkdir(self.work(id), 0o700)
            if not parents:
                return Usage()
            copy_tree(self.tree(parents[0]), self.tree(id))
            return self.usage(id)

It becomes ``Store.open(driver="copy")`` by an entry point in the group ``cowfs.drivers``
(:mod:`cowfs.driver.registry`). ``drivers/vfs.py`` is the same with the edges that real use needs.

Errors: OSError from the host as it is; :class:`~cowfs.errors.Unsupported` for what this driver
cannot do; :class:`~cowfs.errors.Corrupt` when a layer contradicts itself.

Threads: a driver keeps no state between calls but its options, so any thread may call it.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from cowfs.driver.plan import MountPlan
from cowfs.errors import Corrupt, InvalidArgument, Unsupported
from cowfs.format import whiteout
from cowfs.model import Limit, Mount, Usage
from cowfs.sys import atomic, files, host, loop, trees
from cowfs.sys.regular import read_small
from cowfs.sys.trees import copy_tree

__all__ = ["Capabilities", "Changes", "Driver", "Probe", "copy_tree"]

HELD = "cowfs-held"
"""The note beside a whole layer of what its tree holds: bytes, inodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The kind of a driver's layers in one store, on this host, for this user. The store asks nothing else about it.

    Attributes:
        whole: each layer is an entire tree; otherwise it is a delta in the overlay format.
        live: a layer in use can become a lower one of the mount that goes on (live snapshot, rollback).
        own_limit: a layer can hold a limit itself, whoever writes in it (:meth:`Driver.limit`); otherwise only cowfs's own
            server holds one.
        reflink: what ``create`` copies shares its extents with the parent, so a copy takes no room for data.
        snapshots: ``create`` takes a snapshot of its nearest parent: in constant time, and all times and inode numbers stay.
        kernel_mount: the kernel mounts the layers, for this user.
        unprivileged: an ordinary user can keep a store of them.
        row: bytes a block of the redirect files that the mounts make (docs/row.md); 0: they make none.
        xattrs: files in the layers can have extended attributes.
        time_step: nanoseconds by which times in the layers may lie behind the clock: 0, or a second where they have no fractions.
    """

    whole: bool = False
    live: bool = True
    own_limit: bool = False
    reflink: bool = False
    snapshots: bool = False
    kernel_mount: bool = True
    unprivileged: bool = True
    row: int = 0
    xattrs: bool = True
    time_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a driver can run on this host, as this user, in this directory.

    Attributes:
        usable: it can.
        rank: how good a choice it is among usable ones; higher is better.
        reasons: one clause each, for people: what was found, or what is missing.
    """

    usable: bool
    rank: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is different in a whole layer from the layer that it was made of. Too much may be named, never too little.

    Attributes:
        paths: path in the layer's tree (``b""``: its root) -> whether everything below it is to be looked at. Named are names that
            came, went, or mean another object, and each object whose attributes or data were changed, by one of its names at least.
        names: all paths in the layer's tree of one inode that has several.
    """

    paths: Mapping[bytes, bool]
    names: Callable[[int], Sequence[bytes]]


class Driver(ABC):
    """One backend. See the module for words, invariants and an example.

    Args:
        root: the store's directory, absolute.
        form: ``trusted`` or ``user``: the xattr form of the store's layers.
        fsync: whether what :meth:`create` and :meth:`freeze` made must be on the disk when they return.
        options: the driver's own, from ``Store.open``.

    Raises:
        InvalidArgument: an option that the driver does not know.
    """

    name: ClassVar[str]
    whole: ClassVar[bool] = False
    """Short for a driver whose :attr:`capabilities` are the usual ones of whole layers."""

    own_form: ClassVar[str] = ""
    """The form of this driver's layers; "": what the user who makes the store can have (``trusted`` or ``user``)."""

    row: int = 0
    """Short for a driver whose :attr:`capabilities` are the usual ones of redirect files of so many bytes a block."""

    def __init__(self, root: str, *, form: str = "auto", fsync: bool = True, **options: Any) -> None:
        self.root = root
        self.form = whiteout.choose_form(form)
        self.fsync = fsync
        if options:
            raise InvalidArgument(f"the driver {self.name} has no option {', '.join(sorted(options))}")

    @classmethod
    def probe(cls, root: str) -> Probe:
        """Whether this driver can keep a store below ``root`` (which exists). Changes nothing.

        A driver that says nothing can run everywhere, and is chosen only by name or where nothing else can.
        """
        return Probe(usable=True, reasons=("it needs nothing of the host",))

    @cached_property
    def capabilities(self) -> Capabilities:
        """The kind of the layers here; a driver that keeps neither deltas like overlay nor plain copies overrides it."""
        return Capabilities(
            whole=self.whole,
            live=not self.whole,
            reflink=self.whole and _can_reflink(self.root),
            kernel_mount=host.has_cap(host.CAP_SYS_ADMIN)
            and not (self.row and loop.why_no_images(self.root, devices=True)),
            row=self.row,
        )

    # -- places

    def directory(self, id: str) -> str:
        """The layer's directory, also while it is being made or deleted.

        Raises:
            Corrupt: ``id`` is no name in a directory. An index may come from elsewhere, and would have us delete what it likes.
        """
        if not id or id.startswith(".") or "/" in id or "\0" in id:
            raise Corrupt(f"the index names a layer {id!r}", remedy="restore it from a backup")
        return f"{self.root}/{id}" if id.startswith(("new-", "rm-", "live-")) else f"{self.root}/layers/{id}"

    def tree(self, id: str) -> str:
        """The directory inside it that holds the tree, or its changes."""
        return f"{self.directory(id)}/fs"

    def work(self, id: str) -> str:
        """The work directory of its mounts."""
        return f"{self.directory(id)}/work"

    @contextmanager
    def open_tree(self, id: str) -> Iterator[int]:
        """A descriptor of the directory that :meth:`tree` names, which until the block ends is there by that path, too.

        A driver whose layers are no plain directories mounts here.

        Raises:
            FileNotFoundError: the layer has no tree.
        """
        fd = os.open(self.tree(id), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    # -- verbs

    @abstractmethod
    def create(self, id: str, parents: Sequence[str], limit: Limit) -> Usage:
        """Make the layer's directory and fill it.

        Args:
            id: what :meth:`directory` maps to a path that exists and is empty.
            parents: frozen layers, nearest first.
            limit: what mounts of it must keep to; counted without what is returned.

        Returns:
            What was copied from the parents, which later does not count as the layer's own.

        Raises:
            Unsupported: the limit cannot be held.
        """

    def plan(
        self,
        id: str,
        parents: Sequence[str],
        *,
        readonly: bool = False,
        limit: Limit = Limit(),  # noqa: B008 - frozen
    ) -> MountPlan:
        """Which directories a mount of a layer is made of, and what the mount must keep to.

        They are there when this returns, until the layer is removed or the host starts anew.

        Args:
            parents: nearest first. A view of a whole layer shows the nearest, an active whole layer none.
            readonly: for a view.
            limit: the one given to :meth:`create`, with what was copied.
        """
        can = self.capabilities
        beneath = parents if not can.whole else parents[:1] if readonly else ()
        return MountPlan(
            lowers=tuple(self.tree(parent) for parent in beneath),
            upper=self.tree(id),
            work=self.work(id),
            empty=f"{self.root}/empty",
            readonly=readonly,
            limit=limit,
            trusted=self.form.redirects,
            row=can.row,
            form=self.own_form,
            why_not_kernel=self._why_not_layers() or self._why_not_kernel(limit),
            why_not_image=self._why_not_kernel(limit),
        )

    def _why_not_layers(self) -> str:
        return "the kernel's overlayfs cannot read redirect files" if self.capabilities.row else ""

    def _why_not_kernel(self, limit: Limit) -> str:
        can = self.capabilities
        if limit and not can.own_limit:
            return "a bind mount holds no limit" if can.whole else "the kernel's overlayfs holds no limit"
        if not can.kernel_mount:
            return f"layers of {self.name} are not mounted by the kernel, or not by this user"
        return ""

    def mounts(
        self,
        id: str,
        parents: Sequence[str],
        *,
        readonly: bool = False,
        limit: Limit = Limit(),  # noqa: B008 - frozen
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """How to mount a layer over its parents, in mount(8)'s words: :meth:`plan`, rendered.

        Args:
            mount_type: ``kernel`` or ``fuse`` where the caller insists.

        Raises:
            Unsupported: this host, user or driver cannot do the type asked for.
        """
        return (self.plan(id, parents, readonly=readonly, limit=limit).record(mount_type),)

    def freeze(self, id: str) -> None:  # noqa: B027 - a driver may have nothing to do
        """Nothing will be written any more; drop what only a writer needs."""

    def settle(self, id: str) -> None:  # noqa: B027 - likewise
        """The layer became a lower one of a mount that goes on; make what was written hold, and leave the rest alone."""

    def snapshot(self, id: str, target: str, ask: Callable[..., dict[str, Any]] | None) -> None:
        """Make a layer that holds what an active one holds at one instant, whoever writes in it. Only of drivers with ``snapshots``.

        Args:
            id: the active layer.
            target: the new one's id; its directory is there, and empty.
            ask: puts a verb of its control socket to the server that has the layer mounted; None where none has.

        Raises:
            Unsupported: the driver takes no snapshots.
            CowfsError: the server says why not.
        """
        raise Unsupported(f"the driver {self.name} takes no snapshots of layers in use")

    def publish(self, staged: str, id: str) -> None:
        """Give a layer another of its names, in one step: the final one, or the one that it is deleted by.

        Args:
            staged: the id that it has (``new-ID``, say).
            id: the id that it gets; nothing has it.

        Raises:
            FileNotFoundError: the layer is gone.
        """
        os.rename(self.directory(staged), self.directory(id))

    def remove(self, id: str) -> None:
        """Delete the layer's directory; one that is gone is fine. Called when nobody has the layer in use."""
        trees.remove_tree(self.directory(id))

    def usage(self, id: str) -> Usage:
        """What the layer's tree holds now, by a walk (the store keeps the result of a frozen one).

        Also what ``create`` returns of a layer that it filled.
        """
        from cowfs.union.layers import Descriptors, Layer
        from cowfs.union.quota import measure

        with self.open_tree(id):
            layer = Layer(os.fsencode(self.tree(id)), 0, Descriptors())
            try:
                return measure(layer, self.form)
            finally:
                layer.close()

    @contextmanager
    def changes(self, id: str, parent: str) -> Iterator[Changes | None]:
        """What changed in an active whole layer since it was made of its parent; None where that is not known.

        Nobody writes in the layer until the block ends. A driver that cannot tell need not have this: all of the layer is read then.
        """
        yield None

    def held(self, id: str) -> Usage:
        """What the tree of a frozen whole layer holds, what was copied included: as it was noted, else by :meth:`usage`."""
        noted = self.noted(id)
        if noted is not None:
            return noted[0]
        usage = self.usage(id)
        self.note(id, usage)
        return usage

    def noted(self, id: str) -> tuple[Usage, tuple[int, ...]] | None:
        """What :meth:`note` noted, if it did."""
        try:
            text = read_small(f"{self.directory(id)}/{HELD}", limit=500).decode("ascii", "replace")
        except FileNotFoundError:
            return None
        if re.fullmatch(r"[0-9]{1,19}( [0-9]{1,19}){1,9}\n", text) is None:
            return None
        bytes, inodes, *sums = map(int, text.split())
        return Usage(bytes=bytes, inodes=inodes), tuple(sums)

    def note(self, id: str, held: Usage, sums: Sequence[int] = ()) -> None:
        """Note what the tree of a layer holds, and the parts that this was counted of. A note that is lost is found again by a walk."""
        text = " ".join(map(str, (held.bytes, held.inodes, *sums))) + "\n"
        atomic.write_file(f"{self.directory(id)}/{HELD}", text.encode(), durable=False)

    def limit(self, id: str, limit: Limit) -> None:
        """Hold an active layer to a limit, whoever writes in it, in place of the one before.

        The store asks it of drivers with ``own_limit``, and before a mount is made or described: with the snapshot's limit if the kernel
        mounts, with none if cowfs's server does, which holds it itself.

        Args:
            limit: on what the layer holds itself, without what was copied; ``Limit()`` for none.

        Raises:
            Unsupported: this host cannot hold it.
        """
        if limit:
            raise Unsupported(f"the driver {self.name} holds no limit itself")

    def strays(self) -> list[str]:
        """Ids of layers of which there is something, but no directory; ``gc`` gives them one and has them removed.

        Only a driver that keeps layers elsewhere than in their directories has any.
        """
        return []

    def explain(self) -> dict[str, str]:
        """Lines of ``cowfs info`` that only this driver knows, by name: ``limits``, say. Changes nothing."""
        return {}

    def check(self, id: str) -> list[str]:
        """What is wrong with a layer, one line each; quick: no walk."""
        if not os.path.isdir(self.directory(id)):
            return [f"layer {id} is gone: {self.directory(id)}"]
        if not os.path.isdir(self.tree(id)):
            return [f"layer {id} has no tree: {self.tree(id)}"]
        return []

    def close(self) -> None:  # noqa: B027 - likewise
        """Let go of whatever is open. Idempotent."""


def _can_reflink(root: str) -> bool:
    """Whether files below ``root`` can share extents: tried with two files that have no names."""
    try:
        one = os.open(root, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        other = os.open(root, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            os.write(one, b"\0" * 4096)
            return files.reflink(one, other)
        finally:
            os.close(other)
    except OSError:
        return False
    finally:
        os.close(one)
