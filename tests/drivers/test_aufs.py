"""The aufs driver passes the conformance suite on every host filesystem."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hostfs import HostFs

from cowfs.testing import DriverSuite


class TestAufs(DriverSuite):
    driver = "aufs"
    writes_by = "fuse"

    @pytest.fixture
    def place(self, fs: HostFs) -> Path:
        return fs.fresh("store")
