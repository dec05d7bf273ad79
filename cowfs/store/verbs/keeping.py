"""The verbs that keep house: removal, garbage, damage, recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cowfs.store.applying import Progress
    from cowfs.store.checking import Report
    from cowfs.store.house import Collected, Pruned
    from cowfs.store.services import Services

__all__ = ["KeepingVerbs"]


class KeepingVerbs:
    """The verbs that keep house: removal, garbage, damage, recovery."""

    services: Services

    def remove(self, name: str, *, chain: bool = False, mounted: bool = False, defer: bool = False) -> list[str]:
        """Remove a snapshot, or a tag.

        Args:
            name: a key, a name or a tag; of a tag only the tag goes.
            chain: also remove each ancestor that then has neither a tag nor a child.
            mounted: it may be mounted; the mount goes on, and its files are deleted by the first :meth:`cleanup` after it.
            defer: leave the deleting of files to :meth:`cleanup`: constant time.

        Returns:
            The names of the snapshots that were removed.

        Raises:
            NotFound: no such snapshot or tag.
            FailedPrecondition: it has children, a tag, or is mounted.
        """
        return self.services.snapshots.remove(name, chain=chain, mounted=mounted, defer=defer)

    def removable(self, name: str, *, chain: bool = False) -> list[str]:
        """List what :meth:`remove` with these arguments would remove; nothing is changed.

        Args:
            name: a key, a name or a tag.
            chain: also ancestors that nothing else needs.

        Raises:
            NotFound, FailedPrecondition: as :meth:`remove`.
        """
        return self.services.house.removable(name, chain=chain)

    def cleanup(self) -> list[str]:
        """Delete the files of snapshots that were removed, as far as no mount uses them any more.

        Also what killed processes left half made; the next :meth:`open` does the same.

        Returns:
            Paths of what was deleted, relative to the store.

        Raises:
            OSError: a file cannot be deleted.
        """
        return self.services.snapshots.cleanup()

    def prune(
        self,
        filters: Iterable[str] = (),
        *,
        every: bool = False,
        older: float = 0,
        keep: int = 0,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove snapshots that nothing needs.

        By default: layers of images that have neither tag nor child (their names are digests), and what runs left
        (keys that begin with ``run-``). Never what is mounted or in use, and nothing that the service or a container engine has made.

        Args:
            filters: :mod:`cowfs.store.filters`: only snapshots that one of them matches.
            every: also committed snapshots with names of their own that have neither tag nor child, and all other keys and views.
            older: only what was made and changed at least that long ago, seconds.
            keep: leave the newest so many of what could go.
            dry_run: remove nothing.

        Raises:
            InvalidArgument: a filter cannot be read, or a number is negative.
        """
        return self.services.house.prune(filters, every=every, older=older, keep=keep, dry_run=dry_run)

    def garbage(self) -> tuple[list[str], int]:
        """Find what :meth:`gc` would delete now; nothing is changed.

        Returns:
            Paths relative to the store, and how many directory records.

        Raises:
            OSError: a directory of the store cannot be read.
        """
        return self.services.house.garbage()

    def gc(self) -> Collected:
        """Delete what nothing records: layers and records of snapshots that are gone, leftovers of killed processes.

        Each thing is deleted for itself; a kill leaves the rest for the next time. Takes as long as there are layers to delete;
        other verbs go on meanwhile.

        Returns:
            What was deleted.

        Raises:
            OSError: a file of the store cannot be deleted.
        """
        return self.services.house.gc()

    def check(self, *, content: bool = False, repair: bool = False, progress: Progress | None = None) -> Report:
        """Verify the store.

        Args:
            content: also read every file whose digest is known, and list those without one; make archives again whose diff
                ids are kept, compare whole layers with their records, look for broken links (:mod:`cowfs.store.damage`).
            repair: delete garbage, rebuild records, record a whole layer as it is, forget a diff id that is wrong, put in
                quarantine what cannot be helped.
            progress: told how far it is.

        Returns:
            The report; an intact store has no ``problems``.

        Raises:
            Corrupt: the index itself is damaged.
            OSError: a layer cannot be read.
        """
        return self.services.checking.check(content=content, repair=repair, progress=progress)

    def recover(self) -> None:
        """Finish, or take back, what killed processes left half done. Called by :meth:`open` and :meth:`gc`.

        Raises:
            OSError: a file of the store cannot be read or changed.
        """
        self.services.recovery.recover()

    def recover_with_room(self, key: str | None = None) -> None:
        """Recover as far as there is room (:meth:`recover`): what cannot be finished for want of it stays half done.

        Args:
            key: a snapshot that must not be half done itself.

        Raises:
            OSError: as for :meth:`recover`.
        """
        self.services.recovery.recover_with_room(key)

    def is_half_done(self, key: str) -> bool:
        """Whether a verb on a key was killed, or had no room, and is still to be finished: a note tells of it.

        Args:
            key: an active snapshot.

        Raises:
            NotFound: no such key.
        """
        return self.services.recovery.is_half_done(key)
