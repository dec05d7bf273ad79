"""The seam fits any backend: a driver that keeps each layer in an image, and mounts it on demand, passes the suite as it stands."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostfs import HostFs, unmount_below

from cowfs.driver import registry
from cowfs.store import Store
from cowfs.testing import DriverSuite

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts images: needs root")


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution with the driver as its only module."""
    if not shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        pytest.skip("mkfs.ext4 is not installed")
    place = tmp_path / "site"
    record = place / "image_driver-1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: image-driver\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(f"[{registry.GROUP}]\nimage = image_driver:ImageDriver\n")
    shutil.copy(Path(__file__).with_name("image_driver.py"), place / "image_driver.py")
    monkeypatch.syspath_prepend(str(place))
    with monkeypatch.context() as context:
        context.delitem(sys.modules, "image_driver", raising=False)
        yield


@pytest.mark.parametrize("fs", ["tmpfs"], indirect=True)
class TestImage(DriverSuite):
    driver = "image"
    chain_length = 6

    @pytest.fixture
    def place(self, fs: HostFs, can_mount: None) -> Iterator[Path]:
        path = fs.fresh("store")
        yield path
        unmount_below(path)

    def test_a_tree_is_there_only_while_it_is_wanted(self, store: Store) -> None:
        base = self.base(store)
        id = store.index.get(base).id
        store.driver._detach(id)  # type: ignore[attr-defined]
        assert not os.path.exists(store.driver.tree(id))
        store.prepare("child", base)
        assert store.check(content=True).problems == []
        assert [change.path for change in store.diff("child")] == []
        store.export(base, Path(store.root).parent / "whole.tar", format="tar")
        assert not os.path.exists(store.driver.tree(id))
        with store.driver.open_tree(id) as fd:
            assert "file" in os.listdir(fd)
            assert os.path.isdir(store.driver.tree(id))
