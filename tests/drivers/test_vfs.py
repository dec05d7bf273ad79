"""The vfs driver passes the conformance suite on every host filesystem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostfs import HostFs

from cowfs.testing import DriverSuite


class TestVfs(DriverSuite):
    driver = "vfs"

    @pytest.fixture
    def place(self, fs: HostFs) -> Iterator[Path]:
        with fs.lent("store") as place:
            yield place
