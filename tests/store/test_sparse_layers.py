"""Holes of files in layers: a hard link to a file of a lower layer keeps them, on every driver and out of redirect files."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from support.archives import directory, hardlink, member, tar
from support.images import Layout

from cowfs.archive import ApplyOptions, header
from cowfs.errors import LimitExceeded
from cowfs.store import Store

from .conftest import overwrite, tree_path

pytestmark = pytest.mark.root
GIB = 1 << 30
DRIVERS = ["overlay", "row", "vfs"]


def sparse(name: str, size: int, offset: int, data: bytes) -> bytes:
    body = header.sparse_map([(offset, len(data)), (size, 0)]) + data
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(size)}
    return member(f"GNUSparseFile.0/{name}", body, pax=pax)


def used(root: Path) -> int:
    return sum(
        os.lstat(os.path.join(where, name)).st_blocks * 512 for where, _, names in os.walk(root) for name in names
    )


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_linked_file_keeps_its_holes_in_an_image_and_when_it_is_applied(space: Path, driver: str) -> None:
    base = tar(directory("./"), sparse("big", GIB, GIB // 2, b"middle"))
    bounds = ApplyOptions(max_bytes=64 << 10)
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        store.import_image(Layout().add([base], "base").write(space / "base"), options=bounds)
        layers = [base, tar(hardlink("link", "big"))]
        top = store.import_image(Layout().add(layers, "linked").write(space / "linked"), options=bounds)
        store.prepare("w", "base")
        store.apply("w", io.BytesIO(tar(hardlink("again", "big"))), options=bounds)
        for path in (tree_path(store, top) / "link", tree_path(store, "w") / "again"):
            with open(path, "rb") as file:
                assert os.fstat(file.fileno()).st_size == GIB
                file.seek(GIB // 2)
                assert file.read(6) == b"middle"
        assert used(space / "store") < 4 << 20
        assert store.check(content=False).problems == []


@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_what_a_link_brings_along_is_bounded_in_a_store(space: Path, driver: str) -> None:
    base = tar(member("big", os.urandom(1 << 20)))
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        store.import_image(Layout().add([base], "base").write(space / "base"))
        store.prepare("w", "base")
        with pytest.raises(LimitExceeded, match="max-size"):
            store.apply("w", io.BytesIO(tar(hardlink("link", "big"))), options=ApplyOptions(max_bytes=512 << 10))
        assert used(tree_path(store, "w")) < 512 << 10


def test_a_link_to_a_redirect_file_keeps_the_holes_of_all_its_layers(space: Path) -> None:
    size = 64 << 20
    base = tar(directory("./"), sparse("big", size, 1 << 20, b"base"))
    with Store.open(space / "store", driver="row", fsync=False) as store:
        store.import_image(Layout().add([base], "base").write(space / "base"))
        store.prepare("w", "base")
        overwrite(store, "w", "big", 32 << 20, b"written")
        store.commit("w", "middle")
        assert used(tree_path(store, "middle")) < 1 << 20  # a redirect file, not a copy
        store.prepare("x", "middle")
        store.apply("x", io.BytesIO(tar(hardlink("link", "big"))), options=ApplyOptions(max_bytes=1 << 20))
        made = tree_path(store, "x") / "link"
        with open(made, "rb") as file:
            found = {offset: (file.seek(offset), file.read(len(data)))[1] for offset, data in
                     ((1 << 20, b"base"), (32 << 20, b"written"), (40 << 20, bytes(4)))}  # fmt: skip
        assert found == {1 << 20: b"base", 32 << 20: b"written", 40 << 20: bytes(4)}
        assert made.stat().st_size == size
        assert used(tree_path(store, "x")) < 1 << 20
