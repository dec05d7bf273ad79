"""The reading verbs: snapshots, tags, usage, changes, events; most read the index alone."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from cowfs.index import compare
    from cowfs.index.database import Row, Tag
    from cowfs.model import Change, Event, Info, Usage
    from cowfs.store.services import Services
    from cowfs.store.totals import Totals

__all__ = ["ReadingVerbs"]


class ReadingVerbs:
    """The reading verbs: snapshots, tags, usage, changes, events; most read the index alone."""

    services: Services

    def resolve(self, name: str) -> Row:
        """The row of a snapshot, or of the one that a tag names; a digest may be abbreviated.

        Raises:
            NotFound: no such snapshot or tag.
            InvalidArgument: several digests begin with it.
        """
        return self.services.reading.resolve(name)

    def stat(self, name: str) -> Info:
        """One snapshot.

        Raises:
            NotFound: no such key, name or tag.
        """
        return self.services.reading.stat(name)

    def exists(self, name: str) -> bool:
        """Whether a key or name is taken (tags do not count). Only the index is read.

        Args:
            name: a key or name.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.reading.exists(name)

    def walk(self, filters: str | Iterable[str] = (), *, reverse: bool = False) -> Iterator[Info]:
        """List all snapshots, in the order of their making. Only the index is read.

        Snapshots made or removed meanwhile may be included or not; no lock is held in between.

        Args:
            filters: :mod:`cowfs.store.filters`, one or several; one of them must match.
            reverse: the newest first.

        Raises:
            InvalidArgument: a malformed filter.
        """
        return self.services.reading.walk(filters, reverse=reverse)

    def walk_rows(self, filters: str | Iterable[str] = ()) -> Iterator[Row]:
        """List all snapshots with all that the index keeps of each; otherwise :meth:`walk`.

        Args:
            filters: :mod:`cowfs.store.filters`, one or several; one of them must match.

        Raises:
            InvalidArgument: a malformed filter.
        """
        return self.services.reading.walk_rows(filters)

    def chain(self, name: str) -> list[Info]:
        """List a snapshot and its ancestors, nearest first. Only the index is read.

        Args:
            name: a key, a name or a tag.

        Raises:
            NotFound: no such snapshot.
        """
        return self.services.reading.chain(name)

    def tags(self) -> list[Tag]:
        """List all tags, by name. Only the index is read.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.reading.tags()

    def usage(self, name: str) -> Usage:
        """The use of a snapshot's own layer, without its parents.

        For a committed snapshot it is recorded; for a mounted one its server is asked; only the layer of an unmounted
        active one is walked.

        Raises:
            NotFound: no such key, name or tag.
        """
        return self.services.queries.usage(name)

    def diff(self, a: str, b: str | None = None) -> Iterator[Change]:
        """The changes from one snapshot to another, in path order.

        For two committed snapshots, related or not, only the index is read (and pairs of files that agree in all its
        fields, but are different objects without a digest). An active one's own layer is read first.

        Args:
            a: a key, name or tag. Alone: its changes against its parent.
            b: likewise.

        Raises:
            NotFound: no such snapshot.
            Corrupt: records or layers are missing.
        """
        return self.services.queries.diff(a, b)

    @property
    def same_data(self) -> compare.SameData:
        """The comparison of the bytes of two files in their layers."""
        return self.services.scanning.same_data

    def config(self, name: str) -> str:
        """The configuration of an image: a JSON document (OCI image-spec, config.md) byte for byte, "" for a plain tree.

        Args:
            name: a tag; or a snapshot, then the one of the image that it was made from.

        Raises:
            NotFound: no such key, name or tag.
        """
        return self.services.naming.config(name)

    def totals(self) -> Totals:
        """The sums of ``cowfs df``. Only the index is read, and the layers of active snapshots are walked.

        Raises:
            FailedPrecondition: the store is closed.
            OSError: a layer cannot be read.
        """
        return self.services.describing.totals()

    def quarantined(self) -> list[tuple[str, str]]:
        """List the snapshots in quarantine: those that :meth:`check` found damaged beyond repair.

        Returns:
            Pairs (key or name, why).

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.describing.quarantined()

    def describe(self) -> dict[str, str]:
        """The facts of ``cowfs info``: driver, layer form, host file system, how mounts are made, and why.

        Returns:
            Texts by topic.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.describing.describe()

    def alternatives(self, *, possible: bool = True) -> dict[str, str]:
        """Probe the drivers that a store in this place could have instead. Changes nothing.

        Args:
            possible: False: the impossible ones.

        Returns:
            The answer of each driver about this place, by name; the reason for an impossible one.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.describing.alternatives(possible=possible)

    def other_drivers(self) -> tuple[dict[str, str], dict[str, str]]:
        """Probe each other driver once: what two calls of :meth:`alternatives` tell. Changes nothing.

        Returns:
            The possible drivers, then the impossible ones: the answer of each about this place, by name.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.describing.other_drivers()

    def events(
        self,
        *,
        since: int | None = None,
        until: int | None = None,
        after: int | None = None,
        follow: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """Events, oldest first.

        Args:
            since: leave out earlier events; nanoseconds since 1970.
            until: leave out later events; a follower ends then.
            after: leave out events up to this sequence number.
            follow: go on with future events; without ``since`` and ``after`` only with these.
            stop: called by a follower about fifty times a second; a true result ends it.

        Yields:
            Events; ``log lost`` with the attribute ``count`` in place of events that were deleted before they were read.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.events.events(since=since, until=until, after=after, follow=follow, stop=stop)

    def record_event(
        self, type: str, action: str, actor: str, attributes: Mapping[str, str] | None = None, *, at: int | None = None
    ) -> int:
        """Add an event that is no change of the index itself, and return its sequence number.

        Args:
            type, action, actor, attributes: as in :class:`cowfs.Event`.
            at: when it happened, nanoseconds since 1970; now by default.

        Raises:
            OSError: there is no room for it (ENOSPC, EDQUOT, EROFS).
        """
        return self.services.events.record_event(type, action, actor, attributes, at=at)

    def watch(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call a function with each event from now on, from a thread of its own (which a fork does not take along).

        Args:
            callback: gets each :class:`cowfs.Event`; an exception ends the thread.

        Returns:
            A function that ends it; no call is made after its return.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.events.watch(callback)
