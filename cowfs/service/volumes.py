"""Volumes: directories that outlive containers, by name.

Rules:

1. A volume is a directory ``STORE/service/volumes/NAME`` with a record beside its data (``_data``). It exists from the
rename that puts the finished directory in its place to the rename that takes it away; other directories there are left
over and deleted at the next start. 2. The records of containers alone tell the uses of a volume: there is no count that
a killed daemon could leave wrong. 3. The first container that mounts an empty volume fills it from its image's
   directory at that path, with owner, mode and times, as Docker does (unless ``nocopy``). The path is resolved as if
   the container's root were the root; nothing runs in the tree meanwhile.

Threads: any; :attr:`Volumes.lock` is held while volumes are made, filled and removed, and while a container that names them is.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cowfs.errors import CowfsError, FailedPrecondition, NotFound
from cowfs.service.containers.container import OWNER, Container
from cowfs.service.errors import ApiError, not_offered
from cowfs.service.images import rfc3339
from cowfs.service.logs import log
from cowfs.service.telling import Teller
from cowfs.sys.atomic import write_file
from cowfs.sys.files import open_in_root

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["ANONYMOUS", "Volume", "Volumes"]

ANONYMOUS = "com.docker.volume.anonymous"
"""Label of a volume that was made for a container without a name of its own; the name is Docker's."""

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_RECORD, _DATA = "volume.json", "_data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume.

    Attributes:
        created: nanoseconds since 1970. data: the directory that containers see.
    """

    name: str
    created: int
    data: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def anonymous(self) -> bool:
        return ANONYMOUS in self.labels

    def described(self) -> dict[str, Any]:
        """The volume in the API's form."""
        return {
            "Name": self.name, "Driver": "local", "Mountpoint": self.data, "CreatedAt": rfc3339(self.created),
            "Labels": dict(self.labels) or None, "Options": None, "Scope": "local",
        }  # fmt: skip


class Volumes:
    """The volumes of a store.

    Args:
        folder: the directory of the volumes. users: gives (volume's name, container's id) for each use.
    """

    def __init__(self, store: Store, folder: str, users: Callable[[], Iterable[tuple[str, str]]]) -> None:
        self._store = store
        self._teller = Teller(store)
        self.folder = folder
        self._users = users
        self.lock = threading.RLock()
        os.makedirs(folder, mode=0o701, exist_ok=True)
        for name in os.listdir(folder):
            where = os.path.join(folder, name)
            for inner in os.listdir(where):
                if inner.startswith("."):  # a volume that was being filled
                    shutil.rmtree(os.path.join(where, inner), ignore_errors=True)
            if name.startswith("."):
                shutil.rmtree(where, ignore_errors=True)

    # -- looking ----------------------------------------------------------------------------------

    def all(self) -> list[Volume]:
        """All volumes, by name."""
        found = []
        for name in sorted(os.listdir(self.folder)):
            if not name.startswith("."):
                try:
                    found.append(self.get(name))
                except NotFound:
                    continue  # it is being removed
        return found

    def get(self, name: str) -> Volume:
        """The volume of a name.

        Raises:
            NotFound: there is none.
        """
        where = os.path.join(self.folder, name)
        try:
            if not _NAME.fullmatch(name):
                raise FileNotFoundError
            with open(os.path.join(where, _RECORD), "rb") as file:
                record = json.load(file)
            return Volume(
                name=name, created=record["created"], labels=record["labels"], data=os.path.join(where, _DATA)
            )
        except (OSError, ValueError, KeyError):
            raise NotFound(f"get {name}: no such volume") from None

    def path_of(self, name: str) -> str:
        """The path of a volume's data, existing or not."""
        return os.path.join(self.folder, name, _DATA)

    def used_by(self, name: str) -> list[str]:
        """The ids of the containers that name a volume."""
        return [container for volume, container in self._users() if volume == name]

    def size(self, volume: Volume) -> int:
        """The bytes of a volume's files on the host (st_blocks), each inode once."""
        seen, total = set(), 0
        for base, names, files in os.walk(volume.data):
            for name in [*names, *files]:
                try:
                    st = os.lstat(os.path.join(base, name))
                except OSError:
                    continue
                if (st.st_dev, st.st_ino) not in seen:
                    seen.add((st.st_dev, st.st_ino))
                    total += st.st_blocks * 512
        return total

    # -- making and removing ----------------------------------------------------------------------

    def create(
        self, name: str = "", *, driver: str = "", options: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None
    ) -> Volume:  # fmt: skip
        """The volume of a name, made if missing.

        Raises:
            ApiError: 400 for a bad name, 501 for a driver or options.
        """
        if driver not in ("", "local"):
            raise not_offered(f"the volume driver {driver}")
        if options:
            raise not_offered(
                f"options of volumes ({', '.join(sorted(options))}); bind a directory: -v /host/path:/path"
            )
        if not name:
            name, labels = secrets.token_hex(32), {**(labels or {}), ANONYMOUS: ""}
        if not _NAME.fullmatch(name) or len(name) > 200:
            raise ApiError(
                400,
                f'create {name}: "{name}" includes invalid characters for a local volume name,'
                ' only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, use absolute path',
            )
        with self.lock:
            try:
                return self.get(name)
            except NotFound:
                pass
            new = os.path.join(self.folder, f".new-{secrets.token_hex(8)}")
            os.makedirs(os.path.join(new, _DATA), mode=0o755)
            os.chmod(new, 0o701)
            record = {"created": time.time_ns(), "labels": dict(labels or {})}
            write_file(os.path.join(new, _RECORD), json.dumps(record).encode(), durable=self._store.driver.fsync)
            os.rename(new, os.path.join(self.folder, name))
            made = self.get(name)
        self.tell(made.name, "create", driver="local")
        return made

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a volume.

        Args:
            force: a missing one is no error.

        Raises:
            NotFound: there is none. FailedPrecondition: a container names it.
        """
        with self.lock:
            try:
                volume = self.get(name)
            except NotFound:
                if force:
                    return
                raise
            users = self.used_by(name)
            if users:
                raise FailedPrecondition(f"remove {name}: volume is in use - [{', '.join(users)}]")
            gone = os.path.join(self.folder, f".rm-{secrets.token_hex(8)}")
            os.rename(os.path.join(self.folder, volume.name), gone)
        shutil.rmtree(gone, ignore_errors=True)
        self.tell(name, "destroy", driver="local")

    def drop(self, names: Iterable[str]) -> None:
        """Remove unused volumes that were made for one container, after its removal."""
        for name in names:
            try:
                self.remove(name, force=True)
            except FailedPrecondition:
                pass
            except OSError as error:
                log.warning("the volume %s is not removed: %s", name, error)

    def mounts_of(self, container: Container) -> list[dict[str, Any]]:
        """The mounts of a container's volumes in the runtime's form; each volume is there, and filled if it was empty."""
        found = []
        for each in container.volumes:
            volume = self.create(each["name"])
            if each["copy"]:
                root = os.open(container.rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    self.fill(volume, root, each["target"])
                finally:
                    os.close(root)
            options = ["rbind", "ro" if each["readonly"] else "rw", "rprivate"]
            found.append({"destination": each["target"], "type": "bind", "source": volume.data, "options": options})
            self.tell(volume.name, "mount", container=container.id, destination=each["target"], driver="local")
        return found

    def drop_of(self, container: str) -> None:
        """Remove the volumes made for a container whose creation failed."""
        self.drop([each.name for each in self.all() if each.labels.get(OWNER) == container])

    def prune(self, fits: Callable[[Volume], bool]) -> tuple[list[str], int]:
        """Remove the unused volumes that match the filters, and return their names and the bytes freed."""
        done, freed = [], 0
        for volume in self.all():
            if not fits(volume):
                continue
            size = self.size(volume)
            try:
                self.remove(volume.name)
            except (FailedPrecondition, NotFound):
                continue
            done.append(volume.name)
            freed += size
        return done, freed

    def tell(self, name: str, action: str, **more: str) -> None:
        """Record an event."""
        self._teller.tell("volume", action, name, more)

    # -- filling ----------------------------------------------------------------------------------

    def fill(self, volume: Volume, root: int, path: str) -> None:
        """Fill an empty volume from a path of a container's tree.

        Args:
            root: a descriptor of the tree's root directory.
        """
        with self.lock:
            if os.listdir(volume.data):
                return
            try:
                source = open_in_root(root, os.fsencode(path), os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                return  # the image has no directory there
            new = os.path.join(os.path.dirname(volume.data), f".new-{secrets.token_hex(8)}")
            try:
                alone = len(self.used_by(volume.name)) < 2  # else the directory may be mounted: it stays the same one
                target = new if alone else volume.data
                if alone:
                    os.mkdir(new, 0o755)
                _copy(source, target)
                if alone:
                    os.rename(new, volume.data)  # onto the empty directory
            finally:
                os.close(source)
                shutil.rmtree(new, ignore_errors=True)


def _copy(source: int, target: str) -> None:
    """Copy the content of a directory, and its own attributes, with everything that the host can keep."""
    words = ["cp", "-a", "--no-target-directory", f"/proc/self/fd/{source}/.", target]
    done = subprocess.run(words, pass_fds=[source], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CowfsError(f"a volume cannot be filled: {done.stderr.strip().splitlines()[-1]}")
