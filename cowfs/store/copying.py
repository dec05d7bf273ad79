"""Snapshots to another store, layer by layer."""

from __future__ import annotations

import os
import threading

from cowfs._typed import TYPE_CHECKING, Protocol
from cowfs.errors import InvalidArgument
from cowfs.index.database import Row
from cowfs.model import Kind
from cowfs.store.archived import present
from cowfs.store.names import new_id

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

    from cowfs.driver.interface import Driver
    from cowfs.index.database import Index
    from cowfs.store.applying import Progress
    from cowfs.store.context import Context
    from cowfs.store.exporting import Exporting
    from cowfs.store.naming import Naming
    from cowfs.store.reading import Reading

__all__ = ["Copying", "Receiver"]


class Receiver(Protocol):
    """The interface of a store that snapshots are copied to; see :class:`cowfs.Store`."""

    root: str
    index: Index

    @property
    def driver(self) -> Driver: ...

    def exists(self, name: str) -> bool: ...

    def prepare(self, key: str, parent: str | None = None) -> object: ...

    def apply(
        self, key: str, stream: BinaryIO, *, diff_id: str | None = None, progress: Progress | None = None
    ) -> object: ...

    def commit(self, key: str, name: str, *, labels: Mapping[str, str] | None = None) -> object: ...

    def remove(self, name: str) -> object: ...

    def tag(self, name: str, target: str, *, config: str | None = None) -> object: ...


class Copying:
    """Copies in another store, by its public verbs."""

    def __init__(self, context: Context, reading: Reading, naming: Naming, exporting: Exporting) -> None:
        self.context = context
        self._reading = reading
        self._naming = naming
        self._exporting = exporting

    def copy_to(self, name: str, other: Receiver, *, progress: Progress | None = None) -> list[str]:
        """As :meth:`cowfs.Store.copy_to`."""
        row = self._reading.resolve(name)
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"{name!r} is not committed", remedy="commit it, or copy its parent")
        if os.path.realpath(self.context.root) == os.path.realpath(other.root):
            raise InvalidArgument("the other store is this one")
        chain = [self.context.index.by_num(num) for num, _ in reversed(self.context.index.chain(row.num))]
        copied: list[str] = []
        parent: Row | None = None
        chain_id: str | None = None
        for each, diff_id in zip(chain, self._exporting.diff_ids(row), strict=True):
            chain_id = diff_id if chain_id is None else _chained(chain_id, diff_id)
            there = present(other, parent, chain_id, diff_id, "fail")
            if there is not None:
                parent = there
                continue
            parent = self._copy_layer(each, other, parent, chain_id, diff_id, progress)
            copied.append(parent.name)
        assert parent is not None
        self._copy_name(name, row, other, parent)
        return copied

    def _copy_layer(
        self, row: Row, other: Receiver, parent: Row | None, chain_id: str, diff_id: str, progress: Progress | None
    ) -> Row:
        name = row.name if other.index.find(row.name) is None and other.index.tag(row.name) is None else chain_id
        key = f"copy-{new_id()}"
        other.prepare(key, parent.name if parent is not None else None)
        try:
            self._pipe_layer(row, other, key, diff_id, progress)
            other.commit(key, name, labels=row.labels)
        except BaseException:
            if other.exists(key):
                other.remove(key)
            raise
        return other.index.get(name)

    def _pipe_layer(self, row: Row, other: Receiver, key: str, diff_id: str, progress: Progress | None) -> None:
        """One layer's archive, written in a thread of its own, unpacked here."""
        reading, writing = os.pipe()
        failed: list[BaseException] = []

        def write() -> None:
            try:
                with open(writing, "wb") as out:
                    self._exporting.write_layer(row, out, "none", None)
            except BaseException as error:  # noqa: BLE001  raised below, in the caller's thread
                failed.append(error)

        thread = threading.Thread(target=write, name="cowfs-copy", daemon=True)
        with open(reading, "rb") as stream:
            thread.start()
            try:
                other.apply(key, stream, diff_id=diff_id, progress=progress)
            except BaseException as error:
                stream.close()
                thread.join()
                if failed and not isinstance(failed[0], BrokenPipeError):
                    raise failed[0] from error
                raise
        thread.join()
        if failed:
            raise failed[0]

    def _copy_name(self, name: str, row: Row, other: Receiver, top: Row) -> None:
        """Give the copy the names of the snapshot."""
        if name == top.name:
            return
        found = other.index.find(name)
        if found is not None:
            if found.num != top.num:
                raise InvalidArgument(
                    f"{name!r} is another snapshot in {other.root}", remedy=f"its tree is {top.name!r} there"
                )
            return
        other.tag(name, top.name, config=self._naming.config(name) if name != row.name else None)


def _chained(above: str, diff_id: str) -> str:
    """OCI image-spec, config.md, "Layer ChainID"."""
    from hashlib import sha256

    return f"sha256:{sha256(f'{above} {diff_id}'.encode()).hexdigest()}"
