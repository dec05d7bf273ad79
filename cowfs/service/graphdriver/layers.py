"""The verbs of a graph driver, on a store. Plain values in and out; HTTP is the business of :mod:`plugin`.

Rules, from moby's daemon/graphdriver/driver.go and what its layer store does with it:

1. Docker never says commit. A layer that got an archive (ApplyDiff), and one upon which another is made (the init layer of a container), is
   committed by us then.
2. A layer that came as an archive is given back as that archive, byte for byte, which we tell (ReproducesExactDiffs); so
   dockerd keeps no headers of its own.
3. ids are dockerd's, kept with :data:`PREFIX`, which no tag can have. Each layer has the label :data:`HOME` with dockerd's directory.
4. A limit is for what a container writes: ``size`` and ``inodes`` of ``--storage-opt``, or else the default. An init layer has none.
5. When dockerd starts, it tells its directory, options and mapped users (Init): they are kept, for a service that was killed. Layers of which that dockerd
   has no record, since one of both was killed in between, are removed then.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

from cowfs.errors import CowfsError, InvalidArgument, Unsupported
from cowfs.index.database import Row
from cowfs.model import Kind, parse_count, parse_size
from cowfs.mounting.request import IdMap
from cowfs.service import changes
from cowfs.service.cleaning import Cleaner
from cowfs.service.graphdriver.shown import Shown
from cowfs.service.logs import log
from cowfs.store import Store
from cowfs.sys.atomic import write_file

__all__ = ["HOME", "PREFIX", "Layers"]

PREFIX = "docker: "
HOME = "cowfs.service.docker-home"

_INIT = "-init"  # how the ids of init layers end (moby, layer/layer_store.go)
_TURNS = 64
_OPTIONS = {"size": parse_size, "inodes": parse_count}


class Layers:
    """The layers of one dockerd.

    Args:
        state: the file in which is kept what dockerd said at its start.
        default: ``size`` and ``inodes`` of containers for which neither docker nor dockerd says one, as text.
    """

    def __init__(self, store: Store, state: str, default: Mapping[str, str]) -> None:
        self._store = store
        self._state = state
        self._own_default = self._default = dict(default)
        self.shown = Shown(store)
        self._turns = [threading.Lock() for _ in range(_TURNS)]  # one at a time for each id; two ids may share one
        self._cleaner = Cleaner(store)
        self._remember()

    def close(self) -> None:
        """End the threads. Mounts stay."""
        self._cleaner.close()

    # -- dockerd's life -----------------------------------------------------------------------------------------------------

    def init(self, home: str, options: Sequence[str], uid_map: IdMap, gid_map: IdMap) -> None:
        """A dockerd starts.

        Args:
            home: its directory for this driver.
            options: its ``--storage-opt``.
            uid_map, gid_map: (id in the layers, id of the host, count) of the users of its containers.

        Raises:
            InvalidArgument: an option that there is not, or no such directory.
            OSError: the directory cannot be made.
        """
        if not os.path.isabs(home):
            raise InvalidArgument(f"Init: the directory of dockerd is {home!r}, no absolute path")
        default = {**self._own_default, **_limit(dict(_pair(option) for option in options))}
        self._enter(home, default, uid_map, gid_map)
        state = {"home": home, "default": default, "uid_map": uid_map, "gid_map": gid_map}
        write_file(self._state, json.dumps(state).encode())
        self._collect(home)

    def _enter(self, home: str, default: dict[str, str], uid_map: IdMap, gid_map: IdMap) -> None:
        self.shown.enter(home, uid_map, gid_map)
        self._default = default

    def _remember(self) -> None:
        """Go on for the dockerd that a service before this one knew."""
        try:
            with open(self._state, "rb") as file:
                state = json.load(file)
        except FileNotFoundError:
            return
        except ValueError as error:
            log.warning("%s: %s; restart dockerd", self._state, error)
            return
        maps = [tuple(tuple(each) for each in state[name]) for name in ("uid_map", "gid_map")]
        self._enter(state["home"], state["default"], *maps)

    def _collect(self, home: str) -> None:
        """Remove the layers of a dockerd of which it has no record."""
        known = _known(home)
        if known is None:
            return
        ours = [each for each in self._store.walk() if each.labels.get(HOME) == home]
        for info in reversed(ours):  # children before parents
            if info.name.removeprefix(PREFIX) not in known:
                log.info("dockerd has no record of layer %s: removed", info.name)
                try:
                    self.remove(info.name.removeprefix(PREFIX))
                except CowfsError as error:
                    log.warning("%s", error)

    def cleanup(self) -> None:
        """dockerd ends: nobody looks into its layers any more."""
        self.shown.hide_all()

    # -- making -----------------------------------------------------------------------------------------------------------

    def create(self, id: str, parent: str, options: Mapping[str, str], label: str) -> None:
        """Make a layer.

        Raises:
            NotFound: no such parent.
            AlreadyExists: the id is taken.
            InvalidArgument: a bad option.
            FailedPrecondition: dockerd did not say Init.
            Unsupported: a label of SELinux.
        """
        _no_label(label)
        limit = _limit(options)
        if not self.shown.home:
            raise InvalidArgument("dockerd has not told its directory", remedy="restart dockerd")
        if parent:
            self._freeze(parent)
        if id.endswith(_INIT):
            limit = {}
        self._store.prepare(_key(id), _key(parent) if parent else None, labels={HOME: self.shown.home}, **limit)
        self._store.engine_mounts(_key(id))  # so that the kernel can mount what will stand on it

    def create_read_write(self, id: str, parent: str, options: Mapping[str, str], label: str) -> None:
        """Make a layer for a container; errors as for :meth:`create`."""
        self.create(id, parent, {**self._default, **options}, label)

    def _freeze(self, id: str) -> None:
        with self._turn(id):
            row = self._store.index.get(_key(id))
            if row.kind is Kind.ACTIVE:
                self._store.commit(_key(id), _key(id), mounted=True)

    def apply(self, id: str, parent: str, stream: BinaryIO) -> int:
        """Unpack an archive into a layer and commit it; the bytes that it holds.

        Raises:
            NotFound: no such layer.
            InvalidArgument: another parent; a damaged or hostile archive.
            FailedPrecondition: it got one already.
        """
        with self._turn(id):
            row = self._stands_on(id, parent)
            if row.kind is Kind.ACTIVE:
                self.shown.hide(id)
            self._store.apply(row.name, stream)
            self._store.commit(row.name, row.name)
            return self._store.usage(row.name).bytes

    def remove(self, id: str) -> None:
        """Remove a layer at once; its files go in a moment. One that is not there is fine.

        Raises:
            FailedPrecondition: another one stands on it.
        """
        with self._turn(id):
            if self._store.index.find(_key(id)) is not None:
                self._store.remove(_key(id), mounted=True, defer=True)
                self._cleaner.wake()
            self.shown.hide(id)

    # -- looking ----------------------------------------------------------------------------------------------------------

    def get(self, id: str, label: str) -> str:
        """Mount a layer; the directory that shows it. Raises NotFound, and what hinders the mount."""
        _no_label(label)
        with self._turn(id):
            return self.shown.get(id, self._store.index.get(_key(id)).name)

    def put(self, id: str) -> None:
        """The one who said :meth:`get` is done."""
        with self._turn(id):
            self.shown.put(id)

    def exists(self, id: str) -> bool:
        """Whether there is such a layer."""
        return bool(id) and self._store.index.find(_key(id)) is not None

    def status(self) -> list[tuple[str, str]]:
        """The entries for ``docker info``."""
        told = [("Store", self._store.root), ("Driver", self._store.driver.name)]
        return told + [(f"Default {name}", value) for name, value in sorted(self._default.items())]

    def metadata(self, id: str) -> dict[str, str]:
        """The entries for ``docker inspect``. Raises NotFound."""
        row = self._store.index.get(_key(id))
        told = {"Store": self._store.root, "Key": row.name, "Directory": self._store.driver.directory(row.id)}
        limits = {"Size": row.limit.bytes, "Inodes": row.limit.inodes}
        return told | {name: str(value) for name, value in limits.items() if value is not None}

    def diff(self, id: str, parent: str, out: BinaryIO) -> None:
        """Write the archive of a layer. Raises NotFound."""
        row = self._written(id)
        if self._is_parent(row, parent):
            self._store.export(row.name, out, format="layer")
        elif parent:
            self._store.export_diff(_key(parent), row.name, out)
        else:
            raise Unsupported(f"{id} stands on another layer: there is no archive of both", remedy="ask for each")

    def changes(self, id: str, parent: str) -> Iterator[tuple[str, int]]:
        """Paths that are changed (0), added (1) and deleted (2). Raises NotFound."""
        row = self._written(id)
        return changes.changes(self._store, row.name, None if self._is_parent(row, parent) else _key(parent))

    def size(self, id: str, parent: str) -> int:
        """Bytes that a layer holds itself. Raises NotFound, InvalidArgument for another parent."""
        return self._store.usage(self._stands_on(id, parent).name).bytes

    # -- helpers ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, id: str) -> Iterator[None]:
        if not id or "/" in id or id in (".", ".."):
            raise InvalidArgument(f"not the id of a layer: {id!r}")
        with self._turns[hash(id) % _TURNS]:
            yield

    def _written(self, id: str) -> Row:
        """The row of a layer, whose directory has what was written through its mount."""
        row = self._store.index.get(_key(id))
        if row.kind is Kind.ACTIVE:
            self.shown.synced(id)
        return row

    @staticmethod
    def _is_parent(row: Row, parent: str) -> bool:
        return row.parent_name == _key(parent) if parent else row.parent is None

    def _stands_on(self, id: str, parent: str) -> Row:
        row = self._store.index.get(_key(id))
        if parent and not self._is_parent(row, parent):
            raise InvalidArgument(f"{id} does not stand on {parent}")
        return row


def _key(id: str) -> str:
    if not id:
        raise InvalidArgument("the id of a layer is missing")
    return PREFIX + id


def _pair(option: str) -> tuple[str, str]:
    key, _, value = option.partition("=")
    return key.strip().removeprefix("cowfs."), value.strip()


def _limit(options: Mapping[str, str]) -> dict[str, str]:
    """The limit that options say.

    Raises:
        InvalidArgument: another option, or no size.
    """
    for name, value in options.items():
        if name not in _OPTIONS:
            raise InvalidArgument(f"no storage option {name!r}", remedy="size=10G or inodes=1M")
        _OPTIONS[name](value)
    return dict(options)


def _no_label(label: str) -> None:
    if label:
        raise Unsupported(f"no mounts with a label of SELinux ({label})", remedy="dockerd without --selinux-enabled")


def _known(home: str) -> set[str] | None:
    """The ids of layers that a dockerd has on record (moby, layer/filestore.go); None where that cannot be told for certain.

    A layer's record appears whole. That of a container is written file by file: without one of them, dockerd does not know it either.
    """
    root, name = os.path.split(home)
    where = os.path.join(root, "image", name, "layerdb")
    try:
        found = {_id_in(entry.path, "cache-id") for entry in os.scandir(os.path.join(where, "sha256"))}
        with suppress(FileNotFoundError):
            for entry in os.scandir(os.path.join(where, "mounts")):
                for file in ("mount-id", "init-id"):
                    with suppress(FileNotFoundError):
                        found.add(_id_in(entry.path, file))
    except FileNotFoundError as error:
        if os.path.isdir(where):
            log.warning("not every layer of dockerd is on record: %s", error)
        return None  # or it starts for the first time
    except (OSError, ValueError) as error:
        log.warning("the records of dockerd cannot be read: %s", error)
        return None
    return found


def _id_in(directory: str, name: str) -> str:
    with open(os.path.join(directory, name), encoding="utf-8") as file:
        text = file.read().strip()
    if not text:
        raise ValueError(f"{directory}/{name} is empty")
    return text
