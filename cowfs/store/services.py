"""The services of a store and their dependencies: the one place where they are put together.

Each service is a class of its own module with its own rules, over the :class:`~cowfs.store.context.Context`; others that it needs
are arguments of its constructor, so this table is also the order: a service names only those above it. None inherits
from another, none knows :class:`cowfs.Store`, and none keeps state of its own: lasting state is in the store's
directory, its index or its driver. docs/internals/store.md has them as a table.

A service is made, and its module imported, on first use: a program that only prepares and commits imports
no archives.

Threads: any. Two that ask for a service at the same time may get two of it, which are the same, since neither keeps anything.
"""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING, Generic, Self, TypeVar
from cowfs.store.context import Context
from cowfs.store.lookup import Lookup
from cowfs.store.reading import Reading
from cowfs.store.recovery import Recoverer, Recovery

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from cowfs.store.applying import Applying
    from cowfs.store.archived import Archived
    from cowfs.store.blocks import Blocks
    from cowfs.store.checking import Checking
    from cowfs.store.committing import Committing
    from cowfs.store.compacting import Compacting
    from cowfs.store.copying import Copying
    from cowfs.store.describing import Describing
    from cowfs.store.disks import Disks
    from cowfs.store.engines import Engines
    from cowfs.store.events import Events
    from cowfs.store.exporting import Exporting
    from cowfs.store.files import Files
    from cowfs.store.house import House
    from cowfs.store.importing import Importing
    from cowfs.store.instant import Instant
    from cowfs.store.kernel_mounts import KernelMounts
    from cowfs.store.limits import Limits
    from cowfs.store.live import Live
    from cowfs.store.mounted import Mounted
    from cowfs.store.mounts import Mounting
    from cowfs.store.naming import Naming
    from cowfs.store.plans import Plans
    from cowfs.store.queries import Queries
    from cowfs.store.rebasing import Rebasing
    from cowfs.store.restacking import Restacking
    from cowfs.store.running import Running
    from cowfs.store.scanning import Scanning
    from cowfs.store.sending import Receiving, Sending
    from cowfs.store.snapshots import Snapshots
    from cowfs.store.squash import Squashing
    from cowfs.store.switching import Switching

__all__ = ["Services"]

_T = TypeVar("_T")


class _made(Generic[_T]):
    """A service that is made on first use, and kept."""

    def __init__(self, make: Callable[[Services], _T]) -> None:
        self._make = make
        self._name = make.__name__

    def __get__(self, services: Services, owner: type[Services] | None = None) -> _T:
        made = services.__dict__[self._name] = self._make(services)
        return made


class Services:
    """The services over one context. Made by :meth:`open`; as a context manager it closes it.

    Attributes:
        context: the store's directory, index and driver.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.reading = Reading(context.index)
        self.lookup = Lookup(context, self.reading)
        self.recovery = Recovery(
            context,
            self.lookup,
            (Recoverer("live-", lambda: self.switching), Recoverer("squash-", lambda: self.restacking)),
        )

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None,
        *,
        driver: str = "auto",
        create: bool = True,
        fsync: bool = True,
        options: Mapping[str, str | int | bool | None] | None = None,
    ) -> Self:
        """As :meth:`cowfs.Store.open`."""
        made = cls(Context.open(root, driver=driver, create=create, fsync=fsync, options=options or {}))
        try:
            made.recovery.recover_with_room()
        except BaseException:
            made.context.close()
            raise
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    @_made
    def scanning(self) -> Scanning:
        from cowfs.store.scanning import Scanning

        return Scanning(self.context)

    @_made
    def plans(self) -> Plans:
        from cowfs.store.plans import Plans

        return Plans(self.context, self.lookup)

    @_made
    def mounted(self) -> Mounted:
        from cowfs.store.mounted import Mounted

        return Mounted(self.context, self.lookup)

    @_made
    def archived(self) -> Archived:
        from cowfs.store.archived import Archived

        return Archived(self.context)

    @_made
    def instant(self) -> Instant:
        from cowfs.store.instant import Instant

        return Instant(self.context, self.lookup, self.scanning)

    @_made
    def switching(self) -> Switching:
        from cowfs.store.switching import Switching

        return Switching(self.context, self.lookup, self.scanning, self.mounted, self.instant)

    @_made
    def restacking(self) -> Restacking:
        from cowfs.store.restacking import Restacking

        return Restacking(self.context, self.mounted)

    @_made
    def naming(self) -> Naming:
        from cowfs.store.naming import Naming

        return Naming(self.context, self.reading, self.lookup, self.recovery)

    @_made
    def queries(self) -> Queries:
        from cowfs.store.queries import Queries

        return Queries(self.context, self.reading, self.scanning, self.mounted)

    @_made
    def snapshots(self) -> Snapshots:
        from cowfs.store.snapshots import Snapshots

        return Snapshots(self.context, self.lookup, self.plans, self.mounted, self.naming)

    @_made
    def compacting(self) -> Compacting:
        from cowfs.store.compacting import Compacting

        return Compacting(self.context, self.lookup, self.mounted)

    @_made
    def committing(self) -> Committing:
        from cowfs.store.committing import Committing

        return Committing(self.context, self.lookup, self.scanning, self.mounted, self.archived, self.compacting)

    @_made
    def live(self) -> Live:
        from cowfs.store.live import Live

        return Live(self.context, self.reading, self.lookup, self.mounted, self.instant, self.switching, self.recovery)

    @_made
    def squashing(self) -> Squashing:
        from cowfs.store.squash import Squashing

        return Squashing(self.context, self.reading, self.scanning, self.restacking, self.recovery)

    @_made
    def limits(self) -> Limits:
        from cowfs.store.limits import Limits

        return Limits(self.context, self.reading, self.lookup, self.mounted, self.recovery)

    @_made
    def rebasing(self) -> Rebasing:
        from cowfs.store.rebasing import Rebasing

        return Rebasing(self.context, self.lookup)

    @_made
    def kernel_mounts(self) -> KernelMounts:
        from cowfs.store.kernel_mounts import KernelMounts

        return KernelMounts(self.context, self.lookup, self.plans)

    @_made
    def engines(self) -> Engines:
        from cowfs.store.engines import Engines

        return Engines(self.context, self.lookup, self.plans, self.kernel_mounts)

    @_made
    def mounting(self) -> Mounting:
        from cowfs.store.mounts import Mounting

        return Mounting(
            self.context,
            self.reading,
            self.lookup,
            self.plans,
            self.mounted,
            self.recovery,
            lambda: self.live,
            lambda: self.kernel_mounts,
        )

    @_made
    def applying(self) -> Applying:
        from cowfs.store.applying import Applying

        return Applying(self.context, self.lookup, self.scanning)

    @_made
    def exporting(self) -> Exporting:
        from cowfs.store.exporting import Exporting

        return Exporting(self.context, self.reading, self.scanning, self.archived, self.naming)

    @_made
    def importing(self) -> Importing:
        from cowfs.store.importing import Importing

        return Importing(
            self.context, self.lookup, self.scanning, self.archived, self.naming, self.applying, self.exporting
        )

    @_made
    def copying(self) -> Copying:
        from cowfs.store.copying import Copying

        return Copying(self.context, self.reading, self.naming, self.exporting)

    @_made
    def blocks(self) -> Blocks:
        from cowfs.store.blocks import Blocks

        return Blocks(self.context, self.reading, self.lookup, self.scanning)

    @_made
    def disks(self) -> Disks:
        from cowfs.store.disks import Disks

        return Disks(self.context, self.reading)

    @_made
    def sending(self) -> Sending:
        from cowfs.store.sending import Sending

        return Sending(self.context, self.reading, self.archived, self.naming, self.exporting, self.blocks)

    @_made
    def receiving(self) -> Receiving:
        from cowfs.store.sending import Receiving

        return Receiving(
            self.context,
            self.reading,
            self.naming,
            self.snapshots,
            self.committing,
            self.limits,
            self.applying,
            self.exporting,
            self.blocks,
        )

    @_made
    def house(self) -> House:
        from cowfs.store.house import House

        return House(self.context, self.reading, self.recovery, self.snapshots)

    @_made
    def checking(self) -> Checking:
        from cowfs.store.checking import Checking

        return Checking(self.context, self.scanning, self.archived, self.exporting)

    @_made
    def describing(self) -> Describing:
        from cowfs.store.describing import Describing

        return Describing(self.context)

    @_made
    def running(self) -> Running:
        from cowfs.store.running import Running

        return Running(self.context, self.naming, self.snapshots, self.mounting)

    @_made
    def files(self) -> Files:
        from cowfs.store.files import Files

        return Files(self.context, self.reading, self.lookup, self.scanning, self.mounted, lambda: self.mounting)

    @_made
    def events(self) -> Events:
        from cowfs.store.events import Events

        return Events(self.context)
