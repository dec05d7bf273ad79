"""Stores on the session's tmpfs, and layers written without any mount."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.store import Store


@pytest.fixture(params=["overlay", "vfs"])
def driver(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    name: str = request.param
    return name


@pytest.fixture
def store(space: Path, driver: str) -> Iterator[Store]:
    """An empty store."""
    with Store.open(space / "store", driver=driver, fsync=False) as opened:
        yield opened


def tree_path(store: Store, key: str) -> Path:
    """The directory that holds an active snapshot's changes: writing there is what a mount does in the end."""
    return Path(store.driver.tree(store.index.get(key).id))
