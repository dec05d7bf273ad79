"""The verbs that make, commit, name, roll back and merge snapshots."""

from __future__ import annotations

from cowfs._typed import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import EllipsisType

    from cowfs.index.database import Tag
    from cowfs.model import Info, Limit, Mount
    from cowfs.store.compacting import Compacted, OnProgress
    from cowfs.store.services import Services

__all__ = ["SnapshotVerbs"]


class SnapshotVerbs:
    """The verbs that make, commit, name, roll back and merge snapshots."""

    services: Services

    def prepare(
        self,
        key: str,
        parent: str | None = None,
        *,
        size: str | int | None = None,
        inodes: str | int | None = None,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """Make a writable snapshot.

        Args:
            key: its key.
            parent: a committed snapshot, or a tag; None: an empty tree.
            size, inodes: the limit on its own use: bytes or "2G"; a count or "100k".
            labels: kept with it.
            mount_type: of the records returned, as for :meth:`mounts`.

        Returns:
            Its mount records.

        Raises:
            AlreadyExists: the key is taken.
            NotFound: no such parent.
            InvalidArgument: a bad key, label or limit; a parent that is not committed.
            Corrupt: the parent is in quarantine.
        """
        return self.services.snapshots.prepare(
            key, parent, size=size, inodes=inodes, labels=labels, mount_type=mount_type
        )

    def view(
        self,
        key: str,
        parent: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> tuple[Mount, ...]:
        """Make a read-only snapshot, in one step.

        Args:
            key: its key.
            parent: a committed snapshot, or a tag; None: an empty tree.
            labels: kept with it.
            mount_type: of the records returned, as for :meth:`mounts`.

        Returns:
            Its mount records.

        Raises:
            AlreadyExists: the key is taken.
            NotFound: no such parent.
            InvalidArgument: a bad key or label; a parent that is not committed.
        """
        return self.services.snapshots.view(key, parent, labels=labels, mount_type=mount_type)

    def fork(
        self,
        name: str,
        *keys: str,
        size: str | int | None = None,
        inodes: str | int | None = None,
        labels: Mapping[str, str] | None = None,
        mount_type: str | None = None,
    ) -> dict[str, tuple[Mount, ...]]:
        """Prepare many active snapshots of one parent. Each one is made in one step, but not all together.

        Args:
            name: the parent: a committed snapshot, or a tag.
            keys: of the new snapshots.
            size, inodes: the limit of each: bytes or "2G"; a count or "100k".
            labels: kept with each.
            mount_type: of the records returned, as for :meth:`mounts`.

        Returns:
            Mount records by key.

        Raises:
            NotFound: no such parent.
            AlreadyExists: a key is taken; those before it in the list were made.
            InvalidArgument: a bad key, label or limit.
        """
        return self.services.snapshots.fork(name, *keys, size=size, inodes=inodes, labels=labels, mount_type=mount_type)

    def commit(
        self,
        key: str,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        replace_labels: bool = False,
        digests: bool = False,
        mounted: bool = False,
        compact: bool = False,
        kernel_image: bool = False,
    ) -> Info:
        """Make an active snapshot immutable under a name.

        The layer is recorded first, in a time by the number of its files; then one step of the index makes it committed, and
        a kill before that leaves it active.

        Args:
            key: an active snapshot.
            name: its name; its key is free afterwards.
            labels: added to its labels.
            replace_labels: put ``labels`` in place of its labels.
            digests: also record the digest of each file, which reads all data.
            mounted: allow a mounted one; its mounts become read-only.
            compact: :meth:`compact` mostly rewritten files first.
            kernel_image: also make the image for kernel mounts of its children, which the first of these makes otherwise.

        Returns:
            The committed snapshot.

        Raises:
            NotFound: no such key.
            AlreadyExists: the name is taken.
            FailedPrecondition: not active, or in use.
            InvalidArgument: a bad name or label.
            Unsupported: of ``kernel_image``: the kernel mounts no images of these layers; nothing was committed.
        """
        return self.services.committing.commit(
            key,
            name,
            labels=labels,
            replace_labels=replace_labels,
            digests=digests,
            mounted=mounted,
            compact=compact,
            kernel_image=kernel_image,
        )

    def rebase(self, key: str, parent: str) -> Info:
        """Put an active snapshot that stands on nothing upon another: what its layer holds is then what it changes there.

        For layers that were unpacked apart from each other, with whiteouts in the overlay format (:mod:`cowfs.format.whiteout`). The
        root directory gets the attributes of the parent's, unless it has others than those of an empty layer.

        Args:
            key: an active snapshot that nobody has mounted.
            parent: a committed snapshot, or a tag.

        Returns:
            The snapshot, active as before.

        Raises:
            NotFound: no such key, or no such parent.
            FailedPrecondition: not active, mounted, or it stands on another.
            InvalidArgument: a parent that is not committed, or with too many layers beneath.
            Unsupported: the driver keeps whole trees, or deltas in another form.
            Corrupt: the parent is in quarantine.
        """
        return self.services.rebasing.rebase(key, parent)

    def why_not_rebase(self) -> str:
        """Tell why :meth:`rebase` is not possible in this store.

        Returns:
            A clause; "" where it is possible.

        Raises:
            FailedPrecondition: the store is closed.
        """
        return self.services.rebasing.why_not()

    def snapshot(self, key: str, name: str, *, labels: Mapping[str, str] | None = None) -> Info:
        """Make the present content of an active snapshot a committed one; the key goes on over it, mounted or not.

        Args:
            key: an active snapshot.
            name: of the committed one.
            labels: kept with it, beside ``cowfs.snapshot-of``.

        Raises:
            NotFound, AlreadyExists: as for :meth:`commit`.
            FailedPrecondition: read-only, in use by another verb, or mounted by the kernel and the driver is none that
                takes snapshots itself.
            Unsupported: the driver keeps whole trees, and takes no snapshots itself.
        """
        return self.services.live.snapshot(key, name, labels=labels)

    def rollback(self, key: str, name: str, *, keep: str | None = None) -> Info:
        """Put an active snapshot, mounted or not, back to one of its ancestors, and discard newer changes.

        Args:
            key: an active snapshot.
            name: an ancestor, or a tag of one.
            keep: make a snapshot of this name first.

        Raises:
            NotFound: no such key or name.
            InvalidArgument: not an ancestor of the key.
            FailedPrecondition: mounted by the kernel, read-only, or in use by another verb; of whole layers mounted at all.
        """
        return self.services.live.rollback(key, name, keep=keep)

    def squash(self, name: str, *, dry_run: bool = False) -> Info:
        """Merge a committed snapshot into its only child, and remove it; mounts above it go on.

        Args:
            name: a committed snapshot, or a tag.
            dry_run: change nothing: only look whether it can be done.

        Returns:
            The child.

        Raises:
            NotFound: no such snapshot.
            FailedPrecondition: it is not committed, has a tag, has no child or several, or something above it is in use by
                another verb or mounted in a way that cannot switch layers; the message says what.
            Unsupported: the driver keeps whole trees (there is nothing to gain).
        """
        return self.services.squashing.squash(name, dry_run=dry_run)

    def compact(self, key: str, *, share: float | None = None, on_progress: OnProgress | None = None) -> Compacted:
        """Turn redirect files, most of which was written, into plain files. Reading and writing go on meanwhile.

        Args:
            key: an active snapshot, mounted or not.
            share: leave files alone of which less than this part is their own; default: 0.75; 0 takes all.
            on_progress: told after each step.

        Raises:
            NotFound: no such key.
            FailedPrecondition: not active, or in use by another verb.
            Unsupported: the driver makes no redirect files.
            CowfsError: an I/O error; what was compacted until then is.
        """
        return self.services.compacting.compact(key, share=share, on_progress=on_progress)

    def limit(
        self,
        name: str,
        *,
        size: str | int | EllipsisType | None = ...,
        inodes: str | int | EllipsisType | None = ...,
    ) -> Limit:
        """Tell the limit of a snapshot, mounted or not; with arguments, change it first, for this mount and all to come.

        Args:
            name: a key; to look, also a name or a tag.
            size: bytes, or "4G"; None for no limit; left out: as it was.
            inodes: a count, or "100k"; likewise.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: not a size or count, or a snapshot that is not active.
            FailedPrecondition: its mount cannot be bounded.
        """
        return self.services.limits.limit(name, size=size, inodes=inodes)

    def limit_engine(self, name: str) -> str | None:
        """Which engine keeps a snapshot to its limit now (:mod:`cowfs.store.limit_engine`); None where it has none, or nobody does.

        Args:
            name: a key, a name or a tag.

        Raises:
            NotFound: no such snapshot.
        """
        return self.services.limits.limit_engine(name)

    def update(self, name: str, labels: Mapping[str, str | None], *, replace: bool = False) -> Info:
        """Change labels; all else about a snapshot is immutable.

        Args:
            labels: set where a value is given, removed where it is None.
            replace: drop all labels that are not named.

        Raises:
            NotFound: no such key or name.
            InvalidArgument: a bad label.
        """
        return self.services.naming.update(name, labels, replace=replace)

    def tag(self, name: str, target: str, *, config: str | None = None, move: bool = True) -> Tag:
        """Name a committed snapshot (once more).

        Args:
            name: the tag.
            target: a committed snapshot, or a tag.
            config: the image's configuration, a JSON document kept with the tag as it is; by default the one of the
                image that ``target`` is or was made from.
            move: whether a tag of that name may be moved here.

        Raises:
            AlreadyExists: a snapshot of that name; or a tag, and it may not be moved.
            InvalidArgument: a bad name, or a target that is not committed.
        """
        return self.services.naming.tag(name, target, config=config, move=move)

    def untag(self, name: str) -> None:
        """Drop a tag; the snapshot stays.

        Args:
            name: the tag.

        Raises:
            NotFound: no such tag.
        """
        self.services.naming.untag(name)

    def rename(self, old: str, new: str) -> None:
        """Give a key, a name or a tag another one; what is based on it, and its tags, stay.

        Args:
            old: a key, a name or a tag.
            new: what it is to be called.

        Raises:
            NotFound: no such key, name or tag.
            AlreadyExists: the new one is taken.
            InvalidArgument: it cannot be one.
            FailedPrecondition: a key that is mounted or in use.
        """
        self.services.naming.rename(old, new)
