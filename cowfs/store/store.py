"""The class that users import: the life of a store, and its verbs.

Rule: the verbs' signatures and documentation are in :mod:`cowfs.store.verbs`, by topic, and each is one call of a service
(:mod:`cowfs.store.services`). Neither module decides anything, and no verb calls another.
"""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING, Self
from cowfs.store.services import Services
from cowfs.store.verbs.archives import ArchiveVerbs
from cowfs.store.verbs.files import FileVerbs
from cowfs.store.verbs.keeping import KeepingVerbs
from cowfs.store.verbs.mounts import MountVerbs
from cowfs.store.verbs.reading import ReadingVerbs
from cowfs.store.verbs.running import RunVerbs
from cowfs.store.verbs.snapshots import SnapshotVerbs

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from cowfs.driver.interface import Driver
    from cowfs.store.migrating import Migrated, Progress

__all__ = ["Store"]


class Store(SnapshotVerbs, MountVerbs, RunVerbs, ReadingVerbs, ArchiveVerbs, FileVerbs, KeepingVerbs):
    """A store of snapshots in one directory. Make it with :meth:`open`.

    >>> with Store.open("store") as store:
    ...     records = store.prepare("work", size="1G")
    ...     info = store.commit("work", "base")
    ...     [(each.name, each.kind.value) for each in store.walk()]
    [('base', 'committed')]

    Threads: any may call any verb, each has its own connection to the index; two verbs on one key exclude each other, the
    second raises FailedPrecondition. Processes: any number may have the store open; the same holds.

    Fork: a child may go on with the store it inherited; it gets a connection of its own at its first verb. The parent
    alone goes on with the verbs of other threads at the fork.

    A kill at any moment leaves a verb done or not begun, or finished by the next :meth:`open` (docs/internals/crash-safety.md).
    A closed store refuses every verb with FailedPrecondition.

    Attributes:
        root: the store's directory, absolute.
        index: the index.
        reserve: the room that is kept for deletions.
        why: the reason for this driver: the answer of each installed one, by name; empty if the store had one already.
        services: the parts that do the work (:mod:`cowfs.store.services`). They are no part of the interface that is kept.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        context = services.context
        self.root, self.index, self.reserve, self.why = context.root, context.index, context.reserve, context.why

    @property
    def driver(self) -> Driver:
        """The backend. Raises FailedPrecondition once the store is closed."""
        return self.services.context.driver

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        driver: str = "auto",
        create: bool = True,
        fsync: bool = True,
        **options: str | int | bool | None,
    ) -> Self:
        """Open the store in a directory, making it on first use.

        The unfinished verbs of killed processes are finished or undone, which may take as long as the verbs.

        Args:
            root: the directory; default: :func:`default_root`.
            driver: ``auto`` takes the driver that the store has, else the best one for this host.
            create: whether to make a missing store.
            fsync: off: a power loss may undo the latest verbs (not damage the store).
            options: the driver's own, as its class documents them; of cowfs's drivers only row has one: ``block``, bytes a block
                of new redirect files, a power of two from 4 KiB to 1 MiB ("64K").

        Raises:
            NotFound: no store there and ``create`` is off, or no such driver.
            InvalidArgument: the directory holds something else, or the store has another driver.
            Unsupported: no driver can run here, or a newer cowfs made the store.
            Corrupt: the index is damaged.
        """
        return cls(Services.open(root, driver=driver, create=create, fsync=fsync, options=options))

    def close(self) -> None:
        """Close the index and the driver. Idempotent; every other verb refuses from now on. Mounts go on.

        Raises:
            OSError: the driver cannot write its state.
        """
        self.services.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def migrate(
        cls,
        root: str | os.PathLike[str] | None,
        driver: str,
        target: str | os.PathLike[str] | None = None,
        *,
        cut_times: bool = False,
        fsync: bool = True,
        progress: Progress | None = None,
    ) -> Migrated:
        """Move a store to another driver: all snapshots, tags, labels, configurations, limits and times.

        A killed process leaves the old store or the new one; call it again to go on. No other process may use the store
        meanwhile.

        Args:
            root: the store; default: :func:`~cowfs.store.opening.default_root`.
            driver: the new driver.
            target: make the new store here and keep the old one; None: the new one takes the old one's place.
            cut_times: leave out fractions of seconds where the new layers cannot hold them.
            fsync: as for :meth:`open`.
            progress: called with (the name of a snapshot, the number done, the number of all).

        Raises:
            NotFound: no store there, or no such driver.
            InvalidArgument: it has that driver already; it is a mount point and ``target`` is None; something else is
                in the place.
            FailedPrecondition: a snapshot is mounted, or was changed meanwhile.
            Corrupt: a snapshot is in quarantine.
            Unsupported: the driver cannot run there, or cannot hold what the snapshots have.
        """
        from cowfs.store import migrating

        return migrating.migrate(root, driver, target, cut_times=cut_times, fsync=fsync, progress=progress)
