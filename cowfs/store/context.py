"""The shared state of an open store's services: its directory, its index, its driver, and whether it is closed.

Rule: remains of killed processes are swept before the first verb, and no sweep runs while the drivers of a new store
are probed there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping

from cowfs._typed import Any, Self, TypeVar
from cowfs.driver import registry
from cowfs.driver.interface import Driver, Probe
from cowfs.errors import FailedPrecondition, InvalidArgument
from cowfs.index.database import Index
from cowfs.store import key_lock
from cowfs.store.opening import INDEX, default_root, make_root, mark_ids, must_run, only_one
from cowfs.store.reading import must_read
from cowfs.store.recount import recount
from cowfs.store.reserve import FULL, Reserve, no_room
from cowfs.store.staging import sweep
from cowfs.sys import files, host

__all__ = ["Context"]

_T = TypeVar("_T")


class Context:
    """An open store, without its verbs.

    Attributes:
        root: the store's directory, absolute.
        index: the index.
        reserve: the room that is kept for deletions.
        why: the reason for this driver: the answer of each installed one, by name; empty if the store had one already.

    Threads: any; the index gives each a connection of its own, and nothing else here changes but by :meth:`close`.
    """

    def __init__(self, root: str, index: Index, driver: Driver, why: Mapping[str, Probe]) -> None:
        self.root = root
        self.index = index
        self.reserve = Reserve(root)
        self.why = why
        self._driver, self._closed = driver, False
        self._ids = host.id_maps()

    @property
    def driver(self) -> Driver:
        """The backend. Raises FailedPrecondition once the store is closed."""
        if self._closed:
            raise FailedPrecondition(f"the store {self.root} is closed", remedy="open it again")
        return self._driver

    def knows_owners(self) -> bool:
        """Whether the owners that the index has are those that this process sees: it is in the user namespace where the store was opened."""
        return host.id_maps() == self._ids

    def freeing(self, delete: Callable[[], _T]) -> _T:
        """Call ``delete``, perhaps twice, which frees room, also on a file system without a free byte."""
        return self.reserve.spend(delete, self.index.renew)

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None,
        *,
        driver: str,
        create: bool,
        fsync: bool,
        options: Mapping[str, str | int | bool | None],
    ) -> Self:
        """As :meth:`cowfs.Store.open`, without recovery."""
        path = os.path.abspath(os.fspath(root) if root is not None else default_root())
        if driver != "auto":
            registry.load(driver)  # a missing directory makes no store
        make_root(path, create)
        try:
            return cls._open(path, driver, create, fsync, options)
        except OSError as error:
            if error.errno not in (errno.EROFS, *FULL) or not os.path.isdir(path):
                raise
            raise no_room(error, path) from error

    @classmethod
    def _open(cls, path: str, driver: str, create: bool, fsync: bool, options: Mapping[str, Any]) -> Self:
        with only_one(path):
            index = Index(os.path.join(path, INDEX), create=create, fsync=fsync)
        try:
            why: Mapping[str, Probe] = {}
            had = index.meta("driver")
            if had is None:
                with only_one(path):  # no sweep, and no other choice, while the drivers are probed here
                    had = index.meta("driver")
                    if had is None:
                        if driver == "auto":
                            best, why = registry.choose(path)
                            had = best.name
                        else:
                            must_run(registry.load(driver), path)
                            had = driver
                        index.set_meta("driver", had)
            if driver not in ("auto", had):
                raise InvalidArgument(
                    f"the store {path} has the driver {had}, not {driver}",
                    remedy="another driver needs a store of its own",
                )
            found = registry.load(had, index.meta("driver_class"))
            fits = found.own_form or ("trusted" if host.can_trusted_xattr() else "user")
            form = index.meta("form") or index.set_meta("form", fits)
            must_read(path, form)
            if index.meta("driver_class") is None:
                index.set_meta("driver_class", registry.where(found))
            made = found(path, form=form, fsync=fsync, **options)
            if not index.refused:
                for name in ("layers", "empty"):
                    with contextlib.suppress(FileExistsError):
                        files.make_directory(os.path.join(path, name), 0o755 if name == "empty" else 0o700)
                mark_ids(path)
                sweep(made, index)
                Reserve(path).keep()
                key_lock.prepare(path)
                recount(index, made)
        except BaseException:
            index.close()
            raise
        return cls(path, index, made, why)

    def close(self) -> None:
        """Close the index and the driver. Idempotent."""
        self._closed = True
        self._driver.close()
        self.index.close()
