"""The verbs of removal, garbage, damage and recovery."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cowfs.store.applying import Progress
    from cowfs.store.checking import Report
    from cowfs.store.house import Collected, Pruned
    from cowfs.store.services import Services

__all__ = ["KeepingVerbs"]


class KeepingVerbs:
    """The verbs of removal, garbage, damage and recovery."""

    services: Services

    def remove(self, name: str, *, chain: bool = False, mounted: bool = False, defer: bool = False) -> list[str]:
        """Remove a snapshot, or a tag.

        Args:
            name: a key, a name or a tag; for a tag only the tag is removed.
            chain: also remove each ancestor that then has neither a tag nor a child.
            mounted: allow a mounted one; the mount goes on, and its files are deleted by the first :meth:`cleanup` after it.
            defer: leave the deleting of files to :meth:`cleanup`: constant time.

        Returns:
            The names of the removed snapshots.

        Raises:
            NotFound: no such snapshot or tag.
            FailedPrecondition: it has children, a tag, or is mounted.
        """
        return self.services.snapshots.remove(name, chain=chain, mounted=mounted, defer=defer)

    def removable(self, name: str, *, chain: bool = False) -> list[str]:
        """List the snapshots that :meth:`remove` with these arguments would remove. Changes nothing.

        Args:
            name: a key, a name or a tag.
            chain: also ancestors that nothing else needs.

        Raises:
            NotFound, FailedPrecondition: as :meth:`remove`.
        """
        return self.services.house.removable(name, chain=chain)

    def cleanup(self) -> list[str]:
        """Delete the files of removed snapshots, except those still in use by a mount.

        Unfinished layers of killed processes are deleted, too; the next :meth:`open` does the same.

        Returns:
            The deleted paths, relative to the store.

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
        """Remove needless snapshots.

        By default: layers of images that have neither tag nor child (their names are digests), and snapshots of ended
        runs (keys that begin with ``run-``). Mounted or used ones always stay, and so do those of the service or a
        container engine.

        Args:
            filters: :mod:`cowfs.store.filters`: only snapshots that one of them matches.
            every: also committed snapshots with names of their own that have neither tag nor child, and all other keys and views.
            older: only snapshots made and changed at least that long ago, seconds.
            keep: the number of newest candidates to leave.
            dry_run: remove nothing.

        Raises:
            InvalidArgument: a malformed filter, or a negative number.
        """
        return self.services.house.prune(filters, every=every, older=older, keep=keep, dry_run=dry_run)

    def garbage(self) -> tuple[list[str], int]:
        """Find the garbage that :meth:`gc` would delete now. Changes nothing.

        Returns:
            Paths relative to the store, and the number of directory records.

        Raises:
            OSError: a directory of the store cannot be read.
        """
        return self.services.house.garbage()

    def gc(self) -> Collected:
        """Delete garbage: layers and records of removed snapshots, leftovers of killed processes.

        Each part is deleted separately; a kill leaves the rest for the next time. Takes as long as there are layers to delete;
        other verbs go on meanwhile.

        Returns:
            The deleted parts.

        Raises:
            OSError: a file of the store cannot be deleted.
        """
        return self.services.house.gc()

    def check(self, *, content: bool = False, repair: bool = False, progress: Progress | None = None) -> Report:
        """Verify the store.

        Args:
            content: also read every file whose digest is known, and list those without one; make archives again whose diff
                ids are kept, compare whole layers with their records, look for broken links (:mod:`cowfs.store.damage`).
            repair: delete garbage, rebuild records, record a whole layer as it is, forget a wrong diff id, put other
                damaged snapshots in quarantine.
            progress: called with the progress.

        Returns:
            The report; an intact store has no ``problems``.

        Raises:
            Corrupt: the index itself is damaged.
            OSError: a layer cannot be read.
        """
        return self.services.checking.check(content=content, repair=repair, progress=progress)

    def recover(self) -> None:
        """Finish or undo the verbs of killed processes. Called by :meth:`open` and :meth:`gc`.

        Raises:
            OSError: a file of the store cannot be read or changed.
        """
        self.services.recovery.recover()

    def recover_with_room(self, key: str | None = None) -> None:
        """Recover as far as there is room (:meth:`recover`); a verb that cannot be finished for want of it stays unfinished.

        Args:
            key: a snapshot that must not be half done itself.

        Raises:
            OSError: as for :meth:`recover`.
        """
        self.services.recovery.recover_with_room(key)

    def is_half_done(self, key: str) -> bool:
        """Whether a killed verb on a key, or one without room, is still unfinished, by its note.

        Args:
            key: an active snapshot.

        Raises:
            NotFound: no such key.
        """
        return self.services.recovery.is_half_done(key)
