"""The row driver passes the conformance suite on every host filesystem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostfs import HostFs

from cowfs.testing import DriverSuite


class TestRow(DriverSuite):
    driver = "row"
    writes_by = "fuse"

    @pytest.fixture
    def place(self, fs: HostFs) -> Iterator[Path]:
        with fs.lent("store") as place:
            yield place
