"""The class that users import, put together from its groups of verbs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cowfs.store.blocks import BlockVerbs
from cowfs.store.events import EventVerbs
from cowfs.store.files import FileVerbs
from cowfs.store.house import HouseVerbs
from cowfs.store.running import RunVerbs
from cowfs.store.squash import SquashVerbs

__all__ = ["Store"]


if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from cowfs.archive import ApplyOptions
    from cowfs.store.applying import Progress
    from cowfs.store.disks import DiskCounts
    from cowfs.store.migrating import Migrated, Progress as Migration
    from cowfs.store.sending import Sent


class Store(BlockVerbs, SquashVerbs, RunVerbs, HouseVerbs, FileVerbs, EventVerbs):
    """A store of snapshots in one directory. Make it with :meth:`open`.

    >>> with Store.open("store") as store:
    ...     records = store.prepare("work", size="1G")
    ...     info = store.commit("work", "base")
    ...     [(each.name, each.kind.value) for each in store.walk()]
    [('base', 'committed')]

    Threads: any may call any verb, each has its own connection to the index; two verbs on one key exclude each other, the
    second raises FailedPrecondition. Processes: any number may have the store open; the same holds.

    Fork: a child may go on with the store it inherited; it gets a connection of its own at its first verb. What a verb was doing
    in another thread at the fork is the parent's alone.

    A kill at any moment leaves a verb done or not begun, or finished by the next :meth:`open` (docs/internals/crash-safety.md).
    A closed store refuses every verb with FailedPrecondition.
    """

    def send(
        self,
        names: Sequence[str],
        pipe: BinaryIO,
        *,
        since: str | None = None,
        answers: BinaryIO | None = None,
        progress: Progress | None = None,
    ) -> Sent:
        """Write committed snapshots with their ancestors to a pipe, for :meth:`receive` of another store.

        Of a ``row`` store the layers that no archive made are sent as the blocks that changed. The format is :mod:`cowfs.store.stream`.

        Args:
            names: committed snapshots, or tags.
            pipe: where the stream goes; binary.
            since: an ancestor of them all that the other store has: it, and what is beneath it, are left out.
            answers: what the receiver answers (its ``answers``): then only what it lacks is sent.
            progress: told how far it is.

        Returns:
            The layers that were sent.

        Raises:
            NotFound: no such snapshot or tag.
            InvalidArgument: not committed, or ``since`` is no ancestor.
            Corrupt: the answers are cut short or damaged.
            OSError: the pipe cannot be written; BrokenPipeError where the receiver ended.
        """
        from cowfs.store.sending import Sending, Source

        source = Source(
            index=self.index,
            by_blocks=bool(self.driver.capabilities.row),
            resolve=self.resolve,
            config=self.config,
            diff_ids=self._diff_ids,
            is_archived=self._is_archived,
            write_layer=self._write_layer,
            export_blocks=self.export_blocks,
        )
        return Sending(source).send(names, pipe, since=since, answers=answers, progress=progress)

    def receive(
        self,
        pipe: BinaryIO,
        *,
        answers: BinaryIO | None = None,
        options: ApplyOptions | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Bring in what :meth:`send` wrote. Each layer is checked against its diff id; those that came whole stay when the rest fails.

        Names are kept where they are free here, else a layer is named by its chain id. A tag is a tag here, too, with its configuration.

        Args:
            pipe: the stream; binary.
            answers: where to say what is here already, for a sender that asks.
            options: bounds for each layer, and what to do without privilege.
            progress: told how far it is.

        Returns:
            Names of the layers that were new, bottom first.

        Raises:
            InvalidArgument: no such stream, a hostile layer, or a name that is another tree's here.
            Corrupt: the stream is cut short or damaged, or a layer is not what it says.
            FailedPrecondition: it stands on a layer that is not here.
            OSError: no room, and so on.
        """
        from cowfs.store.sending import receive

        return receive(self, pipe, answers=answers, options=options, progress=progress)

    @classmethod
    def migrate(
        cls,
        root: str | os.PathLike[str] | None,
        driver: str,
        target: str | os.PathLike[str] | None = None,
        *,
        cut_times: bool = False,
        fsync: bool = True,
        progress: Migration | None = None,
    ) -> Migrated:
        """Move a store to another driver: all snapshots, tags, labels, configurations, limits and times.

        A killed process leaves the old store or the new one; call it again to go on. Nobody else may use the store meanwhile.

        Args:
            root: the store; default: :func:`~cowfs.store.opening.default_root`.
            driver: the driver that it is to have.
            target: make the new store here and keep the old one; None: the new one takes the old one's place.
            cut_times: leave out fractions of seconds where the new layers cannot hold them.
            fsync: as for :meth:`open`.
            progress: told (the name of a snapshot, how many are done, how many there are).

        Raises:
            NotFound: no store there, or no such driver.
            InvalidArgument: it has that driver already; it is a mount point and ``target`` is None; something else is in the place.
            FailedPrecondition: a snapshot is mounted, or was changed meanwhile.
            Corrupt: a snapshot is in quarantine.
            Unsupported: the driver cannot run there, or cannot hold what the snapshots have.
        """
        from cowfs.store import migrating

        return migrating.migrate(cls, root, driver, target, cut_times=cut_times, fsync=fsync, progress=progress)

    def export_disk(
        self, name: str, target: BinaryIO, *, format: str = "raw", size: str | int | None = None
    ) -> DiskCounts:
        """Write a committed snapshot as a disk for a virtual machine: one file system, without partitions, that has the tree for its root.

        Only of the driver ``block``; the file system has a UUID of its own each time.

        Args:
            name: a committed snapshot, or a tag.
            target: a stream; a file gets holes, and a pipe will do.
            format: ``raw`` or ``qcow2`` (version 3).
            size: of the disk, bytes or "20G"; default: as large as the store's images are.

        Returns:
            Its size, and the bytes written.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: not committed, no such format, or a size that it cannot have.
            Unsupported: the driver keeps no images.
        """
        from cowfs.store.disks import export_disk

        return export_disk(self.driver, self.resolve(name), target, format=format, size=size)
