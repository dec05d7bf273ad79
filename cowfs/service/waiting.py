"""Events of what has happened already, kept on a full disk in a file whose room was taken while there was some.

Strategy. The file has its whole size from the first start of a daemon on, so a record is written over zeros, which needs
neither a block nor an inode. A record: four bytes of length (little-endian), and a JSON array of the arguments of
``Store.record_event``; a length of zero is the end. A record's length is written last, so a kill leaves the record whole or
not there. Events move to the store's log in one transaction, then the first length is zeroed; after a kill between these
two they are found in the log, and are not recorded again.

Threads and processes: any; the daemon and the supervisors write, one at a time (flock(2)).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.store import Store

__all__ = ["SIZE", "Waiting", "Waits"]

SIZE = 512 << 10
"""Bytes: some two thousand events."""

Waits = tuple[str, str, str, dict[str, str], int]
"""Type, action, actor, attributes, and the time in nanoseconds since 1970."""

_LENGTH = struct.Struct("<I")


class Waiting:
    """The file of a store.

    Args:
        root: of the store. durable: whether a record is on the disk before :meth:`append` returns.
    """

    def __init__(self, root: str, *, durable: bool) -> None:
        self._path = os.path.join(root, "service", "events.waiting")
        self._durable = durable

    def reserve(self) -> None:
        """Take the room, if that was not done yet.

        Raises:
            OSError: there is none.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            there = os.fstat(fd).st_size
            for at in range(there, SIZE, 1 << 16):
                os.pwrite(fd, bytes(min(1 << 16, SIZE - at)), at)
        finally:
            os.close(fd)

    def append(self, event: Waits) -> bool:
        """Write a record behind the others; False if there is no place for it."""
        data = json.dumps(event).encode()
        try:
            with self._open() as fd:
                end = sum(_LENGTH.size + len(each) for each in _records(fd))
                if end + 2 * _LENGTH.size + len(data) > os.fstat(fd).st_size:
                    return False
                os.pwrite(fd, data + _LENGTH.pack(0), end + _LENGTH.size)
                os.pwrite(fd, _LENGTH.pack(len(data)), end)
                if self._durable:
                    os.fdatasync(fd)
        except OSError:
            return False
        return True

    def drain(self, store: Store) -> None:
        """Move all records to the store's log, in their order.

        Raises:
            OSError: ENOSPC: there is no room for them yet. CowfsError: the index cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                fd = held.enter_context(self._open())
                records = list(_records(fd))
            except OSError:
                return  # no room was taken, so nothing waits here
            if not records:
                return
            _move([event for event in map(_event, records) if event is not None], store)
            os.pwrite(fd, _LENGTH.pack(0), 0)
            if self._durable:
                os.fdatasync(fd)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)


def _records(fd: int) -> Iterator[bytes]:
    data = os.pread(fd, SIZE, 0)
    at = 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if not length or at + length > len(data):
            return
        yield data[at : at + length]
        at += length


def _event(record: bytes) -> Waits | None:
    """The event of a record; None of one that a failure of power tore."""
    try:
        type, action, actor, attributes, at = json.loads(record)
        return str(type), str(action), str(actor), {str(key): str(value) for key, value in attributes.items()}, int(at)
    except (ValueError, TypeError, AttributeError):
        return None


def _move(events: list[Waits], store: Store) -> None:
    first = min((at for *_, at in events), default=0)
    known = {(each.type, each.action, each.actor, each.time) for each in store.events(since=first)}
    with store.index.write() as change:
        for type, action, actor, attributes, at in events:
            if (type, action, actor, at) not in known:
                change.record_event(type, action, actor, attributes, at=at)
