"""The directories in which dockerd finds the trees of layers: mounted at the first Get, unmounted by the last Put.

Rules:

1. A tree is shown at ``HOME/ID``; HOME is dockerd's (``/var/lib/docker/cowfs``), which its containers' users may enter.
2. Gets are counted here, and nowhere else. A mount that exists before its first Get counts as one Get: of this service
before it was killed, or of the dockerd before this one. 3. A mount whose server was killed counts as none; the next Get
makes a new one. 4. The kernel mounts what has no limit, by a record for engines; our server what has one, and
everything where users are mapped.

Threads: the callers', each with the turn of its layer (:class:`~cowfs.service.graphdriver.layers.Layers`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from cowfs.errors import FailedPrecondition, NotFound
from cowfs.model import Kind
from cowfs.mounting import client, mountpoint
from cowfs.mounting.request import IdMap
from cowfs.store import Store
from cowfs.store.kernel_mounts import mount_record
from cowfs.sys.files import syncfs
from cowfs.sys.mounts import mountinfo

__all__ = ["Shown"]


class Shown:
    """The mounts of one dockerd.

    Attributes:
        home: directory of the mounts. uid_map, gid_map: of its containers' users, () for none.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.home = ""
        self.uid_map: IdMap = ()
        self.gid_map: IdMap = ()
        self._lock = threading.Lock()
        self._gets: dict[
            str, int
        ] = {}  # guarded by _lock: layers -> Gets without a Put; one that is missing was not asked for yet

    def enter(self, home: str, uid_map: IdMap, gid_map: IdMap) -> None:
        """Be the mounts of a dockerd that starts now.

        Raises:
            OSError: its directory cannot be made.
        """
        # Others cannot enter: set-id programs of containers are in there (as moby's drivers have it since CVE-2021-41091).
        os.makedirs(home, mode=0o710, exist_ok=True)
        os.chmod(home, 0o710)
        os.chown(home, -1, next((shown for inside, shown, _ in gid_map if inside == 0), 0))
        self.home, self.uid_map, self.gid_map = home, uid_map, gid_map
        with self._lock:
            self._gets.clear()

    def place(self, id: str) -> str:
        """Where a layer is shown."""
        return os.path.join(self.home, id)

    def get(self, id: str, key: str) -> str:
        """Show a layer; its directory.

        Raises:
            NotFound: no such key.
            CowfsError, OSError: it cannot be mounted.
        """
        place = self.place(id)
        is_there = self._is_there(place)
        with self._lock:
            gets = self._gets.get(id, 1) if is_there else 0
        if not is_there:
            self._mount(key, place)
        with self._lock:
            self._gets[id] = gets + 1
        return place

    def put(self, id: str) -> None:
        """Undo one :meth:`get`. One too many is fine."""
        with self._lock:
            gets = self._gets[id] = self._gets.get(id, 1) - 1
        if gets <= 0:
            self.hide(id)

    def hide(self, id: str) -> None:
        """Unmount a layer, however often it was asked for; whoever is in there keeps it until he is out."""
        place = self.place(id)
        with self._lock:
            self._gets.pop(id, None)
        try:
            while mountpoint.find(place) is not None:
                self._unmount(place)
            os.rmdir(place)
        except (NotFound, FileNotFoundError):
            pass

    def hide_all(self) -> None:
        """Unmount all layers."""
        inside = os.fsencode(self.home) + b"/"
        for target in {entry.target for entry in mountinfo() if entry.target.startswith(inside)}:
            self.hide(os.fsdecode(target[len(inside) :]))

    def synced(self, id: str) -> None:
        """Bring the writes through a server's mount of a layer into its directory."""
        place = self.place(id)
        entry = mountpoint.find(place)
        if entry is not None and entry.fstype in mountpoint.TYPES and not mountpoint.is_dead(place, entry):
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                syncfs(fd)
            finally:
                os.close(fd)

    # -- helpers -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _is_there(place: str) -> bool:
        entry = mountpoint.find(place)
        return entry is not None and not mountpoint.is_dead(place, entry)

    def _mount(self, key: str, place: str) -> None:
        row = self._store.index.get(key)
        self.hide(os.path.basename(place))  # a dead one
        os.makedirs(place, mode=0o700, exist_ok=True)
        try:
            if row.kind is not Kind.COMMITTED and not self.uid_map:
                (record,) = self._store.engine_mounts(key)
                if not record.type.startswith("fuse."):
                    mount_record(record, place, source=f"cowfs:{row.id}")
                    return
            self._store.mount(
                key,
                place,
                readonly=row.kind is Kind.COMMITTED,
                allow_other=True,
                options=("dev", "suid"),
                uid_map=self.uid_map,
                gid_map=self.gid_map,
            )
        except BaseException:
            self._drop(place)
            raise

    @staticmethod
    def _unmount(place: str) -> None:
        """Take one mount off; lazily where somebody is still in it."""

        def step(take: Callable[..., None]) -> None:
            try:
                take(place)
            except FailedPrecondition:
                take(place, lazy=True)

        try:
            step(client.umount)
        except NotFound:
            step(mountpoint.detach)  # a bind of a directory is not known as ours

    @staticmethod
    def _drop(place: str) -> None:
        try:
            os.rmdir(place)
        except OSError:
            pass  # mounted after all, or gone
