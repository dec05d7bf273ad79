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

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cowfs.errors import AlreadyExists, CowfsError, FailedPrecondition, InvalidArgument
from cowfs.index.database import Row
from cowfs.model import Info, Kind, Limit, Mount, Usage
from cowfs.mounting.request import IdMap
from cowfs.service.cleaning import Cleaner
from cowfs.service.containerd import filters as filter_language
from cowfs.service.containerd.annotations import INODES, SIZE, Annotations
from cowfs.service.containerd.held import PAUSE, Held
from cowfs.service.logs import log
from cowfs.store import Store

__all__ = ["GID_MAP", "MAX_INODES", "MAX_SIZE", "PREFIX", "REF", "UID_MAP", "Snapshots"]

PREFIX = "containerd: "
REF = "containerd.io/snapshot.ref"
MAX_SIZE = "containerd.io/snapshot/max-size"
MAX_INODES = "containerd.io/snapshot/cowfs-max-inodes"
"""containerd passes on labels that begin with ``containerd.io/snapshot/``."""

PARENT = "containerd.io/snapshot/parent-chain-id"
UID_MAP = "containerd.io/snapshot/uidmapping"
GID_MAP = "containerd.io/snapshot/gidmapping"
"""Ranges ``CONTAINER:HOST:COUNT``, with commas between (containerd, internal/userns/idmap.go)."""

_EXTRACT = "extract-"
_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})")


class Snapshots:
    """The snapshots of one containerd.

    Args:
        directory: for the mounts that are held; on a file system that a restart of the machine empties.
        default: ``size`` and ``inodes`` of snapshots without a limit of their own, as text.
        annotations: of containers, which may have a limit; None: they are not asked for. Closed with this.
    """

    def __init__(
        self, store: Store, directory: str, default: Mapping[str, str], annotations: Annotations | None = None
    ) -> None:
        self._store = store
        self._default = default
        self._annotations = annotations
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
        if self._annotations is not None:
            self._annotations.close()

    # -- making -----------------------------------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """Make a writable snapshot, and return its mounts.

        Raises:
            AlreadyExists: the key is taken, or the snapshot of :data:`REF` exists.
            NotFound: no such parent.
            InvalidArgument: a bad key, label or limit; a parent that is not committed.
        """
        kept = _kept(labels)
        _maps(kept)
        if kept.get(REF):
            self._refuse_known(kept[REF], parent)
        self._store.prepare(_own(key), _own(parent) or None, labels=kept, **self._limit(key, kept))
        return self._mounts_of_new(key)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """Make a read-only snapshot, and return its mounts; errors as for :meth:`prepare`."""
        kept = _kept(labels)
        _maps(kept)
        self._store.view(_own(key), _own(parent) or None, labels=kept)
        return self._mounts_of_new(key)

    def _mounts_of_new(self, key: str) -> tuple[Mount, ...]:
        """The mounts of a snapshot that was just made; it is removed if it cannot be mounted."""
        try:
            return self._mounts(key)
        except BaseException:
            self.remove(key)
            raise

    def _refuse_known(self, ref: str, parent: str) -> None:
        for info in self._infos():
            if info.kind is Kind.COMMITTED and info.labels.get(REF) == ref and (info.parent or "") == parent:
                raise AlreadyExists(f"the snapshot {ref!r} is there, as {info.name!r}")

    def _limit(self, key: str, labels: Mapping[str, str]) -> dict[str, str]:
        if _is_extract(key):
            return {}
        own = {"size": labels.get(MAX_SIZE), "inodes": labels.get(MAX_INODES)}
        return {**self._default, **{name: value for name, value in own.items() if value}}

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """The mounts of an active snapshot or a view: a record of the kernel, or a bind of a mount that is held.

        Raises:
            NotFound: no such key.
            FailedPrecondition: a committed snapshot, or containerd does not tell a container's annotations.
            InvalidArgument: an annotation that is no limit.
        """
        if self._annotations is not None:
            self._take_annotations(key, self._annotations)
        return self._mounts(key)

    def _take_annotations(self, key: str, annotations: Annotations) -> None:
        """Give a container's snapshot the limit of its annotations, once: a label tells that it was done."""
        row = self._store.index.get(_own(key))
        if row.kind is not Kind.ACTIVE or _is_extract(key) or MAX_SIZE in row.labels or MAX_INODES in row.labels:
            return
        found = annotations.of(key)
        pairs = ((MAX_SIZE, SIZE), (MAX_INODES, INODES))
        labels = {label: found[name] for label, name in pairs if found.get(name)}
        if labels:
            self._set_limit(key, row.limit, self._limit(key, labels))
            self._store.update(_own(key), labels)

    def _mounts(self, key: str) -> tuple[Mount, ...]:
        (record,) = self._store.engine_mounts(_own(key))
        row = self._store.index.get(_own(key))
        if self._is_apart(row):
            return (Mount(type="overlay", source="overlay", options=(f"upperdir={self._store.driver.tree(row.id)}",)),)
        uid_map, gid_map = _maps(row.labels)
        if not record.type.startswith("fuse.") and not uid_map and not gid_map:
            return (record,)
        place = self.held.mount(
            _own(key), uid_map, gid_map, kernel_image=_is_shared(row.parent_name) and not _is_extract(key)
        )
        return (Mount(type="bind", source=place, options=("ro" if "ro" in record.options else "rw", "rbind")),)

    def _is_apart(self, row: Row) -> bool:
        """Whether a layer is unpacked apart from its parent."""
        return (
            row.kind is Kind.ACTIVE
            and row.parent is None
            and _is_extract(row.name.removeprefix(PREFIX))
            and PARENT in row.labels
            and not self._store.why_not_rebase()
        )

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
        if name == key and row.kind is Kind.ACTIVE:
            raise AlreadyExists(f"{name!r} is the key itself")
        if parent and row.parent is None:
            if _is_extract(key) and not self._is_apart(row) and not self._store.why_not_rebase():
                raise InvalidArgument(
                    f"{key!r} was unpacked without whiteouts: it cannot be put upon {parent!r}",
                    remedy="do not tell this containerd that cowfs can rebase",
                )
            log.debug("%s is put upon %s", key, parent)
            self._store.rebase(_own(key), _own(parent))
        elif parent and row.parent_name != _own(parent):
            raise InvalidArgument(f"{key!r} stands on another snapshot than {parent!r}")
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
        if not before and not now:
            return
        try:
            self._store.limit(_own(name), size=now.get("size"), inodes=now.get("inodes"))
        except FailedPrecondition:
            if not self.held.give_up(self._store.index.get(_own(name)).id):
                raise
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


def _is_extract(key: str) -> bool:
    return key.rpartition("/")[2].startswith(_EXTRACT)


def _is_shared(parent: str | None) -> bool:
    """Whether many snapshots will stand on a parent: the chain of an image's layers, named by its digest, not what an engine
    made for one container."""
    return parent is not None and parent.rpartition("/")[2].startswith("sha256:")


def _own(key: str) -> str:
    """The key or name in the store; "" for "".

    Raises:
        InvalidArgument: in the store, for a key that cannot be kept.
    """
    return PREFIX + key if key else ""


def _maps(labels: Mapping[str, str]) -> tuple[IdMap, IdMap]:
    """The maps of users and groups that labels ask for, () for none.

    Raises:
        InvalidArgument: one that cannot be read.
    """

    def read(name: str) -> IdMap:
        text = labels.get(name, "")
        found = [_RANGE.fullmatch(part) for part in text.split(",")] if text else []
        if not all(found):
            raise InvalidArgument(f"the label {name} is {text!r}", remedy="CONTAINER:HOST:COUNT, as in 0:100000:65536")
        return tuple((int(one[1]), int(one[2]), int(one[3])) for one in found if one is not None)

    return read(UID_MAP), read(GID_MAP)


def _shown(info: Info) -> Info:
    parent = info.parent.removeprefix(PREFIX) if info.parent else None
    return replace(info, name=info.name.removeprefix(PREFIX), parent=parent)


def _kept(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if value}
