"""An export beside a removal ends whole, or says that the snapshot was removed; it never tells of damage."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.errors import NotFound
from cowfs.index.directory import Pending
from cowfs.store import Store

EXPORTS: dict[str, Callable[[Store], object]] = {
    "tar": lambda store: store.export("two", io.BytesIO(), format="tar"),
    "layer": lambda store: store.export("two", io.BytesIO(), format="layer"),
    "oci": lambda store: store.export("two", io.BytesIO()),
    "diff": lambda store: store.export_diff("one", "two", io.BytesIO()),
}


@pytest.mark.parametrize("way", EXPORTS)
@pytest.mark.parametrize("at", range(6))
def test_a_removal_under_an_export_is_told(
    way: str, at: int, driver: str, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed with all its records before each of the first reads of the index in turn."""
    with Store.open(space / "store", driver=driver, fsync=False) as store, Store.open(space / "store") as other:
        for name, parent in (("one", None), ("two", "one")):
            store.prepare("k", parent)
            with store.paths("k") as paths:
                for number in range(4):
                    paths.mkdir(f"{name}{number}".encode())
                    paths.write_bytes(f"{name}{number}/file".encode(), b"x" * 5000)
            store.commit("k", name)
        read, count = Pending.record, 0

        def record(self: Pending, digest: bytes) -> bytes:
            nonlocal count
            if count == at:
                for name in ("two", "one"):
                    other.remove(name)
                other.gc()
            count += 1
            return read(self, digest)

        monkeypatch.setattr(Pending, "record", record)
        with contextlib.suppress(NotFound):
            EXPORTS[way](store)
