"""The interface of a backend, and the words that describe one.

A store keeps *snapshots*; each owns one *layer*, a directory that one driver fills and reads.
The store decides about layers, their names, their parents, and the order in which things reach the disk. The driver
knows only how a layer *holds* a tree. It is given ids and never sees a key, a name, a tag or the index, so a driver is
a few small functions.

Words. An **id** names a layer's directory and survives the commit. **parents** are ids, nearest
first. The layer being written is *active*; :meth:`Driver.freeze` makes it *frozen*, which is for
good. A **plan** says which directories a mount is made of (:class:`~cowfs.driver.plan.MountPlan`),
a **mount** the same in mount(8)'s words: data, a driver never mounts. A **delta** layer holds what changed against its
parents, a **whole** layer the entire tree.

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

from cowfs._record import record
from cowfs._typed import Any, ClassVar
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


@record(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The kind of a driver's layers in one store, on this host, for this user. The store knows nothing else about them.

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


@record(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a driver can run on this host, as this user, in this directory.

    Attributes:
        usable: whether it can.
        rank: how good a choice it is among usable ones; higher is better.
        reasons: one clause each, for people: what was found, or what is missing.
    """

    usable: bool
    rank: int = 0
    reasons: tuple[str, ...] = ()


@record(frozen=True, slots=True, kw_only=True)
class Changes:
    """The differences of a whole layer from the layer that it was made of. The record may name too much, never too little.

    Attributes:
        paths: path in the layer's tree (``b""``: its root) -> whether everything below it is to be looked at. It has
            each name that came, went, or means another object, and at least one name of each object whose attributes or
            data were changed.
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

        A driver without this method can run everywhere; it is chosen by name, or where no other driver can run.
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
            Corrupt: ``id`` is no name in a directory. An index may come from a stranger, and could name any directory
                for deletion.
        """
        if not id or id.startswith(".") or "/" in id or "\0" in id:
            raise Corrupt(f"the index names a layer {id!r}", remedy="restore it from a backup")
        return f"{self.root}/{id}" if id.startswith(("new-", "rm-", "live-")) else f"{self.root}/layers/{id}"

    def tree(self, id: str) -> str:
        """The directory inside it that holds the tree, or its changes."""
        return f"{self.directory(id)}/fs"

    def work(self, id: str) -> str:
        """The work directory of the layer's mounts."""
        return f"{self.directory(id)}/work"

    @contextmanager
    def open_tree(self, id: str) -> Iterator[int]:
        """A descriptor of the directory that :meth:`tree` names; until the block ends the path leads there, too.

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
            id: the layer's id; :meth:`directory` is an existing, empty directory.
            parents: frozen layers, nearest first.
            limit: the limit for mounts of the layer, without the use that is returned.

        Returns:
            The use of the data copied from the parents, which later does not count as the layer's own.

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
        """The directories that make up a mount of a layer, and the limit that the mount must keep.

        The directories exist when this returns, until the layer is removed or the host reboots.

        Args:
            parents: nearest first. A view of a whole layer shows the nearest, an active whole layer none.
            readonly: for a view.
            limit: the limit given to :meth:`create`, plus the use of the copied data.
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
        """The mount of a layer over its parents, in mount(8)'s words: the rendered :meth:`plan`.

        Args:
            id, parents, readonly, limit: as for :meth:`plan`.
            mount_type: ``kernel`` or ``fuse``; None: the driver's choice.

        Raises:
            Unsupported: this host, user or driver cannot do the type asked for.
        """
        return (self.plan(id, parents, readonly=readonly, limit=limit).record(mount_type),)

    def freeze(self, id: str) -> None:  # noqa: B027 - a driver may have nothing to do
        """Make the layer read-only for good; drop everything that only a writer needs."""

    def settle(self, id: str) -> None:  # noqa: B027 - likewise
        """Make the written data of a layer durable after the layer became a lower one of a mount that goes on."""

    def snapshot(self, id: str, target: str, ask: Callable[..., dict[str, Any]] | None) -> None:
        """Make a layer with the content of an active one at one instant, even while programs write in it. Only of
        drivers with ``snapshots``.

        Args:
            id: the active layer.
            target: the new layer's id; its directory exists and is empty.
            ask: sends a verb to the control socket of the server that has the layer mounted; None if no server has.

        Raises:
            Unsupported: the driver takes no snapshots.
            CowfsError: the server says why not.
        """
        raise Unsupported(f"the driver {self.name} takes no snapshots of layers in use")

    @contextmanager
    def disk(self, id: str, scratch: str, size: int) -> Iterator[tuple[int, int]]:
        """A frozen layer as a disk: a file system with its tree as the root directory, for a virtual machine.

        Args:
            scratch: the id of a layer whose directory is there, and empty; the caller removes it.
            size: bytes; 0: what the driver's images have.

        Yields:
            A descriptor that can be read and sought for data, and the disk's size in bytes.

        Raises:
            Unsupported: the driver keeps no images.
            InvalidArgument: a size that it cannot have.
        """
        raise Unsupported(f"the driver {self.name} keeps no disk images", remedy="cowfs migrate --to block")
        yield

    def publish(self, staged: str, id: str) -> None:
        """Give a layer another of its names, in one step: the final one, or the one for deletion.

        Args:
            staged: the id that it has (``new-ID``, say).
            id: the new id, which is free.

        Raises:
            FileNotFoundError: the layer is gone.
        """
        os.rename(self.directory(staged), self.directory(id))

    def remove(self, id: str) -> None:
        """Delete the layer's directory; a missing one is no error. The store calls this while the layer is not in use."""
        trees.remove_tree(self.directory(id))

    def usage(self, id: str) -> Usage:
        """The use of the layer's tree now, by a walk (the store keeps the result for a frozen layer).

        ``create`` returns the same for a layer that it filled.
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
        """The changes in an active whole layer since it was made of its parent; None if unknown.

        Nobody writes in the layer until the block ends. Without this method the store reads the whole layer.
        """
        yield None

    def held(self, id: str) -> Usage:
        """The use of the tree of a frozen whole layer, copied data included: from its note, else by :meth:`usage`."""
        noted = self.noted(id)
        if noted is not None:
            return noted[0]
        usage = self.usage(id)
        self.note(id, usage)
        return usage

    def noted(self, id: str) -> tuple[Usage, tuple[int, ...]] | None:
        """The figures of :meth:`note`, if there are any."""
        try:
            text = read_small(f"{self.directory(id)}/{HELD}", limit=500).decode("ascii", "replace")
        except FileNotFoundError:
            return None
        words = text.removesuffix("\n").split(" ")
        if (
            not text.endswith("\n")
            or not 2 <= len(words) <= 10
            or not all(word.isascii() and word.isdigit() and len(word) <= 19 for word in words)
        ):
            return None
        bytes, inodes, *sums = map(int, words)
        return Usage(bytes=bytes, inodes=inodes), tuple(sums)

    def note(self, id: str, held: Usage, sums: Sequence[int] = ()) -> None:
        """Note the use of a layer's tree. A walk restores a lost note.

        Args:
            id: a layer that is about to be frozen.
            held: the use of its tree.
            sums: the parts that it was summed from (:class:`cowfs.union.measure.Sums`), if known.

        Raises:
            OSError: the note cannot be written.
        """
        text = " ".join(map(str, (held.bytes, held.inodes, *sums))) + "\n"
        atomic.write_file(f"{self.directory(id)}/{HELD}", text.encode(), durable=False)

    def limit(self, id: str, limit: Limit) -> None:
        """Hold an active layer to a limit for every writer, in place of the limit before.

        The store asks it of drivers with ``own_limit``, and before a mount is made or described: with the snapshot's
        limit if the kernel mounts, with none if cowfs's server does, which holds it itself.

        Args:
            limit: on the layer's own data, without the copied data; ``Limit()`` for none.

        Raises:
            Unsupported: this host cannot hold it.
        """
        if limit:
            raise Unsupported(f"the driver {self.name} holds no limit itself")

    def strays(self) -> list[str]:
        """Ids of layers that have remains but no directory; ``gc`` gives them a directory and has them removed.

        Only a driver that keeps layers elsewhere than in their directories has any.
        """
        return []

    def explain(self) -> dict[str, str]:
        """Lines of ``cowfs info`` that only this driver knows, by name: ``limits``, say. Changes nothing."""
        return {}

    def check(self, id: str) -> list[str]:
        """The damage of a layer, one line for each fault, found quickly, without a walk."""
        if not os.path.isdir(self.directory(id)):
            return [f"layer {id} is gone: {self.directory(id)}"]
        if not os.path.isdir(self.tree(id)):
            return [f"layer {id} has no tree: {self.tree(id)}"]
        return []

    def close(self) -> None:  # noqa: B027 - likewise
        """Close every descriptor. Idempotent."""


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
