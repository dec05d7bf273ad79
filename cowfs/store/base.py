"""A store that is open: its directory, its index, its driver.

Rule: what killed processes left is swept before the first verb, and nobody sweeps while the drivers of a new store try what
they can do there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from cowfs.driver import registry
from cowfs.driver.interface import Driver, Probe
from cowfs.errors import FailedPrecondition, InvalidArgument
from cowfs.index.database import Index
from cowfs.store import key_lock
from cowfs.store.opening import INDEX, default_root, make_root, must_run, only_one
from cowfs.store.reading import Reading, must_read
from cowfs.store.recount import recount
from cowfs.store.reserve import FULL, Reserve, no_room
from cowfs.store.staging import sweep
from cowfs.sys import files, host

__all__ = ["OpenStore"]


class OpenStore(Reading):
    """The life of a store. Made by :meth:`open`; users see it as :class:`cowfs.Store`.

    Attributes:
        root: the store's directory, absolute.
        index: the index.
        why: why this driver: what each one that is installed said, by name; empty when the store
            had one already.
    """

    def __init__(self, root: str, index: Index, driver: Driver, why: Mapping[str, Probe]) -> None:
        self.root = root
        self.index = index
        self._driver, self._closed = driver, False
        self.why = why
        self.reserve = Reserve(root)

    @property
    def driver(self) -> Driver:
        """The backend. Raises FailedPrecondition once the store is closed."""
        if self._closed:
            raise FailedPrecondition(f"the store {self.root} is closed", remedy="open it again")
        return self._driver

    # --------------------------------------------------------------- open, close

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        driver: str = "auto",
        create: bool = True,
        fsync: bool = True,
        **options: str | int | bool | None,
    ) -> Self:
        """Open the store in a directory, making it on first use.

        What a killed process left half done is finished or taken back, which may take as long as the verb did.

        Args:
            root: the directory; default: :func:`default_root`.
            driver: ``auto`` takes the driver that the store has, else the best one for this host.
            create: whether to make a store that is not there.
            fsync: off: a power loss may undo the latest verbs (not damage the store).
            options: the driver's own, as its class documents them; of cowfs's drivers only row has one: ``block``, bytes a block
                of new redirect files, a power of two from 4 KiB to 1 MiB ("64K").

        Raises:
            NotFound: no store there and ``create`` is off, or no such driver.
            InvalidArgument: the directory holds something else, or the store has another driver.
            Unsupported: no driver can run here, or a newer cowfs made the store.
            Corrupt: the index is damaged.
        """
        path = os.path.abspath(os.fspath(root) if root is not None else default_root())
        if driver != "auto":
            registry.load(driver)  # one that is not there makes no store
        make_root(path, create)
        try:
            made = cls._open(path, driver, create, fsync, options)
        except OSError as error:
            if error.errno not in (errno.EROFS, *FULL) or not os.path.isdir(path):
                raise
            raise no_room(error, path) from error
        try:
            made.recover_with_room()
        except BaseException:
            made.close()
            raise
        return made

    def recover_with_room(self, key: str | None = None) -> None:
        """Recover as far as there is room (:meth:`recover`): what cannot be finished for want of it stays half done.

        Args:
            key: a snapshot that must not be half done itself.

        Raises:
            OSError: as for :meth:`recover`.
        """
        try:
            self.recover()
        except OSError as error:
            if error.errno not in FULL or (key is not None and self.is_half_done(key)):
                raise

    def is_half_done(self, key: str) -> bool:
        """Whether a verb on a key was killed, or had no room, and is still to be finished.

        Args:
            key: an active snapshot.

        Raises:
            NotFound: no such key.
        """
        return False

    def recover(self) -> None:
        """Finish, or take back, what killed processes left half done. Called by :meth:`open` and :meth:`gc`.

        Raises:
            OSError: a file of the store cannot be read or changed.
        """

    @classmethod
    def _open(cls, path: str, driver: str, create: bool, fsync: bool, options: Mapping[str, Any]) -> Self:
        with only_one(path):
            index = Index(os.path.join(path, INDEX), create=create, fsync=fsync)
        try:
            why: Mapping[str, Probe] = {}
            had = index.meta("driver")
            if had is None:
                with only_one(path):  # nobody sweeps, or chooses another, while the drivers try what they can do here
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
                sweep(made, index)
                Reserve(path).keep()
                key_lock.prepare(path)
                recount(index, made)
        except BaseException:
            index.close()
            raise
        return cls(path, index, made, why)

    def close(self) -> None:
        """Let go of the index and the driver. Idempotent; every other verb refuses from now on. Mounts go on.

        Raises:
            OSError: the driver cannot write what it keeps.
        """
        self._closed = True
        self._driver.close()
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
