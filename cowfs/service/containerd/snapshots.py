"""The verbs of a containerd snapshotter, on a store. Plain values in and out; gRPC is the business of :mod:`server`.

Rules, from containerd's core/snapshots/snapshotter.go and its conformance suite:

1. Only snapshots made here are listed here: containerd's garbage collector removes every listed snapshot that it does
not know. So each key is kept with :data:`PREFIX`, which no tag can have. 2. Commit and Remove succeed while the
snapshot is mounted; containerd unmounts later. 3. Labels given to Commit replace all others. A label with an empty
value is none. 4. A snapshot prepared with the label :data:`REF` exists already if a committed one has the same label
and parent: AlreadyExists. So namespaces of containerd share unpacked layers. 5. A limit is for the writes of a container:
:data:`MAX_SIZE` (bytes), :data:`MAX_INODES`, or else the default. Keys that
   begin with ``extract-`` are layers being unpacked, and have none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cowfs.errors import AlreadyExists, CowfsError, InvalidArgument
from cowfs.model import Info, Kind, Limit, Mount, Usage
from cowfs.service.cleaning import Cleaner
from cowfs.service.containerd import filters as filter_language
from cowfs.service.containerd.held import PAUSE, Held
from cowfs.service.logs import log
from cowfs.store import Store

__all__ = ["MAX_INODES", "MAX_SIZE", "PREFIX", "REF", "Snapshots"]

PREFIX = "containerd: "
REF = "containerd.io/snapshot.ref"
MAX_SIZE = "containerd.io/snapshot/max-size"
MAX_INODES = "containerd.io/snapshot/cowfs-max-inodes"
"""containerd passes on labels that begin with ``containerd.io/snapshot/``."""

_EXTRACT = "extract-"


class Snapshots:
    """The snapshots of one containerd.

    Args:
        directory: for the mounts that are held; on a file system that a restart of the machine empties.
        default: ``size`` and ``inodes`` of snapshots without a limit of their own, as text.
    """

    def __init__(self, store: Store, directory: str, default: Mapping[str, str]) -> None:
        self._store = store
        self._default = default
        self.held = Held(store, directory)
        self._cleaner = Cleaner(store)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look, name="cowfs-held", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the threads. Mounts stay."""
        self._ending.set()
        self._thread.join(60.0)
        self._cleaner.close()

    # -- making -----------------------------------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """Make a writable snapshot, and return its mounts.

        Raises:
            AlreadyExists: the key is taken, or the snapshot of :data:`REF` exists.
            NotFound: no such parent.
            InvalidArgument: a bad key, label or limit; a parent that is not committed.
        """
        kept = _kept(labels)
        if kept.get(REF):
            self._refuse_known(kept[REF], parent)
        self._store.prepare(_own(key), _own(parent) or None, labels=kept, **self._limit(key, kept))
        return self._mounts_of_new(key)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """Make a read-only snapshot, and return its mounts; errors as for :meth:`prepare`."""
        self._store.view(_own(key), _own(parent) or None, labels=_kept(labels))
        return self._mounts_of_new(key)

    def _mounts_of_new(self, key: str) -> tuple[Mount, ...]:
        """The mounts of a snapshot that was just made; it is removed if it cannot be mounted."""
        try:
            return self.mounts(key)
        except BaseException:
            self.remove(key)
            raise

    def _refuse_known(self, ref: str, parent: str) -> None:
        for info in self._infos():
            if info.kind is Kind.COMMITTED and info.labels.get(REF) == ref and (info.parent or "") == parent:
                raise AlreadyExists(f"the snapshot {ref!r} is there, as {info.name!r}")

    def _limit(self, key: str, labels: Mapping[str, str]) -> dict[str, str]:
        if key.rpartition("/")[2].startswith(_EXTRACT):
            return {}
        own = {"size": labels.get(MAX_SIZE), "inodes": labels.get(MAX_INODES)}
        return {**self._default, **{name: value for name, value in own.items() if value}}

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """The mounts of an active snapshot or a view: a record of the kernel, or a bind of a mount that is held.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot.
        """
        (record,) = self._store.engine_mounts(_own(key))
        if not record.type.startswith("fuse."):
            return (record,)
        place = self.held.mount(_own(key))
        return (Mount(type="bind", source=place, options=("ro" if "ro" in record.options else "rw", "rbind")),)

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Make an active snapshot immutable.

        Args:
            parent: the parent that it must have, "" for any.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: no such key.
            FailedPrecondition: a view, or committed already.
            InvalidArgument: another parent.
        """
        row = self._store.index.get(_own(key))
        if parent and row.parent_name != _own(parent):
            raise InvalidArgument(
                f"{key!r} does not stand on {parent!r}", remedy="do not tell containerd that cowfs can rebase"
            )
        self._store.commit(_own(key), _own(name), labels=_kept(labels), replace_labels=True, mounted=True)
        self.held.release(row.id)

    def remove(self, key: str) -> None:
        """Remove a snapshot at once; its files are deleted soon, or once they are unmounted.

        Raises:
            NotFound: no such key.
            FailedPrecondition: it has children.
        """
        row = self._store.index.get(_own(key))
        self._store.remove(_own(key), mounted=True, defer=True)
        self.held.release(row.id)
        self._cleaner.wake()

    # -- reading ----------------------------------------------------------------------------------------------------------

    def stat(self, key: str) -> Info:
        """One snapshot. Raises NotFound."""
        return _shown(self._store.index.get(_own(key)).info())

    def _infos(self) -> Iterator[Info]:
        return (_shown(info) for info in self._store.walk() if info.name.startswith(PREFIX))

    def walk(self, filters: Iterable[str]) -> Iterator[Info]:
        """The snapshots that match the filters (:mod:`filters`). Raises InvalidArgument for a malformed filter."""
        wanted = filter_language.parse_all(filters)
        return filter(wanted, self._infos())

    def usage(self, key: str) -> Usage:
        """The use of a snapshot's own layer. Raises NotFound."""
        return self._store.usage(self._store.index.get(_own(key)).name)

    def update(self, name: str, labels: Mapping[str, str], paths: Iterable[str]) -> Info:
        """Change labels. A new limit holds at once, mounted or not.

        Args:
            paths: ``labels``, or ``labels.KEY`` for one of them; none: all that are mutable.

        Raises:
            NotFound: no such snapshot.
            InvalidArgument: another path, or a limit that is none.
            FailedPrecondition: a limit for a snapshot that the kernel has mounted.
        """
        row = self._store.index.get(_own(name))
        wanted = dict(row.labels)
        for path in list(paths) or ["labels"]:
            if path == "labels":
                wanted = dict(labels)
            elif path.startswith("labels."):
                key = path.removeprefix("labels.")
                wanted[key] = labels.get(key, "")
            else:
                raise InvalidArgument(f"{path!r} of a snapshot cannot be changed")
        wanted = _kept(wanted)
        if row.kind is Kind.ACTIVE and any(wanted.get(each) != row.labels.get(each) for each in (MAX_SIZE, MAX_INODES)):
            now = self._limit(name, wanted)
            self._set_limit(name, row.limit, now)
        return _shown(self._store.update(_own(name), wanted, replace=True))

    def _set_limit(self, name: str, before: Limit, now: Mapping[str, str]) -> None:
        if before or now:
            self._store.limit(_own(name), size=now.get("size"), inodes=now.get("inodes"))

    def cleanup(self) -> None:
        """Delete the files of removed snapshots, except those still in use by a mount."""
        self._store.cleanup()

    # -- threads ----------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        while not self._ending.wait(PAUSE):
            try:
                self.held.look()
            except (CowfsError, OSError) as error:
                log.warning("mounts that nobody uses: %s", error)


def _own(key: str) -> str:
    """The key or name in the store; "" for "".

    Raises:
        InvalidArgument: in the store, for a key that cannot be kept.
    """
    return PREFIX + key if key else ""


def _shown(info: Info) -> Info:
    parent = info.parent.removeprefix(PREFIX) if info.parent else None
    return replace(info, name=info.name.removeprefix(PREFIX), parent=parent)


def _kept(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if value}
