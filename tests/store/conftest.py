"""Stores on the session's tmpfs, and layers written without any mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.drivers import HOSTS
from support.hostfs import unmount_below

from cowfs.model import Kind
from cowfs.row.view import View
from cowfs.store import Store
from cowfs.union import Options
from cowfs.union.node import Dir, Node


@pytest.fixture(params=["overlay", "vfs"])
def driver(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    name: str = request.param
    return name


@pytest.fixture
def home(space: Path, driver: str, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory where a store of the driver can be: on the session's tmpfs, on a btrfs, or on a pool of zfs."""
    where = HOSTS.get(driver)
    if where is None:
        yield space
    elif where == "zfs":
        path: Path = request.getfixturevalue("pool") / "home"
        path.mkdir()
        yield path
    else:
        yield request.getfixturevalue("host")(where).fresh("home")
    unmount_below(space)


@pytest.fixture
def store(space: Path, driver: str) -> Iterator[Store]:
    """An empty store."""
    with Store.open(space / "store", driver=driver, fsync=False) as opened:
        yield opened


def tree_path(store: Store, key: str) -> Path:
    """The directory that holds an active snapshot's changes: writing there is what a mount does in the end."""
    row = store.index.get(key)
    store.driver.plan(row.id, [], readonly=row.kind is Kind.COMMITTED)  # a driver may have to make it a directory first
    return Path(store.driver.tree(row.id))


BIG = bytes(range(1, 251)) * 400
"""A file that is worth a redirect file."""


def view_of(store: Store, key: str) -> View:
    """The view that a mount of ``key`` would have; the caller closes it."""
    (record,) = store.mounts(key)
    words = dict(option.partition("=")[::2] for option in record.options)
    options = Options(form=store.driver.form.name, row=store.driver.capabilities.row or None)
    lowers = words.get("lowerdir", record.source)  # a bind mount of one layer has none
    return View(lowers.split(":"), words.get("upperdir"), words.get("workdir"), options=options)


def overwrite(store: Store, key: str, path: str, offset: int, data: bytes) -> None:
    """Write into a file of ``key`` as a mount does: backends of deltas copy it up, or make a redirect file."""
    if store.driver.capabilities.whole:
        with (tree_path(store, key) / path).open("r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a file system in an image keeps it to itself until then
        return
    view = view_of(store, key)
    try:
        node: Node = view.root
        for name in path.encode().split(b"/"):
            assert isinstance(node, Dir)
            node = view.lookup(node, name)
        view.write(node, offset, data)
    finally:
        view.close()


def content(store: Store, name: str, path: str) -> bytes:
    """A file of a snapshot, as a mount shows it."""
    if store.driver.capabilities.whole:
        return (tree_path(store, name) / path).read_bytes()
    key = "to look" if (committed := store.stat(name).kind is Kind.COMMITTED) else name
    if committed:
        store.view(key, name)
    view = view_of(store, key)
    try:
        node: Node = view.root
        for part in path.encode().split(b"/"):
            assert isinstance(node, Dir)
            node = view.lookup(node, part)
        found = bytearray(view.size(node))
        assert view.pread(node, 0, memoryview(found)) == len(found)
    finally:
        view.close()
        if committed:
            store.remove(key)
    return bytes(found)
