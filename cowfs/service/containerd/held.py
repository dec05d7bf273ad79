"""Mounts that the service holds, for an engine to bind: those of snapshots that no record of the kernel can express.

Strategy. Such a snapshot is mounted once, as any mount of cowfs, in a directory of the service, and the engine gets a bind
mount of it. So it starts in milliseconds, a second user (a diff of a running container) gets the same file system, and
the mount outlives a restart of the service. Its server is a process of its own, or the kernel (:meth:`Store.held_by
<cowfs.Store.held_by>`). The service and the engine must be in one mount namespace.

The directory ``RUN/held/ID`` is named after the layer. It is unmounted, whatever the engine does meanwhile:

* when the snapshot is committed or removed: lazily and at once; the engine's bind goes on until it is unmounted;
* when a snapshot that the kernel serves, and that nobody has bound yet, gets a limit;
* when only this directory has shown the mount at two checks, :data:`PAUSE` seconds apart, and no request for it came
  since: a stopped container has none. The next :meth:`Held.mount` makes it anew. A bind of a missing directory
  fails with ENOENT, so no write passes the limit.

Threads: :meth:`Held.mount` and :meth:`Held.release` may be called from any; :meth:`Held.look` from one.
"""

from __future__ import annotations

import os
import threading
from collections import Counter

from cowfs.errors import CowfsError, FailedPrecondition, NotFound, Unsupported
from cowfs.mounting import client, protocol
from cowfs.mounting.request import IdMap
from cowfs.service.logs import log
from cowfs.store import Store
from cowfs.sys.mounts import MNT_DETACH, mountinfo, umount

__all__ = ["PAUSE", "Held"]

_TURNS = 64
PAUSE = 60.0
"""Seconds between two looks for mounts that nobody uses."""


class Held:
    """The held mounts of a service.

    Args:
        directory: the directory of the mounts; made here.
    """

    def __init__(self, store: Store, directory: str) -> None:
        self._store = store
        self.directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._turns = [threading.Lock() for _ in range(_TURNS)]  # one at a time for each id; two ids may share one
        self._lock = threading.Lock()
        self._asked: set[str] = set()  # guarded by _lock: ids requested since the last check
        self._idle: set[str] = set()  # only in look: ids that were unused at the last check

    def _turn(self, id: str) -> threading.Lock:
        return self._turns[hash(id) % _TURNS]

    def place(self, id: str) -> str:
        """The path of the held mount of a layer."""
        return os.path.join(self.directory, id)

    def mount(self, key: str, uid_map: IdMap = (), gid_map: IdMap = (), *, kernel_image: bool = False) -> str:
        """A directory that shows a snapshot, mounted now or before.

        Args:
            uid_map, gid_map: of a mount that is made now: (id in the layers, id shown, count).
            kernel_image: an image of its chain is worth making, since others will stand on the same parent.

        Raises:
            NotFound: no such key.
            FailedPrecondition: it is mounted in a namespace that this process cannot see.
        """
        id = self._store.index.get(key).id
        place = self.place(id)
        with self._turn(id):
            with self._lock:
                self._asked.add(id)
            where = self._store.mounted_at(key)
            if where is not None:
                return self._seen(key, where)
            os.makedirs(place, mode=0o700, exist_ok=True)
            try:
                if uid_map or gid_map or not self._by_kernel(key, place, kernel_image):
                    self._store.mount(key, place, uid_map=uid_map, gid_map=gid_map)
            except BaseException:
                self._drop(place)
                raise
            return place

    def _by_kernel(self, key: str, place: str, kernel_image: bool) -> bool:
        """Have the kernel mount a snapshot. Returns whether it did."""
        if self._store.held_by(key) != "kernel":
            return False
        try:
            self._store.mount(key, place, mount_type="kernel", kernel_image=kernel_image)
        except (Unsupported, OSError) as error:
            log.info("%s is mounted by cowfs's own server, not by the kernel: %s", key, error)
            return False
        return True

    def _seen(self, key: str, where: str) -> str:
        """A path of a mounted snapshot: its mount point, or a bind of it."""
        if os.path.ismount(where):
            return where
        device = protocol.device_of(self._store.handle(key).socket)
        for entry in mountinfo():
            if entry.dev == device and entry.root == b"/":
                return os.fsdecode(entry.target)
        raise FailedPrecondition(
            f"{key!r} is mounted in another mount namespace, at {where}", remedy="run cowfs serve in that of the engine"
        )

    def release(self, id: str) -> None:
        """Unmount a held mount lazily; binds of it go on. A missing one is no error."""
        if os.path.lexists(self.place(id)):
            with self._turn(id):
                self._detach(self.place(id))

    def give_up(self, id: str) -> bool:
        """Unmount a held mount that only its directory shows: a snapshot that the kernel has mounted takes no limit.

        Returns:
            Whether it was there, and is gone.
        """
        place = os.fsencode(self.place(id))
        with self._turn(id):
            entries = mountinfo()
            devices = [entry.dev for entry in entries if entry.target == place]
            if not devices or sum(entry.dev == devices[-1] for entry in entries) > 1:
                return False
            self._detach(self.place(id))
            return True

    def _detach(self, place: str) -> None:
        try:
            client.umount(place, lazy=True)
        except NotFound:
            if os.path.ismount(place):
                umount(place, MNT_DETACH)  # a bind of a directory, which is not known as ours
        except CowfsError:
            umount(place, MNT_DETACH)  # its server hangs, or is gone
        self._drop(place)

    @staticmethod
    def _drop(place: str) -> None:
        try:
            os.rmdir(place)
        except OSError:
            pass  # still mounted, or gone

    def look(self) -> list[str]:
        """Unmount the mounts that only their directory has shown at this check and the one before, and return their ids."""
        with self._lock:
            asked, self._asked = self._asked, set()
        uses: Counter[str] = Counter()
        held: dict[str, str] = {}
        inside = os.fsencode(self.directory) + b"/"
        for entry in mountinfo():
            uses[entry.dev] += 1
            if entry.target.startswith(inside):
                held[os.fsdecode(entry.target[len(inside) :])] = entry.dev
        idle = {id for id, device in held.items() if uses[device] == 1 and id not in asked}
        ended = []
        for id in sorted(idle & self._idle):
            with self._turn(id):
                with self._lock:
                    wanted = id in self._asked
                if not wanted:
                    self._detach(self.place(id))
                    ended.append(id)
        self._idle = idle.difference(ended)
        return ended
